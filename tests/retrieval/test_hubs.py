import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.target import find_target
from lgd.retrieval.answers import Answer, Hit, describe_hubs
from lgd.retrieval.hubs import chance_of_hubs, chance_of_never, count_found, count_hubs, find_hubs


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 250), queries=st.integers(1, 30), k=st.integers(1, 5), seed=st.integers(0, 9))
def test_counts_and_hubs_are_those_of_a_loop(rows, queries, k, seed):
    found = np.random.default_rng(seed).integers(-1, rows, (queries, k))
    counts = count_found(found, rows)
    assert counts.tolist() == [sum(row == one for one in found.ravel().tolist()) for row in range(rows)]
    hubs = find_hubs(counts)
    assert len(set(hubs.tolist())) == len(hubs) == count_hubs(rows) == math.ceil(rows / 100)
    assert counts[hubs].sum() == sum(sorted(counts.tolist(), reverse=True)[: len(hubs)])


def mean_over_all(queries, k, rows):
    """Mean share of the hubs' answers, and of the rows that are never drawn, over everything blind queries can draw."""
    draws = [*itertools.combinations(range(rows), k)]
    shares, nevers = [], []
    for drawn in itertools.product(draws, repeat=queries):
        counts = count_found(np.array(drawn), rows)
        shares.append(counts[find_hubs(counts)].sum() / (queries * k))
        nevers.append((counts == 0).mean())
    return np.mean(shares), np.mean(nevers)


@pytest.mark.parametrize(("queries", "k", "rows"), [(1, 1, 1), (1, 2, 3), (3, 1, 4), (3, 2, 4), (5, 1, 3), (2, 5, 5)])
def test_chance_is_the_mean_over_everything_that_blind_queries_draw(queries, k, rows):
    share, never = mean_over_all(queries, k, rows)
    assert chance_of_never(queries, k, rows) == pytest.approx(never)
    # Rows are not independent of each other, and least so where they are few.
    assert chance_of_hubs(queries, k, rows) == pytest.approx(share, rel=0.35)


@pytest.mark.parametrize(("queries", "k", "rows"), [(50, 1, 100), (216, 1, 216), (216, 10, 216), (60, 10, 720)])
def test_chance_is_the_mean_of_many_drawings(queries, k, rows):
    random = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        counts = count_found(random.random((queries, rows)).argpartition(k - 1, axis=1)[:, :k], rows)
        shares.append(counts[find_hubs(counts)].sum() / (queries * k))
    assert chance_of_hubs(queries, k, rows) == pytest.approx(np.mean(shares), rel=0.02)


HER2 = find_target("her2")


def answer(*rows):
    fields = {"slide": None, "split": "train", "label": None, "part": 0, "distance": 0.1}
    return Answer(known=HER2, image="a.png", neighbours=[Hit(key=str(row), row=row, **fields) for row in rows])


def test_enough_queries_are_told_of_hubs():
    """60 queries of 2 among 120 rows: 40 find row 7 first, and 22 rows are ever found."""
    answers = [answer(7, 8 + number % 20) for number in range(40)] + [
        answer(number % 20 + 8, 3) for number in range(20)
    ]
    line = describe_hubs(answers, 120)
    assert line.startswith("hubs: the 2 IHCs (1 % of 120) found first most often are the first answer to 68.3 % of the")
    assert line.endswith("; 81.7 % of all are never found (by chance 36.5 %)")
    assert describe_hubs([*answers, Answer(known=HER2, image="bad.png", usable=False)], 120) == line
    assert describe_hubs(answers[:49], 20) == describe_hubs(answers, 121) == describe_hubs([], 1) == ""
