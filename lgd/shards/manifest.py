"""What a shard set says of itself: KEY.json of each pair, and manifest.json and patches.npy of all. None is trusted.

KEY.json has no digest of its own: the index has its crc32, and the manifest the digests of tar and index.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from lgd.base.errors import require
from lgd.base.records import Count, Line, Many, Record, Sha256, Text
from lgd.base.spelling import canonical_group
from lgd.base.target import UNKNOWN, StatedTarget
from lgd.io.digests import hash_64
from lgd.io.documents import Document

REBUILD = "fetch it again, or build the set again into an empty folder"

Word = Annotated[str, Field(pattern="^[A-Za-z0-9_]{1,64}$")]
"""The name of a split."""
Key = Annotated[str, Field(pattern="^[A-Za-z0-9_+-]{1,90}$")]
Mpp = Annotated[float, Field(gt=0, lt=100)]
"""Micrometres per pixel."""
Pixels = Annotated[int, Field(ge=1, lt=2**31)]


class Digests(Record):
    """SHA-256 of something of each image."""

    he: Sha256 | None
    ihc: Sha256 | None

    @classmethod
    def of(cls, digests: Sequence[str | None]) -> Self:
        """Those of the H&E and, where there is one, the IHC."""
        return cls(he=digests[0], ihc=digests[1] if len(digests) == 2 else None)


class Origin(Record):
    """Where a pair comes from, as far as it is known.

    Places are in pixels of level 0 of the slide, at the patch's upper left corner.
    """

    marker: Text | None
    """What the second image is stained for, such as HER2."""
    center: Text | None
    scanner: Text | None
    alignment: float | None
    """How well the two images show the same field: standard deviations above that of displaced ones."""
    x: float | None
    """Place of the patch on the H&E slide."""
    y: float | None
    side: float | None
    ihc_slide: Text | None
    ihc_x: float | None
    ihc_y: float | None
    ihc_side: float | None


PATCHES = np.dtype([("he", "<u8"), ("ihc", "<u8"), ("group", "<u8")])
"""Type of an entry of patches.npy: what must not lie on two sides of a split, of every sample, in the order of the
shards. It has the first 64 bits of the SHA-256 of the file that the H&E was, of the IHC's (0 where there is none), and
of the group's `canonical_group`."""

NOWHERE = Origin.from_json(dict.fromkeys(Origin.model_fields))
"""Of a pair of which nothing more is known."""


class PatchMeta(Origin):
    """What KEY.json says: these facts, and those of its `Origin`."""

    key: Key
    """Unique in the set."""
    label: int | float | None
    """Number of a class of the set's target, or the value of a numeric one; None where unknown."""
    slide: Text | None
    group: Text
    """The slide, else the source patch: never on two sides of a split; shared by all tiles of a patch."""
    split: Word
    source: Line
    """The H&E file, relative to the root."""
    width: Pixels
    """Of all images, in pixels."""
    height: Pixels
    mpp: Mpp | None
    icc: Digests
    """Digests of the colour profiles that the source images carry."""
    sha256: Digests
    """Digests of the members."""

    @property
    def place(self) -> tuple[float | None, ...]:
        """x, y and side of the patch in pixels of level 0 of its slide, and its side in micrometres."""
        return self.x, self.y, self.side, self.mpp and self.mpp * self.width


class Encoding(NamedTuple):
    """How images are stored."""

    extension: str | None
    """Type to encode to; None keeps the original bytes."""
    quality: int
    """JPEG quality."""

    @classmethod
    def parse(cls, image: str, tile: int) -> "Encoding":
        """The encoding of `--image` and `--tile`; `ConfigError` for an image that is none."""
        jpeg = re.fullmatch(r"jpeg:(\d{1,3})", image)
        good = 1 <= int(jpeg[1]) <= 100 if jpeg else image in ("keep", "png")
        require(good, f"--image {image}: use keep, png or jpeg:95 (a quality from 1 to 100)")
        if jpeg:
            return cls("jpg", int(jpeg[1]))
        return cls("png" if image == "png" or tile else None, 0)


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
        # A reader of the H&E stops before the IHC.
        given = {"json": "json", "hes": self.hes, "he": self.he, "ihc": self.ihc}
        return {role: extension for role, extension in given.items() if extension}


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
        if self.samples > self.bytes // (2 * 512):
            raise ValueError(f"{self.samples} samples in {self.bytes} bytes of {self.file!r:.80}")
        return self


class Shape(Record):
    """Samples of one size and scale."""

    width: Pixels
    height: Pixels
    mpp: Mpp | None
    samples: Annotated[int, Field(ge=1)]


class Values(Record):
    """The known values of a split."""

    mean: float
    std: Annotated[float, Field(ge=0)]
    least: float
    most: float

    @classmethod
    def of(cls, labels: Iterable[float | None]) -> Self | None:
        """Those of some labels; None where none is known."""
        known = np.array([label for label in labels if label is not None], np.float64)
        if not len(known):
            return None
        return cls(mean=float(known.mean()), std=float(known.std()), least=float(known.min()), most=float(known.max()))


class Split(Record):
    """One split of a set."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("values",)

    samples: Annotated[int, Field(ge=1)]
    labels: dict[Line, Count]
    """Samples of each class, or `known` values, and of `unknown`."""
    shapes: Many[Shape]
    """Commonest first."""
    shards: Many[Entry]
    values: Values | None = None
    """Of a number, where any is known."""


class File(Record):
    """A file beside the manifest."""

    bytes: Count
    sha256: Sha256


class Recipe(Document):
    """What decides the bytes of a set."""

    layout: Text
    options: Options
    codecs: dict[Text, Text | None]
    sources: Sources


class Manifest(Recipe):
    """What `lgd build-shards` states of a set."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("center",)

    FORMAT: ClassVar[str] = "lgd-shards/2"
    ABSENT: ClassVar[str] = "it is no finished shard set; run lgd build-shards"
    REMEDY: ClassVar[str] = REBUILD

    target: StatedTarget
    extensions: Extensions
    patches: File
    """patches.npy, of `PATCHES`."""
    virtual: bool
    """Whether the tissue was drawn by a program."""
    may_leak: bool
    """Whether slides are unknown."""
    caveats: Many[Line]
    splits: dict[Word, Split]
    center: Text | None = None
    """That of all pairs, where it is one."""

    @model_validator(mode="after")
    def _check_he_size(self) -> Self:
        if (self.options.he_size is None) != (self.extensions.hes is None):
            raise ValueError(f"field he_size is {self.options.he_size}, but extensions.hes is {self.extensions.hes}")
        return self

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
            if set(split.labels) != {*self.target.counted, UNKNOWN}:
                raise ValueError(f"split {name} counts the labels {', '.join(map(repr, split.labels))[:200]}")
        return self


def patch_entry(files: Digests, group: str) -> tuple[int, int, int]:
    """An entry of patches.npy, from the digests of the image files and the group."""
    he, ihc = (int.from_bytes(bytes.fromhex(digest or "")[:8], "little") for digest in (files.he, files.ihc))
    return he, ihc, hash_64(canonical_group(group))
