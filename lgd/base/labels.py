"""Labels as arrays, beside what they are of (`lgd.base.target`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgd.base.target import NO_CLASS, Target

Labels = NDArray[np.int64] | NDArray[np.floating[Any]]
"""(n,): numbers of classes as int64, -1 for unknown; or values as float64, NaN for unknown."""


def as_labels(target: Target, labels: Sequence[float | None]) -> Labels:
    """Labels (n,) of JSON, None for unknown."""
    if target.is_number:
        return np.array([np.nan if one is None else one for one in labels], np.float64)
    return np.array([NO_CLASS if one is None else one for one in labels], np.int64)


def find_known(label_n: Labels) -> NDArray[np.bool_]:
    """Which patches have a label, bool (n,)."""
    known_n: NDArray[np.bool_] = label_n >= 0 if label_n.dtype.kind == "i" else ~np.isnan(label_n)
    return known_n
