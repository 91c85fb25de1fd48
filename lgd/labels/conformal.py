"""Conformal label sets: beside the point label the labels that cannot be excluded, calibrated by slide.

A set holds the true label with a stated probability (coverage), whatever the network is worth: a poor one has large
sets. It is calibrated on labelled slides that did not train the network, and holds for slides that are like them, on
average over slides and over calibrations; no single class or slide is promised it. Patches of one slide err together,
so a patch is no independent sample: see `find_threshold`.

Each label has a misfit (nonconformity score), and the set of a patch or a slide is all labels whose misfit does not
pass a threshold:

- an ordinal: the ranked probability score of the class (Epstein 1969), the sum over the bounds between classes of
  (F_j - [label <= j])^2 with F_j the predicted probability of class j or lower. From class k to k + 1 it changes by
  2 F_k - 1, which never falls with k: the misfit is convex in k, and the classes below a threshold are neighbours.
- a class: 1 - its probability, which gives the smallest sets on average (Sadinle, Lei, Wasserman 2019).
- a number: |predicted value - value|, hence an interval.

The most probable class is always in the set, and with it the classes between; this can only raise the coverage.

Shapes: n patches or slides, K classes, J = K - 1 bounds, G slides, R resamples.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lgd.base.labels import Labels
from lgd.base.records import Count, Many, Record
from lgd.metrics import Floats, Interval, Ints, draws, interval

Bools = NDArray[np.bool_]
Kind = Literal["ordinal", "class", "number"]
By = Literal["patch", "slide"]
"""Of which there is a set."""

_EXACT = 1e-9
"""Rounding of a sum of weights must not turn a coverage that is just reached into an infinite threshold."""


class Threshold(Record):
    """Up to which misfit a label is in the set."""

    highest: Annotated[float, Field(ge=0)] | None
    """None: every label is in the set, for too few slides calibrated it."""
    slides: Count
    """How many calibrated it; patches, where slides are unknown."""


class Conformal(Record):
    """The thresholds of label sets, as a model's folder keeps them."""

    coverage: Annotated[float, Field(gt=0, lt=1)]
    """Of how many sets in the long run the true label is a part."""
    kind: Kind
    patch: Threshold
    slide: Threshold | None
    """None where slides are unknown, or have no label of their own; then a slide has no set."""

    def find_sets(self, probability_nK: Floats, by: By = "patch") -> Bools:
        """(n, K): which classes are in the set of each patch, or of each slide by its mean probabilities.

        A set is never empty, and of an ordinal it has no gaps. Where a probability is no finite number, every class is
        in it.
        """
        set_nK: Bools = measure_misfits(self.kind, probability_nK) <= self._read_highest(by)
        np.put_along_axis(set_nK, probability_nK.argmax(1)[:, None], True, axis=1)
        set_nK[~np.isfinite(probability_nK).all(1)] = True
        if self.kind == "ordinal":
            # The least misfit has the median class, which need not be beside the most probable one.
            set_nK = np.logical_or.accumulate(set_nK, 1) & np.logical_or.accumulate(set_nK[:, ::-1], 1)[:, ::-1]
        return set_nK

    def find_intervals(
        self, value_n: Floats, by: By = "patch", bounds: tuple[float, float] = (-math.inf, math.inf)
    ) -> Floats:
        """(n, 2): lowest and highest value of each patch, or of each slide by its mean, within what is possible.

        The whole of `bounds` where too few slides calibrated it, and where a predicted value is not finite.
        """
        finite_n = np.isfinite(value_n)
        value_n, half_n = np.where(finite_n, value_n, 0.0), np.where(finite_n, self._read_highest(by), math.inf)
        return np.stack([value_n - half_n, value_n + half_n], axis=1).clip(*bounds)

    def explain_size(self, by: By = "patch") -> str | None:
        """Why every label is in each set; None where it is not so."""
        found = self.patch if by == "patch" else self.slide
        if found is None or found.highest is not None:
            return None
        return (
            f"{found.slides} labelled slides calibrated them, and a coverage of {100 * self.coverage:g} % needs "
            f"{count_needed_slides(self.coverage)} or more"
        )

    def _read_highest(self, by: By) -> float:
        found = self.patch if by == "patch" else self.slide
        assert found is not None, "slides have no sets here"
        return math.inf if found.highest is None else found.highest


def count_needed_slides(coverage: float) -> int:
    """The fewest slides of which K / (K + 1) reaches the coverage; with fewer every set holds all labels."""
    return max(1, math.ceil((coverage - _EXACT) / (1 - coverage + _EXACT)))


def measure_misfits(kind: Kind, probability_nK: Floats) -> Floats:
    """(n, K): how badly each class fits, of an ordinal or of classes without order; see the head of this module."""
    if kind == "class":
        return 1 - probability_nK
    cumulated_nJ = probability_nK.cumsum(1)[:, :-1]
    below_nK = np.pad((cumulated_nJ**2).cumsum(1), ((0, 0), (1, 0)))
    above_nK = np.pad(((1 - cumulated_nJ)[:, ::-1] ** 2).cumsum(1)[:, ::-1], ((0, 0), (0, 1)))
    misfit_nK: Floats = below_nK + above_nK
    return misfit_nK


def measure_label_misfits(kind: Kind, output_nK: Floats, label_n: Labels) -> Floats:
    """(n,): how badly each true label fits; infinite where the answer is no finite number."""
    if kind == "number":
        misfit_n = abs(output_nK[:, 0] - label_n)
    else:
        misfit_n = np.take_along_axis(measure_misfits(kind, output_nK), label_n.astype(np.int64)[:, None], 1)[:, 0]
    return np.where(np.isfinite(output_nK).all(1), misfit_n, math.inf)


