"""Pictures over a slide: each pixel has the colour of what lies there."""

import csv
import io
import itertools
import json
import re

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lgd.base.errors import DataError
from lgd.base.target import Target, find_target
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slides import score_slide
from lgd.scoring.tile_table import list_columns
from lgd.serve import overlays
from lgd.serve.overlays import draw_overlay, list_overlays
from lgd.stain.checks import NEARLY_BLANK
from tests.support.shades import make_scorer, write_ramp

TYPES = Target(name="Type", kind="class", classes=("tissue", "b", "c"), unit=None)


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """A slide of 12 tiles."""
    return write_ramp(tmp_path_factory.mktemp("ramp") / "ramp.tif", height=600, width=740)


@pytest.fixture(scope="module")
def scored(ramp):
    """The folder of its result. No test may change it."""
    score_slide(make_scorer(grids=True), ramp, ramp.parent / "out")
    return ramp.parent / "out" / "ramp"


def draw(folder, score, name, config=None):
    with Image.open(io.BytesIO(draw_overlay(folder, score, config or make_scorer().config, name))) as image:
        assert image.mode == "RGBA"
        return np.asarray(image)


def colour_naively(legend, value):
    """Between the two stops of a legend around a value; a class by its number."""
    if value is None or np.isnan(value):
        return as_rgb(legend["no_answer"])
    if legend["kind"] == "classes":
        return as_rgb(legend["entries"][int(value)]["colour"])
    stops = legend["stops"]
    value = min(max(value, stops[0]["value"]), stops[-1]["value"])
    low, high = next((a, b) for a, b in itertools.pairwise(stops) if value <= b["value"])
    part = (value - low["value"]) / (high["value"] - low["value"])
    return as_rgb(low["colour"]) * (1 - part) + as_rgb(high["colour"]) * part


def as_rgb(text):
    assert re.fullmatch("#[0-9a-f]{6}", text)
    return np.array([int(text[at : at + 2], 16) for at in (1, 3, 5)], float)


@pytest.mark.parametrize("target", [find_target("her2"), find_target("ki67"), TYPES], ids=lambda one: one.kind)
def test_a_scored_slide_has_the_colours_of_its_numbers(target, ramp, tmp_path):
    """Where the network says what is there, and at the place of level 0 at which it is there."""
    scorer = make_scorer(target, grids=True)
    score, folder = score_slide(scorer, ramp, tmp_path), tmp_path / "ramp"
    found = {one.name: json.loads(json.dumps(one.as_json())) for one in list_overlays(folder, score, scorer.config)}
    assert [*found] == ["score", "nuclei", "dab", "stained", "complete"]
    with (folder / "tiles.csv").open(newline="") as file:
        value_of = {
            (int(row["x"]), int(row["y"])): row["value" if target.is_number else "grade"]
            for row in csv.DictReader(file)
        }
    with h5py.File(folder / "grids.h5") as file:
        places, nuclei, membrane = (file[name][()] for name in ("coords", "nuclei", "membrane"))
    values = {"score": [[[float(value_of[tuple(place)])]] for place in places.tolist()], "nuclei": nuclei}
    values |= {name: membrane[..., number] for number, name in enumerate(("dab", "stained", "complete"))}
    for name, value_ngg in values.items():
        one, picture = found[name], draw(folder, score, name, scorer.config)
        cells = len(value_ngg[0])
        assert picture.shape[:2] == (5 * cells, 6 * cells)
        assert [one[field] for field in ("x", "y", "width", "height")] == [0, 0, 6 * 128, 5 * 128]
        assert (picture[..., 3] > 0).sum() == 12 * cells**2 and set(np.unique(picture[..., 3])) == {0, 255}
        for (x, y), value_gg in zip(places.tolist(), value_ngg, strict=True):
            for (row, column), value in np.ndenumerate(value_gg):
                centre = x + (column + 0.5) * 128 / cells, y + (row + 0.5) * 128 / cells
                at = int(centre[1] * picture.shape[0] / one["height"]), int(centre[0] * picture.shape[1] / one["width"])
                assert np.abs(picture[at][:3] - colour_naively(one["legend"], float(value))).max() <= 1


