"""Whole virtual slides and the truth about them."""

import csv
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from lgd.base.errors import ConfigError, DataError
from lgd.tissue.drawing import MPP
from lgd.tissue.sections import Scene, draw_look
from lgd.tissue.slide_set import SlidesTruth, _draw_slide
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.tissue.whole_slide import BLOCK, Moves, Section, draw_strokes
from lgd.tissue.world import World

_SIDE = 512


def _options(out: Path, **changed) -> SynthOptions:
    given = {"slides_only": 4, "slide_size": _SIDE, "centers": 1, "unregistered": 0.25, "workers": 1}
    return SynthOptions(out=str(out), **{**given, **changed})


def _read(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (_SIDE, _SIDE) and slide.level_count == 2
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3].astype(int)


def _spread(truth: np.ndarray) -> np.ndarray:
    return truth.repeat(32, 0).repeat(32, 1)[:_SIDE, :_SIDE]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("slides") / "set"
    assert synthesise(_options(out))["levels"] == {"0": 1, "1+": 1, "2+": 1, "3+": 1}
    return out


def test_slides_are_listed_and_reused(drawn):
    assert synthesise(_options(drawn))["reused"]
    rows = list(csv.DictReader((drawn / "slides.csv").open()))
    truth = SlidesTruth.read(drawn / "truth.json")
    assert [row["label"] for row in rows] == [slide.label for slide in truth.slides]
    assert {(row["center"], row["scanner"], row["mpp"]) for row in rows} == {("center-1", "scanner-1", "0.46")}
    assert [row["he"] for row in rows] == [f"HE/slide-{number:04d}.tif" for number in range(4)]
    assert [slide.registered for slide in truth.slides].count(False) == 1
    with pytest.raises(DataError, match=r"slide_size 512 \(now 700\)"):
        synthesise(_options(drawn, slide_size=700))
    raster = drawn / "truth" / "slide-0000.png"
    raster.rename(drawn / "aside")
    with pytest.raises(DataError, match="is not as it was made"):
        synthesise(_options(drawn))
    (drawn / "aside").rename(raster)


def test_the_same_options_give_the_same_bytes(drawn, tmp_path):
    names = [f"{folder}/slide-0002.{suffix}" for folder, suffix in (("HE", "tif"), ("IHC", "tif"), ("truth", "png"))]
    for name in names:
        (tmp_path / name).parent.mkdir()
    _draw_slide(tmp_path, _options(drawn), 2)
    assert all((tmp_path / name).read_bytes() == (drawn / name).read_bytes() for name in names)


def test_a_slide_is_as_its_truth_says(drawn):
    brown = {}
    for slide in SlidesTruth.read(drawn / "truth.json").slides:
        areas = dict.fromkeys(("0", "1+", "2+", "3+"), 0.0)
        for region in slide.regions:
            areas[region.label] += region.area_mm2
        whole = sum(areas.values())
        assert max(areas, key=areas.__getitem__) == slide.label
        assert all(area < 0.3 * whole for label, area in areas.items() if label > slide.label)
        raster = np.asarray(Image.open(drawn / "truth" / f"{slide.slide}.png"))
        he, ihc = (_read(drawn / stain / f"{slide.slide}.tif") for stain in ("HE", "IHC"))
        number, tumour, pen = (_spread(raster[..., channel]) for channel in range(3))
        glass = (number == 0) & (pen == 0)
        white = np.median(he[glass], 0)
        assert 0.2 < (number > 0).mean() < 0.8
        assert np.abs(he[glass] - white).mean() < 25 < np.abs(he[(number > 0) & (pen == 0)] - white).mean()
        assert (pen > 128).any() == bool(slide.strokes)
        if slide.registered:
            there = (tumour > 128) & np.isin(number, [r.number for r in slide.regions if r.label == slide.label])
            brown[slide.label] = np.subtract(*(ihc[there] - np.median(ihc[glass], 0)).mean(0)[[0, 2]])
    assert brown[max(brown)] > brown[min(brown)] + 8


def _world(slide: int, side: int) -> World:
    return World(0, slide, draw_look(0, slide, Scene()), (side * MPP, side * MPP), 3, 0.7)


def _draw(section: Section) -> np.ndarray:
    return np.concatenate([np.concatenate(row, 1) for row in section.draw_rows()]).astype(float)


@pytest.mark.parametrize("moves", [None, Moves()])
def test_blocks_join_without_a_seam(moves):
    """Their border does not stand out among the differences of neighbouring columns; and each depends on its place
    alone, whatever was drawn before.
    """
    pixels, world = (BLOCK, 2 * BLOCK), _world(0, 2 * BLOCK)
    whole = _draw(Section(world, (0, 0), pixels, [], moves))
    steps = np.abs(np.diff(whole[:, BLOCK - 100 : BLOCK + 100], axis=1)).mean((0, 2))
    border = steps[99]
    assert border < 1.02 * np.delete(steps, 99).max()
    alone = Section(_world(0, 2 * BLOCK), (0, 0), pixels, [], moves)._draw_block(0, BLOCK, None)
    assert np.array_equal(whole[:, BLOCK:], alone)


def test_a_shift_moves_the_content_of_the_ihc():
    world = _world(2, BLOCK)
    plain, moved = (_draw(Section(world, (0, 2), (BLOCK, BLOCK), [], Moves(by))) for by in ((0.0, 0.0), (16.1, -9.2)))
    dark = [image[..., 0] < np.median(image[..., 0][:5]) - 20 for image in (plain, moved)]
    overlap = [
        (dark[0][40:-80, 60:-40] & dark[1][40 + y : y - 80, 60 + x : x - 40]).sum() for y, x in ((35, -20), (0, 0))
    ]
    assert overlap[0] > 1.3 * overlap[1]


def test_each_third_slide_has_no_pen():
    assert [len(draw_strokes(0, slide, (1000.0, 1000.0))) for slide in range(6)] == [2, 2, 0, 2, 2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slides_only": 2, "pairs": 8}, "slides_only is 2: give no pairs"),
        ({"slides_only": 2, "stain": "nuclei"}, "slides_only is 2: give no stain"),
        ({"shift": 5.0}, "slides_only is 0: give slides_only with shift"),
        ({"slides_only": 4, "centers": 2}, "use at least 4 slides a center"),
        ({"slides_only": 1, "slide_size": 100}, "slide_size"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        SynthOptions(out=str(tmp_path), **options)
