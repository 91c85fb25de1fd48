"""What is measured of answers to a target: the metrics of a kind of target, alike to whoever asks for them.

All metrics but those by rank are functions of sums over patches, so each group is summed once and a resample is one row
of a matrix product: 1000 resamples of 500 patches take 0.2 s, and with scikit-learn 16 s. Tests hold the metrics
against their definitions and scikit-learn's.

Shapes: n patches, K numbers of an answer (see `Target.width`), G groups, R resamples, S sums.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from lgd.base.labels import Labels, find_known
from lgd.base.target import Target
from lgd.metrics import Floats


class Measures(ABC):
    """The metrics of a target."""

    names: tuple[str, ...]
    """All of them, in the order of a document."""
    answers: tuple[str, ...]
    """Those that look at the answer alone, and need no probability."""
    headline: Mapping[str, str]
    """Those of the first table, with their names there."""
    main: str
    """By which networks are compared where one number must do, such as in early stopping."""
    choices: tuple[str, ...]
    """By which networks may be compared so."""
    ranked: frozenset[str] = frozenset()
    """Those by rank, which are no functions of sums."""
    lower_is_better: frozenset[str] = frozenset()
    """Those of which the lower value is the better one."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def sum_patches(self, label_n: Labels, output_nK: Floats) -> Floats:
        """(n, S): what each labelled patch adds to the sums that `read_sums` takes."""

    @abstractmethod
    def read_sums(self, sums_RS: Floats) -> dict[str, Floats]:
        """Every metric but those by rank, (R,) each."""

    @abstractmethod
    def rank_patches(self, name: str, label_n: Labels, output_nK: Floats, weight_Rn: Floats) -> Floats:
        """A metric by rank, (R,), where patch n counts so often."""

    def find_supported(self, sums_GS: Floats) -> frozenset[str]:
        """The metrics that have two groups behind them on each side, so that resampling groups shows how they vary."""
        return frozenset(self.names)

    def score(self, label_n: Labels, output_nK: Floats) -> dict[str, float]:
        """Every metric -> value; NaN where it is undefined. Patches without a label are left out."""
        known_n = find_known(label_n)
        label_n, output_nK = label_n[known_n], output_nK[known_n]
        if not len(label_n):
            return dict.fromkeys(self.names, np.nan)
        values = self.read_sums(self.sum_patches(label_n, output_nK).sum(0, keepdims=True))
        once_1n = np.ones((1, len(label_n)))
        values |= {name: self.rank_patches(name, label_n, output_nK, once_1n) for name in self.ranked}
        return {name: float(values[name][0]) for name in self.names}
