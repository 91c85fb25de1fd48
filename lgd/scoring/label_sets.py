"""Labels as they are printed: the point label, and beside it those that cannot be excluded, of a patch or a slide
(`lgd.labels.conformal`).
"""

import math
from collections.abc import Mapping

import numpy as np

from lgd.base.target import Target
from lgd.labels.conformal import By, Conformal

LabelSet = tuple[str | float, ...]
"""Classes that cannot be excluded; or the lowest and the highest value."""

DIGITS = 4
"""Of a value that a network gives."""


def read_set(conformal: Conformal | None, target: Target, output_K: np.ndarray | None, by: By) -> LabelSet | None:
    """The labels of a patch, or of a slide by its mean, that cannot be excluded; None where too little calibrated that.

    `output_K` is what `Scorer.score` gives of it.
    """
    threshold = conformal and (conformal.patch if by == "patch" else conformal.slide)
    if output_K is None or not np.isfinite(output_K).all() or not threshold or threshold.highest is None:
        return None
    assert conformal is not None
    if target.is_number:
        low, high = conformal.find_intervals(output_K, by, target.range or (-math.inf, math.inf))[0].tolist()
        return low, high
    found_K = conformal.find_sets(output_K[None], by)[0]
    return tuple(name for name, found in zip(target.classes, found_K, strict=True) if found)


def show_set(target: Target, label_set: LabelSet | None) -> LabelSet | None:
    """A set to be printed; the ends of an interval are rounded."""
    if label_set is None or not target.is_number:
        return label_set
    return tuple(float(f"{end:.4g}") for end in label_set)


def format_set(target: Target, label_set: LabelSet | None) -> str:
    """A set as one cell; empty where there is none."""
    return (" to " if target.is_number else ",").join(map(str, show_set(target, label_set) or ()))


def name_set(target: Target) -> str:
    """What a set is called."""
    return "interval" if target.is_number else "label_set"


def show_label(target: Target, label: str | float | None, digits: int = DIGITS) -> dict[str, str | float | None]:
    """A label by its word, to be printed; a value is rounded, and has its unit beside it."""
    if not target.is_number:
        return {target.label_word: label}
    rounded = label if label is None else float(f"{label:.{digits}g}")
    return {target.label_word: rounded, "unit": target.unit}


def write_label(target: Target, label: str | float | None, digits: int = DIGITS) -> dict[str, str | None]:
    """The same as text, for a table, which would give all values three decimals."""
    return {name: None if cell is None else str(cell) for name, cell in show_label(target, label, digits).items()}


def round_probabilities(probabilities: Mapping[str, float | None]) -> dict[str, float | None]:
    """To the 4 digits that are shown."""
    return {name: None if one is None else round(one, 4) for name, one in probabilities.items()}
