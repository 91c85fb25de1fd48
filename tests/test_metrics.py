import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from lgd import metrics
from lgd.base.errors import DataError
from lgd.metrics import METRICS, Predictions, bootstrap, score


def predictions(level, probability, groups=None, name="model"):
    keys = [f"k{row}" for row in range(len(level))]
    return Predictions(
        name=name,
        keys=keys,
        groups=keys if groups is None else list(groups),
        level=np.asarray(level, np.int64),
        probability=np.asarray(probability, np.float64),
    )


def some(n=60, groups=12, seed=0, skill=1.0, name="model"):
    """Random predictions; patch levels differ within a group."""
    random = np.random.default_rng(seed)
    level = random.integers(0, 4, n)
    logits = np.random.default_rng(seed + 1).normal(size=(n, 4)) + skill * np.eye(4)[level]
    # Rounding makes ties, which an AUC has to count.
    probability = np.round(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 2)
    return predictions(
        level, probability / probability.sum(1, keepdims=True), [f"g{r % groups}" for r in range(n)], name
    )


def twin(level, probability):
    """Every metric the slow way, from its definition."""
    said = [int(np.argmax(row)) for row in probability]
    pairs = list(zip(level, said, strict=True))
    n = len(pairs)
    values = {"accuracy": sum(t == s for t, s in pairs) / n, "within_one": sum(abs(t - s) <= 1 for t, s in pairs) / n}
    observed = sum((t - s) ** 2 for t, s in pairs) / n
    expected = sum((t - s) ** 2 for t in level for s in said) / n**2
    values["kappa"] = 1 - observed / expected if expected else np.nan
    f1 = []
    for k in range(4):
        hit, true, answers = pairs.count((k, k)), list(level).count(k), said.count(k)
        values[f"sensitivity_{k}"] = hit / true if true else np.nan
        f1 += [2 * hit / (true + answers)] if true + answers else []
    values["macro_f1"] = sum(f1) / len(f1)
    for name, positives in {"auc_0_vs_rest": [0], "auc_3_vs_rest": [3], "auc_low": [1, 2]}.items():
        scores = probability[:, positives].sum(1)
        above = [s for s, t in zip(scores, level, strict=True) if t in positives]
        below = [s for s, t in zip(scores, level, strict=True) if t not in positives]
        wins = [(a > b) + 0.5 * (a == b) for a in above for b in below]
        values[name] = sum(wins) / len(wins) if wins else np.nan
    values["brier"] = sum((probability[i][k] - (k == level[i])) ** 2 for i in range(n) for k in range(4)) / n
    values["ece"] = 0.0
    for b in range(10):
        inside = [i for i in range(n) if min(int(max(probability[i]) * 10), 9) == b]
        gap = sum((said[i] == level[i]) - max(probability[i]) for i in inside)
        values["ece"] += abs(gap) / n
    return values


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_their_definitions(seed):
    p = some(n=40, seed=seed)
    found, expected = score(p.level, p.probability), twin(p.level, p.probability)
    assert tuple(found) == METRICS
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-12)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=12)
)
def test_the_bootstrap_equals_scoring_the_resampled_patches(rows):
    level, said, groups = (list(column) for column in zip(*rows, strict=True))
    probability = 0.1 + 0.6 * np.eye(4)[said]
    p = predictions(level, probability, groups)
    names = sorted(set(groups))
    found = bootstrap(p, 3, seed=5)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(twin(level, probability), nan_ok=True)
    samples = {name: values[1:] for name, values in found.items()}
    if len(names) < 2:
        assert all(np.isnan(values).all() for values in samples.values())
        return
    drawn = np.random.default_rng(5).integers(len(names), size=(3, len(names)))
    for row, chosen in enumerate(drawn):
        patches = [i for g in chosen for i in range(len(level)) if groups[i] == names[g]]
        expected = twin(np.array(level)[patches], probability[patches])
        for name in METRICS:
            value = samples[name][row]
            if np.isnan(samples[name]).all():  # too few groups, tested below; or undefined in all three
                continue
            assert value == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name


