"""Whether rows that are added to a store are made as those that are there: by the same recipe, and the same libraries.

What a teacher made of two fixed images is kept with the store.

A digest identifies the weights, but not the libraries that run them: another version may resize, normalise or
interpolate otherwise, and rows that were added then would not compare with those that were there.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

import numpy as np
import torch

from lgd.base.device import exact_float32
from lgd.base.errors import DataError
from lgd.io.digests import format_diff
from lgd.io.location import Location
from lgd.models.teacher import Teacher
from lgd.store.document import Recipe, TargetsRecipe

FixedVectors = tuple[tuple[float, ...], ...]
_MOST = 1e-3
"""Of a vector's length: other processors change sums in the sixth digit."""


def fixed_images(size: int) -> np.ndarray:
    """Two images, uint8 (2, size, size, 3): waves of two lengths, in other phases for each channel."""
    y_H, x_W = np.arange(size)[:, None], np.arange(size)[None, :]
    # Whole numbers, so that they are the same on every machine.
    channels = [np.stack([(5 * x_W + 3 * y_H + 60 * c) % 256, (x_W * y_H + 85 * c) % 256]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def make_fixed_vectors(teacher: Teacher, size: int) -> FixedVectors:
    """What a teacher makes of the fixed images, in float32, on the device where it is, to 7 digits."""
    device = next(teacher.parameters()).device
    with torch.inference_mode(), exact_float32():
        images_B3HW = torch.from_numpy(fixed_images(size)).permute(0, 3, 1, 2).to(device)
        pooled_BD = teacher(images_B3HW)["pooled"].float().cpu().numpy()
    return tuple(tuple(float(f"{value:.7g}") for value in row) for row in pooled_BD.tolist())


def check_drift(
    name: str, stored: Sequence[Sequence[float]], made: FixedVectors, then: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Raise `DataError` where a teacher gives other latents of the fixed images than are stored."""
    stored_BD, made_BD = np.array(stored), np.array(made)
    if stored_BD.shape == made_BD.shape:
        differ = np.linalg.norm(made_BD - stored_BD, axis=1).max() / np.linalg.norm(stored_BD, axis=1).max()
        if differ <= _MOST:
            return
    versions = ", ".join(f"{one} {then.get(one, 'unknown')}, now {now.get(one, 'none')}" for one in {**then, **now})
    raise DataError(
        f"the teacher {name} gives other latents than when the store was made, with the same weights, so that new rows "
        f"would not compare with those that are there ({versions}): install the versions of then, or cache under "
        "another name (teacher.name)"
    )


RecipeKind = TypeVar("RecipeKind", Recipe, TargetsRecipe)


def refuse_recipe(folder: Location, stored: RecipeKind, requested: RecipeKind, teacher: str = "") -> NoReturn:
    """Raise `DataError` with the fields in which two recipes differ, of a teacher or of the targets alone."""
    remedy = "Use the settings that made it, or name another folder as latents.dir"
    if teacher:
        remedy = (
            f"Use the teacher and settings that made it, name these latents otherwise than {teacher} (teacher.name), "
            "name another folder as latents.dir, or delete this one"
        )
    differing = format_diff(stored.as_json(), requested.as_json(), "in the store")
    raise DataError(f"{folder / 'store.json'} was made by another recipe:", *differing, remedy)
