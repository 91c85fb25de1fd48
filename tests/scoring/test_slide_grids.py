"""grids.h5: what a student predicts in the cells of each tile of a slide."""

import shutil

import h5py
import numpy as np
import pytest

from lgd.base.errors import DataError
from lgd.io.files import read_json
from lgd.models.loading import load_student
from lgd.scoring import slide_plan
from lgd.scoring.predict import load_scorer
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slides import score_slide
from lgd.scoring.tile_table import read_tiles
from lgd.shards.shard_set import ShardSet
from lgd.slides.slide import open_slide
from lgd.train.tasks import StudentTask
from tests.support.drawn_slides import damage, find_tile
from tests.support.shades import make_scorer, write_ramp


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """A slide of 12 tiles."""
    return write_ramp(tmp_path_factory.mktemp("ramp") / "ramp.tif", height=600, width=740)


@pytest.fixture(scope="module")
def scored(ramp):
    """The folder of its result. No test may change it."""
    score_slide(make_scorer(grids=True), ramp, ramp.parent / "out")
    return ramp.parent / "out" / "ramp"


def read_all(folder):
    with h5py.File(folder / "grids.h5") as file:
        return {name: file[name][()] for name in file}


def test_a_cell_has_what_the_network_says_of_its_pixels(scored, ramp):
    grids, tiles = read_all(scored), read_tiles(scored, SlideScore.read(scored / "slide.json"))
    assert grids["coords"].tolist() == tiles.xy_n2.tolist() and len(tiles.xy_n2) == 12
    assert grids["nuclei"].dtype == grids["membrane"].dtype == np.float16 and "positive" not in grids
    with open_slide(ramp) as slide:
        for (x, y), nuclei_44, membrane_223 in zip(*(grids[n] for n in ("coords", "nuclei", "membrane")), strict=True):
            pixels = slide.read(int(x), int(y), 64, 64, 1.0) / 255
            darkness_44 = 20 * (1 - pixels.reshape(4, 16, 4, 16, 3).mean((1, 3, 4)))
            assert np.allclose(nuclei_44, darkness_44, rtol=1e-3, atol=1e-2)
            assert np.allclose(membrane_223, pixels.reshape(2, 32, 2, 32, 3).mean((1, 3)), atol=1e-3)
    with h5py.File(scored / "grids.h5") as file:
        assert file.attrs["side"] == 128 and file.attrs["mpp"] == pytest.approx(0.5, rel=1e-3)
        assert [*file["membrane"].attrs["units"]] == ["OD", "share", "share"]
        assert [*file["nuclei"].attrs["units"]] == ["per 1,000 µm²"]


def test_a_tile_that_cannot_be_read_has_no_number(scored, ramp, tmp_path):
    slide = damage(shutil.copy(ramp, tmp_path / "ramp.tif"), *find_tile(ramp, 1, level=1))
    score = score_slide(make_scorer(grids=True), slide, tmp_path / "out")
    tiles = read_tiles(tmp_path / "out" / "ramp", score)
    lost_n = np.array([bool(error) for error in tiles.error_n])
    assert 0 < lost_n.sum() == score.failed < 12 and np.isnan(tiles.grade_n[lost_n]).all()
    for name, whole in read_all(scored).items():
        found = read_all(tmp_path / "out" / "ramp")[name]
        assert np.array_equal(found[~lost_n], whole[~lost_n])
        assert name == "coords" or np.isnan(found[lost_n]).all()


def test_all_parts_together_give_the_same_bytes(scored, ramp, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_plan, "CHUNK", 5)
    score_slide(make_scorer(grids=True), ramp, tmp_path)
    assert (tmp_path / "ramp" / "grids.h5").read_bytes() == (scored / "grids.h5").read_bytes()


def test_parts_of_a_version_without_grids_are_refused(ramp, tmp_path):
    scorer = make_scorer(grids=True)
    scorer.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        score_slide(scorer, ramp, tmp_path)
    plan = tmp_path / "ramp" / "parts" / "plan.json"
    assert read_json(plan)["format"] == "lgd-slide-plan/2"
    plan.write_text(plan.read_text().replace("plan/2", "plan/1"))
    with pytest.raises(DataError, match="reads format 2 only: delete its folder and score the slide"):
        score_slide(make_scorer(grids=True), ramp, tmp_path)


def test_a_number_that_float16_cannot_hold_is_its_largest(ramp, tmp_path):
    scorer = make_scorer(grids=True)
    scorer.model.register_forward_hook(lambda _, given, out: out | {"nuclei": 20 + 0 * out["nuclei"]})
    score_slide(scorer, ramp, tmp_path)
    assert (read_all(tmp_path / "ramp")["nuclei"] == 65504).all()


def test_a_table_of_other_tiles_is_refused(scored, tmp_path):
    score = SlideScore.read(scored / "slide.json")
    text = (scored / "tiles.csv").read_text()
    first = text.splitlines()[1]
    for damaged in (text.replace(f"{first}\n", ""), text.replace("grade", "grades"), text.replace(first, f"x{first}")):
        (tmp_path / "tiles.csv").write_text(damaged)
        with pytest.raises(
            DataError, match=r"tiles.csv cannot be read .*: delete its folder and score the slide again"
        ):
            read_tiles(tmp_path, score)


def test_a_trained_student_fills_the_grids_of_its_config(tissue_run, ramp, tmp_path):
    scorer = load_scorer(tissue_run.student.dir)
    score = score_slide(scorer, ramp, tmp_path, mpp=0.46)
    grids, config = read_all(tmp_path / "ramp"), scorer.config
    assert grids["nuclei"].shape == (score.tiles, config.nuclei_grid, config.nuclei_grid)
    assert grids["membrane"].shape == (score.tiles, config.membrane_grid, config.membrane_grid, 3)
    with open_slide(ramp, 0.46) as slide:
        x, y = grids["coords"][-1]
        tile = slide.read(int(x), int(y), score.inputs.pixels, score.inputs.pixels, score.inputs.tile_mpp)
    found = scorer.score(tile[None], grids=True)
    assert {"nuclei", "membrane"} <= {*found} and not {"nuclei", "membrane"} & {*scorer.score(tile[None])}
    for name in ("nuclei", "membrane"):
        np.testing.assert_allclose(grids[name][-1], found[name][0], rtol=2e-3, atol=1e-3)


def test_a_grid_that_nothing_taught_is_left_out(tissue_run, change, ramp, tmp_path):
    shards, (model, config) = ShardSet.open(tissue_run.shard_dirs), load_student(tissue_run.student.dir)
    assert StudentTask(tissue_run, shards).list_untaught(model) is config.untaught is None
    task = StudentTask(change(tissue_run, student={"nuclei_weight": 0.0}), shards)
    assert task.list_untaught(model) == ("nuclei",)
    task.store = None
    assert task.list_untaught(model) == ("nuclei", "membrane")
    score_slide(make_scorer(grids=True, untaught=["nuclei"]), ramp, tmp_path)
    assert {*read_all(tmp_path / "ramp")} == {"coords", "membrane"}
