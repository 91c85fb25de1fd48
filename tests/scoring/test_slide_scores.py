"""Whole slides: what is left of one, and what becomes of those that are damaged, foreign, or killed half way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from lgd.base.errors import ConfigError, DataError
from lgd.base.target import Target, find_target
from lgd.cli import main
from lgd.scoring import slide_plan
from lgd.scoring.colours import NO_ANSWER, colour_grades, grade_answers
from lgd.scoring.slide_answer import SlideScore, answer_slide, number_blocks, resample_means
from lgd.scoring.slide_plan import FILES
from lgd.scoring.slides import find_slides, score_slide, score_slides
from lgd.scoring.tile_table import read_tiles as read_table
from lgd.slides.slide import open_slide
from lgd.store.feature_layouts import open_features
from lgd.tissue.pyramid import write_pyramid
from tests.support.drawn_slides import damage, find_tile
from tests.support.shades import draw_ramp, make_scorer, write_ramp

HER2 = find_target("her2")
KINDS = {
    "number": find_target("ki67"),
    "class": Target(name="Type", kind="class", classes=("a", "b", "c"), unit=None),
    "ordinal": HER2,
}


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """A slide of 40 tiles that get darker from left to right."""
    return write_ramp(tmp_path_factory.mktemp("ramp") / "ramp.tif")


@pytest.fixture(scope="module")
def scored(ramp):
    """The folder of its result. No test may change it."""
    score_slide(make_scorer(), ramp, ramp.parent / "out")
    return ramp.parent / "out" / "ramp"


def read_tiles(folder):
    with (folder / "tiles.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_probabilities(folder):
    return np.array([[float(row[name]) for name in HER2.classes] for row in read_tiles(folder)])


def test_a_slide_leaves_its_files(scored, ramp):
    assert sorted(path.name for path in scored.iterdir()) == sorted({*FILES} - {"grids.h5"})
    score = SlideScore.read(scored / "slide.json")
    rows, mean_K = read_tiles(scored), read_probabilities(scored).mean(0)
    assert score.tiles == len(rows) == 40 and score.failed == 0 and score.side == 128
    assert [score.answer.probabilities[name].value for name in HER2.classes] == pytest.approx(mean_K, abs=1e-5)
    assert score.answer.label == HER2.classes[mean_K.argmax()]
    assert score.inputs.mpp == pytest.approx(0.5, rel=1e-3) and score.tissue.area_mm2 == pytest.approx(0.19, rel=0.15)
    with Image.open(scored / "heatmap.png") as image:
        assert min(image.size) > 500
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for row in rows[:2]:
        colour = colour_grades(HER2, np.array([float(row["grade"])]), (0, 3))[0]
        assert (abs(colours.astype(int) - colour).max(1) <= 1).sum() > 300, "a tile has its absolute colour"


def test_a_tile_has_what_the_network_says_of_its_pixels(scored, ramp):
    scorer, rows = make_scorer(), read_tiles(scored)
    with open_slide(ramp) as slide:
        tiles = np.stack([slide.read(int(row["x"]), int(row["y"]), 64, 64, 1.0) for row in rows])
    assert np.allclose(scorer.score(tiles)["output"], read_probabilities(scored), atol=1e-5)
    with h5py.File(scored / "features.h5") as file:
        assert np.allclose(file["features"], scorer.score(tiles)["features"], atol=1e-3)
        assert file["coords"][()].tolist() == [[int(row["x"]), int(row["y"])] for row in rows]
    assert spearmanr([float(row["grade"]) for row in rows], [int(row["x"]) for row in rows])[0] > 0.95


def test_features_are_read_as_those_of_trident(scored):
    found = open_features(scored / "features.h5")
    assert (found.layout, found.rows, found.dim, found.tiles.side, found.tiles.step) == ("trident", 40, 48, 128, 128)


def test_geojson_is_as_quupath_has_it(scored):
    content = json.loads((scored / "patches.geojson").read_text())
    assert content.keys() == {"type", "features"}, "no crs: places are pixels"
    tissue = [one for one in content["features"] if one["properties"]["objectType"] == "annotation"]
    tiles = [one for one in content["features"] if one["properties"]["objectType"] == "tile"]
    assert len(tissue) == 1 and tissue[0]["properties"]["isLocked"] is True and len(tiles) == 40
    assert len({uuid.UUID(one["id"]) for one in content["features"]}) == 41
    for one, row in zip(tiles, read_tiles(scored), strict=True):
        ring = one["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1] == [int(row["x"]), int(row["y"])] and ring[2] == [ring[0][0] + 128, ring[0][1] + 128]
        said = one["properties"]["classification"]
        assert said["name"] == row["level"] and all(0 <= channel <= 255 for channel in said["color"])
        assert one["properties"]["measurements"]["2+"] == pytest.approx(float(row["2+"]))
    ring = np.array(tissue[0]["geometry"]["coordinates"][0])
    assert np.abs(ring.min(0) - 100).max() < 24 and np.abs(ring.max(0) - (1200, 800)).max() < 24


def test_a_second_run_takes_what_is_there(scored, ramp):
    before = {path: path.stat().st_mtime_ns for path in scored.iterdir()}
    score_slide(make_scorer(), ramp, scored.parent)
    assert {path: path.stat().st_mtime_ns for path in scored.iterdir()} == before
    for scorer, mpp in ((make_scorer(mpp=0.51), None), (make_scorer(), 0.45)):
        with pytest.raises(DataError, match="ramp holds what came of another slide, scale or network: name another"):
            score_slide(scorer, ramp, scored.parent, mpp=mpp)


def test_nothing_is_left_without_a_folder(scored, ramp):
    assert score_slide(make_scorer(), ramp).document() == SlideScore.read(scored / "slide.json").document()


def test_half_the_scale_moves_no_tile(scored, ramp, tmp_path):
    score = score_slide(make_scorer(), write_ramp(tmp_path / "half.tif", 0.25, 2), tmp_path / "out")
    assert np.abs(read_probabilities(tmp_path / "out" / "half") - read_probabilities(scored)).max() < 0.05
    assert score.answer.label == SlideScore.read(scored / "slide.json").answer.label and score.side == 256


def test_a_coarse_slide_is_noted_or_refused(ramp):
    score = score_slide(make_scorer(), ramp, mpp=0.55)
    assert "the slide is coarser than the training patches, and was enlarged" in score.notes
    with pytest.raises(DataError, match=r"ramp.tif has 1 um a pixel, and the network was trained on patches of 0.5"):
        score_slide(make_scorer(), ramp, mpp=1.0)


@pytest.mark.parametrize(("scorer", "message"), [
    (make_scorer(mpp=None), "scale of the network's training patches is unknown"),
    (make_scorer(shape=(128, 256)), "trained on patches of 128 x 256 pixels, and slides are cut into squares"),
])  # fmt: skip
def test_networks_that_score_no_slide(scorer, message, ramp):
    with pytest.raises(DataError, match=message):
        score_slide(scorer, ramp)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_target(kind, ramp, tmp_path):
    target = KINDS[kind]
    score = score_slide(make_scorer(target), ramp, tmp_path)
    rows = read_tiles(tmp_path / "ramp")
    if kind == "number":
        assert score.answer.value.value == score.answer.label
        assert score.answer.label == pytest.approx(np.mean([float(row["value"]) for row in rows]))
        assert score.answer.probabilities == {} and score.answer.area is None
    else:
        assert score.answer.label in target.classes and score.answer.value is None
        assert (score.answer.area is None) == (kind == "class")
    assert SlideScore.read(tmp_path / "ramp" / "slide.json") == score
    table = read_table(tmp_path / "ramp", score)
    assert [[str(x), str(y)] for x, y in table.xy_n2.tolist()] == [[row["x"], row["y"]] for row in rows]
    assert [*map(str, table.label_n)] == [row[target.label_word] for row in rows]
    assert table.grade_n.tolist() == [float(row["value" if kind == "number" else "grade"]) for row in rows]
    assert table.probability_nK.tolist() == [[float(row[name]) for name in target.classes] for row in rows]
    assert table.tissue_n.tolist() == [float(row["tissue"]) for row in rows]


def test_a_network_without_labels_gives_features_and_no_label(ramp, tmp_path):
    score = score_slide(make_scorer(labels=0), ramp, tmp_path)
    assert score.answer.label is None and score.answer.probabilities == {} and score.answer.blocks == 0
    assert any("saw no label" in note for note in score.notes)
    assert {row["level"] for row in read_tiles(tmp_path / "ramp")} == {""}
    assert open_features(tmp_path / "ramp" / "features.h5").rows == 40


def test_a_damaged_tile_costs_its_own_rows(ramp, scored, tmp_path):
    slide = damage(shutil.copy(ramp, tmp_path / "ramp.tif"), *find_tile(ramp, 1, level=1))
    score = score_slide(make_scorer(), slide, tmp_path / "out")
    rows, whole = read_tiles(tmp_path / "out" / "ramp"), read_tiles(scored)
    lost = [number for number, row in enumerate(rows) if row["error"]]
    assert 0 < score.failed == len(lost) < 40 and "damaged at x" in rows[lost[0]]["error"]
    assert [row for row in rows if not row["error"]] == [row for n, row in enumerate(whole) if n not in lost]
    assert f"{score.failed} of 40 tiles cannot be read and do not count: tiles.csv says why" in score.notes
    assert open_features(tmp_path / "out" / "ramp" / "features.h5").rows == 40 - score.failed


def test_a_tile_without_tissue_does_not_count(tmp_path, scored):
    """Glass that is tinted on one side, as of a section of her2st, is tissue to a mask."""
    pixels = np.pad(draw_ramp(), ((0, 0), (0, 500), (0, 0)), constant_values=240)
    pixels[384:512, 1408:1664] = (228, 200, 222)
    write_pyramid(tmp_path / "tinted.tif", pixels, 0.5)
    score = score_slide(make_scorer(), tmp_path / "tinted.tif", tmp_path / "out")
    assert score.tiles == 42 and score.blank == 2
    assert score.answer == SlideScore.read(scored / "slide.json").answer
    assert any(note.startswith("2 of 42 tiles: nearly blank") for note in score.notes)


KILLED = """
import sys
from lgd.scoring import slide_plan
from lgd.scoring.slides import score_slide
from tests.support.shades import Shades, make_scorer
slide_plan.CHUNK = 4
scorer = make_scorer()
def wait(*_):
    import time
    time.sleep(0.2)
