"""Pictures that lie over a slide in the viewer: the grade of each tile, and what a student predicts in the cells of it.

A picture has a pixel a tile or a cell, and covers the lattice of tiles on the part that was scanned. Where a side would
have more than 4,096 pixels, 2 x 2 cells, 4 x 4 and so on are averaged. It is transparent where no tile is, and where
one is nearly blank; grey where a tile has no answer.

Shapes: n tiles, g cells of a tile a side, H and W of a picture.
"""

import functools
import io
import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from lgd.base.errors import DataError
from lgd.base.records import Many, Record
from lgd.io.location import Location
from lgd.metrics import Floats, Ints
from lgd.models.description import StudentConfig
from lgd.models.grids import CHANNELS_BY_NAME, GridChannel
from lgd.scoring.colours import AMOUNTS, NO_ANSWER, ORDERED, Scale, colour_grades, find_ends
from lgd.scoring.heatmap import name_target
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slide_grids import read_channel, read_sides
from lgd.scoring.tile_table import read_tiles

SCORE = "score"
"""The overlay of the answer."""
MOST = 4096
"""Pixels of a side of a picture; at most a tile more, where its cells are no power of two."""
_TICKS = 5
_PIXELS = 1 << 20
"""That are coloured at a time."""


class Entry(Record):
    """A class of a legend."""

    label: str
    colour: str
    """#rrggbb."""


class Stop(Record):
    """A place on a scale; colours are linear between two."""

    value: float
    colour: str


class Tick(Record):
    """A value that is named beside a scale."""

    value: float
    label: str


class ClassLegend(Record):
    """Colours of classes."""

    kind: Literal["classes"] = "classes"
    entries: Many[Entry]
    no_answer: str
    """The colour of tiles that have none."""


class ScaleLegend(Record):
    """Colours of values."""

    kind: Literal["scale"] = "scale"
    stops: Many[Stop]
    ticks: Many[Tick]
    no_answer: str


class Overlay(Record):
    """What a viewer must know of a picture."""

    name: str
    title: str
    unit: str | None
    x: int
    """Of its upper left corner, in level-0 pixels, as `y`, `width` and `height`."""
    y: int
    width: int
    height: int
    legend: ClassLegend | ScaleLegend


