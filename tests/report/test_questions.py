"""Probes of frozen features: what they answer, and how that is scored."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score

from lgd.base.errors import DataError
from lgd.metrics import draws
from lgd.report.questions import DRAWS, Question, answer_by_probes, draw_rows, read_questions, score_answers

STEPS = np.arange(4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key\na\n", "has no column beside key"),
        ("key,share\na,\nb,\n", "column share is empty"),
        ("key,share\na,1\nb,much\n", "row 3: column share is 'much': give a number"),
        ("key,share\na,1\nb,nan\n", "row 3: column share is 'nan': give a number"),
        ("key,share\na,1\nb,inf\n", "row 3: column share is 'inf': give a number"),
        ("key,share\na,1\na,2\n", "row 3: key 'a' is there more than once"),
        ("name,share\na,1\n", "has no column key"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path, text, said):
    (tmp_path / "asked.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read_questions(tmp_path / "asked.csv")


def test_answers_are_read_and_steps_are_found(tmp_path):
    (tmp_path / "asked.csv").write_text("key,share,level,years\na,0.5,3,1\nb,,0,11\nc,2,1,\n")
    share, level, years = read_questions(tmp_path / "asked.csv")
    assert (share.answers, share.steps, share.measures) == ({"a": 0.5, "c": 2.0}, None, ("r2",))
    assert (level.steps.tolist(), level.measures) == ([0, 1, 3], ("kappa", "auc"))
    assert Question("many", {str(n): float(n) for n in range(11)}).steps is None
    assert Question("one", {"a": 1.0, "b": 1.0}).steps is None
    assert years.find(["b", "x", "a"]).tolist()[::2] == [11, 1] and np.isnan(years.find(["x"])).all()


def test_patches_are_drawn_alike_and_only_where_the_answer_is_known():
    known_m = np.arange(50) % 3 > 0
    drawn = [row_n.tolist() for row_n in draw_rows(known_m, 12, 7)]
    assert drawn == [row_n.tolist() for row_n in draw_rows(known_m, 12, 7)]
    assert len(drawn) == DRAWS and len({*map(tuple, drawn)}) == DRAWS
    assert all(len({*rows}) == 12 and known_m[rows].all() for rows in drawn)
    assert drawn != [row_n.tolist() for row_n in draw_rows(known_m, 12, 8)]


def test_probes_answer_what_features_know_and_no_more():
    dice = np.random.default_rng(0)
    features_nF, scale_F = dice.normal(size=(400, 30)), np.logspace(-4, 4, 30)
    answer_n2 = np.stack([features_nF[:, 0] - 2 * features_nF[:, 1], dice.normal(size=400)], 1)
    answer_n2[:5] = np.nan
    given = features_nF[:300] * scale_F, features_nF[300:] * scale_F, answer_n2[:300]
    said_UtQ = answer_by_probes(*given, 100, 3)
    assert said_UtQ.shape == (DRAWS, 100, 2)
    knows, not_ = (r2_score(answer_n2[300:, number], said_UtQ[..., number].mean(0)) for number in (0, 1))
    assert knows > 0.95 and not_ < 0.05
    # A feature that never changes, and others' units, change nothing.
    constant = [np.concatenate([some * 1e6, np.full((len(some), 1), 5.0)], 1) for some in given[:2]]
    assert np.allclose(answer_by_probes(*constant, given[2], 100, 3), said_UtQ, atol=1e-6)


def test_measures_are_those_of_the_field_and_of_each_resample():
    dice = np.random.default_rng(1)
    groups = [f"slide-{number}" for number in dice.integers(12, size=90)]
    answer_t = dice.integers(4, size=90).astype(np.float64)
    said_Ut = answer_t + dice.normal(0, 0.8, (3, 90))
    said_Ut[:, ::7] = said_Ut[:, :1]
    resamples, seed = 20, 5
    names, group_t = np.unique(groups, return_inverse=True)
    quantity = score_answers(said_Ut, answer_t, groups, None, resamples, seed)
    steps = score_answers(said_Ut, answer_t, groups, STEPS, resamples, seed)
    (counts,) = draws(len(names), resamples, seed, 100)
    for number, count_G in enumerate([np.ones(len(names), int), *counts.astype(int)]):
        rows = np.repeat(np.arange(90), count_G[group_t])
        true, few = answer_t[rows], rows[answer_t[rows] < 2]
        expected = [
            (
                r2_score(true, said_t[rows]),
                cohen_kappa_score(true, said_t[rows].round().clip(0, 3), weights="quadratic"),
                roc_auc_score(answer_t[few], said_t[few]),
            )
            for said_t in said_Ut
        ]
        found = quantity["r2"][number], steps["kappa"][number], steps["auc"][number]
        assert found == pytest.approx(np.mean(expected, axis=0))


def test_a_measure_of_one_answer_is_undefined():
    groups, same_t = ["a", "a", "b", "b"], np.ones(4)
    assert np.isnan(score_answers(np.zeros((2, 4)), same_t, groups, None, 5, 0)["r2"]).all()
    assert np.isnan(score_answers(np.zeros((2, 4)), same_t, groups, STEPS, 5, 0)["auc"]).all()
