from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.metrics import ANSWERS, Predictions, paired_differences, score
from lgd.report.slides import by_area, by_slide, score_model

ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=60)


def predictions(rows, level=2, sure=0.7):
    """Patches of (slide, called level), each called with the same confidence; all slides have one level."""
    groups, called = [row[0] for row in rows], np.array([row[1] for row in rows])
    other = (1 - sure) / 3
    return Predictions(
        name="model",
        keys=[f"k{n}" for n in range(len(rows))],
        groups=groups,
        level=np.full(len(rows), level),
        probability=other + (sure - other) * np.eye(4)[called],
    )


@given(ROWS)
def test_the_area_equals_its_definition(rows):
    slides = by_area(predictions(rows))
    assert slides.keys == sorted({group for group, _ in rows})
    for slide, answer in zip(slides.keys, slides.predicted, strict=True):
        called = [level for group, level in rows if group == slide]
        reached = [level for level in range(4) if 10 * sum(c >= level for c in called) > len(called)]
        assert answer == max(reached)
    np.testing.assert_array_equal(slides.probability, np.eye(4)[slides.predicted])


@given(ROWS, st.randoms(use_true_random=False), st.integers(2, 4))
def test_order_and_copies_of_all_patches_change_nothing(rows, random, copies):
    more = rows * copies
    random.shuffle(more)
    for way in (by_area, by_slide):
        once, again = way(predictions(rows)), way(predictions(more))
        assert once.keys == again.keys
        np.testing.assert_allclose(again.probability, once.probability, atol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_slide_of_one_patch_has_the_level_of_the_patch(called):
    patches = predictions([(f"s{n}", level) for n, level in enumerate(called)])
    assert by_area(patches).predicted.tolist() == by_slide(patches).predicted.tolist() == called


@pytest.mark.parametrize(("low", "high", "level"), [(9, 1, 0), (8, 1, 3), (18, 2, 0), (17, 2, 3), (90, 10, 0)])
def test_exactly_a_tenth_is_not_more_than_a_tenth(low, high, level):
    assert by_area(predictions([("a", 0)] * low + [("a", 3)] * high)).predicted.tolist() == [level]


def test_levels_above_add_up():
    # 8 % are called 2+ and 8 % 3+: neither alone, but 16 % reach 2+.
    slides = by_area(predictions([("a", 0)] * 21 + [("a", 2)] * 2 + [("a", 3)] * 2))
    assert slides.predicted.tolist() == [2] and slides.level.tolist() == [2]


def test_score_model_are_scored_and_compared():
    random = np.random.default_rng(0)
    level = np.arange(12) % 4
    patches = [(f"s{s:02}", int(np.clip(level[s] + random.integers(-1, 2), 0, 3))) for s in range(12) for _ in range(9)]
    p = predictions(patches)
    p = Predictions(name="m", keys=p.keys, groups=p.groups, level=np.repeat(level, 9), probability=p.probability)
    found = score_model(p, 50, 0)
    assert found.no_slides is None
    assert tuple(found.by_area.metrics) == tuple(found.area_minus_mean) == ANSWERS
    assert "ece" in found.by_slide.metrics and "ece" not in found.by_area.metrics
    area, mean = by_area(p), by_slide(p)
    values = score(area.level, area.probability)
    assert all(found.by_area.metrics[name].value == values[name] for name in ANSWERS)
    assert found.area_minus_mean["kappa"] == paired_differences(area, mean, ["kappa"], 50, 0)["kappa"]
    assert found.area_minus_mean["accuracy"].value < 0, "upward errors weigh more by area"
    assert found.by_area.one_patch_decides == 12
    assert found.by_area.scored == found.by_slide.scored == 12


def test_slides_in_which_one_patch_decides_are_counted():
    rows = [(slide, 0) for slide, count in (("a", 9), ("b", 10), ("c", 1)) for _ in range(count)]
    assert score_model(predictions(rows), 10, 0).by_area.one_patch_decides == 2


def test_slides_of_two_levels_are_not_scored():
    p = predictions([("a", 0), ("a", 1), ("b", 1)])
    mixed = Predictions(name="m", keys=p.keys, groups=p.groups, level=np.array([0, 1, -1]), probability=p.probability)
    with pytest.raises(DataError, match="like a"):
        by_area(mixed)
    found = score_model(mixed, 10, 0)
    assert found.by_slide is found.by_area is found.area_minus_mean is None
    assert "patches of different levels, like a" in found.no_slides


def test_by_slide_takes_the_mean_and_the_level():
    probability = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    level = np.array([1, -1, 3, -1])
    p = Predictions(name="m", keys=list("wxyz"), groups=list("bbac"), level=level, probability=probability)
    slides = by_slide(p)
    assert slides.keys == slides.groups == ["a", "b", "c"]
    assert slides.level.tolist() == [3, 1, -1]
    np.testing.assert_array_equal(slides.probability, [[0, 0, 0, 1], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    with pytest.raises(DataError, match="1 of 3 slides have patches of different levels, like b"):
        by_slide(replace(p, level=np.array([1, 2, 3, -1])))
