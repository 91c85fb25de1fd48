"""The target of nuclear markers beside the drawn truth: what the study counts, and that it runs."""

import numpy as np
import pytest
import torch

from tools.studies import nuclear


@pytest.fixture(scope="module")
def patch() -> nuclear.Patch:
    return nuclear.draw_patch(5, 1, centers=False)


def test_points_are_matched_one_to_one_and_the_nearest_first():
    first, second = np.array([[0.0, 0], [0, 3], [9, 9]]), np.array([[0.0, 2], [0, 4.5], [30, 30]])
    rows, columns = nuclear.match(first, second, 4.0)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 0)]
    rows, columns = nuclear.match(first, second, 4.6)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert [len(side) for side in nuclear.match(first, np.empty((0, 2)), 4.0)] == [0, 0]


@pytest.mark.parametrize("change", nuclear.CASES)
def test_every_case_keeps_the_nuclei_where_the_image_has_them(patch, change):
    changed = nuclear.CASES[change](patch)
    assert changed.ihc_B3HW.dtype == torch.uint8
    assert (changed.nuclei.yx < changed.ihc_B3HW.shape[-1]).all()
    score = nuclear.score(changed)
    assert sum(score.found) >= 0.6 * sum(score.drawn) and score.right >= 0.9 * sum(score.found)


def test_haze_makes_all_but_the_glass_browner(patch):
    hazy = nuclear.stain_all(patch, 0.3).ihc_B3HW.float()
    paler = hazy.mean((0, 2, 3)) / patch.ihc_B3HW.float().mean((0, 2, 3))
    assert paler[2] < paler[1] < paler[0] < 1 and hazy.amax() == patch.ihc_B3HW.amax()


def test_a_row_sums_up_the_patches():
    score = nuclear.Score((0.5, 0.25), (0.9, 0.8), 8, [(0.5, 0.25)], (3, 5), (3, 6), 7, 1)
    other = score._replace(share=(0.2, 0.25), density=(np.nan, np.nan), drawn=(0, 8), found=(0, 8), right=8, cells=[])
    few = score._replace(nuclei=4)
    row = nuclear.summarise("some", [score, other, few])
    assert row == ["some", "2", "nan", "0.150", "+0.100", "nan", "nan", "+0.10", "1.00, 0.93", "0.12", "0.938"]


def test_the_study_prints_a_row_a_case(capsys):
    assert nuclear.run(["--slides", "2", "--seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 12 + 3
    assert "usual" in lines[2]