def test_the_bootstrap_agrees_with_scikit_learn_on_weights():
    p = some(n=200, groups=20)
    samples = {name: values[1:] for name, values in bootstrap(p, 5, seed=1).items()}
    drawn = np.random.default_rng(1).integers(20, size=(5, 20))
    names = sorted(set(p.groups))
    for row, chosen in enumerate(drawn):
        weight = np.array([(chosen == names.index(group)).sum() for group in p.groups])
        kappa = sk.cohen_kappa_score(p.level, p.predicted, weights="quadratic", sample_weight=weight)
        assert samples["kappa"][row] == pytest.approx(kappa, abs=1e-12)
        f1 = sk.f1_score(p.level, p.predicted, average="macro", sample_weight=weight)
        assert samples["macro_f1"][row] == pytest.approx(f1, abs=1e-12)
        auc = sk.roc_auc_score(p.level == 3, p.probability[:, 3], sample_weight=weight)
        assert samples["auc_3_vs_rest"][row] == pytest.approx(auc, abs=1e-12)


def test_blocks_of_resamples_change_nothing(monkeypatch):
    p = some()
    whole = bootstrap(p, 50, seed=2)
    monkeypatch.setattr(metrics, "_BLOCK", 7 * len(p.keys))
    for name, values in bootstrap(p, 50, seed=2).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)


def test_a_perfect_predictor_scores_perfectly():
    level = np.arange(40) % 4
    found = score(level, np.eye(4)[level])
    for name in METRICS:
        assert found[name] == (0 if name in ("ece", "brier") else 1), name


def test_a_blind_predictor_scores_like_chance():
    level = np.arange(400) % 4
    found = score(level, np.tile([0.1, 0.2, 0.3, 0.4], (400, 1)))
    assert found["kappa"] == 0
    assert found["auc_0_vs_rest"] == found["auc_low"] == 0.5
    assert found["accuracy"] == 0.25
    assert found["ece"] == pytest.approx(0.15)
    assert (found["sensitivity_3"], found["sensitivity_0"]) == (1, 0)


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_nan_and_says_nothing():
    alone = score(np.full(5, 2), np.tile([0.0, 0.0, 1.0, 0.0], (5, 1)))
    undefined = {name for name, value in alone.items() if np.isnan(value)}
    assert undefined == {"kappa", "auc_0_vs_rest", "auc_3_vs_rest", "auc_low", *(f"sensitivity_{k}" for k in (0, 1, 3))}
    nothing = predictions([-1, -1], np.full((2, 4), 0.25))
    assert np.isnan(list(score(nothing.level, nothing.probability).values())).all()
    for interval in metrics.score_with_intervals(nothing, 20, seed=0).values():
        assert interval == metrics.Interval(value=None, low=None, high=None)


def test_patches_of_unknown_level_are_left_out():
    p = some()
    holed = predictions(np.where(np.arange(60) % 3 == 0, -1, p.level), p.probability, p.groups)
    keep = np.flatnonzero(holed.level >= 0)
    assert score(holed.level, holed.probability) == score(p.level[keep], p.probability[keep])
    assert holed.labelled().keys == [f"k{row}" for row in keep]
    assert metrics.confusion(holed.level, holed.predicted).sum() == len(keep)


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_their_value_and_are_reproducible(seed):
    p = some(seed=seed)
    found = metrics.score_with_intervals(p, 200, seed=3)
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())
    assert found["accuracy"].low < found["accuracy"].high
    assert found == metrics.score_with_intervals(p, 200, seed=3)
    assert found != metrics.score_with_intervals(p, 200, seed=4)


