"""The ranks of the study of losses, its arms, and its table of known numbers."""

import numpy as np
import pytest

from tools.studies.losses import ARMS, configure, draw_ranks, format_study


def test_each_resample_has_its_own_median_and_share():
    dice = np.random.default_rng(0)
    rank_n, groups = dice.integers(1, 40, 60).astype(float), [f"slide-{number // 6}" for number in range(60)]
    drawn = draw_ranks(rank_n, groups)
    assert {name: len(values) for name, values in drawn.items()} == {
        "median rank": 1001,
        "own IHC in the first 10": 1001,
    }
    assert drawn["median rank"][0] == np.sort(rank_n)[29], "the lower one of the two in the middle"
    assert drawn["own IHC in the first 10"][0] == np.mean(rank_n <= 10)
    names = sorted(set(groups))
    first_G = np.random.default_rng(0).integers(10, size=(1000, 10))[0]
    again_n = np.concatenate([rank_n[[group == names[drawn] for group in groups]] for drawn in first_G])
    assert drawn["median rank"][1] == np.sort(again_n)[29]
    assert drawn["own IHC in the first 10"][1] == pytest.approx(np.mean(again_n <= 10))


def test_arms_differ_in_fields_of_the_student_alone(tmp_path):
    (first, usual), *others = {arm: configure(str(tmp_path), arm, 1) for arm in ARMS}.items()
    assert first == "today" and usual.run.seed == 2
    for _, other in others:
        assert other.student != usual.student
        assert (other.run, other.teacher, other.train, other.latents) == (
            usual.run,
            usual.teacher,
            usual.train,
            usual.latents,
        )


def test_differences_are_paired_by_training_and_resample():
    drawn_SR = np.random.default_rng(1).normal(0.5, 0.1, (3, 200))
    arms = {"today": {"kappa": drawn_SR}, "other": {"kappa": drawn_SR + 0.25}}
    lines = format_study(arms, 12)
    assert lines[-2 if not lines[-1] else -1].replace(" ", "") == "|otherminustoday|+0.250[+0.250,+0.250]|"