def write_result(folder, target, places, side, grade_n, nuclei_ngg, notes, errors):
    """tiles.csv and grids.h5 of tiles, as a job would leave them."""
    with (folder / "tiles.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(list_columns(target))
        for (x, y), grade, note, error in zip(places, grade_n, notes, errors, strict=True):
            known = [f"{grade:.6g}", *["0.25"] * len(target.classes)] if grade == grade else [""] * (1 + target.width)
            rows.writerow([x, y, side, 1.0, target.classes[0] if grade == grade else "", *known, "", note, error])
    with h5py.File(folder / "grids.h5", "w") as file:
        file["coords"], file["nuclei"] = np.array(places), np.array(nuclei_ngg, np.float16)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_pixel_has_the_mean_of_the_cells_that_lie_in_it(data, scored, tmp_path, monkeypatch):
    """Against a naive twin: tiles anywhere, cells of any number, and pictures that are too large, and so averaged."""
    ranges = [("left", 0, 50), ("top", 0, 50), ("columns", 1, 7), ("rows", 1, 7), ("side", 3, 40), ("cells", 1, 5)]
    ranges += [("most", 3, 40), ("seed", 0, 999)]
    drawn = [data.draw(st.integers(low, high), name) for name, low, high in ranges]
    left, top, columns, rows, side, cells, most, seed = drawn
    monkeypatch.setattr(overlays, "MOST", most)
    random, score = np.random.default_rng(seed), SlideScore.read(scored / "slide.json")
    all_places = [(left + x * side, top + y * side) for y in range(rows) for x in range(columns)]
    places = [place for place in all_places if random.random() < 0.7] or all_places
    count = len(places)
    grade_n = np.where(random.random(count) < 0.2, np.nan, random.uniform(0, 3, count))
    nuclei_ngg = random.uniform(0, 16, (count, cells, cells))
    nuclei_ngg[np.isnan(grade_n)] = np.nan
    notes = [NEARLY_BLANK if random.random() < 0.2 else "" for _ in places]
    write_result(
        tmp_path,
        score.target,
        places,
        side,
        grade_n,
        nuclei_ngg,
        notes,
        ["x" if np.isnan(grade) else "" for grade in grade_n],
    )
    # The last tiles may reach beyond what was scanned.
    bounds = (left, top, columns * side - side // 3, rows * side - side // 3)
    score = score.model_copy(update={"bounds": bounds, "side": side, "tiles": count})
    for name, value_ngg in (("score", grade_n[:, None, None]), ("nuclei", nuclei_ngg.astype(np.float16))):
        one = next(one.as_json() for one in list_overlays(tmp_path, score, make_scorer().config) if one.name == name)
        picture, size = draw(tmp_path, score, name), side / value_ngg.shape[1]
        height, width = picture.shape[:2]
        assert max(height, width) <= most + value_ngg.shape[1] and (one["x"], one["y"]) == (left, top)
        inside = {}
        for (x, y), value_gg, note in zip(places, value_ngg, notes, strict=True):
            for (row, column), value in np.ndenumerate(value_gg):
                at = (
                    int((y + (row + 0.5) * size - one["y"]) * height / one["height"] + 1e-9),
                    int((x + (column + 0.5) * size - one["x"]) * width / one["width"] + 1e-9),
                )
                if note != NEARLY_BLANK:
                    inside.setdefault(at, []).append(float(value))
        for at in np.ndindex(height, width):
            known = [value for value in inside.get(at, []) if value == value]
            expected = colour_naively(one["legend"], np.mean(known) if known else None)
            assert picture[at][3] == (255 if at in inside else 0)
            assert at not in inside or np.abs(picture[at][:3] - expected).max() <= 1


def test_classes_have_no_mean(scored, tmp_path, monkeypatch):
    """Of tiles that share a pixel the first is shown."""
    monkeypatch.setattr(overlays, "MOST", 1)
    places = [(0, 0), (8, 0), (0, 8), (8, 8)]
    write_result(tmp_path, TYPES, places, 8, [0.0, 2.0, 2.0, 2.0], np.zeros((4, 1, 1)), [""] * 4, [""] * 4)
    score = SlideScore.read(scored / "slide.json")
    answer = score.answer.model_copy(update={"label": "b", "probabilities": {}, "area": None})
    update = {"target": TYPES, "answer": answer, "bounds": (0, 0, 16, 16), "side": 8, "tiles": 4}
    score, config = score.model_copy(update=update), make_scorer(TYPES).config
    (one,) = (one.as_json() for one in list_overlays(tmp_path, score, config) if one.name == "score")
    assert [entry["label"] for entry in one["legend"]["entries"]] == ["tissue", "b", "c"]
    picture = draw(tmp_path, score, "score", config)
    assert picture.shape == (1, 1, 4) and (picture[0, 0, :3] == colour_naively(one["legend"], 0)).all()


def test_what_is_not_there_is_not_listed_and_refused(scored, tmp_path):
    score, config = SlideScore.read(scored / "slide.json"), make_scorer().config
    with pytest.raises(DataError, match="no overlay 'positive': use one of score, nuclei, dab, stained, complete"):
        draw_overlay(scored, score, config, "positive")
    with pytest.raises(DataError, match="files of two results .* delete its folder and score the slide again"):
        draw_overlay(scored, score.model_copy(update={"bounds": (1, 0, 740, 600)}), config, "nuclei")
    (tmp_path / "tiles.csv").write_bytes((scored / "tiles.csv").read_bytes())
    assert [one.name for one in list_overlays(tmp_path, score, config)] == ["score"]
    unlabelled = score.model_copy(update={"answer": score.answer.model_copy(update={"label": None})})
    assert list_overlays(tmp_path, unlabelled, config) == []
    (tmp_path / "grids.h5").write_bytes((scored / "grids.h5").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"grids.h5 cannot be read .*: delete its folder and score the slide again"):
        draw_overlay(tmp_path, score, config, "nuclei")
