"""The metrics of classes against their definitions, for targets of any kind and size."""

import numpy as np
import pytest
from drawn_answers import ALL, GRADE, HER2, STATUS, SUBTYPE, draw_answers

from lgd.base.target import Target
from lgd.labels.classes import bin_confidences, count_confusion
from lgd.labels.predictions import find_measures

CLASSES = [target for target in ALL if not target.is_number]


def draw_some(target, n=60, groups=12, seed=0, skill=1.0, name="model"):
    """Random answers; classes differ within a group."""
    random = np.random.default_rng(seed)
    label, noise = random.integers(0, target.width, n), random.normal(size=(n, target.width))
    odds = np.exp(noise + skill * np.eye(target.width)[label])
    # Rounding makes ties, which an AUC has to count.
    output = np.round(odds / odds.sum(1, keepdims=True), 2)
    return label, output / output.sum(1, keepdims=True)


def score_slowly(target, label, output):
    """Every metric from its definition."""
    said, width = [int(np.argmax(row)) for row in output], target.width
    pairs = list(zip(label, said, strict=True))
    n = len(pairs)
    values = {"accuracy": sum(t == s for t, s in pairs) / n}

    def apart(t, s):
        return (t - s) ** 2 if target.kind == "ordinal" else t != s

    observed = sum(apart(t, s) for t, s in pairs) / n
    expected = sum(apart(t, s) for t in label for s in said) / n**2
    values["kappa"] = 1 - observed / expected if expected else np.nan
    if target.kind == "ordinal" and width > 2:
        values["within_one"] = sum(abs(t - s) <= 1 for t, s in pairs) / n
    f1 = []
    for k in range(width):
        hit, true, answers = pairs.count((k, k)), list(label).count(k), said.count(k)
        values[f"sensitivity_{k}"] = hit / true if true else np.nan
        f1 += [2 * hit / (true + answers)] if true + answers else []
    values["macro_f1"] = sum(f1) / len(f1)
    for name, (_, positives) in target.group_titles.items():
        scores = output[:, list(positives)].sum(1)
        above = [s for s, t in zip(scores, label, strict=True) if t in positives]
        below = [s for s, t in zip(scores, label, strict=True) if t not in positives]
        wins = [(a > b) + 0.5 * (a == b) for a in above for b in below]
        values[f"auc_{name}"] = sum(wins) / len(wins) if wins else np.nan
    values["brier"] = sum((output[i][k] - (k == label[i])) ** 2 for i in range(n) for k in range(width)) / n
    values["ece"] = 0.0
    for b in range(10):
        inside = [i for i in range(n) if min(int(max(output[i]) * 10), 9) == b]
        values["ece"] += abs(sum((said[i] == label[i]) - max(output[i]) for i in inside)) / n
    return values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", CLASSES, ids=lambda target: target.name)
def test_scores_equal_their_definitions(target, seed):
    label, output = draw_some(target, n=40, seed=seed)
    measures = find_measures(target)
    found = measures.score(label, output)
    assert tuple(found) == measures.names
    assert found == pytest.approx(score_slowly(target, label, output), nan_ok=True, abs=1e-12)


def test_the_metrics_of_her2_have_their_names():
    assert find_measures(HER2).names == (
        *("accuracy", "macro_f1", "kappa", "within_one"),
        *(f"sensitivity_{level}" for level in range(4)),
        *("auc_0_vs_rest", "auc_3_vs_rest", "auc_low", "ece", "brier"),
    )
    assert find_measures(HER2).headline == {
        "accuracy": "accuracy",
        "kappa": "quadratic weighted kappa",
        "macro_f1": "macro-F1",
        "within_one": "within one level",
        "ece": "ECE",
    }


@pytest.mark.parametrize(
    ("target", "kappa", "groups"),
    [
        (GRADE, "quadratic weighted kappa", ["from_1", "from_2", "from_3", "from_4"]),
        (STATUS, "quadratic weighted kappa", ["from_1"]),
        (SUBTYPE, "Cohen's kappa", ["0_vs_rest", "1_vs_rest", "2_vs_rest"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_kind_decides_kappa_and_groups(target, kappa, groups):
    measures = find_measures(target)
    assert measures.headline["kappa"] == kappa
    assert [*measures.groups] == [f"auc_{group}" for group in groups]
    assert ("within_one" in measures.names) == (target is GRADE)


def test_of_two_classes_weighting_changes_no_kappa():
    binary = Target(name="two", kind="class", classes=("a", "b"), unit=None)
    label, output = draw_some(STATUS)
    ordered, nominal = (find_measures(target).score(label, output) for target in (STATUS, binary))
    assert ordered["kappa"] == pytest.approx(nominal["kappa"])
    assert ordered["auc_from_1"] == pytest.approx(nominal["auc_from_1"])


@pytest.mark.parametrize("target", CLASSES, ids=lambda target: target.name)
def test_a_perfect_predictor_scores_perfectly_and_a_blind_one_like_chance(target):
    measures, width = find_measures(target), target.width
    label = np.arange(10 * width) % width
    found = measures.score(label, np.eye(width)[label])
    for name in measures.names:
        assert found[name] == (0 if name in measures.lower_is_better else 1), name
    blind = np.arange(1, width + 1) / sum(range(1, width + 1))
    found = measures.score(label, np.tile(blind, (len(label), 1)))
    assert found["kappa"] == pytest.approx(0) and found["accuracy"] == 1 / width
    assert {found[name] for name in measures.groups} == {0.5}
    assert found["ece"] == pytest.approx(blind[-1] - 1 / width)
    assert (found[f"sensitivity_{width - 1}"], found["sensitivity_0"]) == (1, 0)


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_nan_and_says_nothing():
    measures = find_measures(HER2)
    alone = measures.score(np.full(5, 2), np.tile([0.0, 0.0, 1.0, 0.0], (5, 1)))
    undefined = {name for name, value in alone.items() if np.isnan(value)}
    assert undefined == {"kappa", "auc_0_vs_rest", "auc_3_vs_rest", "auc_low", *(f"sensitivity_{k}" for k in (0, 1, 3))}
    assert np.isnan([*measures.score(np.full(2, -1), np.full((2, 4), 0.25)).values()]).all()


def test_patches_without_a_label_are_left_out():
    label, output = draw_some(HER2)
    holed = np.where(np.arange(60) % 3 == 0, -1, label)
    keep, measures = np.flatnonzero(holed >= 0), find_measures(HER2)
    assert measures.score(holed, output) == measures.score(label[keep], output[keep])
    assert count_confusion(holed, output.argmax(1), 4).sum() == len(keep)


def test_a_confusion_matrix_has_a_row_a_true_class():
    counts = count_confusion(np.array([0, 0, 2, -1]), np.array([1, 0, 2, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    drawn = draw_answers(GRADE)
    assert count_confusion(drawn.label, drawn.answer, 5).shape == (5, 5)


def test_confidence_bins_hold_their_lower_edge():
    confidence = [0.25, 0.3, 0.5, 0.95, 1.0]
    rows = [[c, 1 - c, 0, 0] if c >= 0.5 else [c, c, 0.5 - c, 0.5 - c] for c in confidence]
    assert bin_confidences(np.array(rows)).tolist() == [2, 3, 5, 9, 9]
