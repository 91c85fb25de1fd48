"""store.json, which makes parts a store, and sources.json, which says where its shards and teachers were."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from lgd.base.records import Line, Many, Record, Sha256
from lgd.io.documents import Document
from lgd.shards.manifest import Key, Text, Word
from lgd.store.recipe import PATCHES, TEACHER, Recipe, TargetsRecipe, TeacherRecipe
from lgd.store.sidecar import FORMAT, REMEDY, Layout, Name, PartName, Rounding, Rows, Sidecar


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

    FORMAT: ClassVar[str] = FORMAT
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
    entries = [
        Entry(
            name=one.name,
            split=one.split,
            tar_sha256=one.tar_sha256,
            rows=one.rows,
            first=one.first,
            last=one.last,
        )
        for one in sidecars[PATCHES]
    ]
    return StoreDocument(
        entries=tuple(entries),
        patches=TargetsLayer(recipe=recipe.targets, **_common(sidecars[PATCHES])),
        teachers={
            TEACHER: TeacherLayer(
                recipe=recipe.teacher,
                licence=None,
                versions=versions,
                probe=None,
                centre=None,
                **_common(sidecars[TEACHER]),
            )
        },
    )


def _common(sidecars: Sequence[Sidecar]) -> dict[str, Any]:
    layout = sidecars[0].layout
    assert all(sidecar.layout == layout for sidecar in sidecars), "parts of one recipe have the same datasets"
    return {
        "datasets": layout,
        "rounding": _largest([sidecar.rounding for sidecar in sidecars]),
        "parts": tuple(sidecar.digest for sidecar in sidecars),
    }


def _largest(roundings: Sequence[dict[str, Rounding]]) -> dict[str, Rounding]:
    """The largest of each number over the parts."""
    found: dict[str, Rounding] = {}
    for rounding in roundings:
        for name, numbers in rounding.items():
            there = found.get(name, numbers)
            found[name] = Rounding(
                absolute=max(numbers.absolute, there.absolute), relative=max(numbers.relative, there.relative)
            )
    return found
