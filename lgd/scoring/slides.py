"""Whole slides -> a score and a map of each.

    DIR/SLIDE/slide.json, heatmap.png, patches.geojson, features.h5, grids.h5, tiles.csv
    DIR/SLIDE/parts/      what is done of a slide that is not whole; a killed job resumes by it

First all slides are opened and their tiles laid, over the workers; then these are scored, in chunks. The worker that
writes the last part of a slide also writes its files, slide.json last.
"""

import functools
import glob
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from lgd.base.environment import count_cpus
from lgd.base.errors import DataError, require
from lgd.base.logs import progress
from lgd.config_files import find_in_run
from lgd.io.files import is_litter, list_folder, peek_kind, remove_folder
from lgd.io.folders import refuse_foreign, walk_files
from lgd.io.location import Location, as_output_location, require_local
from lgd.io.locks import LOCK, exclusive
from lgd.models.description import StudentConfig
from lgd.ray_jobs.mapping import map_with
from lgd.scoring.predict import Scorer, load_scorer
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slide_parts import list_missing
from lgd.scoring.slide_plan import CHUNK, PARTS, SlidePlan, TileScale, find_scale, plan_slide
from lgd.scoring.slide_result import finish_slide
from lgd.scoring.tile_scorer import CHUNKS_AT_ONCE, Chunk, TileScorer, load_tile_scorer
from lgd.slides.slide import looks_like_slide, open_slide

logger = logging.getLogger(__name__)

_WORKERS = "--workers"
THREADS = 2
"""That read tiles in a worker, and where this process computes on a CPU."""
_GPU_THREADS = 8
IMAGES = tuple(".png .jpg .jpeg .jpe .jfif .bmp .webp .jp2".split())
"""Files of a folder that are not asked whether they are slides, for there may be 100,000."""
_MOST = 5


class SlideJob(NamedTuple):
    """A slide, and the folder of its result."""

    path: Path
    folder: Location


class PlannedSlide(NamedTuple):
    """What came of opening a slide."""

    job: SlideJob
    plan: SlidePlan | None
    """None where it is scored already, or cannot be."""
    problem: list[str]
    """Why it cannot be scored."""


def find_slides(names: Sequence[str | Path]) -> list[Path]:
    """The slides of a list of files, folders and glob patterns, sorted, each once; none where all are something else.

    Of folders, which are searched deep, what is no slide is left out with a warning. Raises `DataError` where slides
    and other files are named together.
    """
    slides, files, left_out = set[Path](), list[Path](), list[Path]()
    for name in names:
        path = require_local(name, f"{name}: images are read from local files only: fetch it first")
        # `Path.glob` takes no absolute pattern.
        matching = [path] if peek_kind(path, "file") else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        for one in matching:
            if peek_kind(one, "file") == "folder":
                held = [Path(str(at)) for at, lies, hidden in walk_files(one) if lies == "file" and not hidden]
                found = {at for at in held if not at.name.lower().endswith(IMAGES) and looks_like_slide(at)}
                slides |= found
                left_out += [at for at in held if at not in found] if found else []
                files += [] if found or not held else [one]
            elif not is_litter(one.name):
                is_slide = peek_kind(one, "file") == "file" and looks_like_slide(one)
                (slides.add if is_slide else files.append)(one)
    if slides and files:
        raise DataError(f"{min(slides)} is a slide, and {files[0]} is none: score slides and patches by two commands")
    if left_out:
        more = f" and {len(left_out) - _MOST} more" if len(left_out) > _MOST else ""
        logger.warning("left out %d (no slide): %s%s", len(left_out), ", ".join(map(str, left_out[:_MOST])), more)
    return sorted(slides)


class SlidePlanner:
    """Opens slides and lays their tiles, in any process."""

    def __init__(self, scale: TileScale, model: str, mpp: float | None) -> None:
        self.scale, self.model, self.mpp = scale, model, mpp

    def __call__(self, job: SlideJob) -> PlannedSlide:
        """A slide that cannot be scored costs its own row."""
        try:
            with open_slide(job.path, self.mpp) as slide:
                return PlannedSlide(job, plan_slide(slide, self.scale, self.model, job.folder), [])
        except DataError as error:
            return PlannedSlide(job, None, [str(line) for line in error.args])


def score_slides(
    scorer: Scorer | str | Location,
    slides: Sequence[Path],
    out: str | Location,
    *,
    mpp: float | None = None,
    workers: int = 0,
    code: Collection[str] = (),
) -> tuple[list[SlideScore], dict[Path, list[str]]]:
    """Score slides into a folder each, and go on where an earlier job was killed.

    Args:
        scorer: A trained student, from `load_scorer`, or its folder, or that of its run, which workers need.
        slides: Their files.
        out: A folder or a url, which all workers must share.
        mpp: Micrometres per level-0 pixel of all of them; by default what their files say.
        workers: Processes of Ray; 0: here.
        code: Code outside LGD that the network may run.

    Returns:
        The scores in the order of the slides; and by slide why it has none.
    """
    at = as_output_location(out, "--out")
    require(workers >= 0, f"{_WORKERS} is {workers}: give 0 for this process, or how many workers")
    student = find_in_run(scorer.folder if isinstance(scorer, Scorer) else scorer, "student")
    if workers == 0 and not isinstance(scorer, Scorer):
        scorer = load_scorer(student, code=code)
    config = scorer.config if isinstance(scorer, Scorer) else StudentConfig.read_folder(student)
    assert isinstance(config, StudentConfig), "a teacher reads the IHC"
    jobs = _name_folders(slides, at)
    on_gpu = isinstance(scorer, Scorer) and scorer.device != "cpu" and not workers
    threads = min(_GPU_THREADS, count_cpus()) if on_gpu else THREADS
    planner = functools.partial(SlidePlanner, find_scale(config.training, config.size), config.digest, mpp)
    refuse_foreign(at, {job.folder.name for job in jobs} | _list_folders(at) | {LOCK}, "name another folder as --out")
    with exclusive(at, "scoring slides"):
        planned = _plan(planner, jobs, workers, threads)
        plans = {job.folder: plan for job, plan, _ in planned if plan is not None}
        if isinstance(scorer, Scorer):
            make: Callable[..., TileScorer] = functools.partial(TileScorer, scorer, threads)
        else:
            make = functools.partial(load_tile_scorer, str(student), tuple(code), threads)
        _score(make, [one for one in planned if one.plan], workers, threads)
        problems = {job.path: problem for job, _, problem in planned if problem}
        scores = [_collect(job, plans.get(job.folder), config) for job in jobs if job.path not in problems]
    return scores, problems