scorer.model.register_forward_hook(wait)
score_slide(scorer, sys.argv[1], sys.argv[2])
"""


def test_a_killed_job_resumes(ramp, scored, tmp_path, monkeypatch):
    started = subprocess.Popen([sys.executable, "-c", KILLED, ramp, tmp_path], cwd=Path(__file__).parents[2])
    parts = tmp_path / "ramp" / "parts"
    ends = time.monotonic() + 60
    while len(list(parts.glob("0*.npz"))) < 3 and time.monotonic() < ends:
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    there = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.npz")}
    assert 3 <= len(there) < 10 and not (tmp_path / "ramp" / "slide.json").exists()
    monkeypatch.setattr(slide_plan, "CHUNK", 4)
    scorer, calls = make_scorer(), []
    scorer.model.register_forward_hook(lambda *_: calls.append(1))
    score_slide(scorer, ramp, tmp_path)
    assert len(calls) == 10 - len(there), "no part was scored again"
    for name in ("tiles.csv", "patches.geojson"):
        assert (tmp_path / "ramp" / name).read_bytes() == (scored / name).read_bytes()
    assert not parts.exists()


def test_a_damaged_part_is_scored_again(ramp, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_plan, "CHUNK", 8)
    scorer = make_scorer()

    def fail(*_):
        if list(tmp_path.glob("ramp/parts/0*.npz")):
            raise MemoryError

    scorer.model.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        score_slide(scorer, ramp, tmp_path)
    part = next(tmp_path.glob("ramp/parts/0*.npz"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{part} was damaged .* and is removed: the same command"):
        score_slide(make_scorer(), ramp, tmp_path)
    assert score_slide(make_scorer(), ramp, tmp_path).tiles == 40


def test_a_folder_that_holds_something_else_is_left_as_it_is(ramp, tmp_path):
    for folder in (tmp_path, tmp_path / "ramp"):
        folder.mkdir(exist_ok=True)
        (folder / "thesis.doc").write_text("mine")
        with pytest.raises(DataError, match=rf"{folder} already holds something else \(thesis.doc\): name another"):
            score_slide(make_scorer(), ramp, tmp_path)
        (folder / "thesis.doc").unlink()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a file is in the way: name another folder"):
        score_slide(make_scorer(), ramp, tmp_path / "file")


def test_an_empty_slide_says_so(tmp_path):
    write_pyramid(tmp_path / "empty.tif", np.full((600, 600, 3), 240, np.uint8), 0.5)
    with pytest.raises(DataError, match="empty.tif: less than 0.1 % of it is tissue"):
        score_slide(make_scorer(), tmp_path / "empty.tif", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_bad_slide_costs_its_own_row(ramp, tmp_path):
    bad = tmp_path / "bad.svs"
    Image.new("RGB", (64, 64)).save(bad, "JPEG")
    odd = shutil.copy(ramp, tmp_path / "line\nbreak.tif")
    scores, problems = score_slides(make_scorer(), [bad, ramp, odd], tmp_path / "out")
    assert [score.slide for score in scores] == ["ramp", "line\\nbreak"] and (tmp_path / "out" / "line_break").is_dir()
    assert "bad.svs is a JPEG image and no slide" in problems[bad][0]
    with pytest.raises(DataError, match="have the same name"):
        score_slides(make_scorer(), [ramp, tmp_path / "ramp.tif"], tmp_path / "out")


def test_slides_and_patches_are_told_apart(ramp, tmp_path, caplog):
    folder = tmp_path / "slides"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(ramp, folder / "deep" / "one")
    Image.fromarray(draw_ramp(400, 400)).save(folder / "patch.png")
    Image.fromarray(draw_ramp(400, 400)).save(tmp_path / "patch.tif")
    (folder / "notes.txt").write_text("x")
    assert find_slides([ramp, str(folder)]) == sorted([ramp, folder / "deep" / "one"])
    assert f"left out 2 (no slide): {folder}/notes.txt, {folder}/patch.png" in caplog.text
    assert find_slides([tmp_path / "patch.tif"]) == find_slides([f"{tmp_path}/*.png"]) == []
    with pytest.raises(DataError, match=r"ramp.tif is a slide, and .*patch.tif is none: score .* by two commands"):
        find_slides([ramp, tmp_path / "patch.tif"])
    with pytest.raises(ConfigError, match="^s3://bucket/a.svs: images are read from local files only"):
        find_slides(["s3://bucket/a.svs"])


def test_intervals_are_over_blocks_of_a_millimetre():
    block_n = number_blocks(np.array([[0, 0], [1999, 0], [2000, 0], [0, 2000], [10, 3999]]), 0.5)
    assert block_n[0] == block_n[1] and len({*block_n.tolist()}) == 3 and block_n[3] == block_n[4]
    value_n1 = np.array([[0.0], [0.0], [1.0], [1.0], [1.0]])
    (mean,) = resample_means(value_n1, block_n, 3)
    assert mean.value == pytest.approx(0.6) and mean.low == pytest.approx(0, abs=0.05) and mean.high == 1.0
    (alone,) = resample_means(value_n1, np.zeros(5, np.int64), 1)
    assert alone.value == pytest.approx(0.6) and alone.low is None


def test_the_area_rule_needs_more_than_its_share():
    for high, label in ((1, "0"), (2, "3+")):
        output_nK = np.eye(4)[[0] * (10 - high) + [3] * high]
        answer = answer_slide(HER2, None, output_nK, np.arange(10))
        assert answer.area.label == label and answer.area.shares["1+"].value == pytest.approx(high / 10)
    unread = np.concatenate([output_nK, np.full((5, 4), np.nan)])
    assert answer_slide(HER2, None, unread, np.arange(15)) == answer, "what could not be read does not count"


def test_a_grade_has_one_colour():
    assert grade_answers(HER2, np.array([[0, 0.5, 0.5, 0], [np.nan] * 4])).tolist()[0] == 1.5
    colour_n3 = colour_grades(HER2, np.array([0.0, 1, 2, 3, np.nan, -9, 9]), (0, 3))
    assert len({*map(tuple, colour_n3.tolist())}) == 5 and tuple(colour_n3[4]) == NO_ANSWER
    assert (colour_n3[5] == colour_n3[0]).all() and (colour_n3[6] == colour_n3[3]).all()


def test_the_command_line(tissue_run, ramp, tmp_path, capsys):
    command = ["predict", str(ramp), "--model", tissue_run.student.dir]
    assert main([*command, "--mpp", "0.46", "--out", str(tmp_path / "out"), "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "ramp" / "slide.json").read_text())
    assert main([*command, "--mpp", "0.46", "--csv"]) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row["slide"] == "ramp" and row["level"] == row["by_area"] == document["answer"]["label"]
    assert main([*command, "--mpp", "0.92"]) == 1
    assert "1 of 1 slides have no answer" in (said := capsys.readouterr().err) and "in so coarse a scan" in said
    for options in (["--mpp", "unknown"], ["--workers", "1"], ["--slides", "a.csv"]):
        assert main([*command, *options]) == 2 and options[0] in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--model", tissue_run.student.dir, "--out", str(tmp_path)]) == 2
    assert "--out is for slides" in capsys.readouterr().err
