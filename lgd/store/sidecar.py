"""The sidecar of a part: what it holds, and where. Its appearance commits the part; nothing in it is trusted.

DIR/parts/NAME.json     rows, types, shapes, offsets, digests, the tar's sha256, and a digest of all that
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from lgd.data.shards import Shard
from lgd.errors import DataError
from lgd.files import digest_of, read_json, size_of

FORMAT = "lgd-latents/1"
REMEDY = "delete it and run lgd cache-latents again"

_DIGEST = re.compile("[0-9a-f]{32}")
_TYPES = re.compile(r"<f2|<f4|\|i1|\|S[1-9]\d{0,3}")


def part_name(shard: Shard) -> str:
    """Name of the part that mirrors a shard."""
    return f"{shard.name}-{shard.sha256[:12]}"


def read_sidecar(path: Path) -> dict[str, Any]:
    """A sidecar, checked against its own digest and for what the writer would not write; `DataError` otherwise."""
    sidecar = read_json(path)
    try:
        if sidecar["format"] != FORMAT:
            raise ValueError(f"field format is {sidecar['format']!r:.80}")
        if digest_of({name: value for name, value in sidecar.items() if name != "digest"}) != sidecar["digest"]:
            raise ValueError("it does not match its own digest")
        if sidecar["name"] != path.name.removesuffix(".json"):
            raise ValueError(f"it is of part {sidecar['name']!r:.120}")
        if not _DIGEST.fullmatch(sidecar["xxh3"]):
            raise ValueError("field xxh3 is no digest")
        check_layout(layout_of(sidecar))
        _check_extents(sidecar["datasets"], sidecar["rows"], sidecar["bytes"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"sidecar {path} cannot be used ({error}): {REMEDY}") from error
    return sidecar


def check_layout(layout: dict[str, Any]) -> None:
    """Raise `ValueError` unless every dataset is of plain numbers or texts."""
    for name, entry in layout.items():
        shape = entry["shape"]
        if entry["dtype"] not in ("S", "<f2", "<f4", "|i1") or type(shape) is not list or len(shape) > 5:
            raise ValueError(f"dataset {name!r:.80} is {entry!r:.200}")
        if not all(type(number) is int and 0 < number < 2**31 for number in shape):
            raise ValueError(f"dataset {name!r:.80} has rows of shape {shape!r:.200}")


def _check_extents(datasets: dict[str, Any], rows: int, size: int) -> None:
    """Raise `ValueError` unless every dataset has a plain type and one row a sample, and they lie apart in the file."""
    extents = []
    for name, entry in datasets.items():
        if not _TYPES.fullmatch(entry["dtype"]) or not all(type(n) is int and n >= 0 for n in (entry["offset"], size)):
            raise ValueError(f"dataset {name!r:.80} is {entry!r:.200}")
        length = math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize
        if entry["shape"][0] != rows or entry["offset"] + length > size:
            raise ValueError(f"dataset {name!r:.80} of shape {entry['shape']} does not fit the part")
        extents.append((entry["offset"], entry["offset"] + length))
    extents.sort()
    if "key" not in datasets or any(after[0] < before[1] for before, after in zip(extents, extents[1:], strict=False)):
        raise ValueError("datasets overlap, or there is no dataset key")


def layout_of(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Type and shape of a row of each dataset, alike in all parts of a store; of texts the width may differ."""
    return {
        name: {"dtype": "S" if "S" in entry["dtype"] else entry["dtype"], "shape": entry["shape"][1:]}
        for name, entry in sidecar["datasets"].items()
    }


def is_complete(store: Path, shard: Shard, recipe: dict[str, Any]) -> bool:
    """Whether the shard's part was committed under this recipe, and its file is there in its size."""
    path = store / "parts" / f"{part_name(shard)}.json"
    try:
        sidecar = read_sidecar(path)
        size = size_of(path.with_suffix(".h5"))
    except (DataError, FileNotFoundError):
        return False
    asked = (digest_of(recipe), shard.sha256, shard.samples, size)
    return (sidecar.get("recipe"), sidecar.get("tar_sha256"), sidecar["rows"], sidecar["bytes"]) == asked
