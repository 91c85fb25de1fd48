"""The metrics of a number.

- `mae`: mean absolute error. `rmse`: root of the mean squared error. `bias`: mean of predicted minus true value.
- `pearson`: correlation. `spearman`: that of the ranks, ties having their mean rank.
- `ccc`: concordance, which a shift or another scale lowers too (Lin, Biometrics 45:255, 1989).
"""

import numpy as np

from lgd.base.labels import Labels
from lgd.base.target import Target
from lgd.labels.measures import Measures
from lgd.metrics import Floats


class NumberMeasures(Measures):
    """The metrics of a number."""

    main = "mae"
    choices = ("mae", "rmse", "pearson", "ccc")
    names = answers = ("mae", "rmse", "bias", "pearson", "spearman", "ccc")
    ranked = frozenset({"spearman"})
    lower_is_better = frozenset({"mae", "rmse"})

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        unit = f" ({target.unit})" if target.unit else ""
        self.headline = {"mae": f"MAE{unit}", "pearson": "Pearson r", "spearman": "Spearman r", "ccc": "concordance"}

    def sum_patches(self, label_n: Labels, output_nK: Floats) -> Floats:
        # No metric sees the origin, and squares do not cancel near the labels.
        origin = label_n.mean() if len(label_n) else 0.0
        x, y = label_n - origin, output_nK[:, 0] - origin
        return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, abs(y - x), (y - x) ** 2], axis=1)

    def read_sums(self, sums_RS: Floats) -> dict[str, Floats]:
        count, x, y, xx, yy, xy, absolute, squared = sums_RS.T
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_x, mean_y = x / count, y / count
            covariance = xy / count - mean_x * mean_y
            var_x, var_y = (_measure_variance(square / count, mean) for square, mean in ((xx, mean_x), (yy, mean_y)))
            concordance = 2 * covariance / (var_x + var_y + (mean_x - mean_y) ** 2)
            return {
                "mae": absolute / count,
                "rmse": np.sqrt(squared / count),
                "bias": mean_y - mean_x,
                "pearson": _correlate(covariance, var_x, var_y),
                "ccc": np.where(var_x + var_y > 0, concordance, np.nan),
            }

    def rank_patches(self, name: str, label_n: Labels, output_nK: Floats, weight_Rn: Floats) -> Floats:
        x_Rn, y_Rn = _rank(label_n.astype(np.float64), weight_Rn), _rank(output_nK[:, 0], weight_Rn)
        total_R1 = weight_Rn.sum(1, keepdims=True)
        x_Rn, y_Rn = (rank - (weight_Rn * rank).sum(1, keepdims=True) / total_R1 for rank in (x_Rn, y_Rn))
        covariance, var_x, var_y = ((weight_Rn * product).sum(1) for product in (x_Rn * y_Rn, x_Rn**2, y_Rn**2))
        # Ranks that differ do so by a half at least.
        var_x, var_y = (np.where(variance > 1e-6, variance, 0.0) for variance in (var_x, var_y))
        return _correlate(covariance, var_x, var_y)


def _measure_variance(square: Floats, mean: Floats) -> Floats:
    """The mean square less the square of the mean; 0 where that is what rounding leaves of nothing."""
    variance = square - mean**2
    found: Floats = np.where(variance > 1e-12 * square, variance, 0.0)
    return found


def _correlate(covariance: Floats, var_x: Floats, var_y: Floats) -> Floats:
    """NaN where one does not vary."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value: Floats = np.where((var_x > 0) & (var_y > 0), covariance / np.sqrt(var_x) / np.sqrt(var_y), np.nan)
    return value.clip(-1, 1)


def _rank(value_n: Floats, weight_Rn: Floats) -> Floats:
    """(R, n): the mean rank of each value where patch n is there so often."""
    order = np.argsort(value_n, kind="stable")
    _, block_n = np.unique(value_n, return_inverse=True)
    starts = np.flatnonzero(np.diff(block_n[order], prepend=-1))
    weight_RB = np.add.reduceat(weight_Rn[:, order], starts, axis=1)
    rank_RB = weight_RB.cumsum(1) - (weight_RB - 1) / 2
    return np.ascontiguousarray(rank_RB[:, block_n])
