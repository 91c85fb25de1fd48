import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.metrics import Interval, draws, interval


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 5), st.integers(-1, 20))
def test_blocks_of_any_size_draw_alike(groups, resamples, seed, block):
    whole = np.random.default_rng(seed).integers(groups, size=(resamples, groups))
    found = np.concatenate([*draws(groups, resamples, seed, block)])
    assert found.shape == (resamples, groups)
    assert found.tolist() == [[(row == group).sum() for group in range(groups)] for row in whole]


def test_an_interval_holds_its_value_and_leaves_out_what_is_undefined():
    found = interval(np.array([0.9, 0.1, np.nan, 0.2, 0.3]), 12)
    assert found == Interval(value=0.9, low=found.low, high=0.9) and 0.09 < found.low < 0.2
    assert (
        interval(np.array([0.5, np.nan]), 12)
        == interval(np.array([0.5]), 1)
        == Interval(value=0.5, low=None, high=None)
    )
    assert interval(np.array([np.nan, 0.5]), 12) == Interval(value=None, low=None, high=None)


def test_trainings_widen_an_interval():
    resamples = np.random.default_rng(0).normal(0.5, 0.05, 500)
    alike, apart = (
        np.stack([np.append(value, resamples + value - 0.5) for value in some]) for some in ((0.5, 0.5), (0.3, 0.7))
    )
    narrow, wide = (interval(some, 20) for some in (alike, apart))
    assert narrow.value == wide.value == pytest.approx(0.5)
    # Student's t with one degree of freedom: 12.7 standard errors of 0.2.
    assert wide.high - wide.value == pytest.approx(12.706 * 0.2, rel=0.01) and narrow.high - narrow.value < 0.15
