"""The study of coverage in small: the intervals hold it where resampling slides and trainings jointly does not."""

import numpy as np
import pytest

from lgd.base.target import find_target
from lgd.cli import run_command
from lgd.labels.classes import count_confusion
from lgd.labels.predictions import find_measures
from tools.studies import coverage


def held(cell):
    share, width = map(float, cell.split(", "))
    return share, width


@pytest.mark.parametrize("trainings", [3, 5])
@pytest.mark.parametrize("kind", coverage.SINGLE)
def test_intervals_hold_their_coverage_where_trainings_differ(trainings, kind):
    cases = coverage.draw_scores(coverage.SINGLE[kind], trainings, 1.0, 400, seed=17)
    (found, width), (before, narrow) = map(held, coverage.measure(cases))
    assert 0.92 <= found <= 0.99 and before < 0.9 and narrow < width < 2.5


def test_other_levels_hold_theirs():
    for level, least, most in ((0.5, 0.42, 0.62), (0.975, 0.955, 1.0)):
        found, _ = held(coverage.measure(coverage.draw_scores(2.0, 5, 1.0, 400, seed=17), level)[0])
        assert least <= found <= most, level


def test_a_metric_of_drawn_levels_is_the_one_of_reports():
    random = np.random.default_rng(0)
    level, said = random.integers(4, size=(2, 90))
    counts = count_confusion(level, said, 4).astype(float)
    expected = find_measures(find_target("her2")).score(level, np.eye(4)[said])
    for metric in ("kappa", "accuracy"):
        assert coverage.score_counts(metric, counts) == pytest.approx(expected[metric])


@pytest.mark.parametrize("metric", ["kappa", "accuracy"])
def test_the_true_value_is_that_of_many_slides(metric, monkeypatch):
    monkeypatch.setattr(coverage, "SLIDES", 4000)
    monkeypatch.setattr(coverage, "draw_weights", lambda resamples, seed: np.ones((1, 4000)))
    noise = coverage.find_noise(metric, False, 0.05)
    assert coverage.expect(metric, noise, 1.0)[1] == pytest.approx(0.05)
    drawn = [(values.mean(), truth) for values, truth in coverage.draw_metric(metric, False, 50, noise, 8, seed=3)]
    values, truths = np.transpose(drawn)
    assert values.mean() == pytest.approx(truths[0], abs=4 * 0.05 / np.sqrt(400) + 0.005)


def test_it_prints_a_row_for_each_cell(capsys):
    assert run_command("coverage", coverage.run, ["--draws=2", "--trainings=3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 3 ")]
    assert len(rows) == 14