def name_folder(slide: Path) -> str:
    """The folder of a slide's result: called as its file without suffix."""
    return re.sub(r"[^\w+.-]+", "_", slide.stem.removesuffix(".ome")).lstrip(".") or "slide"


def _name_folders(slides: Sequence[Path], out: Location) -> list[SlideJob]:
    """A folder for each slide."""
    paths: dict[str, Path] = {}
    for path in slides:
        if (other := paths.setdefault(name_folder(path), path)) != path:
            raise DataError(f"{other} and {path} have the same name: score them into two folders, each by its --out")
    return [SlideJob(path, out / name) for name, path in paths.items()]


def _list_folders(folder: Location) -> set[str]:
    return {name for name, lies in list_folder(folder).items() if lies == "folder"}


def _plan(make: Callable[[], SlidePlanner], jobs: Sequence[SlideJob], workers: int, threads: int) -> list[PlannedSlide]:
    """Open all slides, and lay their tiles; in the order of the jobs."""
    planned: dict[SlideJob, PlannedSlide] = {}
    with progress(len(jobs), "finding tissue", "slides") as bar:
        planning = map_with(
            make,
            jobs,
            workers=workers,
            option_name=_WORKERS,
            threads=threads,
            use_gpus=False,
            name=lambda job: str(job.path),
        )
        for one in planning:
            planned[one.job] = one
            bar.update(1)
    return [planned[job] for job in jobs]


def _score(make: Callable[..., TileScorer], planned: Sequence[PlannedSlide], workers: int, threads: int) -> None:
    """Score the tiles that no part has yet, behind a bar with slides, tiles a second and the time left."""
    chunks, total, left = list[Chunk](), 0, Counter[Location]()
    for job, plan, _ in planned:
        assert plan is not None
        total += plan.tiles
        missing = list_missing(job.folder, plan)
        left[job.folder] = len(missing)
        chunks += [Chunk(job.path, plan.inputs.mpp, job.folder, plan.digest, number) for number in missing]
    # The parts that are left are nearly all whole.
    done = total - min(total, len(chunks) * CHUNK)
    with progress(total, "scoring", "tiles", done=done) as bar:
        scoring = map_with(
            functools.partial(make, bar=bar if workers == 0 else None),
            chunks,
            workers=workers,
            option_name=_WORKERS,
            threads=threads,
            at_once=CHUNKS_AT_ONCE,
            name=lambda chunk: str(chunk.slide),
        )
        for chunk, tiles in scoring:
            left[chunk.folder] -= 1
            bar.set_postfix_str(f"slide {sum(not count for count in left.values())} of {len(left)}", refresh=False)
            bar.update(tiles if workers else 0)


def _collect(job: SlideJob, plan: SlidePlan | None, config: StudentConfig) -> SlideScore:
    """The result of a slide; it is made here where all parts were there, and no worker wrote it."""
    if plan is not None and "slide.json" not in list_folder(job.folder):
        with open_slide(job.path, plan.inputs.mpp) as slide:
            finish_slide(slide, job.folder, plan, config)
    score = SlideScore.read(job.folder / "slide.json")
    remove_folder(job.folder / PARTS)
    return score


def score_slide(
    scorer: Scorer | str | Location,
    slide: str | Path,
    out: str | Location | None = None,
    *,
    mpp: float | None = None,
    workers: int = 0,
    code: Collection[str] = (),
) -> SlideScore:
    """Score a whole slide.

    Args:
        scorer: A trained student, from `load_scorer`, or its folder, or that of its run.
        slide: Its file.
        out: Folder in which a folder of the slide's name is left, with the score, a map, GeoJSON and features; a job
            that was killed goes on there. By default nothing is left.
        mpp: Micrometres per level-0 pixel; by default what the file says.
        workers: Processes of Ray, which need `out` on a folder that they share, or at a url; 0: here.
        code: Code outside LGD that the network may run.

    Returns:
        What slide.json holds: `answer` (label, probabilities and their intervals), `tissue`, `tiles`, `notes`.

    Raises:
        DataError: For what is no slide, has no tissue, or is too coarse for the network.

    Example:
        >>> score = lgd.score_slide("runs/demo/student", "slide.svs", "out")
        >>> score.answer.label, score.tissue.area_mm2
    """
    require(out is not None or workers == 0, "workers need a folder that they share: give out")
    with tempfile.TemporaryDirectory(prefix="lgd-") as temporary:
        path = require_local(slide, f"{slide}: slides are read from local files only: fetch it first")
        scores, problems = score_slides(scorer, [path], out or temporary, mpp=mpp, workers=workers, code=code)
    if problems:
        raise DataError(*problems[path])
    return scores[0]
