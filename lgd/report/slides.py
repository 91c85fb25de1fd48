"""Patches -> slides, by the mean of their probabilities (the headline) and by area, so that a report can compare them.

Neither way is chosen, and the share is not tuned, on the patches that are scored.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lgd.base.errors import DataError
from lgd.metrics import ANSWERS, LEVELS, METRICS, Predictions, confusion, paired_differences, score_with_intervals
from lgd.report.results import AreaScores, ModelScores, Scores

PERCENT = 10
"""A level needs more than this share of the patches. ASCO/CAP (Wolff et al., J Clin Oncol 36:2105, 2018) asks that more
than 10 % of the tumour cells show the staining of a level."""

SLIDE_RULES = {
    "by_slide": "mean: the probabilities of a slide's patches are averaged, and the most probable level is the answer",
    "by_area": f"area: the answer is the highest level that more than {PERCENT} % of a slide's patches are called, or "
    "are called something higher",
}
"""How each way makes a slide's level, in words."""


def by_slide(predictions: Predictions) -> Predictions:
    """One row a group, sorted by name: the mean of its patches' probabilities, and their level.

    Patches of unknown level count for the mean. Raises `DataError` where a group's patches differ in level.
    """
    names, group = np.unique(predictions.groups, return_inverse=True)
    known = predictions.level >= 0
    level = np.full(len(names), -1)
    level[group[known]] = predictions.level[known]
    mixed = np.unique(group[known & (level[group] != predictions.level)])
    if len(mixed):
        raise DataError(
            f"{len(mixed)} of {len(names)} slides have patches of different levels, like {names[mixed[0]]}: "
            "a slide is scored only where its patches share one level"
        )
    mean = np.zeros((len(names), LEVELS))
    np.add.at(mean, group, predictions.probability)
    mean /= np.bincount(group, minlength=len(names))[:, None]
    slides = [str(name) for name in names]
    return replace(predictions, keys=slides, groups=slides, level=level, probability=mean)


def by_area(predictions: Predictions) -> Predictions:
    """One row a group, sorted by name: the highest level that more than `PERCENT` % of its patches reach.

    It copies the form of ASCO/CAP's rule, with patches for tumour cells, and is not that rule: a patch counts whole,
    however much tumour it holds; the patches are those of the data set, not the slide; intense staining in at most
    10 % of the cells is 2+ there and does not count here. Errors towards higher levels weigh more than in the mean.

    The row of `probability` holds 1 for the level and 0 else: only `ANSWERS` may be scored, for a chance that more than
    10 % of the patches reach a level would need to know how errors of one slide's patches hang together.

    Patches of unknown level count. Raises `DataError` where a group's patches differ in level.
    """
    slides = by_slide(predictions)
    _, group = np.unique(predictions.groups, return_inverse=True)
    called = np.zeros((len(slides.keys), LEVELS), np.int64)
    np.add.at(called, (group, predictions.predicted), 1)
    reached = called[:, ::-1].cumsum(1)[:, ::-1]
    # All patches reach level 0; how many reach a level only falls with it.
    level = (100 * reached > PERCENT * reached[:, :1]).sum(1) - 1
    return replace(slides, probability=np.eye(LEVELS)[level])


def score_model(predictions: Predictions, resamples: int, seed: int) -> ModelScores:
    """A model by patch, and by slide in both ways; paired by slide is what the area gains over the mean."""
    by_patch = _score_known(predictions.labelled(), resamples, seed)
    try:
        if len(set(predictions.groups)) == len(predictions.groups):
            raise DataError("every group is a single patch")
        mean, area = by_slide(predictions).labelled(), by_area(predictions).labelled()
    except DataError as error:
        nothing = {"by_slide": None, "by_area": None, "area_minus_mean": None}
        return ModelScores(name=predictions.name, by_patch=by_patch, **nothing, no_slides=str(error))
    patches = Counter(predictions.groups)
    return ModelScores(
        name=predictions.name,
        by_patch=by_patch,
        by_slide=_score_known(mean, resamples, seed),
        by_area=AreaScores(
            **dict(_score_known(area, resamples, seed, ANSWERS)),
            one_patch_decides=sum(PERCENT * patches[slide] < 100 for slide in area.keys),
        ),
        area_minus_mean=paired_differences(area, mean, ANSWERS, resamples, seed),
        no_slides=None,
    )


def _score_known(known: Predictions, resamples: int, seed: int, metrics: Sequence[str] = METRICS) -> Scores:
    return Scores(
        scored=len(known.keys),
        groups=len(set(known.groups)),
        metrics=score_with_intervals(known, resamples, seed, metrics),
        confusion=confusion(known.level, known.predicted).tolist(),
    )
