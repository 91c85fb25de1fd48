"""What label sets are worth: how often they hold the true label on the scored split, and how large they are."""

from collections.abc import Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.base.markup import markdown_table
from lgd.base.target import Target
from lgd.labels.conformal import By, Conformal, Coverage, measure_intervals, measure_sets
from lgd.labels.predictions import Predictions
from lgd.report.results import ModelSets, Results, format_interval
from lgd.report.slides import find_slides

_WARNINGS = {
    "val": " The slides of this report calibrated the sets, so that the coverage shows nothing of new ones.",
    "train": " The slides of this report trained the models, so that the coverage shows nothing of new ones.",
}
"""By the scored split."""


def measure_label_sets(scored: Sequence[Predictions], resamples: int, seed: int) -> list[ModelSets]:
    """The sets of each model that has any, of the patches and, where these can be scored, of the slides."""
    found = []
    for one in scored:
        known, conformal = one.labelled(), one.conformal
        if conformal is None or conformal.patch.highest is None or not len(known.keys):
            continue
        by_slide = None
        if conformal.slide is not None and conformal.slide.highest is not None:
            try:
                by_slide = _measure(find_slides(one).labelled(), conformal, "slide", resamples, seed)
            except DataError:
                # The report says elsewhere why slides have no scores.
                by_slide = None
        by_patch = _measure(known, conformal, "patch", resamples, seed)
        fields = {"name": one.name, "calibrated": conformal, "by_patch": by_patch, "by_slide": by_slide}
        found.append(ModelSets.model_validate(fields))
    return found


def _measure(known: Predictions, conformal: Conformal, by: By, resamples: int, seed: int) -> Coverage:
    if known.target.is_number:
        bounds = known.target.range or (-float("inf"), float("inf"))
        interval_n2 = conformal.find_intervals(known.output[:, 0], by, bounds)
        return measure_intervals(interval_n2, known.label.astype(np.float64), known.groups, resamples, seed)
    set_nK = conformal.find_sets(known.output, by)
    return measure_sets(set_nK, known.label.astype(np.int64), known.groups, resamples, seed)


def label_sets_section(results: Results, target: Target) -> list[str]:
    """The table of label sets; nothing where no model has any."""
    rows, split = [], str(results.provenance.get("split"))
    for model in results.label_sets or ():
        for name, one, by in (
            ("patch", model.by_patch, model.calibrated.patch),
            ("slide", model.by_slide, model.calibrated.slide),
        ):
            if one is not None and by is not None:
                classes = [format_interval(held) for held in one.by_class]
                single = [format_interval(one.single)] if one.single else []
                measured = [format_interval(one.coverage), format_interval(one.size), *single, *classes]
                rows.append([model.name, name, str(by.slides), *measured])
    if not rows:
        return []
    size = f"width ({target.unit})" if target.unit else "width"
    columns = [size] if target.is_number else ["size", "one class", *(f"of {name}" for name in target.classes)]
    warning = (
        "chose the network, where training stopped early; no coverage is promised of slides"
        if target.is_number
        else "chose the temperature and, where training stopped early, the network; no single class is promised this "
        "coverage, and neither are slides"
    )
    asked = f"{100 * (results.label_sets or ())[0].calibrated.coverage:g}"
    return [
        "## Label sets\n",
        f"The {target.label_word}s that cannot be excluded, beside the one that is predicted: sets that hold the true "
        f"one in {asked} % of new slides, on average over calibrations. They were calibrated on labelled slides of the "
        f"split val, which also {warning} of another center. Each slide counts once."
        f"{_WARNINGS.get(split, '')}\n",
        *markdown_table(["model", "of each", "calibrated by slides", "holds the true one", *columns], rows),
    ]
