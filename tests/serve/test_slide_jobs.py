"""The scoring of slides: one job a slide, whatever is asked for meanwhile, and what another process left."""

import shutil
import time

import pytest

from lgd.scoring.slide_parts import list_missing
from lgd.scoring.slide_plan import PARTS, SlidePlan, find_scale, plan_slide
from lgd.serve import slide_jobs
from lgd.serve.names import UnknownName
from lgd.serve.options import ServeOptions
from lgd.serve.slide_jobs import SlideJobs
from lgd.slides.slide import open_slide
from tests.support.serving import wait
from tests.support.shades import write_ramp


@pytest.fixture
def options(tissue_run, tmp_path):
    (tmp_path / "slides").mkdir()
    for name in ("a", "b", "c"):
        write_ramp(tmp_path / "slides" / f"{name}.tif", mpp=0.46, height=400, width=500)
    places = {"slides": str(tmp_path / "slides"), "out": str(tmp_path / "out")}
    return ServeOptions(model=tissue_run.student.dir, **places)


def finish(jobs, *identities):
    wait(lambda: {jobs.get_state(one).state for one in identities} <= {"scored", "failed"}, 60)
    return [jobs.get_state(one).state for one in identities]


def test_slides_are_scored_one_after_another_and_once(options, monkeypatch):
    scored, score = [], slide_jobs.score_slides

    def watch(scorer, paths, out):
        scored.append((paths[0].stem, time.monotonic()))
        return score(scorer, paths, out)

    monkeypatch.setattr(slide_jobs, "score_slides", watch)
    jobs = SlideJobs(options)
    ids = {listed.name: listed.id for listed in jobs.slides.list_slides()}
    assert {state.state for state in jobs.list_states().values()} == {"unscored"}
    for name in ("c", "a", "c", "c", "a"):
        assert jobs.start(ids[name]).state in ("queued", "scoring")
    assert finish(jobs, ids["c"], ids["a"]) == ["scored", "scored"]
    assert jobs.start(ids["c"]).state == "scored" and jobs.get_state(ids["b"]).state == "unscored"
    time.sleep(0.3)
    assert [name for name, _ in scored] == ["c", "a"]
    with pytest.raises(UnknownName):
        jobs.start("0123456789abcdef")


def test_progress_may_be_asked_for_while_a_slide_is_finished(tmp_path, monkeypatch):
    parts, read = tmp_path / PARTS, SlidePlan.read
    parts.mkdir()
    (parts / "plan.json").write_text("{}")

    def read_too_late(path):
        shutil.rmtree(parts)
        return read(path)

    monkeypatch.setattr(SlidePlan, "read", read_too_late)
    assert slide_jobs.read_progress(tmp_path) == 0.0


def test_one_that_fails_costs_no_other_and_may_be_asked_for_again(options, tmp_path):
    path = tmp_path / "slides" / "a.tif"
    whole = path.read_bytes()
    jobs = SlideJobs(options)
    ids = {listed.name: listed.id for listed in jobs.slides.list_slides()}
    path.write_bytes(whole[:3000])
    jobs.start(ids["a"])
    jobs.start(ids["b"])
    assert finish(jobs, ids["a"], ids["b"]) == ["failed", "scored"]
    problem = jobs.get_state(ids["a"]).problem
    assert problem and str(tmp_path) not in problem
    path.write_bytes(whole)
    jobs.start(ids["a"])
    assert finish(jobs, ids["a"]) == ["scored"]


def test_what_was_left_undone_is_completed_by_the_next_process(options, tmp_path):
    jobs = SlideJobs(options)
    (identity,) = (listed.id for listed in jobs.slides.list_slides() if listed.name == "a")
    jobs.start(identity)
    assert finish(jobs, identity) == ["scored"]
    # A plan is what a process that is killed leaves first.
    folder, copy = tmp_path / "out" / "a", tmp_path / "left"
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    scale = find_scale(jobs.config.training, jobs.config.size)
    with open_slide(tmp_path / "slides" / "a.tif") as slide:
        plan_slide(slide, scale, jobs.config.digest, folder)
    plan = SlidePlan.read(folder / PARTS / "plan.json")
    assert len(list_missing(folder, plan)) == plan.chunks
    later = SlideJobs(options)
    assert finish(later, identity) == ["scored"]
    assert (folder / "tiles.csv").read_bytes() == (copy / "tiles.csv").read_bytes()
