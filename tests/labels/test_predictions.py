"""Answers to any target: what is refused, and values with intervals over groups."""

import numpy as np
import pytest
from drawn_answers import ALL, GRADE, HER2, KI67, SUBTYPE, draw_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from lgd.base.errors import DataError
from lgd.base.labels import as_labels
from lgd.labels import predictions as module
from lgd.labels.predictions import Predictions, bootstrap, check_same, paired_differences, score_with_intervals
from lgd.metrics import Interval

TARGETS = pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)


def make(label, output, groups=None, target=HER2):
    keys = [f"k{row}" for row in range(len(label))]
    return Predictions(
        target=target,
        name="model",
        keys=keys,
        groups=keys if groups is None else list(groups),
        label=np.asarray(label, np.float64 if target.is_number else np.int64),
        output=np.asarray(output, np.float64),
    )


@settings(max_examples=30)
@given(
    st.sampled_from([HER2, KI67, SUBTYPE]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("abc")), min_size=1, max_size=12),
)
def test_the_bootstrap_equals_scoring_the_resampled_patches(target, rows):
    label, said, groups = (list(column) for column in zip(*rows, strict=True))
    output = 0.1 + 0.6 * np.eye(target.width)[said] if not target.is_number else 10.0 * np.array(said)[:, None]
    if not target.is_number:
        output /= output.sum(1, keepdims=True)
    p = make(label, output, groups, target)
    names, found, whole = sorted(set(groups)), bootstrap(p, 3, seed=5), p.measures.score(p.label, p.output)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(whole, nan_ok=True)
    if len(names) < 2:
        assert all(np.isnan(values[1:]).all() for values in found.values())
        return
    drawn = np.random.default_rng(5).integers(len(names), size=(3, len(names)))
    for row, chosen in enumerate(drawn, 1):
        patches = [i for g in chosen for i in range(len(label)) if groups[i] == names[g]]
        expected = p.measures.score(p.label[patches], p.output[patches])
        for name, values in found.items():
            if not np.isnan(values[1:]).all():  # too few groups, tested below; or undefined in all three
                assert values[row] == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name


def test_the_bootstrap_agrees_with_scikit_learn_on_weights():
    p = draw_answers(HER2, slides=20, each=10)
    found = {name: values[1:] for name, values in bootstrap(p, 5, seed=1).items()}
    drawn, names = np.random.default_rng(1).integers(20, size=(5, 20)), sorted(set(p.groups))
    for row, chosen in enumerate(drawn):
        weight = np.array([(chosen == names.index(group)).sum() for group in p.groups])
        kappa = sk.cohen_kappa_score(p.label, p.answer, weights="quadratic", sample_weight=weight)
        assert found["kappa"][row] == pytest.approx(kappa, abs=1e-12)
        labels = np.unique([*p.label[weight > 0], *p.answer[weight > 0]])
        f1 = sk.f1_score(p.label, p.answer, average="macro", sample_weight=weight, labels=labels)
        assert found["macro_f1"][row] == pytest.approx(f1, abs=1e-12)
        auc = sk.roc_auc_score(p.label == 3, p.output[:, 3], sample_weight=weight)
        assert found["auc_3_vs_rest"][row] == pytest.approx(auc, abs=1e-12)


@TARGETS
def test_blocks_of_resamples_change_nothing(target, monkeypatch):
    p = draw_answers(target)
    whole = bootstrap(p, 50, seed=2)
    monkeypatch.setattr(module, "_BLOCK", 7 * len(p.keys))
    for name, values in bootstrap(p, 50, seed=2).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)


@TARGETS
def test_intervals_hold_their_value_and_are_reproducible(target):
    p = draw_answers(target)
    found = score_with_intervals(p, 200, seed=3)
    assert tuple(found) == p.measures.names
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())
    assert found[p.measures.main].low < found[p.measures.main].high
    assert found == score_with_intervals(p, 200, seed=3) != score_with_intervals(p, 200, seed=4)


@TARGETS
@pytest.mark.filterwarnings("error")
def test_nothing_is_scored_without_a_label(target):
    p = draw_answers(target).without_labels()
    assert not p.known.any() and p.labelled().keys == [] and p.labelled_groups == 0
    for interval in score_with_intervals(p, 20, seed=0).values():
        assert interval == Interval(value=None, low=None, high=None)


def test_an_interval_that_misses_its_value_is_widened():
    said = np.tile([0.55, 0.65, 0.75, 0.85], 20)  # each confidence is right as often as it says
    right = np.concatenate([np.arange(20) < share * 20 for share in said[:4]]).reshape(4, 20).T.ravel()
    calibrated = make(np.where(right, 0, 1), np.stack([said, 1 - said, 0 * said, 0 * said], axis=1))
    found = score_with_intervals(calibrated, 200, seed=0)["ece"]
    assert found.low == found.value == pytest.approx(0)
    assert np.percentile(bootstrap(calibrated, 200, 0)["ece"][1:], 2.5) > 0.01


