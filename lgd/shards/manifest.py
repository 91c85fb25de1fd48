"""manifest.json: what a shard set holds, from where, how many, and the digests of its files; it is not trusted."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.config import LEVEL_NAMES
from lgd.io.documents import Document
from lgd.io.location import Location
from lgd.shards.archive import Shard
from lgd.shards.index import REBUILD, ROLES
from lgd.shards.meta import Mpp, Pixels, Text, Word

FORMAT = "lgd-shards/2"
UNKNOWN = "unknown"
"""Where the samples without a label are counted; and the `--mpp` of who knows that there is none."""

_BLOCK = 512


class Target(Record):
    """What is predicted."""

    name: Text
    kind: Literal["ordinal", "class", "number"]
    classes: Many[Text]
    """Names of the classes, of an ordinal from low to high; none of a number."""
    unit: Text | None

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if len(set(self.classes)) != len(self.classes) or UNKNOWN in self.classes:
            raise ValueError(f"the classes {', '.join(self.classes)} are not distinct, or one is called {UNKNOWN}")
        if (self.kind == "number") == (len(self.classes) > 1):
            raise ValueError(f"a target of kind {self.kind} has {len(self.classes)} classes")
        return self


HER2 = Target(name="HER2", kind="ordinal", classes=LEVEL_NAMES, unit=None)


class Options(Record):
    """The options of `lgd build-shards` that decide the bytes of the set."""

    split: Line
    salt: Line
    shard_size: Annotated[int, Field(ge=1)]
    tile: Count
    image: Line
    he_size: Pixels | None
    """Side of the H&E that is stored beside the original one; None for none."""
    mpp: Mpp | Literal["unknown"] | None
    labelled: Count


class Sources(Record):
    """The pairs that the set was built from."""

    pairs: Annotated[int, Field(ge=1)]
    rejected: Count
    digest: Sha256
    """Of the facts of all pairs, and of the SHA-256 of their files."""


class Extensions(Record):
    """Extension of each image of a sample; None of one that the set does not have."""

    hes: Literal["jpg"] | None
    """The H&E at the size `he_size`."""
    he: Literal["jpg", "png", "webp"]
    ihc: Literal["jpg", "png", "webp"] | None

    def by_role(self) -> dict[str, str]:
        """Role -> extension of the members that there are, in their order."""
        given = {"json": "json", **self.as_json()}
        return {role: given[role] for role in ROLES if given[role]}


class Entry(Record):
    """One shard's files."""

    file: Line
    samples: Annotated[int, Field(ge=1, lt=2**40)]
    bytes: Count
    sha256: Sha256
    idx_sha256: Sha256

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        # The least sample has two headers.
        if self.samples > self.bytes // (2 * _BLOCK):
            raise ValueError(f"{self.samples} samples in {self.bytes} bytes of {self.file!r:.80}")
        return self


class Shape(Record):
    """Samples of one size and scale."""

    width: Pixels
    height: Pixels
    mpp: Mpp | None
    samples: Annotated[int, Field(ge=1)]


class Split(Record):
    """One split of a set."""

    samples: Annotated[int, Field(ge=1)]
    labels: dict[Line, Count]
    """Samples of each class, and of `unknown`."""
    shapes: Many[Shape]
    """Commonest first."""
    shards: Many[Entry]


class File(Record):
    """A file beside the manifest."""

    bytes: Count
    sha256: Sha256


class Manifest(Document):
    """What `lgd build-shards` states of a set."""

    FORMAT: ClassVar[str] = FORMAT
    ABSENT: ClassVar[str] = "it is no finished shard set; run lgd build-shards"
    REMEDY: ClassVar[str] = REBUILD

    layout: Text
    options: Options
    codecs: dict[Text, Text | None]
    sources: Sources
    target: Target
    extensions: Extensions
    patches: File
    """`lgd.shards.patches`."""
    virtual: bool
    """Whether the tissue was drawn by a program."""
    may_leak: bool
    """Whether slides are unknown."""
    caveats: Many[Line]
    splits: dict[Word, Split]

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if not self.splits:
            raise ValueError("field splits is empty")
        for name, split in self.splits.items():
            for number, entry in enumerate(split.shards):
                # A manifest from elsewhere must not lead out of its folder, nor leave out or repeat a shard.
                if entry.file != f"{name}-{number:06d}.tar":
                    raise ValueError(f"field file is {entry.file!r:.80} instead of {name}-{number:06d}.tar")
            of_shapes, of_shards = (sum(part.samples for part in parts) for parts in (split.shapes, split.shards))
            if not split.samples == of_shapes == of_shards == sum(split.labels.values()):
                raise ValueError(
                    f"split {name} has {split.samples} samples, its shards {of_shards}, its shapes {of_shapes}, its "
                    f"labels {sum(split.labels.values())}"
                )
            if set(split.labels) != {*self.target.classes, UNKNOWN}:
                raise ValueError(f"split {name} counts the labels {', '.join(map(repr, split.labels))[:200]}")
        return self

    def shards(self, folder: Location) -> list[Shard]:
        """The shards, which lie in `folder`, in the order of the manifest."""
        extensions = self.extensions.by_role()
        return [
            Shard(
                path=folder / entry.file,
                name=entry.file.removesuffix(".tar"),
                split=name,
                samples=entry.samples,
                bytes=entry.bytes,
                sha256=entry.sha256,
                idx_sha256=entry.idx_sha256,
                extensions=extensions,
                labels=len(self.target.classes),
            )
            for name, split in self.splits.items()
            for entry in split.shards
        ]
