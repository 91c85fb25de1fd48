"""Pure numbers: scores of HER2 levels, their intervals and calibration.

The levels are ordered: quadratic weighted kappa, within-one accuracy and the sensitivity of each level stand
beside accuracy. Patches of one slide are not independent, so every interval resamples groups (slides, or
source patches where slides are unknown) with all of their patches.

All metrics but the AUCs are functions of sums over patches, so each group is summed once and a resample is
one row of a matrix product: 1000 resamples of 500 patches take 0.2 s, and with scikit-learn 16 s. Tests hold the
metrics against their definitions and scikit-learn's.

Shapes: n patches, G groups, R resamples, S sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lgd.base.errors import DataError
from lgd.base.records import Measured, Record
from lgd.config_sections import LEVEL_NAMES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVELS = len(LEVEL_NAMES)
BINS = 10
"""Equal-width bins of confidence behind ECE and the reliability diagram."""

_AUC_LEVELS = {"auc_0_vs_rest": [0], "auc_3_vs_rest": [3], "auc_low": [1, 2]}
ANSWERS = (*("accuracy", "macro_f1", "kappa", "within_one"), *(f"sensitivity_{level}" for level in range(LEVELS)))
"""The metrics that look at the answer alone; ECE, Brier and the AUCs need a probability."""
METRICS = (*ANSWERS, *_AUC_LEVELS, "ece", "brier")
# The sets of levels of which each must have two groups behind it.
_SIDES = {f"sensitivity_{level}": [[level]] for level in range(LEVELS)} | {
    name: [positives, [level for level in range(LEVELS) if level not in positives]]
    for name, positives in _AUC_LEVELS.items()
}
_LEVEL = np.arange(LEVELS)
_DISAGREEMENT = (_LEVEL[:, None] - _LEVEL).astype(np.float64) ** 2
# Columns of the sums: confusion matrix, correct minus confidence of each bin, squared error.
_CONFUSION, _GAPS, _SQUARED = slice(0, LEVELS**2), slice(LEVELS**2, LEVELS**2 + BINS), LEVELS**2 + BINS
# Elements of one block of resamples: 32 MB of float64 each, however many patches there are.
_BLOCK = 4_000_000


class Interval(Record):
    """A value and its 95 % interval; None where they are undefined."""

    value: Measured
    low: Measured
    high: Measured


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """What one model said about one split. Raises `DataError` for sizes or values that cannot be scored."""

    name: str
    """Name of the model, as tables show it."""
    keys: list[str]
    """Key of each patch."""
    groups: list[str]
    """Slide of each patch, or its source patch where slides are unknown."""
    level: Ints
    """(n,) int64, 0 to 3; -1 for unknown."""
    probability: Floats
    """(n, 4) float64; rows sum to 1. All NaN, and no level known: of a model that saw no label and gives none."""

    def __post_init__(self) -> None:
        n = len(self.keys)
        if len(self.groups) != n or self.level.shape != (n,) or self.probability.shape != (n, LEVELS):
            raise DataError(
                f"{self.name}: {n} keys, {len(self.groups)} groups, levels of shape {self.level.shape} and "
                f"probabilities of shape {self.probability.shape}: give one group, level and row a key"
            )
        if n and not (self.level.min() >= -1 and self.level.max() < LEVELS):
            raise DataError(f"{self.name}: a level is outside -1 (unknown) to {LEVELS - 1}")
        # bf16 softmax rows miss 1 by up to 0.004.
        sound = (self.probability >= 0).all(1) & (abs(self.probability.sum(1) - 1) < 0.01)
        untaught = np.isnan(self.probability).all() and (self.level < 0).all()
        if not (sound.all() or untaught):
            row = int(np.argmin(sound))
            raise DataError(
                f"{self.name}: {self.probability[row].tolist()} of {self.keys[row]} are not probabilities; a "
                "training that diverged gives such values"
            )

    @property
    def predicted(self) -> Ints:
        """(n,) the most probable level; the lower one of equals."""
        level: Ints = self.probability.argmax(1)
        return level

    @property
    def labelled_groups(self) -> int:
        """How many groups have a patch whose level is known."""
        return len({self.groups[row] for row in np.flatnonzero(self.level >= 0)})

    def labelled(self) -> "Predictions":
        """The patches whose level is known."""
        rows = np.flatnonzero(self.level >= 0)
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            level=self.level[rows],
            probability=self.probability[rows],
        )


def score(level_n: Ints, probability_n4: Floats) -> dict[str, float]:
    """Every name of `METRICS` -> value; NaN where it is undefined. Patches of level -1 are left out.

    - `macro_f1`: mean over the levels that occur as truth or as answer.
    - `kappa`: Cohen's, quadratic weights; undefined where truth and answer are one and the same level.
    - `within_one`: share at most one level away. `sensitivity_L`: share of level L that was called L.
    - `auc_low`: 1+ and 2+ against 0 and 3+, by the sum of their probabilities.
    - `ece`: expected calibration error of the most probable level, 10 equal-width bins (Naeini et al. 2015).
    - `brier`: sum over the levels of the squared error, 0 to 2 (Brier 1950).
    """
    known = level_n >= 0
    level, probability = level_n[known], probability_n4[known]
    if not len(level):
        return dict.fromkeys(METRICS, np.nan)
    sums_1S = _sums(level, probability).sum(0, keepdims=True)
    values = _from_sums(sums_1S) | {
        name: _auc(name, level, probability, np.ones((1, len(level)))) for name in _AUC_LEVELS
    }
    return {name: float(values[name][0]) for name in METRICS}


def confusion(level_n: Ints, predicted_n: Ints) -> Ints:
    """(4, 4) counts, a row a true level, a column a predicted one. Patches of level -1 are left out."""
    known = level_n >= 0
    cells = LEVELS * level_n[known] + predicted_n[known]
    return np.bincount(cells, minlength=LEVELS**2).reshape(LEVELS, LEVELS)


def confidence_bins(probability_n4: Floats) -> Ints:
    """(n,) bin of each patch's highest probability: bin b holds b/10 <= p < (b+1)/10, the last one also 1."""
    bin_n: Ints = np.minimum((probability_n4.max(1) * BINS).astype(np.int64), BINS - 1)
    return bin_n


