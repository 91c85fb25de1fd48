"""Intervals over slides and seeds."""

from dataclasses import replace

import numpy as np
import pytest
from drawn_answers import ALL, HER2, draw_answers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lgd.base.errors import DataError
from lgd.labels.predictions import Predictions, score_with_intervals
from lgd.metrics import Interval, interval
from lgd.report.ablation_table import AblationDocument, compare_rows, draw_runs, format_ablation, share_of_gap
from lgd.report.results import state_target


def answers(seed, skill=0.5, slides=12, patches=5, name="x"):
    """Predictions on slides of one level each: right with a chance of `skill`, else any level."""
    dice, said = np.random.default_rng([7, 1]), np.random.default_rng([seed, 2])
    level = np.repeat(dice.permutation(slides) % 4, patches)
    called = np.where(said.random(len(level)) < skill, level, said.integers(4, size=len(level)))
    probability = np.full((len(level), 4), 0.1)
    probability[np.arange(len(level)), called] = 0.7
    groups = [f"slide-{n // patches}" for n in range(len(level))]
    keys = [f"{n:03d}" for n in range(len(level))]
    return Predictions(target=HER2, name=name, keys=keys, groups=groups, label=level, output=probability)


def test_the_interval_is_of_slides_and_seeds():
    """A naive twin: the analysis of variance of a score that is a mean, of slides of as many patches each."""
    runs = [answers(seed, skill, slides=80) for seed, skill in enumerate((0.4, 0.5, 0.6, 0.5))]
    found = interval(draw_runs(runs, "accuracy", 4000, seed=0), 80)
    right_SG = np.stack([(run.answer == run.label).reshape(80, 5).mean(axis=1) for run in runs])
    assert found.value == pytest.approx(right_SG.mean())
    residual_SG = right_SG - right_SG.mean(0) - right_SG.mean(1, keepdims=True) + right_SG.mean()
    single = (residual_SG**2).sum() / (3 * 79)
    slides = (4 * right_SG.mean(0).var(ddof=1) - single) / (4 * 80)
    seeds = right_SG.mean(1).var(ddof=1) / 4
    half = np.sqrt(stats.t.ppf(0.975, 79) ** 2 * slides + stats.t.ppf(0.975, 3) ** 2 * seeds)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_seeds_that_agree_leave_the_interval_over_slides():
    runs = [answers(1)] * 3
    alone = score_with_intervals(runs[0], 500, 0, ["kappa"])["kappa"]
    assert interval(draw_runs(runs, "kappa", 500, 0), 12) == alone
    assert interval(draw_runs(runs[:1], "kappa", 500, 0), 12) == alone


def test_few_trainings_that_differ_have_a_wide_interval():
    """Of two it is that of Student's t with one degree of freedom, however many slides there are."""
    runs = [answers(seed, skill, slides=60) for seed, skill in enumerate((0.2, 0.8))]
    one, other = (run.measures.score(run.label, run.output)["accuracy"] for run in runs)
    found = interval(draw_runs(runs, "accuracy", 300, 0), 60)
    assert found.high - found.low >= 12.7 * abs(other - one)


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
        output = run.output.copy()
        # One more patch of each slide is right.
        rows = np.arange(0, len(run.label), 5)
        output[rows] = 0.1
        output[rows, run.label[rows]] = 0.7
        better.append(replace(run, name="y", output=output))
    drawn = [draw_runs(runs, "accuracy", 500, 0) for runs in (better, worse)]
    found, one, other = (interval(values, 12) for values in (drawn[0] - drawn[1], *drawn))
    assert found.low > 0 and found.value == pytest.approx(one.value - other.value)
    assert found.high - found.low < other.high - other.low


def test_the_gap_is_0_at_the_least_and_1_at_the_most():
    runs = [answers(seed, 0.3) for seed in range(3)], [answers(9, 0.95)], [answers(seed, 0.65) for seed in range(3)]
    least, most, middle = (draw_runs(some, "kappa", 300, 0) for some in runs)
    assert interval(share_of_gap(least, least, most), 12).value == pytest.approx(0)
    assert interval(share_of_gap(most, least, most), 12).value == pytest.approx(1)
    half = interval(share_of_gap(middle, least, most), 12)
    assert half.value == pytest.approx((middle[:, 0].mean() - least[:, 0].mean()) / (most[0, 0] - least[:, 0].mean()))
    assert 0.2 < half.low <= half.value <= half.high < 0.9
    assert interval(share_of_gap(least, most, least), 12).value is None


def document_of(seeds, compared, closed, target=None):
    facts = {"seeds": seeds, "resamples": 20, "patches": 60, "groups": 12, "rows": compared, "gap_closed": closed}
    facts |= {"caveats": (), "explained_by_levels": 0.5, "command": "lgd ablate", "shards": (), "teacher": "0" * 64}
    return facts | {"target": target}


@pytest.mark.parametrize(("seeds", "told"), [(1, "of one training each: no difference is shown"), (3, "t, 2 degrees")])
def test_the_table_says_what_its_intervals_are_over(seeds, told):
    rows = {name: [answers(seed) for seed in range(seeds)] for name in ("LGD-Net", "H&E-only", "IHC teacher")}
    compared, closed = compare_rows(rows, 20, 0)
    assert told in format_ablation(AblationDocument(**document_of(seeds, compared, closed)))


def test_other_patches_are_refused():
    with pytest.raises(DataError, match="do not hold the same patches"):
        compare_rows({"LGD-Net": [answers(0)], "H&E-only": [answers(0, slides=11)]}, 10, 0)


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_methods_are_compared_by_the_metrics_of_the_target(target):
    """And the share of the gap that is closed grows where an error falls."""
    skills = {"LGD-Net": 2.0, "H&E-only": 0.5, "IHC teacher": 6.0}
    rows = {name: [draw_answers(target, name, skill, slides=20)] for name, skill in skills.items()}
    compared, closed = compare_rows(rows, 30, 0)
    of_number, of_classes = ["MAE", "Pearson r", "concordance", "Spearman r"], ["kappa", "macro-F1", "accuracy"]
    titles = [*(of_number if target.is_number else of_classes), "LGD-Net minus it"]
    document = AblationDocument(**document_of(1, compared, closed, state_target(target)))
    text = format_ablation(document)
    heads = next(line for line in text.splitlines() if "LGD-Net minus" in line).split("|")[2 : 2 + len(titles)]
    assert all(title in head for title, head in zip(titles, heads, strict=True))
    assert ("lower is better" in text) == target.is_number
    for metric, gap in closed.items():
        ours, least, most = (compared[name][metric].mean.value for name in skills)
        assert gap.value == pytest.approx((ours - least) / (most - least)) and gap.value > 0
    assert ("target" in document.as_json()) == (target is not HER2)
    assert (AblationDocument.from_json(document.as_json()).target or HER2) == target
    soft = "its values explain" if target.is_number else f"its soft {target.label_word}s explain"
    assert soft in text


def test_a_gap_of_errors_is_none_where_the_bound_is_no_better():
    least, most = np.array([[5.0, 5.1]]), np.array([[6.0, 6.1]])
    assert np.isnan(share_of_gap(least, least, most, lower_is_better=True)).all()
    assert share_of_gap(most, most, least, lower_is_better=True).tolist() == [[0, 0]]
