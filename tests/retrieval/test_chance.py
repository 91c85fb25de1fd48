"""What chance would give, against drawing blindly."""

import re

import numpy as np
import pytest

from lgd.base.target import find_target
from lgd.retrieval.answers import Answer, Hit
from lgd.retrieval.chance import describe_chance

HER2, KI67 = find_target("her2"), find_target("ki67")


def answer(target, labels):
    fields = {"slide": None, "split": "train", "part": 0, "distance": 0.1}
    hits = [Hit(key=str(row), row=row, label=label, **fields) for row, label in enumerate(labels)]
    return Answer(known=target, neighbours=hits)


def read_percent(sentence):
    return float(re.search(r"in ([\d.]+) % of cases$", sentence)[1])


@pytest.mark.parametrize(
    ("labels", "winner", "alike"),
    [
        (["3+", "3+", "3+", "0", "2+"], "3+", 3),
        (["1+", "1+", None, "0"], "1+", 2),
        (["0"], "0", 1),
        (["2+", "1+", "1+", "2+"], "2+", 2),
    ],
)
def test_classes_are_as_common_among_rows_that_are_drawn(labels, winner, alike):
    random = np.random.default_rng(0)
    label_m = random.choice([-1, 0, 1, 2, 3], 150, p=[0.1, 0.4, 0.2, 0.2, 0.1])
    sentence = describe_chance(answer(HER2, labels), label_m)
    known_m = label_m[label_m >= 0]
    n = len([label for label in labels if label])
    drawn = random.random((20_000, len(known_m))).argpartition(n - 1, axis=1)[:, :n]
    naive = ((known_m[drawn] == HER2.classes.index(winner)).sum(1) >= alike).mean()
    assert sentence.startswith(f"{alike} of {n} neighbours are {winner}; {n} drawn blindly have as many of that in ")
    assert read_percent(sentence) == pytest.approx(100 * naive, abs=1.2)


def test_values_are_as_alike_among_rows_that_are_drawn():
    random = np.random.default_rng(0)
    value_m = np.r_[random.uniform(0, 90, 120), [np.nan] * 30]
    values = [20.0, 28.0, 33.0, None, 41.0]
    sentence = describe_chance(answer(KI67, values), value_m)
    spread = np.std([20, 28, 33, 41])
    naive = np.mean([np.std(random.choice(value_m[:120], 4)) <= spread for _ in range(5000)])
    assert sentence.startswith(f"the values of 4 neighbours have a standard deviation of {spread:.3g}; 4 drawn blindly")
    assert read_percent(sentence) == pytest.approx(100 * naive, abs=2)


def test_what_is_rare_and_what_is_certain():
    rare = np.array([3] * 5 + [0] * 995)
    assert "in less than 0.1 % of cases" in describe_chance(answer(HER2, ["3+"] * 5), rare)
    assert describe_chance(answer(HER2, ["0"]), np.zeros(10)).endswith("in 100 % of cases")


@pytest.mark.parametrize(
    ("target", "labels", "label_m"),
    [
        (HER2, [], [0, 1]),
        (HER2, [None, None], [0, 1]),
        (HER2, ["0", "0", "0"], [0, 0, -1]),
        (KI67, [30.0], [1.0, 2.0]),
    ],
)
def test_of_too_few_labels_nothing_is_said(target, labels, label_m):
    assert describe_chance(answer(target, labels), np.array(label_m)) is None
