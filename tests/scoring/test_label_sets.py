"""Label sets of a patch and of a slide, as a model's folder calibrates them."""

import numpy as np
import pytest

from lgd.base.target import find_target
from lgd.labels.conformal import Conformal, Threshold
from lgd.scoring.label_sets import read_set, show_set

HER2, KI67 = find_target("her2"), find_target("ki67")


def config(target, patch, slide=None, kind="ordinal"):
    of_slide = None if slide is None else Threshold(highest=slide, slides=30)
    found = Conformal(coverage=0.9, kind=kind, patch=Threshold(highest=patch, slides=30), slide=of_slide)
    return found, target


@pytest.mark.parametrize(("patch", "expected"), [
    (0.0, ("2+",)), (0.6, ("2+", "3+")), (0.8, ("1+", "2+", "3+")), (9.0, ("0", "1+", "2+", "3+")), (None, None),
])  # fmt: skip
def test_a_set_grows_with_its_threshold(patch, expected):
    assert read_set(*config(HER2, patch), np.array([0.05, 0.15, 0.5, 0.3]), "patch") == expected


def test_a_value_has_an_interval_within_its_range():
    of = config(KI67, 12.0, 5.0, "number")
    assert read_set(*of, np.array([95.0]), "patch") == (83.0, 100.0)
    assert read_set(*of, np.array([95.0]), "slide") == (90.0, 100.0)
    assert show_set(KI67, (1 / 3, 100.0)) == (0.3333, 100.0) and show_set(KI67, None) is None


def test_what_was_not_calibrated_has_no_set():
    of = config(HER2, 0.1)
    assert read_set(*of, np.array([0.1, 0.2, 0.3, 0.4]), "slide") is None
    assert read_set(*of, np.full(4, np.nan), "patch") is None and read_set(*of, None, "patch") is None
    none = None, HER2
    assert read_set(*none, np.array([0.1, 0.2, 0.3, 0.4]), "patch") is None
