"""Patches -> slides, two ways, so that a report can compare them.

By mean (`lgd.metrics.by_slide`): a slide's probabilities are the mean of its patches'. It is the headline.
By area (`by_area`): a slide has the highest level that enough of its patches reach. It is named for what it copies
from ASCO/CAP's rule, and gives a level but no probability.

    both_ways(predictions, resamples, seed)    # what `metrics.json` holds of one model

Neither way is chosen, and the share is not tuned, on the patches that are scored.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from lgd.errors import DataError
from lgd.metrics import (
    LEVELS,
    Predictions,
    by_slide,
    confusion,
    paired_difference,
    score_with_intervals,
)

PERCENT = 10
"""A level needs more than this share of the patches. ASCO/CAP (Wolff et al., J Clin Oncol 36:2105, 2018) asks that more
than 10 % of the tumour cells show the staining of a level."""

ANSWERS = (*("accuracy", "macro_f1", "kappa", "within_one"), *(f"sensitivity_{level}" for level in range(LEVELS)))
"""The metrics that look at the answer alone; ECE, Brier and the AUCs need a probability."""

WAYS = {
    "by_slide": "mean: the probabilities of a slide's patches are averaged, and the most probable level is the answer",
    "by_area": f"area: the answer is the highest level that more than {PERCENT} % of a slide's patches are called, or "
    "are called something higher",
}
"""How each way makes a slide's level, in words."""


def by_area(predictions: Predictions) -> Predictions:
    """One row a group, sorted by name: the highest level that more than `PERCENT` % of its patches reach.

    It copies the form of ASCO/CAP's rule, with patches for tumour cells, and is not that rule: a patch counts whole,
    however much tumour it holds; the patches are those of the data set, not the slide; intense staining in at most
    10 % of the cells is 2+ there and does not count here. With ten patches two must reach a level, with nine or fewer
    one is enough, so that errors towards higher levels weigh more than in the mean: a network that calls 11 % of a
    negative slide's patches 3+ calls the slide 3+.

    The row of `probability` holds 1 for the level and 0 else: an answer and no probability. A chance that more than
    10 % of the patches reach a level would need to know how errors of one slide's patches hang together; taking them
    as independent makes it certain of itself on any slide of many patches. So only `ANSWERS` may be scored.

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


def both_ways(predictions: Predictions, resamples: int, seed: int) -> dict[str, Any]:
    """`by_slide` and `by_area`, each with the metrics it may be scored by, and `area_minus_mean`, paired by slide.

    `one_patch_decides` counts the scored slides of so few patches that one alone raises the level by area. Where there
    are no slides, or they have no one level, all three are None and `no_slides` says why.
    """
    none = {"by_slide": None, "by_area": None, "area_minus_mean": None}
    if len(set(predictions.groups)) == len(predictions.groups):
        return none | {"no_slides": "every group is a single patch"}
    try:
        mean, area = by_slide(predictions).labelled(), by_area(predictions).labelled()
    except DataError as error:
        return none | {"no_slides": str(error)}
    of_area = scores(area, resamples, seed)
    of_area["metrics"] = {name: of_area["metrics"][name] for name in ANSWERS}
    patches = Counter(predictions.groups)
    of_area["one_patch_decides"] = sum(PERCENT * patches[slide] < 100 for slide in area.keys)
    return {
        "by_slide": scores(mean, resamples, seed),
        "by_area": of_area,
        "area_minus_mean": {name: paired_difference(area, mean, name, resamples, seed) for name in ANSWERS},
        "no_slides": None,
    }


def scores(predictions: Predictions, resamples: int, seed: int) -> dict[str, Any]:
    """Counts, every metric with its interval, and the confusion matrix, of the rows whose level is known."""
    known = predictions.labelled()
    return {
        "scored": len(known.keys),
        "groups": len(set(known.groups)),
        "metrics": score_with_intervals(known, resamples, seed),
        "confusion": confusion(known.level, known.predicted).tolist(),
    }