def test_groups_are_resampled_whole():
    right = np.repeat([0, 1] * 5, 20)  # 10 groups, each all right or all wrong
    said, slides = np.where(right, 2, 0), np.repeat(np.arange(10), 20).astype(str)
    by_group, by_patch = (make(np.full(200, 2), np.eye(4)[said], groups) for groups in (slides, None))
    width = [
        found["accuracy"].high - found["accuracy"].low
        for found in (score_with_intervals(one, 500, seed=0) for one in (by_group, by_patch))
    ]
    # Standard errors: sqrt(.25 / 10) and sqrt(.25 / 200).
    assert width[0] == pytest.approx(2 * 1.96 * 0.158, rel=0.2)
    assert width[1] == pytest.approx(2 * 1.96 * 0.0354, rel=0.2)


def test_a_class_of_one_group_has_no_interval():
    groups, label = ["a"] * 5 + ["b", "c"] * 5, [0] * 5 + [1, 2] * 5
    found = score_with_intervals(make(label, np.eye(4)[label], groups), 50, seed=0)
    for name in ("sensitivity_0", "auc_0_vs_rest", "auc_low"):
        assert found[name].value == 1
        assert found[name].low is None, name
    assert found["accuracy"] == Interval(value=1, low=1, high=1)


@pytest.mark.parametrize(("target", "metric"), [(HER2, "brier"), (KI67, "mae")], ids=["HER2", "Ki67"])
def test_paired_difference_sees_the_same_groups(target, metric):
    a, b = (draw_answers(target, name=name, skill=skill) for name, skill in (("a", 1.0), ("b", 2.0)))
    assert paired_differences(a, a, [metric], 50, seed=0)[metric] == Interval(value=0, low=0, high=0)
    found = paired_differences(a, b, [metric], 200, seed=0)[metric]
    samples = bootstrap(a, 200, 0)[metric] - bootstrap(b, 200, 0)[metric]
    assert found.value == samples[0]
    # The percentiles that Student's t asks for so few groups, by scipy's other implementation of it.
    groups = len(set(a.groups))
    tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, groups - 1) * np.sqrt(groups / (groups - 1)))
    assert tail < 2.5
    assert [found.low, found.high] == pytest.approx(np.percentile(samples[1:], [tail, 100 - tail]).tolist())


def test_other_patches_labels_or_targets_are_not_compared():
    a = draw_answers(HER2)
    short, other = draw_answers(HER2, slides=11, name="c"), draw_answers(GRADE, name="c")
    flipped = make(3 - a.label, a.output, a.groups)
    for one in (short, other, flipped):
        with pytest.raises(DataError, match="do not hold the same patches"):
            check_same(a, one)
    holed = draw_answers(KI67, label=[1.0, np.nan])
    check_same(holed, holed)


@pytest.mark.parametrize(
    ("label", "output", "target", "match"),
    [
        ([0, 1], np.full((3, 4), 0.25), HER2, "one group, level and row a key"),
        ([0, 1], np.full((2, 4), 0.25), GRADE, "one group, label and row a key"),
        ([4], np.full((1, 4), 0.25), HER2, "a level is outside -1"),
        ([-2], np.full((1, 4), 0.25), HER2, "a level is outside -1"),
        ([0, 1], [[0.25] * 4, [np.nan] * 4], HER2, "of k1 are not probabilities"),
        ([0], [[0.5] * 4], HER2, "of k0 are not probabilities"),
        ([0], [[1.5, -0.5, 0, 0]], HER2, "of k0 are not probabilities"),
        ([1.0, np.inf], [[1.0], [2.0]], KI67, "a value is not finite"),
        ([1.0, 2.0], [[1.0], [np.inf]], KI67, "of k1 is no finite number"),
        ([1.0], [[np.nan]], KI67, "of k0 is no finite number"),
        ([1.0], [1.0], KI67, "one group, value and row a key"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(label, output, target, match):
    with pytest.raises(DataError, match=match):
        make(label, output, target=target)


@TARGETS
def test_a_network_that_saw_no_label_has_no_answers(target):
    nothing = np.full((2, target.width), np.nan)
    unknown = as_labels(target, [None, None])
    assert not make(unknown, nothing, target=target).known.any()
    with pytest.raises(DataError, match="of k0"):
        make(as_labels(target, [None, 1]), nothing, target=target)


@TARGETS
def test_labels_of_json_are_read(target):
    label_n = as_labels(target, [None, 1, 0])
    assert label_n.dtype == (np.float64 if target.is_number else np.int64)
    assert [target.name_label(label) for label in label_n.tolist()] == [
        target.name_label(label) for label in (None, 1, 0)
    ]
    assert as_labels(target, []).shape == (0,)


def test_of_equal_classes_the_lower_is_the_answer_and_a_value_is_its_own():
    assert make([0], [[0.25] * 4]).answer.tolist() == [0]
    assert make([1.0], [[7.5]], target=KI67).answer.tolist() == [7.5]


def test_rows_are_chosen_with_all_that_is_known_of_them():
    p = draw_answers(KI67, label=[1.0, np.nan, 3.0], groups="abc", sites={"center": ["A", "B", ""]})
    known = p.labelled()
    assert (known.keys, known.groups, known.sites) == (["patch-0", "patch-2"], ["a", "c"], {"center": ["A", ""]})
    np.testing.assert_array_equal(known.output, p.output[[0, 2]])
