"""Which rows of a gallery are nearest to a query, and how near their labels are to its own.

Shapes: n queries, m gallery rows, D length of a vector. Similarity is the cosine. Each number stands beside chance.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lgd.base.errors import DataError
from lgd.base.labels import Labels, find_known
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, Interval, Ints, draws, interval
from lgd.report.results import Precision

PRECISION_AT_K = 10
"""Neighbours behind an average precision or a mean difference, and answers behind hubs."""
# Similarities that are worked out at a time: 32 MB.
_BLOCK = 4_000_000


def average_precision(
    queries_nD: Floats, label_n: Labels, gallery_mD: Floats, label_m: Labels, k: int, classes: int, seed: int = 0
) -> tuple[Floats, Floats]:
    """AP@k of each query (n,), and its expected value under a random ranking (n,).

    A gallery row is relevant when it has the query's class. With R relevant rows and r(i) = 1 where the i-th
    neighbour is relevant, AP@k = sum over i <= k of r(i) P(i) / min(k, R), P(i) being the share of relevant ones among
    the first i (Manning et al. 2008, cut at k). NaN where the query has no label or no row has it. Rows without a label
    are left out of the gallery. Ties fall by a random order: that of the shards would favour their labels.
    """
    gallery_mD, label_m = _keep_known(gallery_mD, label_m, seed)
    m, k = len(label_m), min(k, len(label_m))
    relevant_n = np.bincount(label_m, minlength=classes)[label_n]
    relevant_n[label_n < 0] = 0
    found, chance = np.full(len(label_n), np.nan), np.full(len(label_n), np.nan)
    if not m:
        return found, chance
    place_k = np.arange(1, k + 1)
    for those, nearest in find_nearest(queries_nD, gallery_mD, k):
        hit = label_m[nearest] == label_n[those, None]
        found[those] = (hit * hit.cumsum(1) / place_k).sum(1)
    found /= np.where(relevant_n, np.minimum(k, relevant_n), np.nan)
    # Rank i holds a relevant row with chance R/m, and each of the i - 1 before it then with (R - 1)/(m - 1).
    for count in np.unique(relevant_n[relevant_n > 0]):
        others = (place_k - 1) * (count - 1) / max(m - 1, 1)
        chance[relevant_n == count] = (count / m * (1 + others) / place_k).sum() / min(k, count)
    return found, chance


def value_differences(
    queries_nD: Floats, value_n: Labels, gallery_mD: Floats, value_m: Labels, k: int, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Mean |difference| between the value of each query and those of its k nearest gallery rows (n,); its expected
    value under a random ranking (n,), which is that over all rows; and the least that any ranking reaches (n,).

    NaN where the query has no value or no row has one. Rows without a value are left out of the gallery.
    """
    gallery_mD, value_m = _keep_known(gallery_mD, value_m, seed)
    found, chance, best = (np.full(len(value_n), np.nan) for _ in range(3))
    k = min(k, len(value_m))
    if not k:
        return found, chance, best
    for those, nearest in find_nearest(queries_nD, gallery_mD, k):
        found[those] = abs(value_m[nearest] - value_n[those, None]).mean(1)
        less = abs(value_m - value_n[those, None])
        chance[those], best[those] = less.mean(1), np.partition(less, k - 1, axis=1)[:, :k].mean(1)
    return found, chance, best


def _keep_known(gallery_mD: Floats, label_m: Labels, seed: int) -> tuple[Floats, Labels]:
    """The rows of a gallery that have a label, in random order."""
    rows = np.flatnonzero(find_known(label_m))
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    return gallery_mD[rows], label_m[rows]


def split_by_class(
    precision_n: Floats, chance_n: Floats, scored: Predictions, resamples: int, seed: int
) -> dict[str, Precision]:
    """Mean of the average precision over all queries (`overall`) and over those of each class."""
    found = {}
    defined = ~np.isnan(precision_n)
    of_class = {name: defined & (scored.label == number) for number, name in enumerate(scored.target.classes)}
    for name, chosen in [("overall", defined), *of_class.items()]:
        rows = np.flatnonzero(chosen)
        mean = mean_with_interval(precision_n[rows], [scored.groups[row] for row in rows.tolist()], resamples, seed)
        chance = float(chance_n[rows].mean()) if len(rows) else None
        found[name] = Precision(value=mean.value, low=mean.low, high=mean.high, chance=chance, queries=len(rows))
    return found


def mean_with_interval(
    value_n: NDArray[np.float64 | np.bool_], groups: Sequence[str], resamples: int, seed: int
) -> Interval:
    """Mean and 95 % interval over resampled groups; no interval with fewer than two of them."""
    names, group_n = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return interval(np.array([value_n.mean() if len(value_n) else np.nan]), len(names))
    sums_G2 = np.stack([np.bincount(group_n, value_n), np.bincount(group_n)], axis=1)
    blocks = draws(len(names), resamples, seed, _BLOCK // len(names))
    samples = np.concatenate([count_RG @ sums_G2 for count_RG in blocks])
    return interval(np.append(value_n.mean(), samples[:, 0] / samples[:, 1]), len(names))


def compare_all(queries_nD: Floats, gallery_mD: Floats) -> Iterator[tuple[slice, Floats]]:
    """Blocks of the queries, and the cosines of each with the whole gallery."""
    gallery = unit(gallery_mD)
    block = max(1, _BLOCK // len(gallery))
    for start in range(0, len(queries_nD), block):
        rows = slice(start, start + block)
        yield rows, unit(queries_nD[rows]) @ gallery.T


def find_nearest(queries_nD: Floats, gallery_mD: Floats, k: int) -> Iterator[tuple[slice, Ints]]:
    """Blocks of the queries, and the gallery rows of the k nearest of each, nearest first."""
    for those, similarity in compare_all(queries_nD, gallery_mD):
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarity, nearest, axis=1), axis=1, kind="stable")
        yield those, np.take_along_axis(nearest, order, axis=1)


def unit(x_nD: Floats) -> Floats:
    """Scale each vector to length 1; `DataError` for one that is not finite."""
    x_nD = np.asarray(x_nD, dtype=np.float64)
    if not np.isfinite(x_nD).all():
        raise DataError("a latent is not finite: the training diverged, lower train.lr")
    unit_nD: Floats = x_nD / np.maximum(np.linalg.norm(x_nD, axis=1, keepdims=True), 1e-12)
    return unit_nD
