"""Limits of agreement against their definition, and their pictures."""

import numpy as np
import pytest
from drawn_answers import HSCORE, KI67, draw_answers
from PIL import Image

from lgd.base.target import Target
from lgd.metrics import Interval
from lgd.report.agreement import draw_agreement, draw_values, measure_agreement


@pytest.mark.parametrize("origin", [0.0, 1e6])
def test_limits_equal_their_definition(origin):
    p = draw_answers(HSCORE, label=origin + np.arange(30.0), groups=[f"s{row // 3}" for row in range(30)])
    p.output[:] = p.label[:, None] + np.random.default_rng(0).normal(2, 5, (30, 1))
    less = p.output[:, 0] - p.label
    found = measure_agreement(p, 200, 0)
    lines = found.mean_difference, found.lower_limit, found.upper_limit
    for one, factor in zip(lines, (0, -1.96, 1.96), strict=True):
        assert one.value == pytest.approx(less.mean() + factor * less.std(ddof=1), rel=1e-6)
        assert one.low < one.value < one.high


def test_the_intervals_resample_groups():
    """Ten slides that each err in their own way: the mean is as uncertain as ten numbers leave it."""
    shift = np.repeat(np.random.default_rng(3).normal(0, 10, 10), 20)
    p = draw_answers(HSCORE, label=np.linspace(50, 250, 200), groups=[f"s{row // 20}" for row in range(200)])
    p.output[:] = (p.label + shift)[:, None]
    found = measure_agreement(p, 1000, 0).mean_difference
    error = shift[::20].std(ddof=1) / np.sqrt(10)
    assert found.high - found.low == pytest.approx(2 * 2.26 * error, rel=0.2)


@pytest.mark.filterwarnings("error")
def test_few_patches_have_no_limits():
    nothing = Interval(value=None, low=None, high=None)
    empty, alone, slide = (
        measure_agreement(draw_answers(KI67, label=[10.0] * count, groups=["s"] * count), 20, 0) for count in range(3)
    )
    assert empty.mean_difference == empty.lower_limit == nothing
    assert alone.mean_difference.value is not None and alone.lower_limit == alone.upper_limit == nothing
    assert slide.upper_limit.value is not None and slide.upper_limit.low is None


BROKEN = Target(name="x", kind="number", classes=(), unit="$\\frac{$")


@pytest.mark.parametrize(
    ("target", "label"),
    [(KI67, None), (HSCORE, None), (BROKEN, None), (HSCORE, [5.0, 5.0]), (HSCORE, [7.0]), (KI67, [1.0, np.nan])],
    ids=["range", "free", "unit", "constant", "single", "unknown"],
)
def test_values_can_be_drawn(tmp_path, target, label):
    p = draw_answers(target, label=label)
    made = measure_agreement(p.labelled(), 20, 0)
    draw_values([("by patch", p)], tmp_path / "values.png", "$unfinished")
    draw_agreement([("by patch", p, made), ("by slide", p, made)], tmp_path / "agreement.png", "x" * 1000)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert 400 < max(picture.size) < 2000 and np.asarray(picture.convert("L")).std() > 10