def find_threshold(misfit_n: Floats, slide_n: Ints, coverage: float) -> Threshold:
    """The threshold for a patch of a new slide, by hierarchical conformal prediction (Lee, Barber, Willett 2023).

    It is the quantile at `coverage` of misfits of which each of the G slides weighs 1 / (G + 1), its patches in equal
    parts, and the new slide 1 / (G + 1), at infinity. So many of a new slide's patches are covered on average, each
    slide counting once however many patches it has. Pooled as if they were independent, patches would promise too much.
    Of slides with one row each it is that of split conformal prediction (Vovk et al. 2005).
    """
    _, group_n, count_G = np.unique(slide_n, return_inverse=True, return_counts=True)
    weight_n = 1 / ((len(count_G) + 1) * count_G[group_n])
    order = misfit_n.argsort(kind="stable")
    reached = np.flatnonzero(weight_n[order].cumsum() >= coverage - _EXACT)
    highest = float(misfit_n[order[reached[0]]]) if len(reached) else math.inf
    return Threshold(highest=highest if math.isfinite(highest) else None, slides=len(count_G))


def calibrate(
    kind: Kind, output_nK: Floats, label_n: Labels, groups: Sequence[str], coverage: float = 0.9
) -> Conformal:
    """Thresholds from labelled patches that trained nothing.

    A slide's label is that of all its patches, or their mean value; where classes differ within a slide, slides have no
    threshold. Nor have they where no group has two patches: their slides are unknown then.

    Args:
        kind: Of the target.
        output_nK: Probabilities, after the temperature, or values (n, 1).
        label_n: The true classes or values, all known.
        groups: Slide of each patch.
        coverage: To be reached.
    """
    _, slide_n = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    patch = find_threshold(measure_label_misfits(kind, output_nK, label_n), slide_n, coverage)
    output_GK, label_G = average_slides(output_nK, slide_n), average_slides(label_n.astype(np.float64), slide_n)
    slide = None
    if len(label_G) < len(label_n) and (kind == "number" or np.array_equal(label_G[slide_n], label_n)):
        misfit_G = measure_label_misfits(kind, output_GK, label_G)
        slide = find_threshold(misfit_G, np.arange(len(label_G)), coverage)
    return Conformal(coverage=coverage, kind=kind, patch=patch, slide=slide)


def average_slides(value_n: Floats, slide_n: Ints) -> Floats:
    """(G, ...): the mean of each slide's patches, (n, ...); `slide_n` numbers the slides from 0 to G - 1."""
    count_G = np.bincount(slide_n)
    sum_G = np.zeros((len(count_G), *value_n.shape[1:]))
    np.add.at(sum_G, slide_n, value_n)
    return sum_G / count_G.reshape(-1, *[1] * (value_n.ndim - 1))


class Coverage(Record):
    """What label sets are worth on labelled patches, or slides; a mean over slides, each counting once.

    An interval tells how the mean varies with the slides that are scored; that of the calibration is not in it.
    """

    coverage: Interval
    """Share of sets that hold the true label."""
    size: Interval
    """Classes in a set, or the width of an interval in the label's unit; None where one is infinite."""
    single: Interval | None
    """Share of sets of one class; None of a number."""
    by_class: Many[Interval]
    """Share of sets that hold the true label, by true class. It is not promised, and says where sets fail."""


def measure_sets(set_nK: Bools, label_n: Ints, groups: Sequence[str], resamples: int, seed: int) -> Coverage:
    """How often `Conformal.find_sets` holds the true classes, and how large it is, with intervals over slides."""
    held_n, size_n = set_nK[np.arange(len(label_n)), label_n], set_nK.sum(1)

    def over_slides(value_n: NDArray[np.generic], rows: Bools) -> Interval:
        names = [groups[row] for row in np.flatnonzero(rows).tolist()]
        return _average_over_slides(value_n[rows].astype(np.float64), names, resamples, seed)

    everywhere = np.ones(len(label_n), np.bool_)
    return Coverage(
        coverage=over_slides(held_n, everywhere),
        size=over_slides(size_n, everywhere),
        single=over_slides(size_n == 1, everywhere),
        by_class=tuple(over_slides(held_n, label_n == number) for number in range(set_nK.shape[1])),
    )


def measure_intervals(
    interval_n2: Floats, label_n: Floats, groups: Sequence[str], resamples: int, seed: int
) -> Coverage:
    """How often `Conformal.find_intervals` holds the true values, and how wide it is, with intervals over slides."""
    low_n, high_n = interval_n2.T
    held_n = ((low_n <= label_n) & (label_n <= high_n)).astype(np.float64)
    held, width = (_average_over_slides(of_n, groups, resamples, seed) for of_n in (held_n, high_n - low_n))
    return Coverage(coverage=held, size=width, single=None, by_class=())


def _average_over_slides(value_n: Floats, groups: Sequence[str], resamples: int, seed: int) -> Interval:
    names, slide_n = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if not len(names) or not np.isfinite(value_n).all():
        return Interval(value=None, low=None, high=None)
    mean_G = average_slides(value_n, slide_n)
    if len(names) == 1:
        return Interval(value=float(mean_G[0]), low=None, high=None)
    weight_RG = np.vstack([np.ones(len(names)), *draws(len(names), resamples, seed, resamples)])
    return interval(weight_RG @ mean_G / len(names), len(names))
