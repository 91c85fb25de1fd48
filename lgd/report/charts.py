"""The report's charts: confusion matrix, reliability diagram, and the curves of robustness."""

from collections.abc import Sequence

import numpy as np

from lgd.io.location import Location
from lgd.labels.classes import BINS, bin_confidences, count_confusion
from lgd.labels.measures import Measures
from lgd.labels.predictions import Predictions
from lgd.report.columns import list_drawn, name_briefly
from lgd.report.figures import GREY, LINES, MARKERS, error_bars, new_figure, save_figure, shorten
from lgd.report.results import Robustness

_MOST_NUMBERED = 20
"""Classes of a confusion matrix whose cells have their counts written in them."""


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
    numbers, names = np.arange(target.width), list(map(shorten, target.classes))
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
            axes.set_xticks(range(len(labels)), list(map(shorten, labels)), fontsize=8)
        grid[0, column].set_title(change.name, fontsize=11)
    for axes, name in zip(grid[:, 0], list_drawn(measures), strict=True):
        lower = name in measures.lower_is_better
        title = name_briefly(measures, name) + " (lower is better)" * lower
        axes.set(ylabel=title, ylim=(None if name == "pearson" else 0, None if lower else 1.03))
    names = grid[0, 0].get_legend_handles_labels()
    figure.legend(*names, fontsize=9, loc="outside lower center")
    save_figure(figure, path)
