"""Slides and seeds, resampled jointly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.metrics import Interval, Predictions, interval, score
from lgd.report.ablation_table import compare_rows, draw_mean, share_of_gap


def answers(seed, skill=0.5, slides=12, patches=5, name="x"):
    """Predictions on slides of one level each: right with a chance of `skill`, else any level."""
    dice, said = np.random.default_rng([7, 1]), np.random.default_rng([seed, 2])
    level = np.repeat(dice.permutation(slides) % 4, patches)
    called = np.where(said.random(len(level)) < skill, level, said.integers(4, size=len(level)))
    probability = np.full((len(level), 4), 0.1)
    probability[np.arange(len(level)), called] = 0.7
    groups = [f"slide-{n // patches}" for n in range(len(level))]
    keys = [f"{n:03d}" for n in range(len(level))]
    return Predictions(name=name, keys=keys, groups=groups, level=level, probability=probability)


def test_the_mean_is_that_of_the_seeds_and_the_interval_is_of_slides_and_seeds():
    runs = [answers(seed, skill) for seed, skill in enumerate((0.2, 0.5, 0.8))]
    found = interval(draw_mean(runs, "accuracy", 2000, seed=0))
    each = [score(run.level, run.probability)["accuracy"] for run in runs]
    assert found.value == pytest.approx(np.mean(each))
    # Naive: draw slides and seeds, score, average.
    dice = np.random.default_rng(5)
    groups = np.array(runs[0].groups)
    names = np.unique(groups)
    samples = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(groups == name) for name in dice.choice(names, len(names))])
        taken = [runs[n] for n in dice.integers(3, size=3)]
        samples.append(np.mean([(run.probability[rows].argmax(1) == run.level[rows]).mean() for run in taken]))
    low, high = np.percentile(samples, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)
    # Wider than over the slides alone, since these seeds differ much.
    alone = interval(draw_mean([runs[1]] * 3, "accuracy", 2000, seed=0))
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


@given(st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=20)
def test_a_method_does_not_differ_from_itself(seeds, seed):
    runs = [answers(number) for number in range(seeds)]
    rows = dict.fromkeys(("LGD-Net", "H&E-only", "IHC teacher", "other"), runs)
    compared, _ = compare_rows(rows, 50, seed)
    assert compared["other"]["kappa"].lgd_minus == Interval(value=0.0, low=0.0, high=0.0)
    assert compared["LGD-Net"]["kappa"].lgd_minus is None


def test_a_difference_is_paired_and_finds_what_intervals_of_each_would_not():
    worse = [answers(seed, 0.5) for seed in range(5)]
    better = []
    for run in worse:
        probability = run.probability.copy()
        # One more patch of each slide is right.
        rows = np.arange(0, len(run.level), 5)
        probability[rows] = 0.1
        probability[rows, run.level[rows]] = 0.7
        better.append(Predictions(name="y", keys=run.keys, groups=run.groups, level=run.level, probability=probability))
    drawn = [draw_mean(runs, "accuracy", 500, 0) for runs in (better, worse)]
    found, one, other = map(interval, (drawn[0] - drawn[1], *drawn))
    assert found.low > 0 and found.value == pytest.approx(one.value - other.value)
    assert found.high - found.low < other.high - other.low


def test_the_gap_is_0_at_the_least_and_1_at_the_most():
    runs = [answers(seed, 0.3) for seed in range(3)], [answers(9, 0.95)], [answers(seed, 0.65) for seed in range(3)]
    least, most, middle = (draw_mean(some, "kappa", 300, 0) for some in runs)
    assert interval(share_of_gap(least, least, most)).value == 0
    assert interval(share_of_gap(most, least, most)).value == 1
    half = interval(share_of_gap(middle, least, most))
    assert 0.2 < half.low <= half.value <= half.high < 0.9
    assert interval(share_of_gap(least, most, least)).value is None


def test_other_patches_are_refused():
    with pytest.raises(DataError, match="do not hold the same patches"):
        compare_rows({"LGD-Net": [answers(0)], "H&E-only": [answers(0, slides=11)]}, 10, 0)
