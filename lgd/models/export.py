"""A network as a folder: `config.json` says how to build it, `model.safetensors` holds its weights.

`config.json` (`lgd.models.description`) is written last, so a folder that has one is whole. What a file of weights
holds is known from its head before any of it is loaded or a network is built.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lgd.base.errors import DataError
from lgd.base.extensions import refuse_unnamed
from lgd.io.digests import sha256
from lgd.io.files import publish, remove
from lgd.io.location import Location, as_location
from lgd.io.remote import open_checked
from lgd.models.description import ModelConfig

Built = TypeVar("Built", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]

_QUANTISED = ("F4", "F6_", "F8_", "I8", "U8")


def read_shapes(path: Path, *, name: Location | None = None) -> Shapes:
    """The shapes of a file's tensors; `DataError` where it is no whole safetensors file, or not of plain numbers.

    `name` names the file in errors.
    """
    name = name or path
    if not path.is_file():
        raise DataError(f"{name} is missing: copy it again")
    shapes: Shapes = {}
    try:
        with safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - it has no other way to its names
                part = file.get_slice(tensor)
                shapes[tensor] = tuple(part.get_shape())
                kind = part.get_dtype()
                if kind.startswith(_QUANTISED):
                    raise DataError(f"{name}: tensor {tensor!r:.120} is quantised ({kind}): use float weights")
    except SafetensorError as error:
        raise DataError(f"{name} is no safetensors file, or cut off ({error}): copy it again") from error
    return shapes


def count_numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers tensors hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def shapes_of(network: nn.Module) -> Shapes:
    """The shapes of a network's own tensors."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def compare_shapes(path: Location, stored: Shapes, expected: Shapes) -> None:
    """`DataError` where a file holds other tensors than a network has."""
    odd = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    if odd:
        found, wanted = (str(list(s[odd[0]])) if odd[0] in s else "absent" for s in (stored, expected))
        raise DataError(
            f"{path} does not hold the weights of the network in config.json: {len(odd)} tensors differ, such as "
            f"{odd[0]!r:.120} ({found}, by config.json {wanted}): copy both files again, or train again where an older "
            "lgd made them"
        )


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors by name to a local file; `OSError` for a full disk, as for any file."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # What the system said is in its text only.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_model(folder: str | Location, tensors: dict[str, torch.Tensor], describe: Callable[..., ModelConfig]) -> None:
    """Publish weights (by parameter name) and what `describe(weights_sha256=...)` says of their network."""
    folder = as_location(folder)
    remove(folder / "config.json")
    with publish(folder / "model.safetensors") as temporary:
        write_tensors(temporary, tensors)
        weights = sha256(temporary)
    describe(weights_sha256=weights).write(folder / "config.json")


def load_weights(
    folder: str | Location, build: Callable[[], Built], config: ModelConfig, code: Collection[str] = ()
) -> Built:
    """The network that `build` makes, with the checked weights of a folder; `DataError` for those of another one.

    Nothing is built where `config` names code that is not in `code`. It is drafted first, without memory for its
    weights, and built only where the file holds those of just this one.
    """
    path, remedy = as_location(folder) / "model.safetensors", "train or copy it again"
    refuse_unnamed(as_location(folder) / "config.json", config.named, code)
    try:
        with torch.device("meta"):
            draft = build()
    except DataError as error:
        raise DataError(f"{as_location(folder) / 'config.json'}: {error}: {config.REMEDY}") from error
    with open_checked(path, config.weights_sha256, None, remedy) as file:
        # The descriptor names the file that was checked, whatever has taken its place meanwhile.
        checked = Path(f"/dev/fd/{file.fileno()}")
        compare_shapes(path, read_shapes(checked, name=path), shapes_of(draft))
        network = build()
        network.load_state_dict(load_file(checked))
    return network