def score_with_intervals(
    predictions: Predictions, resamples: int, seed: int, metrics: Sequence[str] = METRICS
) -> dict[str, Interval]:
    """Each metric -> value and 95 % interval over resampled groups (`interval`).

    A resample in which a metric is undefined is left out of its interval. With fewer than two groups behind it
    a metric has no interval: NaN. An interval that misses its value is widened to it: resampling raises ECE, so
    that its percentiles can all lie above the value.
    """
    groups = predictions.labelled_groups
    return {name: interval(drawn, groups) for name, drawn in bootstrap(predictions, resamples, seed, metrics).items()}


def paired_differences(
    a: Predictions, b: Predictions, metrics: Sequence[str], resamples: int, seed: int
) -> dict[str, Interval]:
    """Each metric of `a` minus that of `b`, both resampled over the same groups.

    Raises `DataError` unless both hold the same patches in the same order.
    """
    check_same(a, b)
    of_a, of_b = (bootstrap(p, resamples, seed, metrics) for p in (a, b))
    return {name: interval(of_a[name] - of_b[name], a.labelled_groups) for name in metrics}


def check_same(a: Predictions, b: Predictions) -> None:
    """`DataError` unless both hold the same patches in the same order."""
    if a.keys != b.keys or a.groups != b.groups or not np.array_equal(a.level, b.level):
        raise DataError(
            f"{a.name} and {b.name} do not hold the same patches in the same order: score both on one split"
        )


def bootstrap(
    predictions: Predictions, resamples: int, seed: int, metrics: Sequence[str] = METRICS
) -> dict[str, Floats]:
    """Each metric -> its value, and after it that of each resample: (1 + R,), NaN where it is undefined.

    All resamples of a metric are NaN where fewer than two groups stand behind it: resampling one group shows nothing
    of the next. A sensitivity needs two groups that hold its level, an AUC two on either side.
    Two predictions of the same patches see the same resamples for the same seed.
    """
    known = predictions.labelled()
    values = score(known.level, known.probability)
    drawn = {name: np.append(values[name], np.full(resamples, np.nan)) for name in metrics}
    names, group = np.unique(known.groups, return_inverse=True)
    if len(names) < 2:
        return drawn
    sums_GS = np.zeros((len(names), _SQUARED + 1))
    np.add.at(sums_GS, group, _sums(known.level, known.probability))
    aucs = [name for name in metrics if name in _AUC_LEVELS]
    blocks = []
    for count_RG in draws(len(names), resamples, seed, _BLOCK // len(known.keys)):
        block = _from_sums(count_RG @ sums_GS)
        weight_Rn = count_RG[:, group] if aucs else count_RG
        blocks.append(block | {name: _auc(name, known.level, known.probability, weight_Rn) for name in aucs})
    # Which levels a group holds.
    held_GL = sums_GS[:, _CONFUSION].reshape(-1, LEVELS, LEVELS).sum(2) > 0
    for name, row in drawn.items():
        if all(held_GL[:, side].any(1).sum() >= 2 for side in _SIDES.get(name, ())):
            row[1:] = np.concatenate([block[name] for block in blocks])
    return drawn


def draws(groups: int, resamples: int, seed: int, block: int) -> Iterator[Floats]:
    """Blocks of (R, G) counts of how often each group was drawn; every row sums to G."""
    random = np.random.default_rng(seed)
    block = max(1, block)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)


