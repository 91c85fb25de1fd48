"""What a reader of slides gives, whichever library it uses; the scale of a slide; and the level to read from."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from lgd.base.errors import DataError

FINEST, COARSEST = 0.1, 2.0
"""Micrometres per pixel between which the scale of a slide is believed."""
SAME = 1.02
"""Ratio up to which two scales are one."""
INSTALL = "slides need packages that are not installed: pip install 'lgd[slides]'"


class Level(NamedTuple):
    """One size in which a file holds the slide."""

    width: int
    height: int
    downsample: float
    """Level-0 pixels to one of its own."""


class Bounds(NamedTuple):
    """The part of a slide that was scanned, in level-0 pixels."""

    x: int
    y: int
    width: int
    height: int


class Stated(NamedTuple):
    """What one place of a file says of its scale, in micrometres per level-0 pixel."""

    place: str
    across: float
    down: float


class Source(Protocol):
    """An opened file: several threads may read it."""

    vendor: str
    levels: tuple[Level, ...]
    """From the finest on."""
    bounds: Bounds
    stated: tuple[Stated, ...]
    """Scales, the one that counts first."""
    background: tuple[int, int, int]
    profile: bool
    """Whether it carries a colour profile."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Pixels of a level: x and y in level-0 pixels, width and height in its own; RGB, or RGBA with alpha 0 outside.

        Raises `DataError` where the file is damaged.
        """

    def close(self) -> None:
        """Let go of the file."""


def find_scale(name: str, given: float | None, stated: Sequence[Stated]) -> tuple[float, list[str]]:
    """Micrometres per level-0 pixel, and notes: `given`, or else what the file says first.

    Raises `DataError` where the file says nothing, says what no scanner has, or says two things.
    """
    remedy = "say its micrometres per pixel by --mpp X (in a CSV of slides, in the column mpp)"
    if given is not None:
        if not FINEST <= given <= COARSEST:
            raise DataError(f"{name}: mpp is {given:g}: slides have {FINEST} to {COARSEST:g} um a pixel")
        return given, []
    if not stated:
        raise DataError(f"{name} does not say its scale: {remedy}")
    for place, across, down in stated[:1]:
        if not all(FINEST <= value <= COARSEST for value in (across, down)):
            raise DataError(
                f"{name}: its {place} says {_format(across, down)} um a pixel, which is not between {FINEST} and "
                f"{COARSEST:g} and so an error of the program that wrote it: {remedy}"
            )
        if not is_same(across, down):
            raise DataError(f"{name}: its pixels are not square, {_format(across, down)} um by its {place}: {remedy}")
    first, notes = stated[0], []
    for place, across, down in stated[1:]:
        if is_same(across, first.across) and is_same(down, first.down):
            continue
        text = f"its {first.place} says {_format(*first[1:])} um a pixel, and its {place} {_format(across, down)}"
        if FINEST <= across <= COARSEST:
            raise DataError(f"{name}: {text}: {remedy}")
        notes.append(f"{text}, which is not used")
    return (first.across + first.down) / 2, notes


def is_same(one: float, other: float) -> bool:
    """Whether two scales are one."""
    return max(one, other) <= SAME * min(one, other)


def choose_level(levels: Sequence[Level], downsample: float, *, exact: bool) -> tuple[int, float]:
    """The coarsest level that is no coarser than this, within 2 %, and how many of its pixels make one.

    Unless `exact`, a level within 2 % is taken as it is: 1.
    """
    # OpenSlide sorts levels by size, and some files hold one twice.
    fits = [number for number, level in enumerate(levels) if level.downsample <= downsample * SAME]
    number = max(fits, key=lambda number: levels[number].downsample, default=0)
    ratio = downsample / levels[number].downsample
    return number, 1.0 if not exact and is_same(ratio, 1.0) else ratio


def _format(across: float, down: float) -> str:
    return f"{across:.4g}" if is_same(across, down) else f"{across:.4g} x {down:.4g}"
