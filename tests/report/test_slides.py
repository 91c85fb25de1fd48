from dataclasses import replace

import numpy as np
import pytest
from drawn_answers import GRADE, HER2, HSCORE, KI67, STATUS, SUBTYPE, draw_answers
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.labels.predictions import Predictions, paired_differences
from lgd.report.slides import by_area, by_slide, describe_rules, score_model

ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=60)


def predictions(rows, level=2, sure=0.7):
    """Patches of (slide, called level), each called with the same confidence; all slides have one level."""
    groups, called = [row[0] for row in rows], np.array([row[1] for row in rows])
    other = (1 - sure) / 3
    return Predictions(
        target=HER2,
        name="model",
        keys=[f"k{n}" for n in range(len(rows))],
        groups=groups,
        label=np.full(len(rows), level),
        output=other + (sure - other) * np.eye(4)[called],
    )


@given(ROWS)
def test_the_area_equals_its_definition(rows):
    slides = by_area(predictions(rows))
    assert slides.keys == sorted({group for group, _ in rows})
    for slide, answer in zip(slides.keys, slides.answer, strict=True):
        called = [level for group, level in rows if group == slide]
        reached = [level for level in range(4) if 10 * sum(c >= level for c in called) > len(called)]
        assert answer == max(reached)
    np.testing.assert_array_equal(slides.output, np.eye(4)[slides.answer])


@given(ROWS, st.randoms(use_true_random=False), st.integers(2, 4))
def test_order_and_copies_of_all_patches_change_nothing(rows, random, copies):
    more = rows * copies
    random.shuffle(more)
    for way in (by_area, by_slide):
        once, again = way(predictions(rows)), way(predictions(more))
        assert once.keys == again.keys
        np.testing.assert_allclose(again.output, once.output, atol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_slide_of_one_patch_has_the_level_of_the_patch(called):
    patches = predictions([(f"s{n}", level) for n, level in enumerate(called)])
    assert by_area(patches).answer.tolist() == by_slide(patches).answer.tolist() == called


@pytest.mark.parametrize(("low", "high", "level"), [(9, 1, 0), (8, 1, 3), (18, 2, 0), (17, 2, 3), (90, 10, 0)])
def test_exactly_a_tenth_is_not_more_than_a_tenth(low, high, level):
    assert by_area(predictions([("a", 0)] * low + [("a", 3)] * high)).answer.tolist() == [level]


def test_levels_above_add_up():
    # 8 % are called 2+ and 8 % 3+: neither alone, but 16 % reach 2+.
    slides = by_area(predictions([("a", 0)] * 21 + [("a", 2)] * 2 + [("a", 3)] * 2))
    assert slides.answer.tolist() == [2] and slides.label.tolist() == [2]


def test_score_model_are_scored_and_compared():
    random = np.random.default_rng(0)
    level = np.arange(12) % 4
    patches = [(f"s{s:02}", int(np.clip(level[s] + random.integers(-1, 2), 0, 3))) for s in range(12) for _ in range(9)]
    p = predictions(patches)
    p = replace(p, label=np.repeat(level, 9))
    answers = p.measures.answers
    found = score_model(p, 50, 0)
    assert found.no_slides is None
    assert tuple(found.by_area.metrics) == tuple(found.area_minus_mean) == answers
    assert "ece" in found.by_slide.metrics and "ece" not in found.by_area.metrics
    area, mean = by_area(p), by_slide(p)
    values = area.measures.score(area.label, area.output)
    assert all(found.by_area.metrics[name].value == values[name] for name in answers)
    assert found.area_minus_mean["kappa"] == paired_differences(area, mean, ["kappa"], 50, 0)["kappa"]
    assert found.area_minus_mean["accuracy"].value < 0, "upward errors weigh more by area"
    assert found.by_area.one_patch_decides == 12
    assert found.by_area.scored == found.by_slide.scored == 12


def test_slides_in_which_one_patch_decides_are_counted():
    rows = [(slide, 0) for slide, count in (("a", 9), ("b", 10), ("c", 1)) for _ in range(count)]
    assert score_model(predictions(rows), 10, 0).by_area.one_patch_decides == 2


def test_slides_of_two_levels_are_not_scored():
    p = predictions([("a", 0), ("a", 1), ("b", 1)])
    mixed = replace(p, label=np.array([0, 1, -1]))
    with pytest.raises(DataError, match="like a"):
        by_area(mixed)
    found = score_model(mixed, 10, 0)
    assert found.by_slide is found.by_area is found.area_minus_mean is None
    assert "patches of different levels, like a" in found.no_slides


def test_by_slide_takes_the_mean_and_the_level():
    probability = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    level = np.array([1, -1, 3, -1])
    p = draw_answers(HER2, label=level, groups="bbac")
    p = replace(p, output=probability)
    slides = by_slide(p)
    assert slides.keys == slides.groups == ["a", "b", "c"]
    assert slides.label.tolist() == [3, 1, -1]
    np.testing.assert_array_equal(slides.output, [[0, 0, 0, 1], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    with pytest.raises(DataError, match="1 of 3 slides have patches of different levels, like b"):
        by_slide(replace(p, label=np.array([1, 2, 3, -1])))


@pytest.mark.parametrize("target", [GRADE, SUBTYPE, STATUS], ids=lambda target: target.name)
def test_only_a_target_that_states_a_share_is_scored_by_area(target):
    found = score_model(draw_answers(target), 10, 0)
    assert found.by_area is found.area_minus_mean is found.no_slides is None
    assert found.by_slide.scored == 12 and len(found.by_slide.confusion) == target.width
    assert [*describe_rules(target)] == ["by_slide"] and "most probable label" in describe_rules(target)["by_slide"]


def test_the_share_is_that_of_the_target():
    half = HER2.model_copy(update={"name": "other", "area_percent": 50.0})
    few, many = (replace(predictions([("a", 0)] * low + [("a", 3)] * 5), target=half) for low in (5, 4))
    assert by_area(few).answer.tolist() == [0] and by_area(many).answer.tolist() == [3]
    assert "more than 50 %" in describe_rules(half)["by_area"] and "more than 10 %" in describe_rules(HER2)["by_area"]


@pytest.mark.parametrize("target", [KI67, HSCORE], ids=lambda target: target.name)
def test_values_of_a_slide_are_averaged_and_so_are_the_true_ones(target):
    p = draw_answers(target, label=[10.0, 30.0, np.nan, np.nan, 50.0], groups="aaabb")
    slides = by_slide(replace(p, output=np.array([[1.0], [2.0], [9.0], [5.0], [7.0]])))
    assert slides.keys == ["a", "b"] and slides.label.tolist() == [20.0, 50.0]
    assert slides.output.tolist() == [[4.0], [6.0]]
    unknown = by_slide(draw_answers(target, label=[np.nan, np.nan, 1.0], groups="aab"))
    np.testing.assert_array_equal(unknown.label, [np.nan, 1.0])
    found = score_model(draw_answers(target), 20, 0)
    assert found.by_patch.confusion is found.by_slide.confusion is found.by_area is None
    assert found.by_slide.metrics["mae"].value < found.by_patch.metrics["mae"].value


def test_a_slide_has_the_site_that_its_patches_share():
    sites = {"center": ["A", "A", "B", "C", ""], "scanner": [""] * 5}
    slides = by_slide(draw_answers(KI67, label=np.arange(5.0), groups="aabbc", sites=sites))
    assert slides.sites == {"center": ["A", "", ""], "scanner": ["", "", ""]}
