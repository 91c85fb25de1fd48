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

from lgd.base.target import UNKNOWN, Target
from lgd.base.text import escape_text
from lgd.io.files import publish
from lgd.io.location import Location
from lgd.labels.classes import BINS, bin_confidences, count_confusion
from lgd.labels.measures import Measures
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, Interval
from lgd.report.columns import list_drawn, name_briefly
from lgd.report.results import Robustness
from lgd.retrieval.answers import Answer, Vote

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Image = NDArray[np.uint8]
DPI = 110
GREY = "#999999"
_GREEN, _ORANGE, _RED = "#009E73", "#E69F00", "#D55E00"
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX*"
_MOST_NUMBERED = 20
"""Classes of a confusion matrix whose cells have their counts written in them."""
_WIDEST = 80
"""Characters of a line that are drawn."""
# A found label beside the query's: colour and style of the frame.
_SAME, _NEAR, _BEYOND, _UNKNOWN = (_GREEN, "-"), (_ORANGE, "--"), (_RED, ":"), (GREY, "-.")
ALIKE, NEAR = 0.05, 0.2
"""Up to which share of the range of values two are framed as alike, and as near."""


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
    label: str | float | None
    """The true one, None where unknown; the answer's is the student's."""
    he: Image
    ihc: Image | None
    """Its own IHC, where there is one: never an input of the student, but the query where the patch is a stored one."""
    images: Sequence[Picture]
    """One of each neighbour."""


def confusion_matrix(predictions: Predictions, path: str | Location, title: str) -> None:
    """Counts and row shares of the labelled patches, a row a true class."""
    target, word = predictions.target, predictions.target.label_word
    counts = count_confusion(predictions.label, predictions.answer.astype(np.int64), target.width)
    totals = counts.sum(1)
    share = counts / np.maximum(totals, 1)[:, None]
    room, is_large = 0.75 * max(0, min(target.width, _MOST_NUMBERED) - 5), target.width > _MOST_NUMBERED
    figure = new_figure(5.4 + room, 4.8 + room)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in () if is_large else np.ndindex(counts.shape):
        text = f"{counts[row, column]}\n{share[row, column]:.0%}" if totals[row] else "–"
        colour = "white" if share[row, column] > 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=11)
    numbers, names = np.arange(target.width), list(map(_short, target.classes))
    # Names that have no room side by side stand on end.
    turn = 0 if max(map(len, names)) * target.width < 50 else 90
    axes.set_xticks(numbers, names, rotation=turn, fontsize=5 if is_large else 10)
    said = [f"{name}{' ' if is_large else chr(10)}(n = {total})" for name, total in zip(names, totals, strict=True)]
    axes.set_yticks(numbers, said, fontsize=5 if is_large else 10)
    axes.set_xlabel(f"predicted {word}")
    axes.set_ylabel(f"true {word}")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=f"share of the true {word}", fraction=0.046)
    save_figure(figure, path)


def reliability_diagram(scored: Sequence[Predictions], path: str | Location) -> None:
    """How often each model is right at each confidence, over how many patches have that confidence.

    A marker's area grows with its number of patches: a bin of a few patches says little.
    """
    figure = new_figure(5.6, 6.2 + 0.2 * len(scored))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curves = above.plot([0, 1], [0, 1], color=GREY, linestyle="--")
    edges = np.linspace(0, 1, BINS + 1)
    names = ["perfectly calibrated"]
    for number, predictions in enumerate(scored):
        known = predictions.labelled()
        bins = bin_confidences(known.output)
        count = np.bincount(bins, minlength=BINS)
        seen = count > 0
        confidence = np.bincount(bins, known.output.max(1), BINS)[seen] / count[seen]
        right = np.bincount(bins, known.answer == known.label, BINS)[seen] / count[seen]
        colour, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        curves += above.plot(confidence, right, color=colour, linewidth=1, marker=marker, markersize=3)
        above.scatter(confidence, right, 500 * count[seen] / count.sum(), color=colour, marker=marker, alpha=0.5)
        below.stairs(count, edges, color=colour, linewidth=1.6)
        error = predictions.measures.score(known.label, known.output)["ece"]
        names.append(f"{predictions.name} (ECE {error:.3f})")
    above.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share that is right", title="Is the confidence earned?")
    word = scored[0].target.label_word
    below.set(xlabel=f"confidence: probability of the predicted {word}", ylabel="patches", ylim=(0, None))
    below.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(curves, names, fontsize=9, loc="outside lower center")
    save_figure(figure, path)


def robustness_curves(robustness: Robustness, measures: Measures, path: str | Location) -> None:
    """Two metrics of each model (`list_drawn`) against the strength of each change, a column a change.

    Bars are 95 % intervals. The first strength of every panel is the unchanged image.
    """
    figure = new_figure(3.3 * len(robustness.changes), 5.6 + 0.2 * len(robustness.models))
    grid = figure.subplots(2, len(robustness.changes), sharey="row", squeeze=False)
    for column, change in enumerate(robustness.changes):
        labels = ["as it is"]
        for number, model in enumerate(robustness.models):
            rows = model.changes[column].at
            labels[1:] = [row.label for row in rows]
            scores = [model.unchanged, *(row.metrics for row in rows)]
            # Side by side, so that the bars of one strength can be distinguished.
            place = np.arange(len(scores)) + 0.08 * (number - (len(robustness.models) - 1) / 2)
            style = {"color": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}
            for axes, name in zip(grid[:, column], list_drawn(measures), strict=True):
                value, bars = error_bars([metrics[name] for metrics in scores])
                axes.errorbar(place, value, bars, label=model.name, linewidth=1, elinewidth=0.8, **style)
        for axes in grid[:, column]:
            axes.set_xticks(range(len(labels)), list(map(_short, labels)), fontsize=8)
        grid[0, column].set_title(change.name, fontsize=11)
    for axes, name in zip(grid[:, 0], list_drawn(measures), strict=True):
        lower = name in measures.lower_is_better
        title = name_briefly(measures, name) + " (lower is better)" * lower
        axes.set(ylabel=title, ylim=(None if name == "pearson" else 0, None if lower else 1.03))
    names = grid[0, 0].get_legend_handles_labels()
    figure.legend(*names, fontsize=9, loc="outside lower center")
    save_figure(figure, path)


