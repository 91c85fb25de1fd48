"""What retrieval by the hallucinated latent is worth: the same measures for it, for H&E alone, and for the teacher.

Each embedding searches two galleries: the training patches, where a neighbour of the query's level is relevant, and
the IHC of the scored split, where the query's own pair is. H&E alone takes part twice: with its own features, which
can only be compared with H&E, and through a ridge regression from them to the teacher's latents.

Shapes: n queries, m gallery rows, D length of a vector. Similarity is the cosine. Each number stands beside chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lgd.base.errors import DataError
from lgd.config_sections import LEVEL_NAMES
from lgd.metrics import Floats, Interval, Ints, Predictions, draws, interval
from lgd.report.results import EmbeddingScores, Hubs, OwnPair, Precision, Retrieval
from lgd.retrieval.hubs import chance_of_hubs, chance_of_never, count_found, count_hubs, find_hubs

PRECISION_AT_K = 10
"""Neighbours behind an average precision, and answers behind hubs."""
LEVEL_CAVEATS = (
    "The gallery of the levels is the training split, which every network here was trained on: its vectors are better "
    "separated by level than those of new patches would be.",
    "A neighbour counts as relevant for its level alone, whatever the tissue looks like; where a level is that of a "
    "slide, so is the relevance.",
    "The features of H&E alone are compared with H&E, the other vectors with IHC latents: of the precisions by level "
    "only those of one gallery compare directly.",
)
OWN_CAVEATS = (
    "The gallery of the own pair is the IHC of the scored split, which holds neighbours from the query's own slide.",
    "The intervals of hubs take the hubs as they are: other slides would have others.",
)
"""What a reader must know of how the galleries were made."""
# Similarities that are worked out at a time: 32 MB.
_BLOCK = 4_000_000
RECALL_AT = (1, 5, 10)
_ALPHAS = np.logspace(-1, 5, 7)
_FIT_ROWS = 20_000
"""Training rows that the ridge is fitted on at most, evenly spaced: 23 s on one core for 512 features and latents."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """Vectors of the scored split, and the galleries that they search."""

    name: str
    """Its row in the report."""
    queries_nD: Floats
    """In the order of the predictions."""
    train_mD: Floats
    own_nD: Floats | None = None
    """The IHC latents of the scored split, or None where the vectors do not compare with them."""
    gallery: str = "IHC latents of the training patches"
    """What the training gallery is made of, in words."""


def measure(
    embeddings: Sequence[Embedding], scored: Predictions, level_m: Ints, resamples: int, seed: int
) -> Retrieval:
    """Both measures of each embedding; `level_m` are the levels of the training gallery, -1 for unknown."""
    rows = []
    for embedding in embeddings:
        precision_n, chance_n = average_precision(
            embedding.queries_nD, scored.level, embedding.train_mD, level_m, PRECISION_AT_K
        )
        found = by_level(precision_n, chance_n, scored.level, scored.groups, resamples, seed)
        pair = hubs = None
        if embedding.own_nD is not None:
            rank_n = own_ranks(embedding.queries_nD, embedding.own_nD)
            pair = own_pair(rank_n, len(embedding.own_nD), scored.groups, resamples, seed)
            hubs = measure_hubs(embedding.queries_nD, embedding.own_nD, scored.groups, resamples, seed)
        rows.append(
            EmbeddingScores(name=embedding.name, gallery=embedding.gallery, by_level=found, own_pair=pair, hubs=hubs)
        )
    by_levels, own = any(row.by_level["overall"].queries for row in rows), any(row.own_pair for row in rows)
    caveats = (*(LEVEL_CAVEATS if by_levels else ()), *(OWN_CAVEATS if own else ()))
    return Retrieval(caveats=caveats, at=PRECISION_AT_K, gallery_rows=len(level_m), embeddings=tuple(rows))


def he_only(
    name: str,
    features_nC: np.ndarray,
    train_features_mC: np.ndarray,
    train: Predictions,
    latents_mD: Floats,
    own_nD: Floats | None,
    what: str = "latents",
) -> list[Embedding]:
    """A network of H&E alone, by its features and by their ridge regression to the teacher's latents.

    `train` are its predictions of the training patches, for their groups; `latents_mD` are the teacher's latents of the
    same patches as they are compared, `what` says how, and `own_nD` are those of the scored split, if there are any.
    """
    # The teacher's latents are relative to their training mean too: without it all features share one direction.
    mean_C = train_features_mC.mean(0, dtype=np.float64)
    queries_nC, train_mC = features_nC - mean_C, train_features_mC - mean_C
    found = [Embedding(f"{name}, its features", queries_nC, train_mC, gallery="H&E of the training patches")]
    if len(set(train.groups)) < 2:
        # A fit on a single slide cannot be checked on another one.
        return found
    mapped_nD, alpha = ridge(train_mC, latents_mD, train.groups, queries_nC)
    return [*found, Embedding(f"{name}, ridge to the {what} (alpha {alpha:.3g})", mapped_nD, latents_mD, own_nD)]


def explained_by_levels(train_mD: Floats, train_m4: Floats, latents_nD: Floats, soft_n4: Floats) -> float:
    """R^2 of a linear regression from the teacher's soft levels to its unit latents, fitted on training patches.

    Near 1 the latents hold no more than the levels do, and hallucinating them is label distillation by another name: a
    teacher that is trained on levels for long ends so (neural collapse, Papyan et al. 2020).
    """
    from sklearn.linear_model import LinearRegression

    error_nD = unit(latents_nD) - LinearRegression().fit(train_m4, unit(train_mD)).predict(soft_n4)
    return float(1 - (error_nD**2).sum() / ((unit(latents_nD) - unit(train_mD).mean(0)) ** 2).sum())


def ridge(x_mC: Floats, y_mD: Floats, groups: Sequence[str], queries_nC: Floats) -> tuple[Floats, float]:
    """What a ridge regression of y on x says of the queries, (n, D), and its alpha.

    Alpha is that of the least squared error on left-out groups (5 folds): left-out patches of a slide that was fitted
    on would favour too small a one.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.unique(np.linspace(0, len(x_mC) - 1, min(len(x_mC), _FIT_ROWS)).round().astype(int))
    split = list(GroupKFold(min(5, len(set(groups)))).split(rows, groups=np.array(groups)[rows]))
    fitted = RidgeCV(_ALPHAS, scoring="neg_mean_squared_error", cv=split)
    model = make_pipeline(StandardScaler(), fitted).fit(x_mC[rows], y_mD[rows])
    return model.predict(queries_nC), float(fitted.alpha_)


