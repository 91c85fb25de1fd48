"""Slides whose patches have a place: the H&E, the true labels and the predicted ones, each patch where it lies.

Shapes: n patches of a slide, K numbers of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lgd.base.target import Target
from lgd.io.location import Location
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, Ints
from lgd.report.figures import Image, draw_scale_bar, new_figure, save_figure, shorten
from lgd.scoring.colours import NO_ANSWER, colour_grades, grade_answers
from lgd.shards.archive import Shard
from lgd.shards.image import resize
from lgd.stream.reader import Reader, in_batches, stream

if TYPE_CHECKING:
    from lgd.report.figures import Axes, Figure

MOST_SLIDES, MOST_IMAGES = 4, 1000
"""Slides that are shown, and patches of each whose H&E is."""
_LEAST_PATCHES = 4
_SIDE = 480
"""Pixels of the longer side of a slide's panel."""
_EMPTY = 245


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlideMap:
    """A slide with its panels, uint8 (H, W, 3)."""

    name: str
    patches: int
    shown: int
    """Those whose H&E is shown."""
    he: Image
    true: Image
    predicted: Image
    mpp: float | None
    """Micrometres per pixel of the panels."""


def read_slide_maps(
    predictions: Predictions, shards: Sequence[Shard], ends: tuple[float, float], threads: int
) -> list[SlideMap]:
    """Some slides of which patches have a place; their true labels are evenly spaced over those that there are.

    `predictions` are of all samples of the shards; `ends` those of `lgd.scoring.colours`.
    """
    if predictions.places is None:
        return []
    placed_n = np.isfinite(predictions.places[:, :3]).all(axis=1)
    rows_of: dict[str, list[int]] = {}
    for row in np.flatnonzero(placed_n).tolist():
        rows_of.setdefault(predictions.groups[row], []).append(row)
    grade_n = np.where(predictions.known, predictions.label.astype(np.float64), np.nan)

    def rank(slide: str) -> tuple[float, str]:
        known = grade_n[rows_of[slide]][predictions.known[rows_of[slide]]]
        return float(known.mean()) if len(known) else np.inf, slide

    slides = sorted((slide for slide, rows in rows_of.items() if len(rows) >= _LEAST_PATCHES), key=rank)
    chosen = np.linspace(0, len(slides) - 1, min(MOST_SLIDES, len(slides))).round().astype(int).tolist()
    grades = (grade_n, grade_answers(predictions.target, predictions.output))
    names = [slides[number] for number in chosen]
    return [_read_map(name, np.array(rows_of[name]), predictions, shards, grades, ends, threads) for name in names]


def _read_map(
    slide: str,
    row_n: Ints,
    predictions: Predictions,
    shards: Sequence[Shard],
    grades: tuple[Floats, Floats],
    ends: tuple[float, float],
    threads: int,
) -> SlideMap:
    assert predictions.places is not None
    x_n, y_n, side_n, um_n = predictions.places[row_n].T
    left, top = x_n.min(), y_n.min()
    extent = max((x_n + side_n).max() - left, (y_n + side_n).max() - top)
    step = extent / _SIDE
    shape = tuple(max(1, round(float((at_n + side_n).max() - at_n.min()) / step)) for at_n in (y_n, x_n))
    corners = [((at_n - start) / step, (at_n - start + side_n) / step) for at_n, start in ((y_n, top), (x_n, left))]
    slots = [
        tuple(slice(round(low[n]), max(round(low[n]) + 1, round(high[n]))) for low, high in corners)
        for n in range(len(row_n))
    ]
    true, predicted = (
        _paint(shape, slots, colour_grades(predictions.target, grade_n[row_n], ends)) for grade_n in grades
    )
    he = np.full((*shape, 3), _EMPTY, np.uint8)
    shown = np.unique(np.linspace(0, len(row_n) - 1, min(MOST_IMAGES, len(row_n))).round().astype(int)).tolist()
    reader = Reader(shards, ("he",), max(8, round(float(side_n.max()) / step)))
    place = iter(shown)
    for samples in stream(reader, in_batches(row_n[shown].tolist(), 64), threads=threads):
        for sample in samples.rows:
            slot = he[slots[next(place)]]
            slot[:] = resize(sample.images["he"], *slot.shape[:2])
    reader.close()
    scale_n = um_n / side_n
    known = bool(np.isfinite(scale_n).any())
    mpp = float(np.nanmedian(scale_n)) * step if known else None
    return SlideMap(name=slide, patches=len(row_n), shown=len(shown), he=he, true=true, predicted=predicted, mpp=mpp)


def _paint(shape: tuple[int, ...], slots: Sequence[tuple[slice, ...]], colour_n3: np.ndarray) -> Image:
    panel = np.full((*shape, 3), _EMPTY, np.uint8)
    for slot, colour in zip(slots, colour_n3, strict=True):
        panel[slot] = colour
    return panel


def draw_slide_maps(maps: Sequence[SlideMap], target: Target, ends: tuple[float, float], path: str | Location) -> None:
    """A row a slide, in the absolute colours of the target; grey is unknown."""
    heights = [max(0.5, min(1.0, one.he.shape[0] / one.he.shape[1])) for one in maps]
    figure = new_figure(11.0, 3.7 * sum(heights) + 0.45 * len(maps) + 1.0)
    grid = figure.subplots(len(maps), 3, squeeze=False, height_ratios=heights)
    for row, one in zip(grid, maps, strict=True):
        images = (("H&E", one.he), (f"true {target.label_word}", one.true), ("predicted from H&E", one.predicted))
        for axes, (name, image) in zip(row, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(name, fontsize=9)
            draw_scale_bar(axes, image.shape[1], image.shape[0], one.mpp)
        few = f", {one.shown:,} of them shown" if one.shown < one.patches else ""
        row[0].set_title(f"H&E of slide {shorten(one.name)}\n{one.patches:,} patches{few}", fontsize=9)
    _draw_colours(figure, grid.ravel().tolist(), target, ends)
    save_figure(figure, path)


def _draw_colours(figure: "Figure", panels: "list[Axes]", target: Target, ends: tuple[float, float]) -> None:
    """What the colours stand for."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    handles = [Patch(color=tuple(np.array(NO_ANSWER) / 255), label="unknown")]
    title = f"{target.label_word} ({target.unit})" if target.unit else target.label_word
    if target.is_number or target.is_ordered:
        colours = ListedColormap(colour_grades(target, np.linspace(*ends, 256), ends) / 255)
        mapped = ScalarMappable(Normalize(*ends), colours)
        bar = figure.colorbar(mapped, ax=panels, location="bottom", shrink=0.5, aspect=40, pad=0.02)
        if target.is_ordered:
            bar.set_ticks(range(target.width), labels=list(map(shorten, target.classes)))
        bar.set_label(title, fontsize=9)
    else:
        colour_K3 = colour_grades(target, np.arange(target.width, dtype=np.float64), ends) / 255
        classes = zip(colour_K3.tolist(), target.classes, strict=True)
        handles = [Patch(color=tuple(rgb), label=shorten(name)) for rgb, name in classes] + handles
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=9, frameon=False)
