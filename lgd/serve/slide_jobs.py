"""Slides that are scored one after another, in a thread of this process; what is done of them lies on disk.

There is one job a slide, however often it is asked for. What a process that ended left undone, the next one completes.
"""

import functools
import logging
import queue
import threading
from pathlib import Path
from typing import Literal, NamedTuple

from lgd.base.errors import ConfigError, DataError
from lgd.io.digests import sha256
from lgd.io.documents import MissingDocument
from lgd.io.files import exists
from lgd.io.folders import find_existing
from lgd.io.location import Location
from lgd.models.description import StudentConfig
from lgd.scoring.predict import Scorer, load_scorer
from lgd.scoring.slide_answer import SlideScore
from lgd.scoring.slide_parts import list_missing
from lgd.scoring.slide_plan import PARTS, SlidePlan, find_scale
from lgd.scoring.slides import score_slides
from lgd.serve.messages import SEE_LOG
from lgd.serve.options import ServeOptions
from lgd.serve.slide_folder import ListedSlide, SlideFolder, explain_slide

logger = logging.getLogger(__name__)

OTHER_NETWORK = "its folder of results holds those of another network: serve them with that one, or name another folder"
REPLACED = "its file was replaced after it was scored: delete its folder of results, and score it again"
_SAME_NAME = "another slide has the same name, and so the same folder of results: serve them from two folders"

JobState = Literal["unscored", "queued", "scoring", "scored", "failed"]


class SlideState(NamedTuple):
    """How far a slide is."""

    state: JobState
    progress: float = 0.0
    """Share of its tiles that are scored."""
    problem: str | None = None


class SlideJobs:
    """The jobs of a folder of slides."""

    def __init__(self, options: ServeOptions) -> None:
        folder = options.slides_folder
        assert folder is not None, "there are no slides"
        self.options, self.results = options, options.results
        self.config = StudentConfig.read_folder(options.student)
        scale = find_scale(self.config.training, self.config.size)
        self.slides = SlideFolder(folder, options.hide_names, scale)
        self._asked: dict[str, SlideState] = {}
        self._queue: queue.Queue[ListedSlide] = queue.Queue()
        self._scorer: Scorer | None = None
        for listed in self.slides.list_slides():
            if (
                exists(self.results / listed.folder / PARTS / "plan.json")
                and self._read_state(listed).state == "unscored"
            ):
                self.start(listed.id)
        # It ends with the process: what it has done is on disk.
        threading.Thread(target=self._work, daemon=True).start()

    def list_states(self) -> dict[str, SlideState]:
        """How far each slide is, by its id."""
        return {listed.id: self.get_state(listed.id) for listed in self.slides.list_slides()}

    def get_state(self, identity: str) -> SlideState:
        """How far a slide is."""
        listed = self.slides.find(identity)
        asked = self._asked.get(identity)
        if asked is None or asked.state == "scored":
            return self._read_state(listed)
        return (
            asked._replace(progress=read_progress(self.results / listed.folder)) if asked.state == "scoring" else asked
        )

    def start(self, identity: str) -> SlideState:
        """Have a slide scored, unless that is done or asked for already."""
        listed, state = self.slides.find(identity), self.get_state(identity)
        if state.state in ("unscored", "failed") and not self._shares_folder(listed):
            self._asked[identity] = state = SlideState("queued")
            self._queue.put(listed)
        return state

    def _shares_folder(self, listed: ListedSlide) -> bool:
        """With another one that can be opened."""
        folders = [one.folder for one in self.slides.list_slides() if one.id != listed.id and not one.problem]
        return listed.folder in folders

    def _read_state(self, listed: ListedSlide) -> SlideState:
        """What the folder of its results says."""
        if listed.problem:
            return SlideState("failed", 0.0, listed.problem)
        if self._shares_folder(listed):
            return SlideState("failed", 0.0, _SAME_NAME)
        try:
            score = read_score(self.results, listed)
        except DataError as error:
            return SlideState("failed", 0.0, explain_slide(error, listed))
        if score is None:
            return SlideState("unscored", read_progress(self.results / listed.folder))
        same = score.inputs.model == self.config.digest
        return SlideState("scored", 1.0) if same else SlideState("failed", 0.0, OTHER_NETWORK)

    def _work(self) -> None:
        while True:
            listed = self._queue.get()
            self._asked[listed.id] = SlideState("scoring")
            try:
                self._score(listed)
                self._asked[listed.id] = SlideState("scored", 1.0)
            except (ConfigError, DataError, OSError, MemoryError) as error:
                logger.warning("%s was not scored: %s", listed.path, error)
                message = explain_slide(error, listed) if isinstance(error, DataError) else SEE_LOG
                self._asked[listed.id] = SlideState("failed", 0.0, message)
            except Exception:
                # The next slide may be better.
                logger.exception("%s was not scored", listed.path)
                self._asked[listed.id] = SlideState("failed", 0.0, SEE_LOG)

    def _score(self, listed: ListedSlide) -> None:
        if self._scorer is None:
            self._scorer = load_scorer(self.options.student, code=self.options.code)
        _, problems = score_slides(self._scorer, [listed.path], self.results)
        if problems:
            raise DataError(*problems[listed.path])


def read_score(results: Location, listed: ListedSlide) -> SlideScore | None:
    """The result of a slide; None where there is none yet."""
    path = results / listed.folder / "slide.json"
    return SlideScore.read(path) if exists(path) else None


def is_of_slide(score: SlideScore, results: Location, listed: ListedSlide) -> bool:
    """Whether a result is of the file that lies there now, which is hashed where it came, or was changed, later.

    When a result at a url was written is not known, and it counts as that of the file.
    """
    result = find_existing(results / listed.folder / "slide.json")
    stated = listed.path.stat()
    changed = max(stated.st_ctime_ns, stated.st_mtime_ns)
    if result is None or changed < result.stat().st_mtime_ns:
        return True
    return _hash_slide(listed.path, changed) == score.inputs.sha256


@functools.lru_cache(1024)
def _hash_slide(path: Path, changed: int) -> str:
    """Once for each change of a file."""
    return sha256(path)


def read_progress(folder: Location) -> float:
    """Share of a slide's tiles that are scored."""
    try:
        plan = SlidePlan.read(folder / PARTS / "plan.json")
    except MissingDocument:
        # Not begun, or just finished.
        return 0.0
    return 1 - len(list_missing(folder, plan)) / plan.chunks
