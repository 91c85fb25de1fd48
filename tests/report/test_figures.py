"""Text of others in the pictures."""

import warnings

import numpy as np
import pytest
from drawn_answers import GRADE, HER2, KI67, STATUS, SUBTYPE, draw_answers
from PIL import Image

from lgd.base.target import Target
from lgd.metrics import Interval
from lgd.report.charts import confusion_matrix, robustness_curves
from lgd.report.contact_sheet import Field, Picture, Query, compare_labels, contact_sheet
from lgd.report.results import AtStrength, ModelRobustness, Robustness, UnderChange
from lgd.report.sheet import cut_middle
from lgd.retrieval.answers import Answer, Hit

BROKEN = [r"$\frac{$ & \x", "a\x1b[2J\x07\nb\t", "漢字 \udcff\u202e", "x" * 100_000, ""]


@pytest.mark.parametrize("name", BROKEN, ids=range(len(BROKEN)))
def test_any_text_can_be_drawn(tmp_path, name):
    scored = draw_answers(HER2, name=name)
    part = Interval(value=0.5, low=0.4, high=0.6)
    metrics = {"accuracy": part, "ece": part}
    # Not checked, as no record takes all of these names.
    changes = [UnderChange.model_construct(name=name, at=[AtStrength.model_construct(label=name, metrics=metrics)])]
    models = [ModelRobustness.model_construct(name=name, unchanged=metrics, changes=changes)]
    robust = Robustness.model_construct(changes=changes, models=models)
    field = Field(np.zeros((8, 8, 3), np.uint8), 0.46)
    found = Hit(key=name, slide=name, split=name, label="1+", part=0, row=0, distance=0.1, duplicate_of=name)
    answer = Answer(image=name, label="1+", known=HER2, neighbours=[found])
    images = [Picture("H&E", field)]
    query = Query(answer=answer, slide=name, label="1+", he=field, ihc=field, images=images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(scored, tmp_path / "confusion.png", name)
        robustness_curves(robust, scored.measures, tmp_path / "robustness.png")
        contact_sheet([query], tmp_path / "sheet.png", votes=True)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) < 2000


@pytest.mark.parametrize(
    ("size", "mpp", "shown", "scale"),
    [
        ((1024, 1024), 0.46, (330, 330), 0.46),
        ((1024, 1024), 0.25, (330, 330), 150 / 330),
        ((1024, 1024), None, (330, 330), None),
        ((96, 128), 0.46, (96, 128), 0.46),
        ((200, 2000), 0.5, (200, 330), 0.5),
        ((168, 168), 2.8, (168, 168), 2.8),
    ],
)
def test_a_panel_shows_the_middle_of_a_patch_fine_enough_for_membranes(size, mpp, shown, scale):
    """150 um or 330 pixels, whichever is more; nothing is enlarged."""
    image = np.indices((*size, 3)).sum(0).astype(np.uint8)
    field = cut_middle(image, mpp)
    assert field.image.shape == (*shown, 3)
    assert field.mpp == (scale and pytest.approx(scale, rel=0.01))
    assert field.share == pytest.approx(shown[1] * (scale / mpp if scale else 1) / size[1], rel=0.01)
    if scale == mpp:
        top, left = ((whole - part) // 2 for whole, part in zip(size, shown, strict=True))
        assert np.array_equal(field.image, image[top : top + shown[0], left : left + shown[1]])


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def draw_sheet(path, target, true, predicted, found):
    image = np.zeros((8, 8, 3), np.uint8)
    hits = [Hit(key="k", slide=None, split="train", label=one, part=0, row=0, distance=0.1) for one in found]
    answer = Answer(image="q", label=predicted, known=target, neighbours=hits)
    images = [Picture("IHC", Field(image, None))] * len(hits)
    query = Query(answer=answer, slide=None, label=true, he=Field(image, None), ihc=None, images=images)
    contact_sheet([query], path, votes=True)
    colours = {"green": (0, 158, 115), "orange": (230, 159, 0), "red": (213, 94, 0), "grey": (153, 153, 153)}
    pixels = read_pixels(path)
    return {name for name, colour in colours.items() if (pixels == colour).all(1).sum() > 500}


@pytest.mark.parametrize(
    ("target", "labels", "frames"),
    [
        (GRADE, ("3", "4", ["5", None]), {"orange", "red", "grey"}),
        (SUBTYPE, ("ductal", "lobular", ["ductal"]), {"red", "green"}),
        (STATUS, ("negative", "negative", ["positive"]), {"green", "orange"}),
        (KI67, (50.0, 54.0, [65.0, 90.0, None]), {"green", "orange", "red", "grey"}),
        (KI67, (None, 54.0, [65.0]), {"grey"}),
    ],
    ids=["ordinal", "class", "binary", "number", "unknown"],
)
def test_frames_show_how_far_labels_are(tmp_path, target, labels, frames):
    assert draw_sheet(tmp_path / "q.png", target, *labels) == frames


@pytest.mark.parametrize(
    ("target", "true", "label", "words"),
    [
        (HER2, "2+", "2+", "same level"),
        (HER2, "2+", "1+", "one level off"),
        (HER2, "0", "3+", "further off"),
        (SUBTYPE, "ductal", "other", "another label"),
        (KI67, 20.0, 24.0, "off by 4%"),
        (KI67, 0.0, 0.0, "off by 0%"),
        (HER2, None, "2+", "not comparable"),
        (HER2, "2+", "a class of another target", "not comparable"),
        (KI67, 20.0, "2+", "not comparable"),
        (HER2, 20.0, "2+", "not comparable"),
    ],
)
def test_captions_say_how_far_labels_are(target, true, label, words):
    assert compare_labels(true, label, target, 100.0)[1] == words


def test_values_without_a_range_are_compared_by_those_at_hand(tmp_path):
    plain = Target(name="score", kind="number", classes=(), unit=None)
    assert draw_sheet(tmp_path / "a.png", plain, 0.0, 10.0, [1000.0]) == {"green", "red"}
    assert draw_sheet(tmp_path / "b.png", plain, 0.0, 10.0, [11.0]) == {"red"}
    assert draw_sheet(tmp_path / "c.png", plain, 7.0, 7.0, [7.0]) == {"green"}


@pytest.mark.parametrize("count", [2, 12, 100])
def test_a_confusion_matrix_of_many_classes_can_be_drawn(tmp_path, count):
    names = tuple(f"a rather long name of class {number}" for number in range(count))
    target = Target(name="many", kind="class", classes=names, unit=None)
    confusion_matrix(draw_answers(target, slides=count, each=2), tmp_path / "c.png", "many")
    with Image.open(tmp_path / "c.png") as picture:
        assert 400 < max(picture.size) < 4000
