"""Hubs: the few gallery rows that take most of the answers, and the many that no query finds, beside chance.

Shapes: n queries, k answers of each, m rows of the gallery. The most frequent hundredth of the rows are the hubs.
"""

import math

import numpy as np

from lgd.metrics import Floats, Ints


def count_hubs(rows: int) -> int:
    """How many rows are a hundredth of a gallery, at least 1."""
    return math.ceil(rows / 100)


def count_found(found_nk: Ints, rows: int) -> Ints:
    """How often each row of the gallery was found, (m,); -1 is no row."""
    found = found_nk[found_nk >= 0]
    return np.bincount(found, minlength=rows)


def find_hubs(count_m: Ints) -> Ints:
    """The rows that were found most often."""
    return np.argsort(-count_m, kind="stable")[: count_hubs(len(count_m))]


def chance_of_hubs(queries: int, k: int, rows: int) -> float:
    """The expected share of answers of the hubs, where each query draws k rows of m blindly.

    With N_t the number of rows that were drawn t times or more, the h most frequent were drawn sum over t of min(h,
    N_t) times. N_t is taken to be binomial, as if rows were drawn independently of each other: within 1 % of the mean
    of 600 drawings for 50 to 720 queries of 1 to 10 answers among 20 to 1,000 rows, 4 % too small for 20 among 20.
    """
    from scipy.stats import binom

    k, hubs = min(k, rows), count_hubs(rows)
    drawn_t = binom.sf(np.arange(queries), queries, k / rows)
    # Beyond these no row is to be expected.
    drawn_t = drawn_t[: int((drawn_t * rows > 1e-9).sum())]
    expected_th: Floats = binom.sf(np.arange(hubs), rows, drawn_t[:, None])
    return min(1.0, float(expected_th.sum()) / (queries * k))


def chance_of_never(queries: int, k: int, rows: int) -> float:
    """The expected share of rows that no query draws, (1 - k / m)^n."""
    return (1 - min(k, rows) / rows) ** queries