class _Lattice(NamedTuple):
    """Where the pixels of a picture lie."""

    x: int
    y: int
    side: int
    """Of a tile, in level-0 pixels."""
    columns: int
    rows: int
    cells: int
    """Of a tile a side."""
    step: int
    """Of a pixel a side, in cells."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.rows * self.cells // self.step, self.columns * self.cells // self.step

    @property
    def extent(self) -> dict[str, int]:
        """What the picture covers, in level-0 pixels."""
        return {"x": self.x, "y": self.y, "width": self.columns * self.side, "height": self.rows * self.side}

    def find_pixels(self, xy_n2: Ints) -> Ints:
        """(n, g, g): the number of the pixel, row by row, in which each cell of tiles lies.

        `ValueError` for tiles that are not of the lattice.
        """
        place_n2, off_n2 = np.divmod(xy_n2 - (self.x, self.y), self.side)
        if off_n2.any() or (place_n2 < 0).any() or (place_n2 >= (self.columns, self.rows)).any():
            raise ValueError("a tile does not lie where slide.json lays tiles")
        x_ng, y_ng = ((place_n2 * self.cells)[..., None] + np.arange(self.cells)).swapaxes(0, 1) // self.step
        pixel_ngg: Ints = y_ng[:, :, None] * self.shape[1] + x_ng[:, None, :]
        return pixel_ngg


def _lay(score: SlideScore, cells: int) -> _Lattice:
    """The lattice of all tiles that the scanned part has room for; widened to whole pixels where cells are averaged."""
    left, top, width, height = score.bounds
    columns, rows, step = -(-width // score.side), -(-height // score.side), 1
    while max(columns, rows) * cells > step * MOST:
        step *= 2
    whole = step // math.gcd(step, cells)
    columns, rows = (-(-count // whole) * whole for count in (columns, rows))
    return _Lattice(left, top, score.side, columns, rows, cells, step)


def list_overlays(folder: Location, score: SlideScore, config: StudentConfig) -> list[Overlay]:
    """The overlays of a slide that is scored: of its answer, where it has one, and of each channel of its grids.

    Args:
        folder: Of the slide's result.
        score: What slide.json there says.
        config: That of the student which scored it.
    """
    overlays = [] if score.answer.label is None else [_describe_score(score, config)]
    sides = read_sides(folder)
    channels = [one for one in CHANNELS_BY_NAME.values() if one.dataset in sides]
    return overlays + [_describe_channel(one, _lay(score, sides[one.dataset])) for one in channels]


def _describe_score(score: SlideScore, config: StudentConfig) -> Overlay:
    target, ends = score.target, find_ends(config.training)
    legend: ClassLegend | ScaleLegend
    if target.is_ordered:
        legend = _scale(ORDERED, ends, list(enumerate(target.classes)))
    elif target.is_number:
        # Beyond a range that is not stated values lie, too.
        ticks = [(value, f"{value:.3g}") for value in np.linspace(*ends, _TICKS).tolist()]
        if not target.range:
            ticks[0], ticks[-1] = (ends[0], f"≤ {ticks[0][1]}"), (ends[1], f"≥ {ticks[-1][1]}")
        legend = _scale(ORDERED, ends, ticks)
    else:
        colour_K3 = colour_grades(target, np.arange(target.width, dtype=np.float64), ends)
        entries = zip(target.classes, colour_K3, strict=True)
        legend = ClassLegend(
            entries=tuple(Entry(label=name, colour=_as_hex(rgb)) for name, rgb in entries), no_answer=_as_hex(NO_ANSWER)
        )
    title = f"predicted {name_target(score)}"
    return Overlay(name=SCORE, title=title, unit=target.unit, legend=legend, **_lay(score, 1).extent)


def _describe_channel(channel: GridChannel, lattice: _Lattice) -> Overlay:
    values = np.linspace(0, channel.top, _TICKS).tolist()
    ticks = [(value, f"{value:g}" if channel.unit else f"{value:.0%}") for value in values]
    if channel.unit:
        ticks[-1] = channel.top, f"≥ {ticks[-1][1]}"
    legend = _scale(AMOUNTS, (0.0, channel.top), ticks)
    title = f"predicted {channel.title}"
    return Overlay(name=channel.name, title=title, unit=channel.unit, legend=legend, **lattice.extent)


def _scale(scale: Scale, ends: tuple[float, float], ticks: Iterable[tuple[float, str]]) -> ScaleLegend:
    values = (ends[0] + (ends[1] - ends[0]) * scale.place_A).tolist()
    return ScaleLegend(
        stops=tuple(Stop(value=value, colour=_as_hex(rgb)) for value, rgb in zip(values, scale.colour_A3, strict=True)),
        ticks=tuple(Tick(value=value, label=label) for value, label in ticks),
        no_answer=_as_hex(NO_ANSWER),
    )


def _as_hex(rgb: Iterable[float]) -> str:
    return "#" + "".join(f"{round(channel):02x}" for channel in rgb)


def draw_overlay(folder: Location, score: SlideScore, config: StudentConfig, name: str) -> bytes:
    """An overlay as a PNG, RGBA, in the colours of its legend.

    Args:
        folder: Of the slide's result.
        score: What slide.json there says.
        config: That of the student which scored it.
        name: One of `list_overlays`.

    Raises:
        DataError: For another name, and for files that are damaged or not of this score.
    """
    tiles, target = read_tiles(folder, score), score.target
    if name == SCORE and score.answer.label is not None:
        xy_n2, value_ngg = tiles.xy_n2, tiles.grade_n[:, None, None]
    elif name in CHANNELS_BY_NAME and CHANNELS_BY_NAME[name].dataset in read_sides(folder):
        xy_n2, value_ngg = read_channel(folder, CHANNELS_BY_NAME[name])
    else:
        known = ", ".join(overlay.name for overlay in list_overlays(folder, score, config))
        raise DataError(f"this slide has no overlay {name!r:.80}: use one of {known}")
    lattice = _lay(score, value_ngg.shape[1])
    try:
        pixel_ngg = lattice.find_pixels(xy_n2)[~tiles.blank_n]
        value_ngg = value_ngg[~tiles.blank_n]
    except (ValueError, IndexError) as error:
        raise DataError(f"{folder} holds files of two results ({error}): {SlideScore.REMEDY}") from error
    if name == SCORE and not (target.is_ordered or target.is_number):
        # Numbers of classes have no mean: where tiles share a pixel the first is shown.
        pixel_ngg, first_n = np.unique(pixel_ngg, return_index=True)
        value_ngg = value_ngg.ravel()[first_n]
    return _draw(lattice, pixel_ngg.ravel(), value_ngg.ravel(), _find_colours(name, config))


def _find_colours(name: str, config: StudentConfig) -> Callable[[Floats], np.ndarray]:
    """What gives the colours of an overlay's values."""
    if name == SCORE:
        return functools.partial(colour_grades, config.training.target, ends=find_ends(config.training))
    return functools.partial(AMOUNTS.colour, ends=(0.0, CHANNELS_BY_NAME[name].top))


def _draw(lattice: _Lattice, pixel_n: Ints, value_n: np.ndarray, colour: Callable[[Floats], np.ndarray]) -> bytes:
    """A picture of the mean of the values in each pixel."""
    height, width = lattice.shape
    sum_P, count_P = np.zeros(height * width, np.float32), np.zeros(height * width, np.uint16)
    drawn_P, known_n = np.zeros(height * width, bool), np.isfinite(value_n)
    drawn_P[pixel_n] = True
    np.add.at(sum_P, pixel_n[known_n], value_n[known_n].astype(np.float32))
    np.add.at(count_P, pixel_n[known_n], np.uint16(1))
    rgba_P4 = np.zeros((height * width, 4), np.uint8)
    for start in range(0, len(rgba_P4), _PIXELS):
        drawn = start + np.flatnonzero(drawn_P[start : start + _PIXELS])
        # Of a pixel without a known value the mean is NaN.
        with np.errstate(invalid="ignore"):
            mean_n = sum_P[drawn].astype(np.float64) / count_P[drawn]
        rgba_P4[drawn, :3], rgba_P4[drawn, 3] = colour(mean_n), 255
    with io.BytesIO() as content:
        Image.fromarray(rgba_P4.reshape(height, width, 4)).save(content, "PNG", compress_level=3)
        return content.getvalue()
