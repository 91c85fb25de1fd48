"""What a model said about patches, and how well, with intervals over groups.

Shapes: n patches, K numbers of an answer, G groups, R resamples, S sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lgd.base.errors import DataError
from lgd.base.labels import Labels, as_labels, find_known
from lgd.base.target import NO_CLASS, Target
from lgd.labels.classes import ClassMeasures
from lgd.labels.conformal import Conformal
from lgd.labels.measures import Measures
from lgd.labels.numbers import NumberMeasures
from lgd.metrics import Floats, Interval, Ints, draws, interval

# Elements of one block of resamples: 32 MB of float64 each, however many patches there are.
_BLOCK = 4_000_000


def find_measures(target: Target) -> Measures:
    """The metrics of a target."""
    return NumberMeasures(target) if target.is_number else ClassMeasures(target)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """What one model said about one split. Raises `DataError` for sizes or values that cannot be scored."""

    target: Target
    """What is predicted."""
    name: str
    """Name of the model, as tables show it."""
    keys: list[str]
    """Key of each patch."""
    groups: list[str]
    """Slide of each patch, or its source patch where slides are unknown."""
    label: Labels
    """(n,): int64 number of the class, -1 for unknown; or float64 value, NaN for unknown."""
    output: Floats
    """(n, K) float64: probabilities, whose rows sum to 1; or (n, 1) values. All NaN, and no label known: of a model
    that saw no label and gives none."""
    sites: Mapping[str, list[str]] = field(default_factory=dict)
    """The center and the scanner of each patch, empty where unknown."""
    conformal: Conformal | None = None
    """What makes the model's label sets."""
    places: Floats | None = None
    """(n, 4): x, y and side of each patch in pixels of level 0 of its slide, and its side in micrometres, NaN where
    unknown; None of what is no patch of a set."""

    def __post_init__(self) -> None:
        n, target = len(self.keys), self.target
        if len(self.groups) != n or self.label.shape != (n,) or self.output.shape != (n, target.width):
            raise DataError(
                f"{self.name}: {n} keys, {len(self.groups)} groups, {target.label_word}s of shape {self.label.shape} "
                f"and answers of shape {self.output.shape}: give one group, {target.label_word} and row a key"
            )
        known = self.label[self.known]
        if target.is_number and not np.isfinite(known).all():
            raise DataError(f"{self.name}: a value is not finite; NaN is unknown")
        if n and not target.is_number and not (self.label.min() >= NO_CLASS and self.label.max() < target.width):
            raise DataError(f"{self.name}: a {target.label_word} is outside {NO_CLASS} (unknown) to {target.width - 1}")
        sound = np.isfinite(self.output).all(1)
        if not target.is_number:
            # bf16 softmax rows miss 1 by up to 0.004.
            sound = (self.output >= 0).all(1) & (abs(self.output.sum(1) - 1) < 0.01)
        untaught = np.isnan(self.output).all() and not len(known)
        if not (sound.all() or untaught):
            row = int(np.argmin(sound))
            are = "is no finite number" if target.is_number else "are not probabilities"
            raise DataError(
                f"{self.name}: {self.output[row].tolist()} of {self.keys[row]} {are}; a training that diverged gives "
                "such values"
            )

    @property
    def measures(self) -> Measures:
        """The metrics of its target."""
        return find_measures(self.target)

    @property
    def known(self) -> np.ndarray:
        """Which patches have a label, bool (n,)."""
        return find_known(self.label)

    @property
    def answer(self) -> Labels:
        """(n,) the most probable class, the lower one of equals; or the value."""
        if self.target.is_number:
            return self.output[:, 0]
        answer_n: Ints = self.output.argmax(1)
        return answer_n

    @property
    def labelled_groups(self) -> int:
        """How many groups have a patch whose label is known."""
        return len({self.groups[row] for row in np.flatnonzero(self.known)})

    def labelled(self) -> "Predictions":
        """The patches whose label is known."""
        return self.select(np.flatnonzero(self.known))

    def select(self, rows: Ints) -> "Predictions":
        """Some of the patches, by their numbers."""
        chosen = rows.tolist()
        return replace(
            self,
            keys=[self.keys[row] for row in chosen],
            groups=[self.groups[row] for row in chosen],
            label=self.label[rows],
            output=self.output[rows],
            sites={name: [values[row] for row in chosen] for name, values in self.sites.items()},
            places=None if self.places is None else self.places[rows],
        )

    def without_labels(self) -> "Predictions":
        """The same answers, as if no label were known."""
        return replace(self, label=as_labels(self.target, [None] * len(self.keys)))


def score_with_intervals(
    predictions: Predictions, resamples: int, seed: int, metrics: Sequence[str] = ()
) -> dict[str, Interval]:
    """Each metric, by default all, -> value and 95 % interval over resampled groups (`interval`).

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
    same_labels = np.array_equal(a.label, b.label, equal_nan=a.target.is_number)
    if a.target != b.target or a.keys != b.keys or a.groups != b.groups or not same_labels:
        raise DataError(
            f"{a.name} and {b.name} do not hold the same patches in the same order: score both on one split"
        )


def bootstrap(predictions: Predictions, resamples: int, seed: int, metrics: Sequence[str] = ()) -> dict[str, Floats]:
    """Each metric, by default all, -> its value, and after it that of each resample: (1 + R,), NaN where undefined.

    All resamples of a metric are NaN where fewer than two groups stand behind it (`Measures.find_supported`):
    resampling one group shows nothing of the next. Two predictions of the same patches see the same resamples for the
    same seed.
    """
    known, measures = predictions.labelled(), predictions.measures
    metrics = metrics or measures.names
    values = measures.score(known.label, known.output)
    drawn = {name: np.append(values[name], np.full(resamples, np.nan)) for name in metrics}
    names, group = np.unique(known.groups, return_inverse=True)
    if len(names) < 2:
        return drawn
    sums = measures.sum_patches(known.label, known.output)
    sums_GS = np.zeros((len(names), sums.shape[1]))
    np.add.at(sums_GS, group, sums)
    ranked = [name for name in metrics if name in measures.ranked]
    blocks = []
    for count_RG in draws(len(names), resamples, seed, _BLOCK // len(known.keys)):
        block = measures.read_sums(count_RG @ sums_GS)
        weight_Rn = count_RG[:, group] if ranked else count_RG
        blocks.append(
            block | {name: measures.rank_patches(name, known.label, known.output, weight_Rn) for name in ranked}
        )
    supported = measures.find_supported(sums_GS)
    for name, row in drawn.items():
        if name in supported:
            row[1:] = np.concatenate([block[name] for block in blocks])
    return drawn
