"""The metrics of a number against scipy, scikit-learn and their definitions."""

import numpy as np
import pytest
from drawn_answers import HSCORE, KI67, draw_answers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from lgd.labels.predictions import find_measures

MEASURES = find_measures(KI67)


def score(label, output):
    return MEASURES.score(np.asarray(label, np.float64), np.asarray(output, np.float64)[:, None])


def concord(x, y):
    """Lin's coefficient from its definition."""
    spread = np.mean((x - x.mean()) * (y - y.mean()))
    return 2 * spread / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


@pytest.mark.parametrize(("scale", "origin"), [(1, 0), (1e-7, 0), (1, 1e6), (1e9, -3)])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_those_of_others(seed, scale, origin):
    random = np.random.default_rng(seed)
    # Few distinct values, so that ranks have ties.
    x = origin + scale * random.integers(0, 12, 50)
    y = x + scale * random.integers(-4, 5, 50)
    found = score(x, y)
    assert tuple(found) == MEASURES.names
    expected = {
        "mae": sk.mean_absolute_error(x, y),
        "rmse": sk.root_mean_squared_error(x, y),
        "bias": (y - x).mean(),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "ccc": concord(x, y),
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9), st.randoms())
def test_a_patch_that_counts_twice_is_there_twice(rows, random):
    x, y = (np.array(column, float) for column in zip(*rows, strict=True))
    weight = np.array([random.randint(row == 0, 3) for row in range(len(rows))], float)
    found = MEASURES.rank_patches("spearman", x, y[:, None], weight[None])[0]
    again = np.repeat(np.arange(len(x)), weight.astype(int))
    if len({*x[again]}) < 2 or len({*y[again]}) < 2:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(x[again], y[again]).statistic)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.1, 33.3, 1e6 + 0.1])
def test_what_does_not_vary_has_no_correlation(value):
    varied, alike = np.linspace(0, 300, 7), np.full(7, value)
    for x, y in ((alike, varied), (varied, alike), (alike, alike)):
        found = score(x, y)
        assert np.isnan([found["pearson"], found["spearman"]]).all()
        assert found["mae"] == pytest.approx(abs(x - y).mean())
    assert np.isnan(score(alike, alike)["ccc"])
    assert score(varied, alike)["ccc"] == pytest.approx(0, abs=1e-9)


def test_a_shift_lowers_concordance_alone():
    x = np.linspace(0, 100, 20)
    found = score(x, x + 10)
    assert found["pearson"] == found["spearman"] == pytest.approx(1)
    assert [found["bias"], found["mae"]] == pytest.approx([10, 10]) and found["ccc"] < 0.96


@pytest.mark.filterwarnings("error")
def test_values_that_are_unknown_are_left_out():
    found = score([1.0, np.nan, 3.0], [2.0, 9.0, 5.0])
    assert found["mae"] == 1.5 and found["bias"] == 1.5
    assert np.isnan([*score([np.nan], [1.0]).values()]).all()


def test_the_unit_stands_in_the_headline():
    assert [*MEASURES.headline.values()] == ["MAE (%)", "Pearson r", "Spearman r", "concordance"]
    assert find_measures(HSCORE).headline["mae"] == "MAE"
    assert {name for name in MEASURES.names if name in MEASURES.lower_is_better} == {"mae", "rmse"}


def test_skill_shows_in_each_metric():
    better, worse = (draw_answers(HSCORE, skill=skill) for skill in (4.0, 0.5))
    good, bad = (one.measures.score(one.label, one.output) for one in (better, worse))
    for name in ("mae", "rmse", "pearson", "spearman", "ccc"):
        assert (good[name] < bad[name]) == (name in better.measures.lower_is_better), name
