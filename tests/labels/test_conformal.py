"""Label sets against their definitions, and what they promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.labels.conformal import (
    Conformal,
    Coverage,
    Threshold,
    calibrate,
    count_needed_slides,
    find_threshold,
    measure_intervals,
    measure_label_misfits,
    measure_misfits,
    measure_sets,
)


def make(kind, highest, slide=None):
    found = None if slide is None else Threshold(highest=slide, slides=30)
    return Conformal(coverage=0.9, kind=kind, patch=Threshold(highest=highest, slides=30), slide=found)


@st.composite
def probabilities(draw):
    """Rows with ties, zeros, certainty and the rounding of a softmax in bf16."""
    count = draw(st.integers(2, 9))
    weights = st.lists(st.sampled_from([0.0, 1e-30, 0.004, 0.1, 0.25, 1 / 3, 1.0, 7.0]), min_size=count, max_size=count)
    rows = np.array(draw(st.lists(weights, min_size=1, max_size=4)))
    rows[rows.sum(1) == 0, draw(st.integers(0, count - 1))] = 1
    return rows / rows.sum(1, keepdims=True) * draw(st.sampled_from([1.0, 0.996, 1.004]))


@given(probabilities())
def test_the_misfit_of_an_ordinal_is_its_ranked_probability_score(probability_nK):
    for row, found in zip(probability_nK, measure_misfits("ordinal", probability_nK), strict=True):
        for label in range(len(row)):
            expected = sum((sum(row[: bound + 1]) - (label <= bound)) ** 2 for bound in range(len(row) - 1))
            assert found[label] == pytest.approx(expected, abs=1e-12)


@given(probabilities(), st.floats(0, 3) | st.sampled_from([0.0, 1.0, 0.25, 1e-9]))
def test_a_set_of_an_ordinal_has_no_gap_and_holds_the_most_probable_class(probability_nK, highest):
    set_nK = make("ordinal", highest).find_sets(probability_nK)
    for inside, row, misfit in zip(set_nK, probability_nK, measure_misfits("ordinal", probability_nK), strict=True):
        first, last = np.flatnonzero(inside)[[0, -1]]
        assert inside[first : last + 1].all() and inside[row.argmax()] and inside[misfit <= highest].all()


@given(probabilities(), st.sampled_from(["ordinal", "class"]), st.lists(st.floats(0, 3), min_size=2, max_size=2))
def test_sets_grow_with_the_threshold(probability_nK, kind, two):
    small, large = (make(kind, one).find_sets(probability_nK) for one in sorted(two))
    assert (small <= large).all()


def test_a_set_bridges_the_median_and_the_most_probable_class():
    """The median class is 1 and the most probable one 3: neither alone, and no gap."""
    probability = np.array([[0.3, 0.25, 0.1, 0.35]])
    lowest = float(measure_misfits("ordinal", probability).min())
    assert make("ordinal", lowest).find_sets(probability).tolist() == [[False, True, True, True]]
    assert make("ordinal", 0.0).find_sets(probability).tolist() == [[False, False, False, True]]


def test_a_set_of_classes_without_order_may_leave_out_one_between():
    found = make("class", 0.65).find_sets(np.array([[0.45, 0.1, 0.45], [0.34, 0.33, 0.33]]))
    assert found.tolist() == [[True, False, True], [True, False, False]]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=25),
    st.sampled_from([Fraction(1, 2), Fraction(4, 5), Fraction(9, 10), Fraction(19, 20)]),
)
def test_a_threshold_is_the_quantile_of_slides_that_weigh_alike(misfits, coverage):
    flat = [(one, number) for number, slide in enumerate(misfits) for one in slide]
    shares = {
        bound: sum(Fraction(one <= bound, len(slide)) for slide in misfits for one in slide) / (len(misfits) + 1)
        for bound in range(7)
    }
    expected = min((bound for bound in shares if shares[bound] >= coverage), default=None)
    order = np.random.default_rng(0).permutation(len(flat))
    misfit_n, slide_n = np.array(flat, np.float64)[order].T
    found = find_threshold(misfit_n, slide_n.astype(np.int64), float(coverage))
    assert (found.highest, found.slides) == (expected, len(misfits))
    assert (found.highest is None) == (len(misfits) < count_needed_slides(float(coverage)))


@pytest.mark.parametrize(("coverage", "slides"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.3, 1)])
def test_so_many_slides_are_needed(coverage, slides):
    assert count_needed_slides(coverage) == slides


def test_one_large_slide_weighs_no_more_than_a_small_one():
    """Pooled, the 1000 patches of the first slide would set the threshold."""
    misfit_n = np.r_[np.zeros(1000), np.arange(1.0, 20.0)]
    slide_n = np.r_[np.zeros(1000), np.arange(1, 20)].astype(np.int64)
    assert find_threshold(misfit_n, slide_n, 0.9).highest == 18


def draw_slides(kind, slides, random, patches=(2, 7)):
    """Patches of slides that err together: outputs, labels, groups."""
    slide_n = np.repeat(np.arange(slides), random.integers(*patches, size=slides))
    label_n = random.integers(3, size=slides)[slide_n]
    seen_n = label_n + random.normal(size=slides)[slide_n] + 0.5 * random.normal(size=len(slide_n))
    groups = [f"slide-{number}" for number in slide_n]
    if kind == "number":
        return seen_n[:, None], label_n + 0.2 * random.normal(size=len(slide_n)), groups
    weight_nK = np.exp(-((seen_n[:, None] - np.arange(3)) ** 2))
    return weight_nK / weight_nK.sum(1, keepdims=True), label_n, groups


@pytest.mark.parametrize("kind", ["ordinal", "class", "number"])
def test_too_few_slides_give_every_label_and_the_reason(kind):
    output, label, groups = draw_slides(kind, 8, np.random.default_rng(1))
    found = calibrate(kind, output, label, groups)
    assert found.patch == found.slide == Threshold(highest=None, slides=8)
    for by in ("patch", "slide"):
        assert "8 labelled slides" in found.explain_size(by) and "90 % needs 9 or more" in found.explain_size(by)
        if kind == "number":
            assert found.find_intervals(output[:, 0], by).tolist() == [[-math.inf, math.inf]] * len(output)
            assert found.find_intervals(output[:, 0], by, (0.0, 9.0)).tolist() == [[0.0, 9.0]] * len(output)
        else:
            assert found.find_sets(output, by).all()
    nine = calibrate(kind, *draw_slides(kind, 9, np.random.default_rng(1)))
    assert nine.patch.highest is not None and nine.explain_size() is None and nine.explain_size("slide") is None


def test_a_slide_has_the_mean_of_its_patches():
    output, label, groups = draw_slides("class", 40, np.random.default_rng(2))
    names = sorted(set(groups))
    rows = [[row for row, group in enumerate(groups) if group == name] for name in names]
    misfits = sorted(1 - output[some].mean(0)[label[some[0]]] for some in rows)
    found = calibrate("class", output, label, groups)
    # The smallest k of which k / 41 reaches 0.9.
    assert found.slide.highest == pytest.approx(misfits[37 - 1], abs=1e-15) and found.slide.slides == 40


@pytest.mark.parametrize("kind", ["ordinal", "class"])
def test_slides_without_a_label_of_their_own_have_no_sets(kind):
    output, label, groups = draw_slides(kind, 12, np.random.default_rng(3))
    mixed = label.copy()
    mixed[0] = (mixed[0] + 1) % 3
    assert calibrate(kind, output, mixed, groups).slide is None
    assert calibrate(kind, output, label, [f"{row}" for row in range(len(label))]).slide is None
    assert calibrate(kind, output, mixed, groups).explain_size("slide") is None


def test_answers_that_are_no_number_have_the_whole_set_and_calibrate_as_infinitely_wrong():
    broken = np.array([[np.nan, np.nan, np.nan], [0.0, 1.0, 0.0]])
    for kind in ("ordinal", "class"):
        assert make(kind, 0.1).find_sets(broken).tolist() == [[True] * 3, [False, True, False]]
        assert measure_label_misfits(kind, broken, np.array([0, 1])).tolist() == [math.inf, 0.0]
    assert make("number", 1.0).find_intervals(np.array([np.nan, 5.0, -math.inf]), bounds=(0.0, 10.0)).tolist() == [
        [0.0, 10.0],
        [4.0, 6.0],
        [0.0, 10.0],
    ]
    assert find_threshold(np.full(20, math.inf), np.arange(20), 0.9) == Threshold(highest=None, slides=20)


def test_an_interval_is_cut_to_what_is_possible():
    found = make("number", 5.0, slide=1.0)
    assert found.find_intervals(np.array([2.0, 120.0]), bounds=(0.0, 100.0)).tolist() == [[0.0, 7.0], [100.0, 100.0]]
    assert found.find_intervals(np.array([2.0]), "slide").tolist() == [[1.0, 3.0]]


def test_a_record_is_read_back_equal():
    for one in (make("ordinal", 0.1 + 0.2), make("number", None, slide=2.5)):
        assert Conformal.from_json(one.as_json()) == one
    with pytest.raises(ValueError, match="patch.highest"):
        Conformal.from_json(make("class", 0.5).as_json() | {"patch": {"highest": -1.0, "slides": 3}})


def test_coverage_and_size_are_means_over_slides():
    set_nK = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]], bool)
    found = measure_sets(set_nK, np.array([0, 0, 1, 2]), ["a", "a", "a", "b"], 200, 0)
    assert found.coverage.value == pytest.approx((2 / 3 + 1) / 2) and found.coverage.low <= found.coverage.value
    assert found.size.value == pytest.approx((4 / 3 + 3) / 2)
    assert found.single.value == pytest.approx((2 / 3 + 0) / 2)
    assert [one.value for one in found.by_class] == [1, 0, 1] and found.by_class[0].low is None
    assert Coverage.from_json(found.as_json()) == found
    found = measure_intervals(np.array([[0, 2], [0, 4], [1, 1.0]]), np.array([2, 5, 1.0]), ["a", "a", "b"], 200, 0)
    assert found.coverage.value == pytest.approx(0.75) and found.size.value == pytest.approx(1.5)
    assert found.single is None and found.by_class == ()
    wide = measure_intervals(np.array([[-math.inf, math.inf]] * 2), np.zeros(2), ["a", "b"], 200, 0)
    assert wide.coverage.value == 1 and wide.size.value is None


@pytest.mark.parametrize("kind", ["ordinal", "class", "number"])
def test_new_slides_are_covered_by_patch_and_by_slide(kind):
    """Of 60 calibrations with 20 slides each: 0.9 or more, and not much more."""
    random, held = np.random.default_rng(4), {"patch": [], "slide": []}
    for _ in range(60):
        found = calibrate(kind, *draw_slides(kind, 20, random))
        output, label, groups = draw_slides(kind, 60, random)
        _, slide_n = np.unique(groups, return_inverse=True)
        mean = [np.array([one[slide_n == slide].mean(0) for slide in range(60)]) for one in (output, label)]
        for by, (of, true, names) in {"patch": (output, label, groups), "slide": (*mean, list(range(60)))}.items():
            if kind == "number":
                one = measure_intervals(found.find_intervals(of[:, 0], by), true, names, 2, 0)
            else:
                one = measure_sets(found.find_sets(of, by), true.astype(int), names, 2, 0)
            held[by].append(one.coverage.value)
    for shares in held.values():
        error = np.std(shares) / np.sqrt(60)
        assert 0.9 - 2.5 * error < np.mean(shares) < 0.9 + 1 / 21 + 2.5 * error
