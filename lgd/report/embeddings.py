"""What retrieval by the hallucinated latent is worth: the same measures for it, for H&E alone, and for the teacher.

Each embedding searches two galleries: the training patches, where a neighbour of the query's label is relevant, and
the IHC of the scored split, where the query's own pair is. H&E alone takes part twice: with its own features, which
can only be compared with H&E, and through a ridge regression from them to the teacher's latents.

Shapes: n queries, m gallery rows, D length of a vector. Similarity is the cosine. Each number stands beside chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lgd.base.labels import Labels
from lgd.base.target import Target
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats
from lgd.report.neighbours import (
    PRECISION_AT_K,
    average_precision,
    compare_all,
    find_nearest,
    mean_with_interval,
    split_by_class,
    unit,
    value_differences,
)
from lgd.report.results import EmbeddingScores, Hubs, Nearness, OwnPair, Retrieval
from lgd.retrieval.hubs import chance_of_hubs, chance_of_never, count_found, count_hubs, find_hubs

LABEL_CAVEATS = (
    "The gallery of the {0}s is the training split, which every network here was trained on: its vectors are better "
    "separated by {0} than those of new patches would be.",
    "A neighbour counts as {1} for its {0} alone, whatever the tissue looks like; where a {0} is that of a "
    "slide, so is the {2}.",
    "The features of H&E alone are compared with H&E, the other vectors with IHC latents: of the {3}s by {0} "
    "only those of one gallery compare directly.",
)
OWN_CAVEATS = (
    "The gallery of the own pair is the IHC of the scored split, which holds neighbours from the query's own slide.",
    "The intervals of hubs take the hubs as they are: other slides would have others.",
)
"""What a reader must know of how the galleries were made."""
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
    embeddings: Sequence[Embedding], scored: Predictions, label_m: Labels, resamples: int, seed: int
) -> Retrieval:
    """Both measures of each embedding; `label_m` are the labels of the training gallery."""
    target, rows = scored.target, []
    for one in embeddings:
        by_class, by_value = {}, None
        if target.is_number:
            by_value = _measure_values(one, scored, label_m, resamples, seed)
        else:
            precision_n, chance_n = average_precision(
                one.queries_nD, scored.label, one.train_mD, label_m, PRECISION_AT_K, target.width
            )
            by_class = split_by_class(precision_n, chance_n, scored, resamples, seed)
        pair = hubs = None
        if one.own_nD is not None:
            rank_n = own_ranks(one.queries_nD, one.own_nD)
            pair = own_pair(rank_n, len(one.own_nD), scored.groups, resamples, seed)
            hubs = measure_hubs(one.queries_nD, one.own_nD, scored.groups, resamples, seed)
        rows.append(
            EmbeddingScores(
                name=one.name, gallery=one.gallery, by_level=by_class, own_pair=pair, hubs=hubs, by_value=by_value
            )
        )
    caveats = (*(_label_caveats(target) if any(row.asks for row in rows) else ()),)
    caveats += OWN_CAVEATS if any(row.own_pair for row in rows) else ()
    return Retrieval(caveats=caveats, at=PRECISION_AT_K, gallery_rows=len(label_m), embeddings=tuple(rows))


def _label_caveats(target: Target) -> list[str]:
    words = ("near", "difference", "difference") if target.is_number else ("relevant", "relevance", "precision")
    return [caveat.format(target.label_word, *words) for caveat in LABEL_CAVEATS]


def _measure_values(one: Embedding, scored: Predictions, value_m: Labels, resamples: int, seed: int) -> Nearness:
    near_n, chance_n, best_n = value_differences(one.queries_nD, scored.label, one.train_mD, value_m, PRECISION_AT_K)
    rows = np.flatnonzero(~np.isnan(near_n))
    mean = mean_with_interval(near_n[rows], [scored.groups[row] for row in rows.tolist()], resamples, seed)
    chance, best = (float(some[rows].mean()) if len(rows) else None for some in (chance_n, best_n))
    return Nearness(value=mean.value, low=mean.low, high=mean.high, chance=chance, best=best, queries=len(rows))


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


def explained_by_labels(train_mD: Floats, train_mK: Floats, latents_nD: Floats, soft_nK: Floats) -> float:
    """R^2 of a linear regression from the teacher's soft labels, or values, to its unit latents, fitted on training
    patches.

    Near 1 the latents hold no more than the labels do, and hallucinating them is label distillation by another name: a
    teacher that is trained on labels for long ends so (neural collapse, Papyan et al. 2020).
    """
    from sklearn.linear_model import LinearRegression

    error_nD = unit(latents_nD) - LinearRegression().fit(train_mK, unit(train_mD)).predict(soft_nK)
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
    for rows, similarity in compare_all(queries_nD, gallery_mD):
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
    found_nk = np.concatenate([nearest for _, nearest in find_nearest(queries_nD, gallery_mD, k)])
    first_n, answers_n = (
        np.isin(some, find_hubs(count_found(some, rows))).mean(1) for some in (found_nk[:, :1], found_nk)
    )
    return first_n, answers_n, (count_found(found_nk, rows) == 0).astype(np.float64)
