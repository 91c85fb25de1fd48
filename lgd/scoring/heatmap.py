"""heatmap.png: the H&E of a slide beside what a network says of its tiles, in the absolute colours of the target."""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lgd.base.errors import DataError
from lgd.base.text import escape_text
from lgd.io.files import publish
from lgd.io.location import Location
from lgd.scoring.colours import NO_ANSWER, colour_grades, find_ends
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slide_files import ScoredSlide
from lgd.slides.slide import Slide
from lgd.stain.checks import NEARLY_BLANK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 1000
"""Pixels along the longer side of a picture of the slide."""
_DPI = 140
_INCHES = 6.4
"""Of that side."""
_MARGIN = 0.03
_FADED = 0.35
"""How much of the H&E is left below the map, where no tile is."""


def draw_heatmap(slide: Slide, scored: ScoredSlide, score: SlideScore, path: Location) -> None:
    """Draw the part of the slide that has tiles, and the map beside or below it."""
    from matplotlib.figure import Figure

    plan = scored.plan
    low_2, high_2 = scored.arrays.xy_n2.min(0), scored.arrays.xy_n2.max(0) + plan.side
    margin = max(plan.side / 2, _MARGIN * float((high_2 - low_2).max()))
    left, top = (int(max(0, low - margin)) for low in low_2)
    right, bottom = min(plan.width, int(high_2[0] + margin)), min(plan.height, int(high_2[1] + margin))
    step = max(1.0, max(right - left, bottom - top) / _MOST)
    width, height = (max(1, int(extent / step)) for extent in (right - left, bottom - top))
    try:
        he_HW3 = slide.read(left, top, width, height, plan.inputs.mpp * step)
    except DataError:
        # The tiles that could be read are worth their map.
        he_HW3 = np.full((height, width, 3), 255, np.uint8)
    map_HW3 = _draw_map(scored, he_HW3, (left, top), step)
    wide = width > 1.7 * height
    inches = _INCHES / max(width, height)
    panel = max(3.2, width * inches), height * inches
    size = (panel[0], 2 * panel[1] + 2.2) if wide else (2 * panel[0], panel[1] + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    he, tiles = figure.subplots(2, 1) if wide else figure.subplots(1, 2)
    for axes, image, title in ((he, he_HW3, "H&E"), (tiles, map_HW3, f"predicted {name_target(score)}, by tile")):
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
        _draw_scale(axes, width, height, plan.inputs.mpp * step)
    figure.suptitle("\n".join(_describe(score)), fontsize=10)
    _draw_legend(figure, (he, tiles), scored, score)
    _save(figure, path)


def _draw_map(scored: ScoredSlide, he_HW3: np.ndarray, corner: tuple[int, int], step: float) -> np.ndarray:
    """The tiles over a faded grey H&E."""
    grey_HW = he_HW3.mean(2)
    map_HW3 = np.repeat((255 - _FADED * (255 - grey_HW)).astype(np.uint8)[..., None], 3, axis=2)
    side = scored.plan.side
    for row in scored.read_rows():
        if row.note == NEARLY_BLANK:
            continue
        x, y = row.x - corner[0], row.y - corner[1]
        columns, rows = (slice(round(at / step), max(round(at / step) + 1, round((at + side) / step))) for at in (x, y))
        map_HW3[rows, columns] = row.colour
    return map_HW3


def name_target(score: SlideScore) -> str:
    """HER2 level; a word that says nothing is left out."""
    name, word = score.target.name, score.target.label_word
    return name if word in ("label", "value") else f"{name} {word}"


def _describe(score: SlideScore) -> list[str]:
    """What stands above the pictures."""
    tiles = f"{score.tiles:,} tiles of {_format_length(score.side * score.inputs.mpp)}"
    counts = {"unreadable": score.failed, "nearly blank": score.blank}
    tiles += "".join(f", {count:,} {word}" for word, count in counts.items() if count)
    return [*_describe_answer(score), f"{score.tissue.area_mm2:.3g} mm² of tissue, {tiles}"]


def _describe_answer(score: SlideScore) -> list[str]:
    answer, target = score.answer, score.target
    if answer.label is None:
        return ["no answer: the network saw no label"]
    lines = [f"{name_target(score)}: {target.format_label(answer.label)} by the mean of the tiles"]
    if answer.area is not None:
        lines[0] += f", {answer.area.label} by area"
    mean = answer.value or answer.probabilities[str(answer.label)]
    shown = [target.format_label(end) if target.is_number else f"{end:.2f}" for end in (mean.low, mean.high) if end]
    word = "" if target.is_number else f"probability {mean.value:.2f}"
    between = f"95 % interval {shown[0]} to {shown[1]}" if len(shown) == 2 else ""
    return [*lines, *filter(None, [", ".join(filter(None, [word, between]))])]


def _format_length(um: float) -> str:
    return f"{um / 1000:.3g} mm" if um >= 1000 else f"{um:.3g} µm"


def _draw_scale(axes: "Axes", width: int, height: int, mpp: float) -> None:
    """A bar of a round length, about a fifth of the picture, below it."""
    from matplotlib.patches import Rectangle

    most = 0.25 * width * mpp
    power = 10.0 ** math.floor(math.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    y, thick = height * 1.02, max(width, height) * 0.008
    axes.add_patch(Rectangle((0, y), length / mpp, thick, color="black", clip_on=False))
    axes.text(length / mpp + 0.01 * width, y + thick / 2, _format_length(length), fontsize=9, va="center", ha="left")


def _draw_legend(figure: "Figure", panels: Sequence["Axes"], scored: ScoredSlide, score: SlideScore) -> None:
    """The colours, from low to high or class by class."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    target, ends = score.target, find_ends(scored.config.training)
    if target.is_number or target.is_ordered:
        grade_n = np.linspace(*ends, 256)
        colours = ListedColormap(colour_grades(target, grade_n, ends) / 255)
        mapped = ScalarMappable(Normalize(*ends), colours)
        bar = figure.colorbar(mapped, ax=panels, location="bottom", shrink=0.6, aspect=40, pad=0.05)
        if target.is_ordered:
            bar.set_ticks(range(target.width), labels=list(target.classes))
        unit = f" ({target.unit})" if target.unit else ""
        bar.set_label(f"{name_target(score)}{unit}", fontsize=9)
        handles = []
    else:
        colour_K3 = colour_grades(target, np.arange(target.width, dtype=float), ends) / 255
        handles = [Patch(color=tuple(rgb), label=name) for rgb, name in zip(colour_K3, target.classes, strict=True)]
    if score.failed or score.answer.label is None:
        handles.append(Patch(color=tuple(np.array(NO_ANSWER) / 255), label="no answer"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=9, frameon=False
        )


def _save(figure: "Figure", path: Location) -> None:
    """Publish a figure; nothing in its texts is a formula, and a letter that the font lacks is a box."""
    import matplotlib
    from matplotlib.text import Text

    with publish(path) as temporary, matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for text in figure.findobj(Text):
            text.set_parse_math(False)
            text.set_text("\n".join(escape_text(line, 200) for line in text.get_text().split("\n")))
        figure.savefig(temporary, format="png", dpi=_DPI, pil_kwargs={"compress_level": 3})
