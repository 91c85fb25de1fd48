"""What neighbours are worth, against definitions and enumerations."""

import itertools
import math

import numpy as np
import pytest
from drawn_answers import HER2, draw_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lgd.report.neighbours import average_precision, mean_with_interval, split_by_class, value_differences


def naive(query, level, gallery, levels, k):
    """AP@k of one query, by the words of its definition."""
    rows = [row for row in range(len(levels)) if levels[row] >= 0]
    total = sum(levels[row] == level for row in rows)
    if level < 0 or not total:
        return math.nan
    rows.sort(key=lambda row: -(gallery[row] @ query) / np.linalg.norm(gallery[row]))
    relevant = [levels[row] == level for row in rows[:k]]
    return sum(np.mean(relevant[: i + 1]) for i in range(len(relevant)) if relevant[i]) / min(k, total, len(rows))


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_average_precision_equals_its_definition(k):
    random = np.random.default_rng(k)
    queries, gallery = random.normal(size=(40, 6)), random.normal(size=(35, 6))
    level, levels = random.integers(-1, 4, 40), random.integers(-1, 3, 35)
    found, _ = average_precision(queries, level, gallery, levels, k, 4)
    expected = [naive(q, own, gallery, levels, k) for q, own in zip(queries, level, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isnan(found[level == 3]).all() and np.isnan(found[level == -1]).all()


@given(levels=st.lists(st.integers(0, 1), min_size=1, max_size=6), k=st.integers(1, 7))
@settings(max_examples=40)
def test_chance_is_the_mean_over_all_rankings(levels, k):
    """Vectors on a circle, so that the similarity to the query falls from row to row, in every order of the levels."""
    angle = np.linspace(0.1, 1, len(levels))
    gallery = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    orders = [np.array(order) for order in itertools.permutations(levels)]
    query = np.array([[1.0, 0.0]])
    found = [average_precision(query, np.array([1]), gallery, order, k, 4) for order in orders]
    chances = {round(float(chance[0]), 12) for _, chance in found}
    if 1 not in levels:
        assert math.isnan(found[0][0][0]) and math.isnan(found[0][1][0])
        return
    assert len(chances) == 1
    assert float(found[0][1][0]) == pytest.approx(np.mean([precision[0] for precision, _ in found]))


def test_ties_do_not_follow_the_order_of_the_gallery():
    levels = np.repeat([0, 1, 2, 3], 50)
    found, chance = average_precision(np.ones((4, 2)), np.arange(4), np.ones((200, 2)), levels, 200, 4)
    assert found == pytest.approx(chance, abs=0.1)


def test_without_a_gallery_nothing_is_defined():
    empty = average_precision(np.ones((3, 2)), np.arange(3), np.empty((0, 2)), np.empty(0, np.int64), 10, 4)
    assert np.isnan(empty).all()
    found = split_by_class(*empty, draw_answers(HER2, label=np.arange(3), groups="abc"), 10, 0)
    assert found["overall"].queries == 0
    assert found["overall"].value is found["overall"].low is found["overall"].chance is None


def test_means_by_level_leave_out_what_is_undefined():
    precision = np.array([1.0, 0.5, np.nan, 0.25])
    found = split_by_class(precision, np.full(4, 0.1), draw_answers(HER2, label=[0, 0, 1, 2], groups="abab"), 50, 0)
    assert found["overall"].value == pytest.approx(1.75 / 3)
    assert found["0"].value == 0.75 and found["0"].low == 0.5 and found["0"].high == 1.0
    assert found["1+"].queries == 0 and found["1+"].value is None
    assert found["2+"].value == 0.25 and found["2+"].low is None, "one slide has no interval"
    assert [found[name].queries for name in found] == [3, 2, 0, 1, 0]


def test_the_interval_resamples_groups_as_a_loop_does():
    random = np.random.default_rng(0)
    values, groups = random.normal(size=30), [f"s{row % 15}" for row in range(30)]
    found = mean_with_interval(values, groups, 4000, 0)
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 15, 15)
        means.append(np.concatenate([values[s::15] for s in drawn]).mean())
    # Wider than from 2.5 to 97.5, as Student's t is of 15.
    tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, 14) * np.sqrt(15 / 14))
    low, high = np.percentile(means, [tail, 100 - tail])
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


@pytest.mark.parametrize("k", [1, 3, 100])
def test_differences_of_values_equal_their_definition(k):
    random = np.random.default_rng(k)
    queries, gallery = random.normal(size=(12, 6)), random.normal(size=(15, 6))
    value, values = random.uniform(0, 100, 12), random.uniform(0, 100, 15)
    value[3], values[[2, 7]] = np.nan, np.nan
    found, chance, best = value_differences(queries, value, gallery, values, k)
    rows = [row for row in range(15) if row not in (2, 7)]
    for number, query in enumerate(queries):
        order = sorted(rows, key=lambda row: -(gallery[row] @ query) / np.linalg.norm(gallery[row]))
        less = [abs(values[row] - value[number]) for row in order]
        expected = np.mean(less[:k]), np.mean(less), np.mean(sorted(less)[:k])
        np.testing.assert_allclose([found[number], chance[number], best[number]], expected, rtol=1e-12)
    assert np.isnan(found[3])


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=5), k=st.integers(1, 6))
@settings(max_examples=30)
def test_chance_of_values_is_the_mean_over_all_rankings(values, k):
    angle = np.linspace(0.1, 1, len(values))
    gallery, query = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.array([[1.0, 0.0]])
    found = [
        value_differences(query, np.array([4.0]), gallery, np.array(order, float), k)
        for order in itertools.permutations(values)
    ]
    assert float(found[0][1][0]) == pytest.approx(np.mean([near[0] for near, _, _ in found]))
    assert min(near[0] for near, _, _ in found) == pytest.approx(found[0][2][0])


def test_values_without_a_gallery_are_not_compared():
    for values in (np.empty(0), np.full(2, np.nan)):
        empty = value_differences(np.ones((3, 2)), np.arange(3.0), np.ones((len(values), 2)), values, 10)
        assert np.isnan(empty).all()
