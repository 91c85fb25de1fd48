"""Text of others in the figure."""

import warnings

import pytest
from PIL import Image

from lgd.metrics import Interval
from lgd.report.ablation_table import AblationDocument, Compared
from tools.studies.plot_coupling import gain_curves

BROKEN = [r"$\frac{$ & \x", "a\x1b[2J\x07\nb\t", "漢字 \udcff\u202e", "x" * 100_000, ""]


@pytest.mark.parametrize("name", BROKEN, ids=range(len(BROKEN)))
def test_any_text_can_be_drawn(tmp_path, name):
    part = Interval(value=0.5, low=0.4, high=0.6)
    rows = {name or "row": {"kappa": Compared(mean=part, lgd_minus=part)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gain_curves({0.5: AblationDocument.model_construct(rows=rows)}, "kappa", tmp_path / "gain.png")
    with Image.open(tmp_path / "gain.png") as picture:
        assert max(picture.size) < 2000
