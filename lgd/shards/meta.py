"""KEY.json: the facts of one patch pair, as they are stored beside its images. Nothing in it is trusted.

It has no digest of its own: the index has its crc32, and the manifest the digests of tar and index.
"""

import re
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from lgd.base.records import Line, Record, Sha256, explain, load_json

Word = Annotated[str, Field(pattern="^[A-Za-z0-9_]{1,64}$")]
"""The name of a split."""
Key = Annotated[str, Field(pattern="^[A-Za-z0-9_+-]{1,90}$")]
Mpp = Annotated[float, Field(gt=0, lt=100)]
"""Micrometres per pixel."""
Pixels = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[Line, Field(min_length=1)]

_KEY = re.compile(r"[A-Za-z0-9_+-]{1,90}")
# Escapes for terminals, line breaks, and halves of letters that cannot be written to any file.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Digests(Record):
    """SHA-256 of something of each image."""

    he: Sha256 | None
    ihc: Sha256 | None


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
    """Of both images, in pixels."""
    height: Pixels
    mpp: Mpp | None
    icc: Digests
    """Digests of the colour profiles that the source images carry."""
    sha256: Digests
    """Digests of the members."""

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        if self.slide is not None and self.group != self.slide:
            raise ValueError(f"fields slide and group are {self.slide!r:.80} and {self.group!r:.80}")
        return self


SKIPPED = PatchMeta.model_construct(key="", label=None, slide=None, group="", mpp=None)
"""In the place of one that could not be read."""


def parse_meta(content: Any, split: str) -> tuple[PatchMeta | None, str]:
    """A KEY.json of a shard of `split`, or None, and what is wrong with it, or nothing."""
    try:
        meta = PatchMeta.model_validate_json(bytes(content))
    except ValidationError as error:
        return None, _explain(content, error)
    return meta, "" if meta.split == split else f"field split is {meta.split!r:.80}, but the shard is of {split}"


def _explain(content: Any, error: ValidationError) -> str:
    try:
        found = load_json(content)
    except ValueError as broken:
        return f"no valid JSON ({broken})"
    if type(found) is not dict or type(found.get("key")) is not str or not _KEY.fullmatch(found["key"]):
        return "has no key of letters, digits, _, + and -"
    return f"{found['key']}: {explain(error)}"
