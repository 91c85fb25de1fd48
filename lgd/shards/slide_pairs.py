"""Pairs that are squares of slides: read from them, measured, and left out where the two do not fit."""

import contextlib
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Literal, TypeVar

import numpy as np

from lgd.base.errors import DataError
from lgd.base.threads import map_ordered_prefetch
from lgd.shards.candidate import Problem
from lgd.shards.pairs import PatchPair, Source
from lgd.slides.slide import Slide, open_slide

_UNREGISTERED = 1.5
"""Median alignment of a slide below which nothing suggests that it was registered: elsewhere it is about 0.5."""

logger = logging.getLogger(__name__)

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def map_slides(
    function: Callable[[Argument, Sequence[Slide]], Result],
    arguments: Iterable[Argument],
    pair_of: Callable[[Argument], PatchPair],
    threads: int,
) -> Iterator[Result]:
    """Results in the order of the arguments, each got with the two slides that its pair is of.

    Those of one pair of slides that follow one another share them, and are worked on in threads.
    """
    for files, some in itertools.groupby(arguments, key=lambda one: _list_slides(pair_of(one))):
        # From the inside out: a slide that is closed while a thread reads it takes the process with it.
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
            slides = [stack.enter_context(open_slide(path, mpp)) for path, mpp in files]
            yield from map_ordered_prefetch(pool, functools.partial(_call, function, slides), some, 2 * threads)


def _call(function: Callable[[Argument, Sequence[Slide]], Result], slides: Sequence[Slide], one: Argument) -> Result:
    return function(one, slides)


def _list_slides(pair: PatchPair) -> list[tuple[str, float]]:
    """The slides of a pair, and the um/px of their level 0."""
    assert pair.region is not None, "the caller looks"
    return list(zip(map(str, pair.images), pair.region.scales, strict=True))


def check_region(pair: PatchPair, slides: Sequence[Slide]) -> Source | Problem:
    """Read a pair of its two slides, and measure how well they are aligned there."""
    assert pair.region is not None, "the caller looks"
    he, ihc = slides
    try:
        images = pair.region.read(he, ihc)
        alignment = pair.region.measure(he, ihc, images)
    except DataError as error:
        return pair.problem(str(error))
    rounded = None if alignment is None else round(alignment, 3)
    return Source(
        pair=replace(pair, origin=pair.origin.model_copy(update={"alignment": rounded})),
        width=pair.region.pixels,
        height=pair.region.pixels,
        extensions=("png", "png"),
        sha256=tuple(map(_hash, images)),
        icc=(None, None),
    )


def read_region(source: Source, slides: Sequence[Slide]) -> Sequence[np.ndarray]:
    """The pixels of a pair that was checked; `DataError` where they are no longer the same."""
    assert source.pair.region is not None, "the caller looks"
    he, ihc = slides
    images = source.pair.region.read(he, ihc)
    for image, name, digest in zip(images, source.pair.names, source.sha256, strict=True):
        if _hash(image) != digest:
            raise DataError(f"{name}: changed while the shards were built: build them again")
    return images


def _hash(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def leave_out_misaligned(
    sources: Sequence[Source], least: float | Literal["none"]
) -> tuple[list[Source], list[Problem]]:
    """The sources that are aligned as well as `least`, and why each of the others is not taken; `none` takes all.

    A warning names the slides of which nothing suggests that they were
    registered. Raises `DataError` where no source is left.
    """
    by_slide = {slide: list(some) for slide, some in itertools.groupby(sources, key=lambda source: source.pair.group)}
    for slide, some in by_slide.items():
        middle = median(source.pair.origin.alignment or 0.0 for source in some)
        if middle < _UNREGISTERED:
            logger.warning(
                "slide %s: not registered, or not well: the median alignment of its %d pairs is %.1f, and that of "
                "slides that do not fit is about 0.5",
                slide,
                len(some),
                middle,
            )
    if least == "none" or not sources:
        return list(sources), []
    problems = {}
    for source in sources:
        z = source.pair.origin.alignment
        if z is None or z < least:
            shown = "cannot be measured, for nothing is to be seen there" if z is None else f"is {z:.1f}"
            problems[source.pair.key] = source.pair.problem(f"its alignment {shown}, below --least-alignment {least:g}")
    if problems:
        logger.warning(
            "%d of %d pairs are aligned worse than --least-alignment %g: left out", len(problems), len(sources), least
        )
    left = [source for source in sources if source.pair.key not in problems]
    if not left:
        middle = median(source.pair.origin.alignment or 0.0 for source in sources)
        raise DataError(
            f"all {len(sources)} pairs are aligned worse than --least-alignment {least:g} (median {middle:.1f}): "
            "register the slides again, or look at them before you take --least-alignment none, which keeps all"
        )
    return left, list(problems.values())
