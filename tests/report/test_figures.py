"""Text of others in the pictures."""

import warnings

import numpy as np
import pytest
from PIL import Image

from lgd.metrics import Interval, Predictions
from lgd.report.figures import Picture, Query, confusion_matrix, contact_sheet, robustness_curves
from lgd.report.results import AtStrength, ModelRobustness, Robustness, UnderChange
from lgd.retrieval.answers import Answer, Hit

BROKEN = [r"$\frac{$ & \x", "a\x1b[2J\x07\nb\t", "漢字 \udcff\u202e", "x" * 100_000, ""]


@pytest.mark.parametrize("name", BROKEN, ids=range(len(BROKEN)))
def test_any_text_can_be_drawn(tmp_path, name):
    level = np.arange(8) % 4
    scored = Predictions(name=name, keys=["k"] * 8, groups=["g"] * 8, level=level, probability=np.eye(4)[level])
    part = Interval(value=0.5, low=0.4, high=0.6)
    metrics = {"accuracy": part, "ece": part}
    # Not checked, as no record takes all of these names.
    changes = [UnderChange.model_construct(name=name, at=[AtStrength.model_construct(label=name, metrics=metrics)])]
    models = [ModelRobustness.model_construct(name=name, unchanged=metrics, changes=changes)]
    robust = Robustness.model_construct(changes=changes, models=models)
    image = np.zeros((8, 8, 3), np.uint8)
    found = Hit(key=name, slide=name, split=name, level="1+", part=0, row=0, distance=0.1, duplicate_of=name)
    answer = Answer(image=name, level="1+", neighbours=[found])
    query = Query(answer=answer, slide=name, level="1+", he=image, ihc=image, images=[Picture("H&E", image)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(scored, tmp_path / "confusion.png", name)
        robustness_curves(robust, tmp_path / "robustness.png")
        contact_sheet([query], tmp_path / "sheet.png", votes=True)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) < 2000
