"""The pairs of the study of weights by alignment, and its table of known numbers."""

import numpy as np
from drawn_answers import HER2, draw_answers

from tools.studies.alignment import Trained, draw_means, format_study, misalign


def test_a_third_of_the_training_pairs_have_the_ihc_of_one_another():
    splits = ["test", "train", "train", "train"] * 100
    rows = [
        {"key": f"k{number}", "slide": f"s{number // 5}", "split": split, "level": "2+"}
        for number, split in enumerate(splits)
    ]
    pairs = misalign(rows)
    moved = [pair for pair in pairs if pair["he"].removeprefix("HE") != pair["ihc"].removeprefix("IHC")]
    assert len(moved) == 100 and {pair["split"] for pair in moved} == {"train"}
    assert len({pair["ihc"] for pair in pairs}) == len(pairs), "each IHC stands in one pair"
    stay = [pair["alignment"] for pair in pairs if pair not in moved]
    assert np.mean([pair["alignment"] for pair in moved]) < 0.2 and np.mean(stay) > 3
    assert pairs == misalign(rows)


def test_the_table_holds_means_and_paired_differences():
    said = draw_answers(HER2)
    rank_n = np.arange(1.0, len(said.keys) + 1)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in format_study([Trained(said, rank_n)] * 2, [Trained(said, rank_n - 1)] * 2)
        if line.startswith("|")
    ][2:]
    assert [row[0] for row in cells] == ["without weights", "weights by alignment", "weights minus none"]
    assert cells[2][1].startswith("+0.000 [") and cells[2][4].startswith("-1.000 [")
    assert draw_means([rank_n], said.groups)[0, 0] == rank_n.mean()
