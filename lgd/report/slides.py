"""Patches -> slides, by the mean of their answers (the headline) and by area, so that a report can compare them.

Neither way is chosen, and the share is not tuned, on the patches that are scored.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lgd.base.errors import DataError
from lgd.base.target import NO_CLASS, Target
from lgd.labels.classes import count_confusion
from lgd.labels.predictions import Predictions, paired_differences, score_with_intervals
from lgd.report.agreement import measure_agreement
from lgd.report.results import AreaScores, ModelScores, Scores


def describe_rules(target: Target) -> dict[str, str]:
    """How each way makes a slide's label, in words."""
    if target.is_number:
        return {"by_slide": "mean: the values of a slide's patches are averaged, and so are their true ones"}
    mean = (
        f"the probabilities of a slide's patches are averaged, and the most probable {target.label_word} is the answer"
    )
    rules = {"by_slide": f"mean: {mean}"}
    if target.area_percent is not None:
        rules["by_area"] = (
            f"area: the answer is the highest {target.label_word} that more than {target.area_percent:g} % of a "
            "slide's patches are called, or are called something higher"
        )
    return rules


def by_slide(predictions: Predictions) -> Predictions:
    """One row a group, sorted by name: the mean of its patches' probabilities, and their class; or the mean of their
    values, and that of the true ones.

    Patches without a label count for the mean of the answers. A slide has the site that all its patches have. Raises
    `DataError` where a group's patches differ in class.
    """
    names, group = np.unique(predictions.groups, return_inverse=True)
    known = predictions.known
    if predictions.target.is_number:
        label = _average(predictions.label[known][:, None], group[known], len(names))[:, 0]
    else:
        label = np.full(len(names), NO_CLASS)
        label[group[known]] = predictions.label[known]
        mixed = np.unique(group[known & (label[group] != predictions.label)])
        if len(mixed):
            word = predictions.target.label_word
            raise DataError(
                f"{len(mixed)} of {len(names)} slides have patches of different {word}s, like {names[mixed[0]]}: "
                f"a slide is scored only where its patches share one {word}"
            )
    slides = [str(name) for name in names]
    sites = {kind: _share_site(values, group, len(names)) for kind, values in predictions.sites.items()}
    output = _average(predictions.output, group, len(names))
    return replace(predictions, keys=slides, groups=slides, label=label, output=output, sites=sites, places=None)


def _average(value_nK: np.ndarray, group_n: np.ndarray, groups: int) -> np.ndarray:
    """(G, K): the mean of each group; NaN of one without rows."""
    sums_GK = np.zeros((groups, value_nK.shape[1]))
    np.add.at(sums_GK, group_n, value_nK)
    with np.errstate(invalid="ignore"):
        mean_GK: np.ndarray = sums_GK / np.bincount(group_n, minlength=groups)[:, None]
    return mean_GK


def _share_site(site_n: Sequence[str], group_n: np.ndarray, groups: int) -> list[str]:
    of_group: list[set[str]] = [set() for _ in range(groups)]
    for site, group in zip(site_n, group_n.tolist(), strict=True):
        of_group[group].add(site)
    return [one.pop() if len(one) == 1 else "" for one in of_group]


def by_area(predictions: Predictions) -> Predictions:
    """One row a group, sorted by name: the highest class that more than `Target.area_percent` % of its patches reach.

    It has the form of ASCO/CAP's rule (Wolff et al., J Clin Oncol 36:2105, 2018: more than 10 % of the tumour cells
    show a staining) with patches for tumour cells, and is not that rule: a patch counts whole, however much tumour it
    holds; the patches are those of the data set, not the slide; what that rule makes of intense staining in fewer cells
    does not count here. Errors towards higher classes weigh more than in the mean.

    The row of `output` holds 1 for the class and 0 else: only `Measures.answers` may be scored, for a chance that so
    many patches reach a class would need to know how errors of one slide's patches hang together.

    Patches without a label count. Raises `DataError` where a group's patches differ in class.
    """
    target = predictions.target
    assert target.area_percent is not None
    slides = by_slide(predictions)
    _, group = np.unique(predictions.groups, return_inverse=True)
    called = np.zeros((len(slides.keys), target.width), np.int64)
    np.add.at(called, (group, predictions.answer.astype(np.int64)), 1)
    reached = called[:, ::-1].cumsum(1)[:, ::-1]
    # All patches reach the lowest class; how many reach one only falls with it.
    label = (100 * reached > target.area_percent * reached[:, :1]).sum(1) - 1
    return replace(slides, output=np.eye(target.width)[label])


def find_slides(predictions: Predictions) -> Predictions:
    """As `by_slide`; `DataError` also where no slide has two patches."""
    if len(set(predictions.groups)) == len(predictions.groups):
        raise DataError("every group is a single patch")
    return by_slide(predictions)


def score_model(predictions: Predictions, resamples: int, seed: int) -> ModelScores:
    """A model by patch, and by slide in both ways; paired by slide is what the area gains over the mean."""
    by_patch = _score_known(predictions.labelled(), resamples, seed)
    try:
        mean = find_slides(predictions).labelled()
    except DataError as error:
        nothing = {"by_slide": None, "by_area": None, "area_minus_mean": None}
        return ModelScores(name=predictions.name, by_patch=by_patch, **nothing, no_slides=str(error))
    of_area = minus = None
    if (percent := predictions.target.area_percent) is not None:
        area, answers = by_area(predictions).labelled(), predictions.measures.answers
        patches = Counter(predictions.groups)
        of_area = AreaScores(
            **dict(_score_known(area, resamples, seed, answers)),
            one_patch_decides=sum(percent * patches[slide] < 100 for slide in area.keys),
        )
        minus = paired_differences(area, mean, answers, resamples, seed)
    return ModelScores(
        name=predictions.name,
        by_patch=by_patch,
        by_slide=_score_known(mean, resamples, seed),
        by_area=of_area,
        area_minus_mean=minus,
        no_slides=None,
    )


def _score_known(known: Predictions, resamples: int, seed: int, metrics: Sequence[str] = ()) -> Scores:
    target = known.target
    confusion = None if target.is_number else count_confusion(known.label, known.answer.astype(int), target.width)
    return Scores(
        scored=len(known.keys),
        groups=len(set(known.groups)),
        metrics=score_with_intervals(known, resamples, seed, metrics),
        confusion=None if confusion is None else confusion.tolist(),
        agreement=measure_agreement(known, resamples, seed) if target.is_number else None,
    )