def test_an_interval_that_misses_its_value_is_widened():
    said = np.tile([0.55, 0.65, 0.75, 0.85], 20)  # each confidence is right as often as it says
    right = np.concatenate([np.arange(20) < share * 20 for share in said[:4]]).reshape(4, 20).T.ravel()
    probability = np.stack([said, 1 - said, 0 * said, 0 * said], axis=1)
    calibrated = predictions(np.where(right, 0, 1), probability)
    found = metrics.score_with_intervals(calibrated, 200, seed=0)["ece"]
    assert found.low == found.value == pytest.approx(0)
    assert np.percentile(bootstrap(calibrated, 200, 0)["ece"][1:], 2.5) > 0.01


def test_groups_are_resampled_whole():
    right = np.repeat([0, 1] * 5, 20)  # 10 groups, each all right or all wrong
    said = np.where(right, 2, 0)
    slides = np.repeat(np.arange(10), 20).astype(str)
    by_group = metrics.score_with_intervals(predictions(np.full(200, 2), np.eye(4)[said], slides), 500, seed=0)
    by_patch = metrics.score_with_intervals(predictions(np.full(200, 2), np.eye(4)[said]), 500, seed=0)
    width = [found["accuracy"].high - found["accuracy"].low for found in (by_group, by_patch)]
    # Standard errors: sqrt(.25 / 10) and sqrt(.25 / 200).
    assert width[0] == pytest.approx(2 * 1.96 * 0.158, rel=0.2)
    assert width[1] == pytest.approx(2 * 1.96 * 0.0354, rel=0.2)


def test_a_level_of_one_group_has_no_interval():
    groups = ["a"] * 5 + ["b", "c"] * 5
    level = [0] * 5 + [1, 2] * 5
    found = metrics.score_with_intervals(predictions(level, np.eye(4)[level], groups), 50, seed=0)
    for name in ("sensitivity_0", "auc_0_vs_rest", "auc_low"):
        assert found[name].value == 1
        assert found[name].low is None, name
    assert found["accuracy"] == metrics.Interval(value=1, low=1, high=1)


def test_paired_difference_sees_the_same_groups():
    a, b = some(skill=1.0, name="a"), some(skill=2.0, name="b")
    assert metrics.paired_differences(a, a, ["kappa"], 50, seed=0)["kappa"] == metrics.Interval(value=0, low=0, high=0)
    found = metrics.paired_differences(a, b, ["brier"], 200, seed=0)["brier"]
    samples = (bootstrap(a, 200, 0)["brier"] - bootstrap(b, 200, 0)["brier"])[1:]
    assert found.value == score(a.level, a.probability)["brier"] - score(b.level, b.probability)["brier"]
    # The percentiles that Student's t asks for so few groups, by scipy's other implementation of it.
    groups = len(set(a.groups))
    tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, groups - 1) * np.sqrt(groups / (groups - 1)))
    assert tail < 2.5
    assert [found.low, found.high] == pytest.approx(np.percentile(samples, [tail, 100 - tail]).tolist())
    alone = metrics.score_with_intervals(a, 200, seed=0)["brier"]
    assert found.high - found.low < alone.high - alone.low
    with pytest.raises(DataError, match="a and c do not hold the same patches"):
        metrics.paired_differences(a, some(n=59, name="c"), ["kappa"], 10, seed=0)["kappa"]


def test_predictions_that_cannot_be_scored_are_refused():
    with pytest.raises(DataError, match="one group, level and row a key"):
        predictions([0, 1], np.full((3, 4), 0.25))
    with pytest.raises(DataError, match="outside -1"):
        predictions([4], np.full((1, 4), 0.25))
    with pytest.raises(DataError, match="of k1 are not probabilities"):
        predictions([0, 1], [[0.25] * 4, [np.nan] * 4])


def test_confidence_bins_hold_their_lower_edge():
    confidence = [0.25, 0.3, 0.5, 0.95, 1.0]
    rows = [[c, 1 - c, 0, 0] if c >= 0.5 else [c, c, 0.5 - c, 0.5 - c] for c in confidence]
    assert metrics.confidence_bins(np.array(rows)).tolist() == [2, 3, 5, 9, 9]