def own_ranks(queries_nD: Floats, gallery_mD: Floats) -> Floats:
    """(n,) rank of each query's own pair, the gallery row of its number, from 1; ties with it count half.

    Raises `DataError` for vectors that are not finite.
    """
    ranks = np.empty(len(queries_nD))
    for rows, similarity in _similarities(queries_nD, gallery_mD):
        own = np.take_along_axis(similarity, np.arange(len(ranks))[rows, None], axis=1)
        ties = (similarity == own).sum(1) - 1
        ranks[rows] = 1 + (similarity > own).sum(1) + ties / 2
    return ranks


def own_pair(rank_n: Floats, gallery: int, groups: Sequence[str], resamples: int, seed: int) -> OwnPair:
    """The ranks of n queries among `gallery` rows in numbers, with intervals over the groups."""
    ranks = {
        "median_rank": float(np.median(rank_n)),
        "chance_median_rank": (gallery + 1) / 2,
        "mean_rank": mean_with_interval(rank_n, groups, resamples, seed),
    }
    for k in RECALL_AT:
        ranks[f"recall_at_{k}"] = mean_with_interval(rank_n <= k, groups, resamples, seed)
        ranks[f"chance_recall_at_{k}"] = min(k, gallery) / gallery
    return OwnPair.model_validate({"queries": len(rank_n), "gallery": gallery, **ranks})


def measure_hubs(
    queries_nD: Floats, gallery_mD: Floats, groups: Sequence[str], resamples: int, seed: int, k: int = PRECISION_AT_K
) -> Hubs:
    """How evenly queries find a gallery whose rows are of the groups of the queries, with intervals over these."""
    rows = len(gallery_mD)
    k = min(k, rows)
    shares = count_answers(queries_nD, gallery_mD, k)
    first, answers, never = (mean_with_interval(share, groups, resamples, seed) for share in shares)
    return Hubs(
        hubs=count_hubs(rows),
        first_answers=first,
        chance_first_answers=chance_of_hubs(len(queries_nD), 1, rows),
        answers=answers,
        chance_answers=chance_of_hubs(len(queries_nD), k, rows),
        never_found=never,
        chance_never_found=chance_of_never(len(queries_nD), k, rows),
    )


def count_answers(queries_nD: Floats, gallery_mD: Floats, k: int) -> tuple[Floats, Floats, Floats]:
    """Of each query the share of hubs in its first answer and in its first k, (n,) each; and which rows of the gallery
    none of these are, as 0 or 1, (m,).
    """
    rows = len(gallery_mD)
    found_nk = np.concatenate([nearest for _, nearest in _nearest(queries_nD, gallery_mD, k)])
    first_n, answers_n = (
        np.isin(some, find_hubs(count_found(some, rows))).mean(1) for some in (found_nk[:, :1], found_nk)
    )
    return first_n, answers_n, (count_found(found_nk, rows) == 0).astype(np.float64)


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
    for those, nearest in _nearest(queries_nD, gallery_mD, k):
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
    of_level = {name: defined & (level_n == number) for number, name in enumerate(LEVEL_NAMES)}
    for name, chosen in {"overall": defined, **of_level}.items():
        rows = np.flatnonzero(chosen)
        mean = mean_with_interval(precision_n[rows], [groups[row] for row in rows.tolist()], resamples, seed)
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


def _similarities(queries_nD: Floats, gallery_mD: Floats) -> Iterator[tuple[slice, Floats]]:
    """Blocks of the queries, and the cosines of each with the whole gallery."""
    gallery = unit(gallery_mD)
    block = max(1, _BLOCK // len(gallery))
    for start in range(0, len(queries_nD), block):
        rows = slice(start, start + block)
        yield rows, unit(queries_nD[rows]) @ gallery.T


def _nearest(queries_nD: Floats, gallery_mD: Floats, k: int) -> Iterator[tuple[slice, Ints]]:
    """Blocks of the queries, and the gallery rows of the k nearest of each, nearest first."""
    for those, similarity in _similarities(queries_nD, gallery_mD):
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
