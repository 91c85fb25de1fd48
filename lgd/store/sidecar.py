"""The sidecar of a part: what it holds, and where. Its appearance commits the part; nothing in it is trusted.

DIR/parts/LAYER/NAME.json     rows, types, shapes, offsets, digests, the tar's sha256, and a digest of all that
"""

import itertools
import math
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from lgd.base.errors import DataError
from lgd.base.records import Count, Many, Record, Sha256, Xxh3
from lgd.io.documents import Document
from lgd.io.location import Location
from lgd.shards.archive import Shard
from lgd.shards.manifest import Key, Word

REMEDY = "delete it and run lgd cache-latents again"

PartName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,120}$")]
Name = Annotated[str, Field(pattern="^[a-z_]{1,40}$")]
Rows = Annotated[int, Field(ge=1, lt=2**40)]
_Length = Annotated[int, Field(ge=1, lt=2**31)]


class Layout(Record):
    """Type and shape of a row of a dataset; of texts the width may differ from part to part."""

    dtype: Annotated[str, Field(pattern="^(<f2|<f4|S)$")]
    shape: Annotated[Many[_Length], Field(max_length=5)]


class Dataset(Record):
    """A contiguous dataset of a part."""

    dtype: Annotated[str, Field(pattern=r"^(<f2|<f4|\|S[1-9]\d{0,3})$")]
    shape: Annotated[Many[_Length], Field(min_length=1, max_length=6)]
    offset: Count
    """Where it lies in the file."""
    xxh3: Xxh3
    """Of its bytes."""

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def rows(self, content: memoryview) -> np.ndarray:
        """Its bytes as rows, (rows, ...)."""
        return np.ndarray(self.shape, np.dtype(self.dtype), content)

    @property
    def layout(self) -> Layout:
        """What is alike in all parts of a store."""
        return Layout(dtype="S" if "S" in self.dtype else self.dtype, shape=self.shape[1:])


class Rounding(Record):
    """What the stored type lost, at most."""

    absolute: float
    relative: float
    """Of a row's length."""

    def largest(self, other: "Rounding | None") -> "Rounding":
        """The larger of each number."""
        one = other or self
        return Rounding(absolute=max(self.absolute, one.absolute), relative=max(self.relative, one.relative))


class Sidecar(Document):
    """What is said of a part."""

    FORMAT: ClassVar[str] = "lgd-latents-part/2"
    ABSENT: ClassVar[str] = "run lgd cache-latents again"
    REMEDY: ClassVar[str] = REMEDY

    name: PartName
    layer: Word
    shard: PartName
    split: Word
    tar_sha256: Sha256
    recipe: Sha256
    """Digest of the layer's recipe."""
    rows: Rows
    bytes: Count
    xxh3: Xxh3
    """Of the whole file."""
    datasets: dict[Name, Dataset]
    first: Key
    """The first key; keys are sorted."""
    last: Key
    rounding: dict[Name, Rounding]

    @model_validator(mode="after")
    def _check_extents(self) -> Self:
        """Every dataset has one row a sample, and they lie apart in the file."""
        extents = []
        for name, dataset in self.datasets.items():
            end = dataset.offset + dataset.bytes
            if dataset.shape[0] != self.rows or end > self.bytes:
                raise ValueError(f"dataset {name!r:.80} of shape {dataset.shape} does not fit the part")
            extents.append((dataset.offset, end))
        if "key" not in self.datasets:
            raise ValueError("there is no dataset key")
        if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(extents))):
            raise ValueError("datasets overlap")
        return self

    @property
    def layout(self) -> dict[str, Layout]:
        """Type and shape of a row of each dataset."""
        return {name: dataset.layout for name, dataset in self.datasets.items()}


def part_name(shard: Shard) -> str:
    """Name of the part that mirrors a shard."""
    return f"{shard.name}-{shard.sha256[:12]}"


def read_sidecar(folder: Location, name: str) -> Sidecar:
    """The sidecar of a part of a layer's folder; `DataError` for one that is missing, damaged or of another part."""
    path = folder / f"{name}.json"
    sidecar = Sidecar.read(path)
    if (sidecar.name, sidecar.layer) != (name, folder.name):
        raise DataError(f"sidecar {path} is of part {sidecar.name} of {sidecar.layer}: {REMEDY}")
    return sidecar