def error_bars(intervals: Sequence[Interval | None]) -> tuple[Floats, Floats]:
    """Values, NaN where undefined, and what their bars reach below and above them."""
    parts = [(one.value, one.low, one.high) if one else (None, None, None) for one in intervals]
    value, low, high = np.array(parts, dtype=np.float64).T
    return value, np.nan_to_num([value - low, high - value])


def contact_sheet(rows: Sequence[Query], path: str | Location, votes: bool = False) -> None:
    """A row a query: its H&E, its own IHC (if any query has one), and what it found, with label and distance.

    A patch is shown by its IHC, and by its H&E where it has none. The frame of a found IHC, and that of the H&E for its
    predicted label, shows how far the label is from the query's true one (`compare_labels`). `votes`: also what the
    labels of all neighbours say together. Where no label is known at all, none is spoken of.
    """
    shown_labels = [
        known for row in rows for known in (row.label, row.answer.label, *(hit.label for hit in row.answer.neighbours))
    ]
    labelled = any(known is not None for known in shown_labels)
    target = rows[0].answer.known
    word, spread = target.label_word, _spread(target, shown_labels)
    first = 1 + any(row.ihc is not None for row in rows)
    columns = first + max((len(row.images) for row in rows), default=0)
    # The caption of a panel has up to six lines.
    figure = new_figure(1.9 * columns, 2.8 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        answer, true = row.answer, [f"true {word} {target.format_label(row.label)}"] if labelled else []
        predicted = f", predicted {target.format_label(answer.label)}" if answer.label is not None else ""
        lines = [_short(Path(answer.name).stem), f"slide {_short(row.slide or 'unknown')}"]
        lines += [f"{one}{predicted}" for one in true]
        vote = [_vote_line(answer.vote, target)] if votes and labelled else []
        if answer.stored:
            if first == 2:
                _panel(axes[0], row.he, ["its H&E, not asked", *lines], None)
                _panel(axes[1], row.ihc, ["IHC query", *true, *vote], None)
            else:
                _panel(axes[0], row.he, ["its stored latent asks", *lines, *vote], None)
        else:
            frame, _ = compare_labels(row.label, answer.label, target, spread)
            _panel(axes[0], row.he, ["H&E query", *lines, *vote], None if answer.label is None else frame)
            if first == 2:
                _panel(axes[1], row.ihc, ["its own IHC", "not given to the student", "", *true], None)
        for rank, (ax, found, shown) in enumerate(zip(axes[first:], answer.neighbours, row.images, strict=False), 1):
            frame, words = compare_labels(row.label, found.label, target, spread)
            slide = f"slide {_short(found.slide or 'unknown')} ({found.split})"
            label = [f"{word} {target.format_label(found.label)}, {words}"] if labelled else []
            distance = f"found {rank}, distance {found.distance:.3f}"
            twin = [f"near-duplicate of {_short(found.duplicate_of)}"] if found.duplicate_of else []
            stain = ["its H&E: it has no IHC"] if shown.stain == "H&E" else []
            _panel(
                ax,
                shown.image,
                [distance, _short(found.key), slide, *label, *twin, *stain],
                frame if labelled else None,
            )
        for ax in axes[first + len(row.images) :]:
            ax.set_axis_off()
    save_figure(figure, path)


def _vote_line(said: Vote, target: Target) -> str:
    """The winner, its share and the entropy: all shares would be wider than a panel. Of values their mean."""
    if said.label is None:
        return f"vote {UNKNOWN}"
    if said.shares is None or said.entropy_bits is None:
        return f"vote {target.format_label(said.label)} (mean of {said.labelled})"
    return f"vote {said.label} ({said.shares[str(said.label)]:.2f}), {said.entropy_bits:.2f} bits"


def _spread(target: Target, labels: Sequence[str | float | None]) -> float:
    """By what differences of values are divided: the length of the target's range, or that of the values at hand."""
    values = target.range or [label for label in labels if isinstance(label, float)]
    return (max(values) - min(values) if values else 0.0) or 1.0


def compare_labels(
    true: str | float | None, label: str | float | None, target: Target, spread: float
) -> tuple[tuple[str, str], str]:
    """Colour and style of a frame, and words: how far a label is from the true one.

    Values are alike up to `ALIKE` of the spread, and near up to `NEAR` of it; classes without order are the same or
    others.
    """
    word = target.label_word
    if isinstance(true, float) and isinstance(label, float):
        share = abs(true - label) / spread
        frame = _SAME if share <= ALIKE else _NEAR if share <= NEAR else _BEYOND
        return frame, f"off by {target.format_label(abs(true - label))}"
    # Also of a student that learnt another target than that of the stored patches.
    if true not in target.classes or label not in target.classes:
        return _UNKNOWN, "not comparable"
    if true == label:
        return _SAME, f"same {word}"
    if not target.is_ordered:
        return _BEYOND, f"another {word}"
    steps = abs(target.classes.index(true) - target.classes.index(label))
    return (_NEAR, f"one {word} off") if steps == 1 else (_BEYOND, "further off")


def _panel(axes: "Axes", image: Image | None, lines: list[str], frame: tuple[str, str] | None) -> None:
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
