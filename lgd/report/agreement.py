"""How far predicted values lie from true ones: limits of agreement, and the pictures of a number.

Of the differences, predicted minus true, these are the mean, and 1.96 standard deviations below and above it (Bland and
Altman, Stat Methods Med Res 8:135, 1999). Where differences are normal, 95 % of them lie between. The paper draws a
difference over the mean of both, and so does this: over the true value alone a network that answers near the middle
would show a trend for that reason only. Patches of a slide are repeated measures of it (section 5 there): the intervals
resample slides with all their patches.

Shapes: n patches, G groups, R resamples.
"""

from collections.abc import Sequence

import numpy as np

from lgd.io.location import Location
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, draws, interval
from lgd.report.figures import GREY, LINES, new_figure, save_figure
from lgd.report.results import Agreement

_WIDTH = 1.96
# Elements of one block of resamples.
_BLOCK = 4_000_000
_DRAWN = 20_000
"""Points that a picture has at most, evenly spaced."""


def measure_agreement(known: Predictions, resamples: int, seed: int) -> Agreement:
    """Mean difference and limits of labelled patches, with intervals over groups; no limits of fewer than two."""
    less_n: Floats = known.output[:, 0] - known.label
    names, group_n = np.unique(known.groups, return_inverse=True)
    sums_G3 = np.stack([np.bincount(group_n, weight, len(names)) for weight in (np.ones_like(less_n), less_n)], axis=1)
    # About the mean, so that squares do not cancel.
    centre = less_n.mean() if len(less_n) else 0.0
    sums_G3 = np.column_stack([sums_G3, np.bincount(group_n, (less_n - centre) ** 2, len(names))])
    sums_G3[:, 1] = sums_G3[:, 1] - centre * sums_G3[:, 0]
    blocks = [sums_G3.sum(0, keepdims=True)]
    if len(names) > 1:
        blocks += [count_RG @ sums_G3 for count_RG in draws(len(names), resamples, seed, _BLOCK // len(names))]
    count_R, sum_R, square_R = np.concatenate(blocks).T
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_R = sum_R / count_R
        variance_R = (square_R - count_R * mean_R**2) / (count_R - 1)
    limit_R = _WIDTH * np.sqrt(np.where(count_R > 1, variance_R.clip(0), np.nan))
    lines = mean_R + centre, mean_R + centre - limit_R, mean_R + centre + limit_R
    middle, low, high = (interval(line, len(names)) for line in lines)
    return Agreement(mean_difference=middle, lower_limit=low, upper_limit=high)


def draw_values(views: Sequence[tuple[str, Predictions]], path: str | Location, title: str) -> None:
    """Predicted over true values, a panel a view such as `by patch`; on the dashed line both are alike."""
    figure = new_figure(4.8 * len(views), 4.8)
    for axes, (name, predictions) in zip(np.atleast_1d(figure.subplots(1, len(views))), views, strict=True):
        true_n, predicted_n = _thin(predictions)
        ends = predictions.target.range or _stretch(np.concatenate([true_n, predicted_n]))
        axes.plot(ends, ends, color=GREY, linestyle="--")
        axes.scatter(true_n, predicted_n, 14, color=LINES[0], alpha=0.5, linewidth=0)
        axes.set(xlim=_stretch(np.array(ends)), ylim=_stretch(np.array(ends)), aspect="equal")
        axes.set_xlabel(_with_unit(f"true {predictions.target.label_word}", predictions))
        axes.set_ylabel(_with_unit(f"predicted {predictions.target.label_word}", predictions))
        axes.set_title(f"{name}: n = {len(predictions.labelled().keys)}", fontsize=11)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_agreement(views: Sequence[tuple[str, Predictions, Agreement]], path: str | Location, title: str) -> None:
    """Bland and Altman's picture, a panel a view: differences over means, their mean and the limits of agreement.

    Bands are the 95 % intervals of the lines.
    """
    figure = new_figure(5.4 * len(views), 4.8)
    panels = np.atleast_1d(figure.subplots(1, len(views), sharey=True))
    for axes, (name, predictions, agreement) in zip(panels, views, strict=True):
        true_n, predicted_n = _thin(predictions)
        axes.scatter((true_n + predicted_n) / 2, predicted_n - true_n, 14, color=LINES[0], alpha=0.5, linewidth=0)
        axes.axhline(0, color=GREY, linewidth=0.8)
        lines = (agreement.mean_difference, "-"), (agreement.lower_limit, "--"), (agreement.upper_limit, "--")
        for (line, style), word in zip(lines, ("mean", "-1.96 SD", "+1.96 SD"), strict=True):
            if line.value is None:
                continue
            axes.axhline(line.value, color=LINES[1], linestyle=style, linewidth=1.4)
            if line.low is not None and line.high is not None:
                axes.axhspan(line.low, line.high, color=LINES[1], alpha=0.12, linewidth=0)
            place = axes.get_yaxis_transform()
            axes.text(
                0.99, line.value, f"{word}: {line.value:.3g}", transform=place, ha="right", va="bottom", fontsize=9
            )
        axes.set_xlabel(_with_unit("mean of predicted and true", predictions))
        axes.set_title(f"{name}: n = {len(predictions.labelled().keys)}", fontsize=11)
    panels[0].set_ylabel(_with_unit("predicted minus true", views[0][1]))
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _thin(predictions: Predictions) -> tuple[Floats, Floats]:
    """True and predicted values of some labelled patches, evenly spaced."""
    known = predictions.labelled()
    rows = np.unique(np.linspace(0, len(known.keys) - 1, min(len(known.keys), _DRAWN)).round().astype(int))
    return known.label[rows].astype(np.float64), known.output[rows, 0]


def _stretch(value_n: Floats) -> tuple[float, float]:
    """Ends of an axis that holds all values with some room."""
    low, high = float(value_n.min()), float(value_n.max())
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _with_unit(text: str, predictions: Predictions) -> str:
    unit = predictions.target.unit
    return f"{text} ({unit})" if unit else text
