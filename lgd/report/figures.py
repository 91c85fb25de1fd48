"""The report's pictures: confusion matrix, reliability diagram, robustness, and the contact sheet of queries.

Drawn without pyplot, so without a display or global state, and published as PNG. Colours are those of Okabe
and Ito (2008), which colour-blind readers can distinguish; what a colour says is also written or shaped.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lgd.base.text import escape_text
from lgd.config_sections import LEVEL_NAMES
from lgd.io.files import publish
from lgd.io.location import Location
from lgd.metrics import BINS, Floats, Interval, Predictions, confidence_bins, confusion, score
from lgd.report.results import Robustness
from lgd.retrieval.answers import Answer, Vote

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Image = NDArray[np.uint8]
DPI = 110
_GREEN, _ORANGE, _RED, _GREY = "#009E73", "#E69F00", "#D55E00", "#999999"
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX*"
_WIDEST = 80
"""Characters of a line that are drawn."""
# A found level beside the query's: colour and style of the frame, and the words of the caption.
_SAME, _ONE_OFF = (_GREEN, "-", "same level"), (_ORANGE, "--", "one level off")
_BEYOND, _UNKNOWN = (_RED, ":", "further off"), (_GREY, "-.", "not comparable")


class Picture(NamedTuple):
    """What is shown of a patch."""

    stain: str
    """IHC, or H&E of a patch without one."""
    image: Image


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Query:
    """An answer with its pictures, each uint8 (H, W, 3), and what is known of the patch that asks."""

    answer: Answer
    slide: str | None
    level: str | None
    """The true one, None where unknown; the answer's is the student's."""
    he: Image
    ihc: Image | None
    """Its own IHC, where there is one: never an input of the student, but the query where the patch is a stored one."""
    images: Sequence[Picture]
    """One of each neighbour."""


def confusion_matrix(predictions: Predictions, path: str | Location, title: str) -> None:
    """Counts and row shares of the labelled patches, a row a true level."""
    counts = confusion(predictions.level, predictions.predicted)
    totals = counts.sum(1)
    share = counts / np.maximum(totals, 1)[:, None]
    figure = new_figure(5.4, 4.8)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        text = f"{counts[row, column]}\n{share[row, column]:.0%}" if totals[row] else "–"
        colour = "white" if share[row, column] > 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=11)
    levels = np.arange(len(LEVEL_NAMES))
    axes.set_xticks(levels, list(map(_short, LEVEL_NAMES)))
    axes.set_yticks(levels, [f"{_short(name)}\n(n = {total})" for name, total in zip(LEVEL_NAMES, totals, strict=True)])
    axes.set_xlabel("predicted level")
    axes.set_ylabel("true level")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the true level", fraction=0.046)
    save_figure(figure, path)


def reliability_diagram(scored: Sequence[Predictions], path: str | Location) -> None:
    """How often each model is right at each confidence, over how many patches have that confidence.

    A marker's area grows with its number of patches: a bin of a few patches says little.
    """
    figure = new_figure(5.6, 6.2 + 0.2 * len(scored))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curves = above.plot([0, 1], [0, 1], color=_GREY, linestyle="--")
    edges = np.linspace(0, 1, BINS + 1)
    names = ["perfectly calibrated"]
    for number, predictions in enumerate(scored):
        known = predictions.labelled()
        bins = confidence_bins(known.probability)
        count = np.bincount(bins, minlength=BINS)
        seen = count > 0
        confidence = np.bincount(bins, known.probability.max(1), BINS)[seen] / count[seen]
        right = np.bincount(bins, known.predicted == known.level, BINS)[seen] / count[seen]
        colour, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        curves += above.plot(confidence, right, color=colour, linewidth=1, marker=marker, markersize=3)
        above.scatter(confidence, right, 500 * count[seen] / count.sum(), color=colour, marker=marker, alpha=0.5)
        below.stairs(count, edges, color=colour, linewidth=1.6)
        names.append(f"{predictions.name} (ECE {score(known.level, known.probability)['ece']:.3f})")
    above.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share that is right", title="Is the confidence earned?")
    below.set(xlabel="confidence: probability of the predicted level", ylabel="patches", ylim=(0, None))
    below.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(curves, names, fontsize=9, loc="outside lower center")
    save_figure(figure, path)


def robustness_curves(robustness: Robustness, path: str | Location) -> None:
    """Accuracy and ECE of each model against the strength of each change, a column a change; bars are 95 % intervals.

    The first strength of every panel is the unchanged image.
    """
    figure = new_figure(3.3 * len(robustness.changes), 5.6 + 0.2 * len(robustness.models))
    grid = figure.subplots(2, len(robustness.changes), sharey="row", squeeze=False)
    for column, change in enumerate(robustness.changes):
        labels = ["as it is"]
        for number, model in enumerate(robustness.models):
            rows = model.changes[column].at
            labels[1:] = [row.label for row in rows]
            measures = [model.unchanged, *(row.metrics for row in rows)]
            # Side by side, so that the bars of one strength can be distinguished.
            place = np.arange(len(measures)) + 0.08 * (number - (len(robustness.models) - 1) / 2)
            style = {"color": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}
            for axes, name in zip(grid[:, column], ("accuracy", "ece"), strict=True):
                value, bars = error_bars([metrics[name] for metrics in measures])
                axes.errorbar(place, value, bars, label=model.name, linewidth=1, elinewidth=0.8, **style)
        for axes in grid[:, column]:
            axes.set_xticks(range(len(labels)), list(map(_short, labels)), fontsize=8)
        grid[0, column].set_title(change.name, fontsize=11)
    grid[0, 0].set(ylabel="accuracy", ylim=(0, 1.03))
    grid[1, 0].set(ylabel="ECE (lower is better)", ylim=(0, None))
    names = grid[0, 0].get_legend_handles_labels()
    figure.legend(*names, fontsize=9, loc="outside lower center")
    save_figure(figure, path)


def error_bars(intervals: Sequence[Interval | None]) -> tuple[Floats, Floats]:
    """Values, NaN where undefined, and what their bars reach below and above them."""
    parts = [(one.value, one.low, one.high) if one else (None, None, None) for one in intervals]
    value, low, high = np.array(parts, dtype=np.float64).T
    return value, np.nan_to_num([value - low, high - value])


def contact_sheet(rows: Sequence[Query], path: str | Location, votes: bool = False) -> None:
    """A row a query: its H&E, its own IHC (if any query has one), and what it found, with level and distance.

    A patch is shown by its IHC, and by its H&E where it has none.

    The frame of a found IHC, and that of the H&E for its predicted level, shows how far the level is from the
    query's true one. `votes`: also what the levels of all neighbours say together. Where no level is known at all, none
    is spoken of.
    """
    levelled = any(
        known for row in rows for known in (row.level, row.answer.level, *(hit.level for hit in row.answer.neighbours))
    )
    first = 1 + any(row.ihc is not None for row in rows)
    columns = first + max((len(row.images) for row in rows), default=0)
    # The caption of a panel has up to six lines.
    figure = new_figure(1.9 * columns, 2.8 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        answer, true = row.answer, [f"true level {row.level or 'unknown'}"] if levelled else []
        predicted = f", predicted {answer.level}" if answer.level else ""
        lines = [_short(Path(answer.name).stem), f"slide {_short(row.slide or 'unknown')}"]
        lines += [f"{one}{predicted}" for one in true]
        vote = [_vote_line(answer.vote)] if votes and levelled else []
        if answer.stored:
            if first == 2:
                _panel(axes[0], row.he, ["its H&E, not asked", *lines], None)
                _panel(axes[1], row.ihc, ["IHC query", *true, *vote], None)
            else:
                _panel(axes[0], row.he, ["its stored latent asks", *lines, *vote], None)
        else:
            frame = _agreement(row.level, answer.level) if answer.level else None
            _panel(axes[0], row.he, ["H&E query", *lines, *vote], frame)
            if first == 2:
                _panel(axes[1], row.ihc, ["its own IHC", "not given to the student", "", *true], None)
        for rank, (ax, found, shown) in enumerate(zip(axes[first:], answer.neighbours, row.images, strict=False), 1):
            agreement = _agreement(row.level, found.level)
            slide = f"slide {_short(found.slide or 'unknown')} ({found.split})"
            level = [f"level {found.level or 'unknown'}, {agreement[2]}"] if levelled else []
            distance = f"found {rank}, distance {found.distance:.3f}"
            twin = [f"near-duplicate of {_short(found.duplicate_of)}"] if found.duplicate_of else []
            stain = ["its H&E: it has no IHC"] if shown.stain == "H&E" else []
            _panel(
                ax,
                shown.image,
                [distance, _short(found.key), slide, *level, *twin, *stain],
                agreement if levelled else None,
            )
        for ax in axes[first + len(row.images) :]:
            ax.set_axis_off()
    save_figure(figure, path)


def _vote_line(said: Vote) -> str:
    """The winner, its share and the entropy: all shares would be wider than a panel."""
    if said.level is None:
        return "vote unknown"
    return f"vote {said.level} ({said.shares[said.level]:.2f}), {said.entropy_bits:.2f} bits"


def _agreement(true: str | None, level: str | None) -> tuple[str, str, str]:
    if true is None or level is None:
        return _UNKNOWN
    return {0: _SAME, 1: _ONE_OFF}.get(abs(LEVEL_NAMES.index(true) - LEVEL_NAMES.index(level)), _BEYOND)


def _panel(axes: "Axes", image: Image | None, lines: list[str], frame: tuple[str, str, str] | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if image is None:
        axes.set_facecolor("#EEEEEE")
        axes.set_box_aspect(1)
        axes.text(0.5, 0.5, "no image", transform=axes.transAxes, ha="center", va="center", color="#555555")
    else:
        axes.imshow(image)
    for spine in axes.spines.values():
        spine.set_visible(frame is not None)
        if frame is not None:
            spine.set(color=frame[0], linestyle=frame[1], linewidth=4)
    axes.set_xlabel("\n".join(lines), fontsize=7.5, labelpad=5)


def _short(name: str, width: int = 24) -> str:
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
            text.set_text("\n".join(_short(line, _WIDEST) for line in text.get_text().split("\n")))
        figure.savefig(temporary, format="png", dpi=DPI)
