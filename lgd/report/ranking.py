"""Pure numbers of retrieval: the rank of the own pair, and the average precision by level, each beside chance.

Shapes: n queries, m gallery rows, D length of a vector. Similarity is the cosine. Tests hold each number against a
naive twin.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lgd.base.errors import DataError
from lgd.config import LEVEL_NAMES
from lgd.metrics import Floats, Interval, Ints, draws, interval
from lgd.report.results import OwnPair, Precision

# Similarities that are worked out at a time: 32 MB.
_BLOCK = 4_000_000
RECALL_AT = (1, 5, 10)


def own_ranks(queries_nD: Floats, gallery_mD: Floats, own_index_n: Ints) -> Floats:
    """(n,) rank of each query's own pair, from 1; `own_index_n` is its gallery row, and ties with it count half.

    Raises `DataError` for shapes that disagree, an empty side, or vectors that are not finite.
    """
    n, m = len(queries_nD), len(gallery_mD)
    if not n or not m or queries_nD.shape[1:] != gallery_mD.shape[1:] or own_index_n.shape != (n,):
        raise DataError(
            f"queries of shape {queries_nD.shape}, gallery of shape {gallery_mD.shape} and own rows of shape "
            f"{own_index_n.shape} do not fit: give (n, D), (m, D) and (n,), none empty"
        )
    ranks = np.empty(n)
    for rows, similarity in _similarities(queries_nD, gallery_mD):
        own = np.take_along_axis(similarity, own_index_n[rows, None], axis=1)
        ties = (similarity == own).sum(1) - 1
        ranks[rows] = 1 + (similarity > own).sum(1) + ties / 2
    return ranks


def own_pair(rank_n: Floats, gallery: int, groups: Sequence[str], resamples: int, seed: int) -> OwnPair:
    """The ranks of n queries among `gallery` rows in numbers, with intervals over the groups."""

    def mean(value_n: Floats | NDArray[np.bool_]) -> Interval:
        return mean_with_interval(value_n.astype(np.float64), groups, resamples, seed)

    recall_1, recall_5, recall_10 = (mean(rank_n <= k) for k in RECALL_AT)
    chance_1, chance_5, chance_10 = (min(k, gallery) / gallery for k in RECALL_AT)

    return OwnPair(
        queries=len(rank_n),
        gallery=gallery,
        median_rank=float(np.median(rank_n)),
        chance_median_rank=(gallery + 1) / 2,
        mean_rank=mean(rank_n),
        recall_at_1=recall_1,
        chance_recall_at_1=chance_1,
        recall_at_5=recall_5,
        chance_recall_at_5=chance_5,
        recall_at_10=recall_10,
        chance_recall_at_10=chance_10,
    )


def average_precision(
    queries_nD: Floats, level_n: Ints, gallery_mD: Floats, level_m: Ints, k: int, seed: int = 0
) -> tuple[Floats, Floats]:
    """AP@k of each query (n,), and its expected value under a random ranking (n,).

    A gallery row is relevant when it has the query's level. With R relevant rows and r(i) = 1 where the i-th
    neighbour is relevant, AP@k = sum over i <= k of r(i) P(i) / min(k, R), P(i) being the share of relevant ones among
    the first i (Manning et al. 2008, cut at k). NaN where the query has no level or no row has it. Rows without a level
    are left out of the gallery. Ties fall by a random order: that of the shards would favour their levels.
    """
    rows = np.flatnonzero(level_m >= 0)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    gallery_mD, level_m = gallery_mD[rows], level_m[rows]
    m, k = len(rows), min(k, len(rows))
    relevant_n = np.bincount(level_m, minlength=len(LEVEL_NAMES))[level_n]
    relevant_n[level_n < 0] = 0
    found, chance = np.full(len(level_n), np.nan), np.full(len(level_n), np.nan)
    if not m:
        return found, chance
    place_k = np.arange(1, k + 1)
    for those, similarity in _similarities(queries_nD, gallery_mD):
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarity, nearest, axis=1), axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        hit = level_m[nearest] == level_n[those, None]
        found[those] = (hit * hit.cumsum(1) / place_k).sum(1)
    found /= np.where(relevant_n, np.minimum(k, relevant_n), np.nan)
    # Rank i holds a relevant row with chance R/m, and each of the i - 1 before it then with (R - 1)/(m - 1).
    for count in np.unique(relevant_n[relevant_n > 0]):
        others = (place_k - 1) * (count - 1) / max(m - 1, 1)
        chance[relevant_n == count] = (count / m * (1 + others) / place_k).sum() / min(k, count)
    return found, chance


def by_level(
    precision_n: Floats, chance_n: Floats, level_n: Ints, groups: Sequence[str], resamples: int, seed: int
) -> dict[str, Precision]:
    """Mean of the average precision over all queries (`overall`) and over those of each level."""
    found = {}
    defined = ~np.isnan(precision_n)
    for name, level in {"overall": None, **{name: number for number, name in enumerate(LEVEL_NAMES)}}.items():
        rows = np.flatnonzero(defined if level is None else defined & (level_n == level))
        mean = mean_with_interval(precision_n[rows], [groups[row] for row in rows.tolist()], resamples, seed)
        chance = float(chance_n[rows].mean()) if len(rows) else None
        found[name] = Precision(value=mean.value, low=mean.low, high=mean.high, chance=chance, queries=len(rows))
    return found


def mean_with_interval(value_n: Floats, groups: Sequence[str], resamples: int, seed: int) -> Interval:
    """Mean and 95 % percentile interval over resampled groups; no interval with fewer than two of them."""
    if not len(value_n):
        return interval(np.nan, np.empty(0))
    names, group_n = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return interval(float(value_n.mean()), np.empty(0))
    sums_G2 = np.stack([np.bincount(group_n, value_n), np.bincount(group_n)], axis=1)
    samples = np.concatenate(
        [count_RG @ sums_G2 for count_RG in draws(len(names), resamples, seed, _BLOCK // len(names))]
    )
    return interval(float(value_n.mean()), samples[:, 0] / samples[:, 1])


def _similarities(queries_nD: Floats, gallery_mD: Floats) -> Iterator[tuple[slice, Floats]]:
    """Blocks of the queries, and the cosines of each with the whole gallery."""
    gallery = unit(gallery_mD)
    block = max(1, _BLOCK // len(gallery))
    for start in range(0, len(queries_nD), block):
        rows = slice(start, start + block)
        yield rows, unit(queries_nD[rows]) @ gallery.T


def unit(x_nD: Floats) -> Floats:
    """Scale each vector to length 1; `DataError` for one that is not finite."""
    x_nD = np.asarray(x_nD, dtype=np.float64)
    if not np.isfinite(x_nD).all():
        raise DataError("a latent is not finite: the training diverged, lower train.lr")
    unit_nD: Floats = x_nD / np.maximum(np.linalg.norm(x_nD, axis=1, keepdims=True), 1e-12)
    return unit_nD
