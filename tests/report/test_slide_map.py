"""Patches on their slides: each in its place, in the colours of the target."""

import numpy as np
import pytest
from drawn_answers import HER2, KI67, SUBTYPE
from PIL import Image

from lgd.base.labels import as_labels
from lgd.labels.predictions import Predictions
from lgd.report.slide_map import MOST_SLIDES, draw_slide_maps, read_slide_maps
from lgd.report.slides import by_slide
from lgd.scoring.colours import NO_ANSWER, colour_grades
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.stream.reader import Reader

COLUMNS, SIDE = 4, 500
SIZES = {"a": 12, "b": 8, "c": 9, "d": 6, "e": 5, "small": 3, "nowhere": 4}
"""Patches of each slide."""


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Shards of H&E patches of one colour each, which lie in rows of `COLUMNS` on their slides, and their KEY.json."""
    folder = tmp_path_factory.mktemp("placed")
    rows, random = ["he,slide,split,label,x,y,side,mpp"], np.random.default_rng(0)
    for slide, count in SIZES.items():
        for number in range(count):
            name = f"{slide}-{number}.png"
            colour = random.integers(0, 256, 3, np.uint8)
            Image.fromarray(np.broadcast_to(colour, (50, 50, 3)).copy()).save(folder / name)
            x, y = 10_000 + SIDE * (number % COLUMNS), 7_000 + SIDE * (number // COLUMNS)
            place = ",," if slide == "nowhere" else f"{x},{y},{SIDE}"
            label = "" if number == 1 else HER2.classes[number % 4]
            rows.append(f"{name},{slide},test,{label},{place},2.5")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(folder / "pairs.csv"), out=str(folder / "shards"), shard_size=20))
    shards = ShardSet.open([str(folder / "shards")]).of_split("test")
    reader = Reader(shards, ("he",))
    return shards, [reader.read(number) for number in range(reader.total)]


def predict(samples, target=HER2):
    metas = [sample.meta for sample in samples]
    random = np.random.default_rng(1)
    labels = [meta.label for meta in metas] if target == HER2 else [None] * len(metas)
    output = random.dirichlet(np.ones(target.width), len(metas))
    output = random.random((len(metas), 1)) if target.is_number else output
    return Predictions(
        target=target,
        name="LGD-Net",
        keys=[meta.key for meta in metas],
        groups=[meta.group for meta in metas],
        label=as_labels(target, labels),
        output=output,
        places=np.array([meta.place for meta in metas], np.float64),
    )


def test_each_patch_lies_in_its_place_in_the_colour_of_its_label(placed):
    shards, samples = placed
    predictions = predict(samples)
    maps = {one.name: one for one in read_slide_maps(predictions, shards, (0.0, 3.0), threads=1)}
    assert len(maps) == MOST_SLIDES and {"small", "nowhere"}.isdisjoint(maps)
    expected = predictions.output @ np.arange(4)
    for row, sample in enumerate(samples):
        meta = sample.meta
        if meta.slide not in maps:
            continue
        one = maps[meta.slide]
        assert one.patches == one.shown == SIZES[meta.slide]
        # Four patches, 500 pixels or 125 um each, are 480 pixels of a panel.
        assert one.mpp == pytest.approx(4 * 125 / 480) and one.he.shape[1] == 480
        at = tuple(int((place - start + SIDE / 2) * 480 / 2000) for place, start in ((meta.y, 7_000), (meta.x, 10_000)))
        true = NO_ANSWER if meta.label is None else colour_grades(HER2, np.array([float(meta.label)]), (0.0, 3.0))[0]
        assert tuple(one.true[at]) == tuple(true)
        assert tuple(one.predicted[at]) == tuple(colour_grades(HER2, expected[[row]], (0.0, 3.0))[0])
        assert np.abs(one.he[at].astype(int) - sample.images["he"][25, 25]).max() <= 2


def test_the_slides_are_spread_over_their_labels_and_bounded(placed, monkeypatch):
    shards, samples = placed
    monkeypatch.setattr("lgd.report.slide_map.MOST_IMAGES", 5)
    maps = read_slide_maps(predict(samples), shards, (0.0, 3.0), threads=1)
    assert [one.shown for one in maps] == [5] * MOST_SLIDES
    again = read_slide_maps(predict(samples), shards, (0.0, 3.0), threads=1)
    assert [one.name for one in maps] == [one.name for one in again]


@pytest.mark.parametrize("target", [HER2, SUBTYPE, KI67], ids=["ordinal", "class", "number"])
def test_slides_of_any_target_can_be_drawn(placed, tmp_path, target):
    shards, samples = placed
    maps = read_slide_maps(predict(samples, target), shards, (0.0, 3.0), threads=1)
    draw_slide_maps(maps[:1], target, (0.0, 3.0), tmp_path / "slides.png")
    with Image.open(tmp_path / "slides.png") as picture:
        assert picture.width > 1000


def test_places_follow_their_patches(placed):
    _, samples = placed
    predictions = predict(samples)
    assert predictions.places[0].tolist() == [10_000, 7_000, SIDE, 125]
    assert np.array_equal(predictions.select(np.array([5, 2])).places, predictions.places[[5, 2]])
    assert by_slide(predict(samples[:1])).places is None
    nowhere = [sample for sample in samples if sample.meta.slide == "nowhere"]
    assert read_slide_maps(predict(nowhere), [], (0.0, 3.0), 1) == []
