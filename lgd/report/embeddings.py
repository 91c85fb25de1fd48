"""What retrieval by the hallucinated latent is worth: the same measures for it, for H&E alone, and for the teacher.

Each embedding searches two galleries: the training patches, where a neighbour of the query's level is relevant, and
the IHC of the scored split, where the query's own pair is. H&E alone takes part twice: with its own features, which
can only be compared with H&E, and through a ridge regression from them to the teacher's latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lgd.metrics import Floats, Ints, Predictions
from lgd.report.ranking import average_precision, by_level, own_pair, own_ranks, unit
from lgd.report.results import EmbeddingScores, Retrieval

PRECISION_AT_K = 10
"""Neighbours behind an average precision."""
GALLERY_CAVEATS = (
    "The gallery of the levels is the training split, which every network here was trained on: its vectors are better "
    "told apart by level than those of new patches would be.",
    "A neighbour counts as relevant for its level alone, whatever the tissue looks like; where a level is that of a "
    "slide, so is the relevance.",
    "The gallery of the own pair is the IHC of the scored split, which holds neighbours from the query's own slide.",
    "The features of H&E alone are compared with H&E, the other vectors with IHC latents: of the precisions by level "
    "only those of one gallery compare directly.",
)
"""What a reader must know of how the galleries were made."""
_ALPHAS = np.logspace(-1, 5, 7)
_FIT_ROWS = 20_000
"""Training rows that the ridge is fitted on at most, evenly spaced: 23 s on one core for 512 features and latents."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedding:
    """Vectors of the scored split, and the galleries that they search."""

    name: str
    """Its row in the report."""
    gallery: str
    """What the training gallery is made of, in words."""
    queries_nD: Floats
    """In the order of the predictions."""
    train_mD: Floats
    own_nD: Floats | None
    """The IHC latents of the scored split, or None where the vectors do not compare with them."""


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
        own = None
        if embedding.own_nD is not None:
            rank_n = own_ranks(embedding.queries_nD, embedding.own_nD, np.arange(len(scored.keys)))
            own = own_pair(rank_n, len(embedding.own_nD), scored.groups, resamples, seed)
        rows.append(EmbeddingScores(name=embedding.name, gallery=embedding.gallery, by_level=found, own_pair=own))
    return Retrieval(caveats=GALLERY_CAVEATS, at=PRECISION_AT_K, gallery_rows=len(level_m), embeddings=tuple(rows))


def of_ihc(name: str, queries_nD: np.ndarray, latents_mD: Floats, own_nD: Floats | None) -> Embedding:
    """Vectors that search the teacher's latents."""
    gallery = "IHC latents of the training patches"
    return Embedding(name=name, gallery=gallery, queries_nD=queries_nD, train_mD=latents_mD, own_nD=own_nD)


def he_only(
    name: str,
    features_nC: np.ndarray,
    train_features_mC: np.ndarray,
    train: Predictions,
    latents_mD: Floats,
    own_nD: Floats,
) -> list[Embedding]:
    """A network of H&E alone, by its features and by their ridge regression to the teacher's latents.

    `train` are its predictions of the training patches, for their groups; `latents_mD` are the teacher's latents of the
    same patches, and `own_nD` those of the scored split.
    """
    # The teacher's latents are relative to their training mean too: without it all features share one direction.
    mean_C = train_features_mC.mean(0, dtype=np.float64)
    queries_nC, train_mC = features_nC - mean_C, train_features_mC - mean_C
    found = [
        Embedding(
            name=f"{name}, its features",
            gallery="H&E of the training patches",
            queries_nD=queries_nC,
            train_mD=train_mC,
            own_nD=None,
        )
    ]
    if len(set(train.groups)) < 2:
        # A fit on a single slide cannot be checked on another one.
        return found
    mapped_nD, alpha = ridge(train_mC, unit(latents_mD), train.groups, queries_nC)
    return [*found, of_ihc(f"{name}, ridge to the latents (alpha {alpha:.3g})", mapped_nD, latents_mD, own_nD)]


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
