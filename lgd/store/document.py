"""store.json, which makes parts a store, and sources.json, which says where its shards and teachers were.

A recipe is what the numbers of a store depend on beside the shards: one of the domain targets, one of each teacher.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from lgd.base.records import Line, Many, Record, Sha256
from lgd.io.documents import Document
from lgd.models.description import Grid
from lgd.shards.manifest import Key, Mpp, Text, Word
from lgd.store.sidecar import REMEDY, Layout, Name, PartName, Rounding, Rows, Sidecar

PATCHES = "patches"
"""The layer of a store that does not depend on a teacher: keys, labels, slides and domain targets."""
TEACHER = "teacher"
"""The name of the latents of a run's teacher."""

Dtype = Literal["float16", "float32"]


class TargetsRecipe(Record):
    """Of the domain targets."""

    nuclei_grid: Grid
    membrane_grid: Grid
    dtype: Dtype
    settings: dict[Text, float]
    """Every number behind them (`lgd.stain.targets`)."""


class TeacherRecipe(Record):
    """Of a teacher's latents."""

    source: Literal["trained", "frozen", "imported"]
    weights_sha256: Sha256
    encoder: dict[str, JsonValue]
    pool: Literal["cls", "mean", "cls+mean"]
    size: Annotated[int, Field(ge=1, le=16_384)]
    """Side of its input, in pixels."""
    mpp: Mpp | None
    """The scale that it expects; None for that of the patches."""
    resize: Text
    """How images are shrunk to that."""
    precision: Literal["fp32", "bf16"]
    views: Literal[1, 8]
    map: Annotated[int, Field(ge=0, le=256)]
    dtype: Dtype


class Recipe(Record):
    """Of what a student is trained against."""

    targets: TargetsRecipe
    teacher: TeacherRecipe

    def of(self, layer: str) -> TargetsRecipe | TeacherRecipe:
        """That of one layer of the store."""
        return self.targets if layer == PATCHES else self.teacher


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
    parts: Many[Sha256]
    """Digest of the sidecar of each entry's part, in the order of the entries."""


class TargetsLayer(Layer):
    """Keys, labels, slides, and the domain targets."""

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
    """Subtracted from the latents where they are read; None where the teacher centres them itself."""


class StoreDocument(Document):
    """What `lgd cache-latents` states of a store."""

    FORMAT: ClassVar[str] = "lgd-latents/2"
    ABSENT: ClassVar[str] = "it is no finished feature store; run lgd cache-latents"
    REMEDY: ClassVar[str] = REMEDY

    entries: Annotated[Many[Entry], Field(min_length=1)]
    patches: TargetsLayer
    teachers: Annotated[dict[Word, TeacherLayer], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if PATCHES in self.teachers or TEACHER not in self.teachers:
            raise ValueError(f"field teachers names {', '.join(self.teachers)}")
        for name, layer in self.layers.items():
            if len(layer.parts) != len(self.entries) or "key" not in layer.datasets:
                raise ValueError(f"layer {name} has {len(layer.parts)} parts, and the store {len(self.entries)}")
            for dataset, layout in layer.datasets.items():
                if dataset in ("pooled", "map") and not layout.shape:
                    raise ValueError(f"dataset {dataset} has rows of shape {layout.shape}")
        if len({entry.tar_sha256 for entry in self.entries}) != len(self.entries):
            raise ValueError("field entries names a shard twice")
        if "pooled" not in self.teachers[TEACHER].datasets:
            raise ValueError("there is no dataset pooled")
        return self

    @property
    def layers(self) -> dict[str, TargetsLayer | TeacherLayer]:
        """All layers by their names."""
        return {PATCHES: self.patches, **self.teachers}

    @property
    def recipe(self) -> Recipe:
        """Of the targets and of the run's teacher."""
        return Recipe(targets=self.patches.recipe, teacher=self.teachers[TEACHER].recipe)


class SourcesDocument(Document):
    """Where shards and teachers were: no part of what a store is."""

    FORMAT: ClassVar[str] = "lgd-latents-sources/2"
    ABSENT: ClassVar[str] = "run lgd cache-latents again"
    REMEDY: ClassVar[str] = "delete it and run lgd cache-latents again"

    shards: Many[Line]
    teachers: dict[Word, Line]


def as_document(recipe: Recipe, sidecars: Mapping[str, Sequence[Sidecar]], versions: dict[str, str]) -> StoreDocument:
    """The document over the sidecars of each layer, alike ordered."""
    shared = set(Entry.model_fields)
    teacher = TeacherLayer(
        recipe=recipe.teacher,
        licence=None,
        versions=versions,
        probe=None,
        centre=None,
        **dict(_join_layer(sidecars[TEACHER])),
    )
    return StoreDocument(
        entries=tuple(Entry(**one.model_dump(include=shared)) for one in sidecars[PATCHES]),
        patches=TargetsLayer(recipe=recipe.targets, **dict(_join_layer(sidecars[PATCHES]))),
        teachers={TEACHER: teacher},
    )


def _join_layer(sidecars: Sequence[Sidecar]) -> Layer:
    layout, rounding = sidecars[0].layout, dict[str, Rounding]()
    assert all(sidecar.layout == layout for sidecar in sidecars), "parts of one recipe have the same datasets"
    for sidecar in sidecars:
        rounding |= {name: lost.largest(rounding.get(name)) for name, lost in sidecar.rounding.items()}
    return Layer(datasets=layout, rounding=rounding, parts=tuple(sidecar.digest for sidecar in sidecars))
