"""Scores of networks that were trained several times: slides and seeds are resampled jointly.

An interval over slides alone says how far another set of slides would move this one network; one over seeds alone how
far another training would. A claim about a method needs both.

Shapes: S seeds, R resamples.
"""

from collections.abc import Sequence

import numpy as np

from lgd.metrics import Floats, Interval, Predictions, bootstrap, check_same, interval, score


def mean_of(runs: Sequence[Predictions], metric: str, resamples: int, seed: int) -> Interval:
    """The mean of `metric` over the seeds, and its 95 % interval over slides and seeds."""
    return interval(*_drawn(runs, metric, resamples, seed))


def difference(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], metric: str, resamples: int, seed: int
) -> Interval:
    """The mean of ours minus that of theirs; both see the same slides, and the same seeds where both have several."""
    _check(ours, theirs)
    (a, a_R), (b, b_R) = (_drawn(runs, metric, resamples, seed) for runs in (ours, theirs))
    return interval(a - b, a_R - b_R)


def gap_closed(
    ours: Sequence[Predictions],
    least: Sequence[Predictions],
    most: Sequence[Predictions],
    metric: str,
    resamples: int,
    seed: int,
) -> Interval:
    """(ours - least) / (most - least): 0 where nothing is gained, 1 where `most`, such as the teacher, is reached.

    NaN where `most` is not better than `least`; such resamples are left out.
    """
    _check(ours, [*least, *most])
    (a, a_R), (low, low_R), (high, high_R) = (_drawn(runs, metric, resamples, seed) for runs in (ours, least, most))
    gap, gap_R = high - low, high_R - low_R
    with np.errstate(divide="ignore", invalid="ignore"):
        share_R = np.where(gap_R > 0, (a_R - low_R) / gap_R, np.nan)
    return interval((a - low) / gap if gap > 0 else np.nan, share_R)


def _check(ours: Sequence[Predictions], theirs: Sequence[Predictions]) -> None:
    for other in [*ours, *theirs]:
        check_same(ours[0], other)


def _drawn(runs: Sequence[Predictions], metric: str, resamples: int, seed: int) -> tuple[float, Floats]:
    """The mean over the runs, and that of each resample, (R,).

    All runs see the same slides in a resample. Which seeds it takes depends on their number only, so that two methods
    of as many seeds are compared seed by seed.
    """
    values_S = np.array([score(run.level, run.probability)[metric] for run in runs])
    samples_SR = np.stack([bootstrap(run, resamples, seed, [metric])[metric] for run in runs])
    taken_RS = np.random.default_rng([seed, len(runs)]).integers(len(runs), size=(resamples, len(runs)))
    return float(values_S.mean()), samples_SR[taken_RS, np.arange(resamples)[:, None]].mean(axis=1)
