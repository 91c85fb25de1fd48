"""Virtual tissue on disk, in BCI's layout: paired H&E and IHC of virtual slides, with the truth about them.

Run as `lgd synth OUT --pairs N`. It leaves OUT/HE/{train,test}/00000_train_1+.png and the same names under
OUT/IHC (the level is the slide's; as in BCI, the `.png` files hold JPEG streams), OUT/truth.csv, and, last,
OUT/synth.json. The same options give the same bytes with any number of workers.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import simplejpeg

from lgd.base.errors import DataError, require
from lgd.base.logs import progress
from lgd.base.records import Count, Line, Record
from lgd.config import LEVEL_NAMES
from lgd.io.documents import Document
from lgd.io.files import publish
from lgd.io.location import as_output_location, require_local
from lgd.io.locks import LOCK, exclusive
from lgd.io.tables import write_csv
from lgd.tissue.sections import Shortcut, draw_pair, shortcut_of, slide_level

TRUTH_COLUMNS = (
    "key",
    "slide",
    "split",
    "level",
    "patch_level",
    "nuclei",
    "tumour_nuclei",
    "membrane_od",
    "membrane_completeness",
    "stained_fraction",
    "discordant",
    "coupling",
)
_QUALITY = 92
_DONE, _BEGUN = "synth.json", ".synth-begun"


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthOptions:
    """What to draw, and where to."""

    out: str
    """Folder that is written; new, empty, or made before with the same options."""
    pairs: int = 640
    """Pairs of patches."""
    size: int = 256
    """Side of a patch, in pixels of 0.46 um; a multiple of 16."""
    seed: int = 0
    """Seed of everything drawn."""
    slides: int = 0
    """Virtual slides, with the levels balanced over them; 0 for one slide per 8 pairs, and at least 8."""
    coupling: float = 0.7
    """How much the H&E's morphology reveals of the level: 0 nothing, 1 much."""
    shortcut: float | None = None
    """Give each slide's H&E one of four strengths of stain (see shortcut_in), which reveals the level of this share of
    the training slides and nothing in the folder `test`: 0 is the control of 0.9, with the same test images. By default
    each slide has a strength of its own."""
    shortcut_in: Literal["stain", "background"] = "stain"
    """Where the shortcut is: in the strength of stain, or in a background from white to grey."""
    test: float = 0.25
    """Share of the slides in the folder `test`."""
    workers: int = 0
    """Processes that draw; 0 for one a CPU."""

    def __post_init__(self) -> None:
        require(bool(self.out), "out is empty: name the folder to write")
        require(self.pairs >= 1, f"pairs is {self.pairs}: use at least 1")
        require(self.size >= 64 and self.size % 16 == 0, f"size is {self.size}: use a multiple of 16, at least 64")
        require(self.seed >= 0, f"seed is {self.seed}: use 0 or more")
        require(0 <= self.slides <= self.pairs, f"slides is {self.slides}: use 0 to pairs ({self.pairs})")
        require(0 <= self.coupling <= 1, f"coupling is {self.coupling}: use 0 to 1")
        require(self.shortcut is None or 0 <= self.shortcut <= 1, f"shortcut is {self.shortcut}: use 0 to 1")
        require(0 <= self.test < 1, f"test is {self.test}: use 0 or more, below 1")
        require(self.workers >= 0, f"workers is {self.workers}: use 0 (one a CPU) or more")
        require(
            self.test == 0 or self.slide_count >= 2,
            f"test is {self.test} but there is one slide only: use at least 2 slides, or test 0",
        )

    @property
    def slide_count(self) -> int:
        """The number of slides, with the default filled in."""
        return self.slides or min(self.pairs, max(8, -(-self.pairs // 8)))


class Summary(Record):
    """What was drawn: pairs, also by folder and by level name, and bytes of the images."""

    pairs: Count
    slides: Count
    train: Count
    test: Count
    levels: dict[Line, Count]
    discordant: Count
    bytes: Count


class Drawing(Document):
    """OUT/synth.json, written last."""

    # Its number rises whenever the same options would give other bytes.
    FORMAT: ClassVar[str] = "lgd-synth/2"
    ABSENT: ClassVar[str] = "run lgd synth"
    REMEDY: ClassVar[str] = "choose another folder, or delete this one"

    options: dict[Line, int | float | Line | None]
    """Those that decide about the bytes."""
    summary: Summary


@dataclass(frozen=True, slots=True)
class _Task:
    """One pair to draw."""

    key: str
    slide: int
    patch: int
    split: str
    options: SynthOptions


_Drawn = tuple[dict[str, Any], dict[str, bytes]]
"""A row of the truth, and the files' content by stain."""


def synthesise(options: SynthOptions) -> dict[str, Any]:
    """Draw the set, or find it already drawn; return its summary.

    The summary holds out, pairs, slides, train, test, levels (pairs by level name), discordant (pairs), bytes of
    the images, and `reused`: True where a complete set with the same options was there. Raises `DataError` where
    `out` holds anything else, or a set with other options, and while another process draws there. One that was
    interrupted is redone from scratch.
    """
    given, recipe = as_output_location(options.out, "OUT"), _recipe(options)
    out = require_local(given, f"OUT is {given}: virtual tissue is drawn into a local folder: name one")
    options = dataclasses.replace(options, out=str(out))
    # A finished set is only read, and may lie where nothing can be written.
    finished = (out / _DONE).exists()
    with contextlib.nullcontext() if finished else exclusive(out, "drawing virtual tissue"):
        if finished or (out / _DONE).exists():
            return {"out": str(out), **_reuse(out, recipe).as_json(), "reused": True}
        return {"out": str(out), **_draw_set(out, options, recipe).as_json(), "reused": False}


def _draw_set(out: Path, options: SynthOptions, recipe: dict[str, Any]) -> Summary:
    """Draw the set into a folder that nobody else works on; returns its summary."""
    _claim(out)
    tasks = _plan(options)
    for stain in ("HE", "IHC"):
        for split in {task.split for task in tasks}:
            (out / stain / split).mkdir(parents=True)
    rows = []
    for task, (row, streams) in zip(tasks, _draw_all(tasks, options.workers or os.cpu_count() or 1), strict=True):
        # Written here and not where it was drawn: a process that draws may outlive this one, and its lock.
        for stain, content in streams.items():
            (out / stain / task.split / f"{task.key}.png").write_bytes(content)
        rows.append(row)
    rows.sort(key=lambda row: row["key"])
    with publish(out / "truth.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        write_csv(stream, TRUTH_COLUMNS, ([row[name] for name in TRUTH_COLUMNS] for row in rows))
    summary = _summary(out, rows)
    Drawing(options=recipe, summary=summary).write(out / _DONE)
    (out / _BEGUN).unlink()
    return summary


def _recipe(options: SynthOptions) -> dict[str, Any]:
    """The options that decide about the bytes."""
    recipe = dataclasses.asdict(options) | {"slides": options.slide_count}
    del recipe["out"], recipe["workers"]
    return recipe


def _reuse(out: Path, recipe: dict[str, Any]) -> Summary:
    """The summary of a complete set, when it was made with this recipe and is still whole."""
    made = Drawing.read(out / _DONE)
    differing = [
        f"{name} {made.options.get(name)} (now {now})" for name, now in recipe.items() if made.options.get(name) != now
    ]
    if differing:
        raise DataError(
            f"{out} holds virtual tissue made with {', '.join(differing)}: choose another folder, or delete it"
        )
    found = sum(path.stat().st_size for path in _images(out))
    if found != made.summary.bytes or not (out / "truth.csv").exists():
        raise DataError(
            f"{out} is not as it was made (its images hold {found} bytes, not "
            f"{made.summary.bytes}, or truth.csv is gone): delete it and draw it again"
        )
    return made.summary


def _claim(out: Path) -> None:
    """Make `out` ours and empty, or refuse it."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / _BEGUN).exists():
        for stain in ("HE", "IHC"):
            shutil.rmtree(out / stain, ignore_errors=True)
    elif any(path.name != LOCK for path in out.iterdir()):
        raise DataError(f"{out} is not empty and holds no virtual tissue: choose a new folder")
    (out / _BEGUN).touch()


def _plan(options: SynthOptions) -> list[_Task]:
    """The pairs to draw. The last slides are the test's: whole slides, levels as balanced as four in a row are."""
    slides = options.slide_count
    held_out = min(max(round(options.test * slides), 1), slides - 1) if options.test else 0
    numbers = np.random.default_rng((options.seed, options.pairs)).permutation(options.pairs)
    tasks = []
    for position, number in enumerate(numbers):
        slide, patch = position % slides, position // slides
        split = "test" if slide >= slides - held_out else "train"
        key = f"{number:05d}_{split}_{LEVEL_NAMES[slide_level(options.seed, slide)]}"
        tasks.append(_Task(key, slide, patch, split, options))
    return tasks


def _draw_all(tasks: list[_Task], workers: int) -> Iterator[_Drawn]:
    """Draw every task, in the tasks' order."""
    bar = progress(len(tasks), "virtual tissue", "pairs")
    with bar:
        if workers == 1:
            for task in tasks:
                yield _draw(task)
                bar.update()
            return
        # Spawned, because a fork of a process with threads (torch, Ray) can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_end_with_parent) as pool:
            for drawn in pool.map(_draw, tasks, chunksize=4):
                yield drawn
                bar.update()


def _end_with_parent() -> None:
    """End this process when its parent does, however that ends: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _draw(task: _Task) -> _Drawn:
    """Draw one pair."""
    options = task.options
    shortcut = Shortcut()
    if options.shortcut is not None:
        name = {"stain": "strength", "background": "glass"}[options.shortcut_in]
        drawn = shortcut_of(options.seed, task.slide, options.shortcut if task.split == "train" else 0.0)
        shortcut = Shortcut(**{name: drawn})
    he, ihc, truth = draw_pair(options.seed, task.slide, task.patch, options.size, options.coupling, shortcut=shortcut)
    streams = {
        stain: simplejpeg.encode_jpeg(image, quality=_QUALITY, colorsubsampling="420")
        for stain, image in (("HE", he), ("IHC", ihc))
    }
    slide = f"slide-{task.slide:04d}"
    row = {"key": task.key, "slide": slide, "split": task.split, **truth, "coupling": options.coupling}
    return row, streams


def _images(out: Path) -> list[Path]:
    return sorted(path for stain in ("HE", "IHC") for path in (out / stain).glob("*/*.png"))


def _summary(out: Path, rows: list[dict[str, Any]]) -> Summary:
    splits, levels = (Counter(row[column] for row in rows) for column in ("split", "level"))
    return Summary(
        pairs=len(rows),
        slides=len({row["slide"] for row in rows}),
        train=splits["train"],
        test=splits["test"],
        levels={name: levels[level] for level, name in enumerate(LEVEL_NAMES)},
        discordant=sum(row["discordant"] for row in rows),
        bytes=sum(path.stat().st_size for path in _images(out)),
    )
