"""Weights as safetensors: what a file holds, known from its head before any of it is loaded or a network is built."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lgd.base.errors import DataError
from lgd.io.location import Location

# 100,000 tensors; that of DINOv3's 6.7 billion parameters has 60 kB.
_MOST_HEAD = 10_000_000
_QUANTISED = ("F4", "F6_", "F8_", "I8", "U8")

Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path, *, name: Location | None = None) -> Shapes:
    """The shapes of a file's tensors; `DataError` where it is no whole safetensors file, or not of plain numbers.

    `name` names the file in errors.
    """
    from safetensors import SafetensorError, safe_open

    name = name or path
    if not path.is_file():
        raise DataError(f"{name} is missing: copy it again")
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
    if head > _MOST_HEAD:
        raise DataError(f"{name} is no safetensors file, or damaged (its head states {head} bytes): copy it again")
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


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, as stored."""
    from safetensors.torch import load_file

    return load_file(path)


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
            f"{odd[0]!r:.120} ({found}, by config.json {wanted}): copy both files again"
        )
