"""The documents of a store: the sidecar of each part, store.json, and sources.json. Nothing in them is trusted.

DIR/parts/LAYER/NAME.json     rows, types, shapes, offsets, digests, the tar's sha256; it commits the part
DIR/store.json                recipes, layers and parts; it makes parts a store
DIR/sources.json              where the shards and the teachers were

A recipe is what the numbers of a store depend on beside the shards: one of the domain targets, one of each teacher.
"""

import itertools
import math
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, JsonValue, model_validator

from lgd.base.errors import DataError
from lgd.base.records import Count, Line, Many, Record, Sha256, Text, Xxh3
from lgd.base.target import DEFAULT_TARGET, StatedTarget, Target, find_target
from lgd.config_sections import Staining
from lgd.io.documents import Document
from lgd.io.location import Location
from lgd.models.description import Grid
from lgd.shards.archive import Shard
from lgd.shards.manifest import Key, Mpp, Word

REMEDY = "delete it and run lgd cache-latents again"

PartName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,120}$")]
Name = Annotated[str, Field(pattern="^[a-z_]{1,40}$")]
Rows = Annotated[int, Field(ge=1, lt=2**40)]
_Length = Annotated[int, Field(ge=1, lt=2**31)]

PATCHES = "patches"
"""The layer of a store that does not depend on a teacher: keys, labels, slides and domain targets."""
TEACHER = "teacher"
"""The name of a teacher's latents, unless `teacher.name` is another."""

Dtype = Literal["float16", "float32"]


class TargetsRecipe(Record):
    """Of the domain targets."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("target", "staining")

    nuclei_grid: Grid | None
    """None where the patches have no second image: then there are no targets."""
    membrane_grid: Grid | None
    dtype: Dtype
    settings: dict[Text, float]
    """Every number behind them (`lgd.stain.targets`)."""
    target: StatedTarget | None = None
    """What labels are of; None for the default, HER2."""
    staining: Staining | None = None
    """What the second stain shows; None for membranes. The side of its grid is membrane_grid."""

    def of(self, layer: str) -> Self:
        """That of the layer of the patches."""
        assert layer == PATCHES, "the recipe is of the targets alone"
        return self


class TeacherRecipe(Record):
    """Of a teacher's latents; of imported ones None is what the files do not state."""

    source: Literal["trained", "frozen", "random", "imported"]
    weights_sha256: Sha256
    """Of imported ones the digest of the digests of their files: the weights are not known."""
    encoder: dict[str, JsonValue]
    pool: Literal["cls", "mean", "cls+mean"] | None
    size: Annotated[int, Field(ge=1, le=16_384)] | None
    """Side of its input, in pixels."""
    mpp: Mpp | None
    """The scale that it expects; None for that of the patches."""
    resize: Text | None
    """How images are shrunk to that."""
    precision: Literal["fp32", "bf16"] | None
    views: Literal[1, 8]
    map: Annotated[int, Field(ge=0, le=256)]
    dtype: Dtype

    @model_validator(mode="after")
    def _check_unknown(self) -> Self:
        if self.source != "imported" and None in (self.pool, self.size, self.resize, self.precision):
            raise ValueError("of imported latents alone pool, size, resize and precision may be unknown")
        return self


class Recipe(Record):
    """Of the domain targets and of one teacher's latents."""

    targets: TargetsRecipe
    teacher: TeacherRecipe

    def of(self, layer: str) -> TargetsRecipe | TeacherRecipe:
        """That of one layer of the store."""
        return self.targets if layer == PATCHES else self.teacher


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


class Entry(Record):
    """A shard's rows."""

    name: PartName
    split: Word
    tar_sha256: Sha256
    rows: Rows
    first: Key
    last: Key


class Layer(Record):
    """What the parts of a layer have in common."""

    datasets: dict[Name, Layout]
    rounding: dict[Name, Rounding]
    """The largest of all parts."""
    parts: Many[Sha256 | None]
    """Digest of the sidecar of each entry's part, in the order of the entries; None where the layer has none."""


class TargetsLayer(Layer):
    """Keys, labels, slides, and the domain targets: of every entry."""

    recipe: TargetsRecipe


class TeacherLayer(Layer):
    """A teacher's latents."""

    recipe: TeacherRecipe
    licence: Text | None
    """Terms of the teacher, which travel to whatever is trained on its latents."""
    versions: dict[Text, Text]
    """Of the libraries that ran the teacher."""
    probe: Many[Many[float]] | None
    """What the teacher made of two fixed images: another library's drift shows there."""
    centre: Many[float] | None
    """The mean that was subtracted from imported latents before they were stored; None where they were centred."""


class StoreDocument(Document):
    """What `lgd cache-latents` states of a store."""

    FORMAT: ClassVar[str] = "lgd-latents/2"
    ABSENT: ClassVar[str] = "it is no finished feature store; run lgd cache-latents"
    REMEDY: ClassVar[str] = REMEDY

    entries: Annotated[Many[Entry], Field(min_length=1)]
    patches: TargetsLayer
    teachers: Annotated[dict[Word, TeacherLayer], Field(min_length=1)]
    """Named latents; of some entries one may have no part."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if PATCHES in self.teachers or None in self.patches.parts:
            raise ValueError("field teachers names patches, or a part of the patches is missing")
        for name, layer in self.layers.items():
            if len(layer.parts) != len(self.entries) or "key" not in layer.datasets:
                raise ValueError(f"layer {name} has {len(layer.parts)} parts, and the store {len(self.entries)}")
            for dataset, layout in layer.datasets.items():
                if dataset in ("pooled", "map") and not layout.shape:
                    raise ValueError(f"dataset {dataset} has rows of shape {layout.shape}")
        if len({entry.tar_sha256 for entry in self.entries}) != len(self.entries):
            raise ValueError("field entries names a shard twice")
        if lacking := [name for name, layer in self.teachers.items() if "pooled" not in layer.datasets]:
            raise ValueError(f"there is no dataset pooled of {lacking[0]}")
        return self

    @property
    def layers(self) -> dict[str, TargetsLayer | TeacherLayer]:
        """All layers by their names."""
        return {PATCHES: self.patches, **self.teachers}

    @property
    def target(self) -> Target:
        """What labels are of."""
        return self.patches.recipe.target or find_target(DEFAULT_TARGET)

    def recipe(self, teacher: str) -> Recipe:
        """Of the targets and of a teacher."""
        return Recipe(targets=self.patches.recipe, teacher=self.teachers[teacher].recipe)


class SourcesDocument(Document):
    """Where shards and teachers were: no part of what a store is."""

    FORMAT: ClassVar[str] = "lgd-latents-sources/2"
    ABSENT: ClassVar[str] = "run lgd cache-latents again"
    REMEDY: ClassVar[str] = "delete it and run lgd cache-latents again"

    shards: Many[Line]
    teachers: dict[Word, Line]
