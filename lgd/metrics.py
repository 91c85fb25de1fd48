"""Pure numbers: a value with its interval, from resampled groups and several trainings.

What is measured of answers to a target stands in `lgd.labels`. Patches of one slide are not independent, so every
interval resamples groups (slides, or source patches where slides are unknown) with all of their patches.

Shapes: n patches, G groups, R resamples, S trainings.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lgd.base.records import Measured, Record

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Interval(Record):
    """A value and its 95 % interval; None where they are undefined."""

    value: Measured
    low: Measured
    high: Measured


def draws(groups: int, resamples: int, seed: int, block: int) -> Iterator[Floats]:
    """Blocks of (R, G) counts of how often each group was drawn; every row sums to G."""
    random = np.random.default_rng(seed)
    block = max(1, block)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)


def interval(drawn: Floats, groups: int, level: float = 0.95) -> Interval:
    """A value and its interval, of 95 % or another level, over groups and over trainings.

    Over groups it is the percentile interval, at the percentiles that Student's t asks for so few (Hesterberg 2015, the
    expanded one); over S trainings Student's t with S - 1 degrees of freedom. Both add as squares (Zou and Donner 2008,
    MOVER). How trainings differ on single groups is in the spread of trainings already, and is taken out of that of
    groups. tools/studies/coverage.py measures what it covers. Of one training the interval is over groups alone. It is
    widened to hold the value; a resample in which any training has NaN is left out.

    Args:
        drawn: The value, and after it that of each resample, as of `bootstrap` or the difference of two such: (1 + R,);
            or a row for each training, (S, 1 + R), whose mean is the value.
        groups: How many groups were resampled.
        level: Of the interval.
    """
    drawn_SR = np.atleast_2d(drawn)
    value, samples_SR = float(drawn_SR[:, 0].mean()), drawn_SR[:, 1:]
    samples_SR = samples_SR[:, ~np.isnan(samples_SR).any(axis=0)]
    if np.isnan(value) or not samples_SR.shape[1]:
        return Interval(value=value, low=None, high=None)
    from scipy.special import ndtr, stdtrit

    trainings, mean_R, upper = len(drawn_SR), samples_SR.mean(axis=0), 0.5 + level / 2
    shared, spread = 1.0, 0.0
    if trainings > 1:
        single = (samples_SR - mean_R).var(axis=1).sum() / (trainings * (trainings - 1))
        shared = np.sqrt(max(0.0, 1 - single / max(mean_R.var(), 1e-300)))
        spread = stdtrit(trainings - 1, upper) * drawn_SR[:, 0].std(ddof=1) / np.sqrt(trainings)
    tail = 100 * ndtr(-stdtrit(groups - 1, upper) * np.sqrt(groups / (groups - 1)))
    low, high = np.percentile(mean_R, [tail, 100 - tail])
    below, above = (float(np.hypot(shared * max(0.0, side), spread)) for side in (value - low, high - value))
    return Interval(value=value, low=value - below, high=value + above)
