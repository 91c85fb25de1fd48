"""What the numbers of a store depend on, beside the shards: one recipe for the domain targets, one for each teacher."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from lgd.base.records import Record, Sha256
from lgd.models.description import Grid
from lgd.shards.manifest import Mpp, Text

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
