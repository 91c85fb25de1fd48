"""What the report's pictures have in common: figures without pyplot, so without a display or global state, as PNG.

Colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish; what a colour says is also
written or shaped.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lgd.base.text import escape_text
from lgd.io.files import publish
from lgd.io.location import Location
from lgd.metrics import Floats, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

Image = NDArray[np.uint8]
DPI = 110
GREY = "#999999"
GREEN, ORANGE, RED = "#009E73", "#E69F00", "#D55E00"
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX*"
_WIDEST = 80
"""Characters of a line that are drawn."""


def error_bars(intervals: Sequence[Interval | None]) -> tuple[Floats, Floats]:
    """Values, NaN where undefined, and what their bars reach below and above them."""
    parts = [(one.value, one.low, one.high) if one else (None, None, None) for one in intervals]
    value, low, high = np.array(parts, dtype=np.float64).T
    return value, np.nan_to_num([value - low, high - value])


def draw_scale_bar(axes: "Axes", width: float, height: float, mpp: float | None) -> None:
    """A bar of a round length at the lower left of a picture of so many pixels, up to a third of its width.

    None where `mpp`, the micrometres per pixel, is unknown.
    """
    if not mpp:
        return
    most = width * mpp / 3
    power = 10.0 ** math.floor(math.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    left, y = 0.05 * width, 0.95 * height
    # Dark tissue and white glass are both below it.
    for colour, thick in (("white", 5), ("black", 2.5)):
        (bar,) = axes.plot([left, left + length / mpp], [y, y], scalex=False, scaley=False, color=colour)
        bar.set(linewidth=thick, solid_capstyle="butt")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.text(left, y - 0.03 * height, text, fontsize=7.5, ha="left", va="bottom", bbox=box)


def draw_line_legend(figure: "Figure", title: str, styles: Mapping[str, tuple[str, str]]) -> None:
    """A legend below a figure: names of lines of a colour and a style, if there are any, and a title."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=4) for _ in styles]
    for line, (colour, style) in zip(lines, styles.values(), strict=True):
        line.set(color=colour, linestyle=style)
    if lines or title:
        legend = figure.legend(lines, [*styles], loc="outside lower center", ncols=max(1, len(lines)), handlelength=4)
        legend.set(frame_on=False, title=title)


def shorten(name: str, width: int = 24) -> str:
    """`name`, escaped, with its middle left out where it is too wide for a caption."""
    name = escape_text(name)
    return name if len(name) <= width else f"{name[: width // 2]}…{name[-width // 2 + 1 :]}"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: str | Location) -> None:
    """Publish a figure. Its texts are drawn as they are: nothing in them is a formula, unseen or endless."""
    import matplotlib
    from matplotlib.text import Text

    # Ticks get their texts while they are drawn.
    with publish(path) as temporary, matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        # A letter that the font lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for text in figure.findobj(Text):
            text.set_parse_math(False)
            text.set_text("\n".join(shorten(line, _WIDEST) for line in text.get_text().split("\n")))
        figure.savefig(temporary, format="png", dpi=DPI)
