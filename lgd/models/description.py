"""config.json of a model's folder: how the network is built, what it was trained on, and what it may be used for."""

from collections import Counter
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from lgd.base.errors import DataError
from lgd.base.records import Count, Line, Many, Record, Sha256, Text
from lgd.base.target import UNKNOWN, StatedTarget
from lgd.config_sections import Learns, Staining
from lgd.io.documents import Document
from lgd.io.files import read_json
from lgd.io.location import Location, as_location
from lgd.labels.conformal import Conformal
from lgd.models.spec import EncoderSpec
from lgd.shards.manifest import Shape, Values, Word
from lgd.shards.shard_set import ShardSet

Grid = Annotated[int, Field(ge=1, le=256)]


class TeacherRef(Record):
    """A teacher that a student was taught by."""

    name: Word
    """Of its latents in the store."""
    weights_sha256: Sha256
    licence: Text | None


class LatentSizes(Record):
    """What latents of a teacher a student hallucinates."""

    dim: Annotated[int, Field(ge=1, le=65_536)]
    """Length of a pooled latent."""
    map: Annotated[int, Field(ge=0, le=256)]
    """Side of the latent map; 0 where there is none."""


class Training(Record):
    """What a network was trained on."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("values",)

    target: StatedTarget
    marker: Text | None
    """What the IHC of the training patches is stained for."""
    labels: dict[Line, Count]
    """Training patches of each class, and of `unknown`."""
    shapes: Many[Shape]
    """Sizes and scales of the training patches, commonest first."""
    virtual: bool
    """Whether all tissue was drawn by a program."""
    shards: Many[Sha256]
    """Digests of the shard sets."""
    values: Values | None = None
    """Of the labelled training patches, where labels are values."""

    @property
    def labelled(self) -> int:
        """Training patches that had a label."""
        return sum(count for name, count in self.labels.items() if name != UNKNOWN)


class ModelConfig(Document):
    """What a teacher's and a student's folder say alike."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("ordinal", "conformal")

    FORMAT: ClassVar[str] = "lgd-model/3"
    ABSENT: ClassVar[str] = "train it first"
    REMEDY: ClassVar[str] = "copy the folder again, or train it again"

    weights_sha256: Sha256
    size: Annotated[int, Field(ge=1, le=16_384)]
    """Side of the input, in pixels."""
    training: Training
    licence: Text | None
    """Terms that the weights come with."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)]
    """By which logits are divided."""
    validation: dict[Text, float]
    inputs: Sha256
    """Of all that the result depends on (`lgd.train.tasks.inputs_of`)."""
    steps: Count
    """After which its weights were taken: with early stopping those of the best validation."""
    epochs: Annotated[float, Field(ge=0)]
    """Passes over the training split in these steps; 0 of a frozen teacher, which is not trained."""
    skipped: Count
    engine: Text
    workers: Annotated[int, Field(ge=1)]
    versions: dict[Text, Text]
    ordinal: Literal["corn"] | None = None
    """How an ordinal was taught, where that was not by cross-entropy."""
    conformal: Conformal | None = None
    """What label sets are made by, where labelled patches were held out for that."""

    @classmethod
    def read_folder(cls, folder: str | Location) -> Self:
        """What a model's folder says of it."""
        return cls.read(as_location(folder) / "config.json")

    @property
    def named(self) -> dict[str, str]:
        """By field, each name that may be one of code outside LGD."""
        return {field: value.name for field, value in self if isinstance(value, EncoderSpec)}


class TeacherConfig(ModelConfig):
    """A teacher's folder."""

    ABSENT: ClassVar[str] = "it holds no trained teacher; run lgd train-teacher first"

    kind: Literal["teacher"] = "teacher"
    source: Literal["trained", "frozen", "random"]
    learns: Many[Learns]
    """What taught it; nothing taught a frozen one."""
    encoder: EncoderSpec
    pool: Literal["cls", "mean", "cls+mean"]

    @property
    def gives_labels(self) -> bool:
        """Whether labels taught it; else a probe on its latents gives them (`lgd.store.probe`)."""
        return "label" in self.learns


class StudentConfig(ModelConfig):
    """A student's folder."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("ordinal", "conformal", "staining", "untaught")

    ABSENT: ClassVar[str] = "it holds no trained student; run lgd train first"

    kind: Literal["student"] = "student"
    method: Line
    """Its name in `lgd.models.methods`."""
    morphology: EncoderSpec
    hallucination: EncoderSpec | None
    latents: dict[Word, LatentSizes]
    """Of each teacher, by name, first that whose latents queries compare; none where there is one stream."""
    nuclei_grid: Grid
    membrane_grid: Grid
    teachers: Many[TeacherRef]
    """None of a network that was taught by labels alone."""
    staining: Staining | None = None
    """What the second stain shows, where that is not membranes."""
    untaught: Many[Word] | None = None
    """The grids that it predicts though nothing taught them, if any: their weight was 0, or the store has none."""

    @property
    def named(self) -> dict[str, str]:
        return {"method": self.method, **super().named}

    def suffix_of(self, weights_sha256: str) -> str | None:
        """What ends the names of the latents of a teacher in what the network gives; None where it gives none."""
        for number, teacher in enumerate(self.teachers):
            if teacher.weights_sha256 == weights_sha256:
                return f"@{teacher.name}" if number else ""
        return None


def read_kind(path: Location) -> type[ModelConfig]:
    """Whether a config.json describes a teacher or a student; `DataError` where it describes neither."""
    found = read_json(path)
    kinds: dict[str, type[ModelConfig]] = {"teacher": TeacherConfig, "student": StudentConfig}
    kind = found.get("kind") if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise DataError(f"{path}: field kind is {kind!r:.80}, and should be teacher or student: {ModelConfig.REMEDY}")
    return kinds[kind]


def describe_training(shards: ShardSet, labelled: bool = True) -> Training:
    """What the split `train` of a run's shards holds; of a network that saw no labels, as if it had none."""
    labels = shards.count_labels("train")
    if not labelled:
        labels = dict.fromkeys(labels, 0) | {UNKNOWN: sum(labels.values())}
    shapes: Counter[tuple[int, int, float | None]] = Counter()
    for manifest in shards.manifests:
        for shape in manifest.splits["train"].shapes if "train" in manifest.splits else ():
            shapes[shape.width, shape.height, shape.mpp] += shape.samples
    commonest = sorted(shapes.items(), key=lambda item: (-item[1], *item[0][:2], item[0][2] or 0))
    return Training(
        target=shards.target,
        marker=None,
        labels=labels,
        shapes=tuple(
            Shape(width=width, height=height, mpp=mpp, samples=count) for (width, height, mpp), count in commonest
        ),
        virtual=all(one.virtual for one in shards.manifests),
        shards=shards.digests,
        values=shards.summarise_values("train") if labelled else None,
    )