def _sums(level_n: Ints, probability_n4: Floats) -> Floats:
    """(n, S): what each labelled patch adds to the sums that `_from_sums` reads."""
    row = np.arange(len(level_n))
    said = probability_n4.argmax(1)
    sums = np.zeros((len(level_n), _SQUARED + 1))
    sums[row, LEVELS * level_n + said] = 1
    sums[row, _GAPS.start + confidence_bins(probability_n4)] = (said == level_n) - probability_n4.max(1)
    sums[:, _SQUARED] = ((probability_n4 - (level_n[:, None] == _LEVEL)) ** 2).sum(1)
    return sums


def _from_sums(sums_RS: Floats) -> dict[str, Floats]:
    """Every metric but the AUCs, (R,) each."""
    confusion_R44 = sums_RS[:, _CONFUSION].reshape(-1, LEVELS, LEVELS)
    truth, said = confusion_R44.sum(2), confusion_R44.sum(1)
    right = np.diagonal(confusion_R44, axis1=1, axis2=2)
    total = truth.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.einsum("ri,ij,rj->r", truth, _DISAGREEMENT, said) / total
        values = {
            "accuracy": right.sum(1) / total,
            "macro_f1": np.nanmean(2 * right / (truth + said), axis=1),
            "kappa": 1 - (confusion_R44 * _DISAGREEMENT).sum((1, 2)) / expected,
            "within_one": (confusion_R44 * (_DISAGREEMENT <= 1)).sum((1, 2)) / total,
            "ece": abs(sums_RS[:, _GAPS]).sum(1) / total,
            "brier": sums_RS[:, _SQUARED] / total,
        }
        recall = right / truth
    return values | {f"sensitivity_{index}": recall[:, index] for index in range(LEVELS)}


def _auc(name: str, level_n: Ints, probability_n4: Floats, weight_Rn: Floats) -> Floats:
    """(R,) chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
    positive_n, score_n = np.isin(level_n, _AUC_LEVELS[name]), probability_n4[:, _AUC_LEVELS[name]].sum(1)
    order = np.argsort(score_n, kind="stable")
    starts = np.flatnonzero(np.diff(score_n[order], prepend=-1.0))
    weight, positive = weight_Rn[:, order], positive_n[order]
    positives = np.add.reduceat(weight * positive, starts, axis=1)
    negatives = np.add.reduceat(weight * ~positive, starts, axis=1)
    wins = (positives * (negatives.cumsum(1) - negatives / 2)).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        area: Floats = wins / (positives.sum(1) * negatives.sum(1))
    return area


def interval(drawn: Floats, groups: int) -> Interval:
    """A value and its 95 % interval, over groups and over trainings.

    Over groups it is the percentile interval, at the percentiles that Student's t asks for so few (Hesterberg 2015, the
    expanded one); over S trainings Student's t with S - 1 degrees of freedom. Both add as squares (Zou and Donner 2008,
    MOVER). How trainings differ on single groups is in the spread of trainings already, and is taken out of that of
    groups. tools/studies/coverage.py measures what it covers. Of one training the interval is over groups alone. It is
    widened to hold the value; a resample in which any training has NaN is left out.

    Args:
        drawn: The value, and after it that of each resample, as of `bootstrap` or the difference of two such: (1 + R,);
            or a row for each training, (S, 1 + R), whose mean is the value.
        groups: How many groups were resampled.
    """
    drawn_SR = np.atleast_2d(drawn)
    value, samples_SR = float(drawn_SR[:, 0].mean()), drawn_SR[:, 1:]
    samples_SR = samples_SR[:, ~np.isnan(samples_SR).any(axis=0)]
    if np.isnan(value) or not samples_SR.shape[1]:
        return Interval(value=value, low=None, high=None)
    from scipy.special import ndtr, stdtrit

    trainings, mean_R = len(drawn_SR), samples_SR.mean(axis=0)
    shared, spread = 1.0, 0.0
    if trainings > 1:
        single = (samples_SR - mean_R).var(axis=1).sum() / (trainings * (trainings - 1))
        shared = np.sqrt(max(0.0, 1 - single / max(mean_R.var(), 1e-300)))
        spread = stdtrit(trainings - 1, 0.975) * drawn_SR[:, 0].std(ddof=1) / np.sqrt(trainings)
    tail = 100 * ndtr(-stdtrit(groups - 1, 0.975) * np.sqrt(groups / (groups - 1)))
    low, high = np.percentile(mean_R, [tail, 100 - tail])
    below, above = (float(np.hypot(shared * max(0.0, side), spread)) for side in (value - low, high - value))
    return Interval(value=value, low=value - below, high=value + above)
