"""What a network says of a whole slide, from what it says of the tiles; slide.json holds it.

Neighbouring tiles are alike, so that intervals resample squares of 1 mm with all of their tiles. They show how much the
answer depends on which parts of the tissue are on the slide, and not whether the network is right.

Shapes: n tiles, K numbers of an answer, B blocks, R resamples.
"""

from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from lgd.base.records import Count, Line, Many, Record, Sha256, Text
from lgd.base.target import StatedTarget, Target
from lgd.io.documents import Document
from lgd.labels.conformal import Conformal
from lgd.metrics import Floats, Interval, Ints, draws, interval
from lgd.scoring.label_sets import read_set
from lgd.scoring.predict import read_answer

BLOCK_UM = 1000.0
"""Side of the squares that are resampled."""
_RESAMPLES, _SEED = 1000, 0
_DRAWN = 4_000_000
"""Elements of one block of resamples."""

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class AreaAnswer(Record):
    """An ordinal by area: the highest class that more than `Target.area_percent` % of the tiles reach."""

    label: Text
    shares: dict[Text, Interval]
    """Of the tiles that are called so, or something higher."""


class SlideAnswer(Record):
    """What a network says of a slide; the mean over its tiles is the headline."""

    label: str | float | None
    """The most probable class by the mean probabilities, or the mean value; None of a network that saw no label."""
    probabilities: dict[Text, Interval]
    """The mean over the tiles, with its 95 % interval; none of a number."""
    value: Interval | None
    """Of a number."""
    label_set: Many[str | float] | None
    """The classes that cannot be excluded, or lowest and highest value (`lgd.labels.conformal`)."""
    area: AreaAnswer | None
    blocks: Count
    """Squares of 1 mm that have a tile with an answer: what the intervals are over."""


class SlideInputs(Record):
    """All that the result of a slide depends on."""

    sha256: Sha256
    """Of the slide's file."""
    mpp: Positive
    """Micrometres per level-0 pixel that the slide was taken to have."""
    model: Sha256
    """Digest of the network's config.json, which states that of its weights."""
    pixels: Annotated[int, Field(ge=1)]
    """Side of a tile as the network sees it."""
    tile_mpp: Positive
    """Micrometres per pixel of that."""
    chunk: Annotated[int, Field(ge=1)]
    """Tiles that are scored together."""


class SlideTissue(Record):
    """The tissue of a slide."""

    area_mm2: Annotated[float, Field(ge=0)]
    pen: Share
    """Of the tissue that may be pen."""
    blurred: Share
    """Of the tissue that is out of focus."""


class TiledSlide(Document):
    """A slide, and how it is cut into tiles."""

    REMEDY: ClassVar[str] = "delete its folder and score the slide again"

    slide: Text
    """Its file's name without suffix."""
    inputs: SlideInputs
    width: Annotated[int, Field(ge=1)]
    """In level-0 pixels, as `height` and all places."""
    height: Annotated[int, Field(ge=1)]
    vendor: Line
    bounds: Many[int]
    """x, y, width and height of the part that was scanned."""
    tissue: SlideTissue
    side: Annotated[int, Field(ge=1)]
    """Of a tile."""


class SlideScore(TiledSlide):
    """slide.json."""

    FORMAT: ClassVar[str] = "lgd-slide/1"
    ABSENT: ClassVar[str] = "score the slide first: lgd predict SLIDE --out DIR"

    method: Line
    target: StatedTarget
    virtual: bool
    """Whether the network was trained on virtual tissue only."""
    answer: SlideAnswer
    tiles: Count
    failed: Count
    """Tiles that could not be read; tiles.csv says why. They do not count, nor do those that are `blank`."""
    blank: Count
    """Tiles that hold hardly any tissue after all (`lgd.stain.checks`)."""
    notes: Many[Line]

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        answer, classes = self.answer, self.target.classes
        named = [answer.probabilities, *([answer.area.shares] if answer.area else [])]
        if any(one and {*one} != {*classes} for one in named):
            raise ValueError(f"field answer names other classes than the target's ({', '.join(classes)[:200]})")
        return self


def answer_slide(target: Target, conformal: Conformal | None, output_nK: Floats, block_n: Ints) -> SlideAnswer:
    """The answer of tiles, of which each lies in the block of its number; tiles without an answer do not count."""
    known_n = np.isfinite(output_nK).all(1)
    output_nK = output_nK[known_n].astype(np.float64)
    _, block_n = np.unique(block_n[known_n], return_inverse=True)
    blocks = int(block_n.max()) + 1 if len(block_n) else 0
    mean_K = output_nK.mean(0) if blocks else None
    label, _ = read_answer(target, mean_K)
    means = resample_means(output_nK, block_n, blocks) if blocks else []
    named = dict(zip(target.classes, means, strict=False))
    return SlideAnswer(
        label=label,
        probabilities=named,
        value=means[0] if target.is_number and blocks else None,
        label_set=read_set(conformal, target, mean_K, "slide"),
        area=_answer_by_area(target, output_nK, block_n, blocks) if blocks else None,
        blocks=blocks,
    )


def _answer_by_area(target: Target, output_nK: Floats, block_n: Ints, blocks: int) -> AreaAnswer | None:
    """By the rule of `lgd.report.slides.by_area`."""
    if target.area_percent is None:
        return None
    reached_nK = (output_nK.argmax(1)[:, None] >= np.arange(target.width)).astype(np.float64)
    counts_K = reached_nK.sum(0)
    label = int((100 * counts_K > target.area_percent * counts_K[0]).sum()) - 1
    shares = resample_means(reached_nK, block_n, blocks)
    return AreaAnswer(label=target.classes[label], shares=dict(zip(target.classes, shares, strict=True)))


def resample_means(value_nK: Floats, block_n: Ints, blocks: int) -> list[Interval]:
    """The mean of each column, with its 95 % interval over resampled blocks; of a single block there is none."""
    mean_1K, width = value_nK.mean(0, keepdims=True), value_nK.shape[1]
    drawn_RK = np.full((1, width), np.nan)
    if blocks > 1:
        sums_BK = np.zeros((blocks, width + 1))
        np.add.at(sums_BK, block_n, np.column_stack([value_nK, np.ones(len(value_nK))]))
        sums = [count_RB @ sums_BK for count_RB in draws(blocks, _RESAMPLES, _SEED, _DRAWN // blocks)]
        sums_RK = np.concatenate(sums)
        drawn_RK = sums_RK[:, :-1] / sums_RK[:, -1:]
    both = np.concatenate([mean_1K, drawn_RK])
    return [interval(both[:, column], blocks) for column in range(width)]


def number_blocks(centre_n2: Floats, mpp: float) -> Ints:
    """(n,): the number of the block in which each place lies, in level-0 pixels of `mpp`."""
    cell_n2 = (centre_n2 * (mpp / BLOCK_UM)).astype(np.int64)
    _, block_n = np.unique(cell_n2, axis=0, return_inverse=True)
    return block_n.reshape(-1)
