"""Virtual tissue on disk, in BCI's layout: paired H&E and IHC of virtual slides, with the truth about them.

Run as `lgd synth OUT --pairs N`. It leaves OUT/HE/{train,test}/00000_train_1+.png and the same names under
OUT/IHC (the level is the slide's; as in BCI, the `.png` files hold JPEG streams), OUT/truth.csv, and, last,
OUT/synth.json. The same options give the same bytes with any number of workers. With `--stain nuclei` names hold no
level; then, and with `--centers N`, OUT/pairs.csv has the labels, for `lgd build-shards --layout csv`.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import simplejpeg
from pydantic import Field, JsonValue

from lgd.base.arguments import check_bounds
from lgd.base.environment import count_cpus
from lgd.base.errors import DataError, require
from lgd.base.logs import progress
from lgd.base.records import Count, Line, Record
from lgd.config_sections import NotNegative, Positive, Share
from lgd.io.documents import Document
from lgd.io.files import explain_write_errors, is_litter
from lgd.io.folders import refuse_foreign
from lgd.io.location import as_output_location, require_local
from lgd.io.locks import LOCK, exclusive
from lgd.tissue.sections import Scene, Stain, center_of, draw_pair, shortcut_of, slide_level
from lgd.tissue.truth import LEVELS, Pair, Truth, write_pairs, write_truth

_QUALITY = 92
_DONE, _BEGUN = "synth.json", ".synth-begun"


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthOptions:
    """What to draw, and where to."""

    out: str
    """Folder that is written; new, empty, or made before with the same options."""
    pairs: Positive = 640
    """Pairs of patches."""
    size: Annotated[int, Field(ge=64, multiple_of=16)] = 256
    """Side of a patch, in pixels of 0.46 um; a multiple of 16."""
    seed: NotNegative = 0
    """Seed of everything drawn."""
    slides: NotNegative = 0
    """Virtual slides, with the levels balanced over them; 0 for one slide per 8 pairs, and at least 8."""
    coupling: Share = 0.7
    """How much the H&E's morphology reveals of the level: 0 nothing, 1 much."""
    stain: Stain = "membranes"
    """What the IHC shows: membranes of the four HER2 levels, or nuclei of which a share is positive, as of Ki67."""
    centers: NotNegative = 0
    """Deal the slides to so many virtual centers of unequal stain and scanner, each with all levels; 0 for none."""
    shortcut: Share | None = None
    """Give each slide's H&E one of four strengths of stain (see shortcut_in), which reveals the level of this share of
    the training slides and nothing in the folder `test`: 0 is the control of 0.9, with the same test images. By default
    each slide has a strength of its own. Of nuclei, the quarter of the shares counts as the level."""
    shortcut_in: Literal["stain", "background", "center"] = "stain"
    """Where the shortcut is: in the strength of stain, in a background from white to grey, or in the center."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the slides in the folder `test`."""
    workers: NotNegative = 0
    """Processes that draw; 0 for one a CPU."""

    def __post_init__(self) -> None:
        require(bool(self.out), "out is empty: name the folder to write")
        check_bounds(self)
        require(self.slides <= self.pairs, f"slides is {self.slides}: use 0 to pairs ({self.pairs})")
        require(
            4 * self.centers <= self.slide_count,
            f"centers is {self.centers} but there are {self.slide_count} slides: use at least 4 slides a center, that "
            "each may have all levels",
        )
        require(
            self.shortcut_in != "center" or (self.centers > 1 and self.shortcut is not None),
            "shortcut_in is center: give shortcut, and centers of 2 or more",
        )
        require(
            self.test == 0 or self.slide_count >= 2,
            f"test is {self.test} but there is one slide only: use at least 2 slides, or test 0",
        )

    @property
    def slide_count(self) -> int:
        """The number of slides, with the default filled in."""
        return self.slides or min(self.pairs, max(8, -(-self.pairs // 8)))


class Summary(Record):
    """What was drawn: pairs, also by folder and, of HER2, by level name, and bytes of the images."""

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


_Drawn = tuple[Truth, dict[str, bytes]]
"""The truth of a pair, and its files' content by stain."""

_ADDED: dict[str, int | float | str | None] = {"stain": "membranes", "centers": 0}
"""Options that the recipe names only where they are not as here: earlier sets were drawn without them."""


def synthesise(options: SynthOptions) -> dict[str, JsonValue]:
    """Draw the set, or find it already drawn; return its summary.

    The summary holds out, pairs, slides, train, test, levels (pairs by level name), discordant (pairs), bytes of
    the images, and `reused`: True where a complete set with the same options was there. Raises `DataError` where
    `out` holds anything else, or a set with other options, and while another process draws there. One that was
    interrupted is redone from scratch.
    """
    given = as_output_location(options.out, "OUT")
    out = require_local(given, f"OUT is {given}: virtual tissue is drawn into a local folder: name one")
    # The options that decide about the bytes.
    recipe = dataclasses.asdict(options) | {"slides": options.slide_count}
    for name in ("out", "workers", *(name for name, usual in _ADDED.items() if recipe[name] == usual)):
        del recipe[name]
    # A finished set is only read, and may lie where nothing can be written.
    finished = (out / _DONE).exists()
    with contextlib.nullcontext() if finished else exclusive(out, "drawing virtual tissue"):
        reused = finished or (out / _DONE).exists()
        with explain_write_errors(out):
            summary = _reuse(out, recipe) if reused else _draw_set(out, options, recipe)
        return {"out": str(out), **summary.as_json(), "reused": reused}


def _draw_set(out: Path, options: SynthOptions, recipe: dict[str, int | float | str | None]) -> Summary:
    """Draw the set into a folder that nobody else works on, and that is new, empty or begun; returns its summary."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / _BEGUN).exists():
        for stain in ("HE", "IHC"):
            shutil.rmtree(out / stain, ignore_errors=True)
    else:
        refuse_foreign(out, {LOCK}, "choose a new folder")
    (out / _BEGUN).touch()
    pairs = _plan(options)
    for stain, split in itertools.product(("HE", "IHC"), {pair.split for pair in pairs}):
        (out / stain / split).mkdir(parents=True)
    truths = {}
    for pair, (truth, files) in zip(pairs, _draw_all(pairs, options), strict=True):
        # Written here and not where it was drawn: a process that draws may outlive this one, and its lock.
        for stain, content in files.items():
            (out / stain / pair.split / f"{pair.key}.png").write_bytes(content)
        truths[pair] = truth
    write_truth(out / "truth.csv", options.stain, options.coupling, truths)
    if _has_pairs(recipe):
        write_pairs(out / "pairs.csv", options.stain, truths)
    splits, levels = Counter(pair.split for pair in pairs), Counter(truth.get("level") for truth in truths.values())
    summary = Summary(
        pairs=len(pairs),
        slides=len({pair.slide for pair in pairs}),
        train=splits["train"],
        test=splits["test"],
        levels={name: levels[level] for level, name in enumerate(LEVELS)} if options.stain == "membranes" else {},
        discordant=sum(int(truth["discordant"]) for truth in truths.values()),
        bytes=_count_bytes(out),
    )
    Drawing(options=recipe, summary=summary).write(out / _DONE)
    (out / _BEGUN).unlink()
    return summary


def _reuse(out: Path, recipe: dict[str, int | float | str | None]) -> Summary:
    """The summary of a complete set, when it was made with this recipe and is still whole."""
    made = Drawing.read(out / _DONE)
    before, now = _ADDED | made.options, _ADDED | recipe
    differing = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
    if differing:
        raise DataError(
            f"{out} holds virtual tissue made with {', '.join(differing)}: choose another folder, or delete it"
        )
    found = _count_bytes(out)
    tables = ["truth.csv", *(["pairs.csv"] if _has_pairs(recipe) else [])]
    if found != made.summary.bytes or not all((out / name).exists() for name in tables):
        raise DataError(
            f"{out} is not as it was made (its images hold {found} bytes, not "
            f"{made.summary.bytes}, or {' or '.join(tables)} is gone): delete it and draw it again"
        )
    return made.summary


def _has_pairs(recipe: Mapping[str, int | float | str | None]) -> bool:
    """Whether there is a pairs.csv: names of files say all where HER2 comes from nowhere."""
    return any(name in recipe for name in _ADDED)


def _count_bytes(out: Path) -> int:
    found = (path for stain in ("HE", "IHC") for path in (out / stain).glob("*/*.png"))
    return sum(path.stat().st_size for path in found if not is_litter(path.name))


def _plan(options: SynthOptions) -> list[Pair]:
    """The pairs to draw. The last slides are the test's: whole slides, levels as balanced as four in a row are."""
    slides = options.slide_count
    held_out = min(max(round(options.test * slides), 1), slides - 1) if options.test else 0
    numbers = np.random.default_rng((options.seed, options.pairs)).permutation(options.pairs)
    pairs = []
    for position, number in enumerate(numbers):
        slide, patch = position % slides, position // slides
        split = "test" if slide >= slides - held_out else "train"
        key = f"{number:05d}_{split}"
        if options.stain == "membranes":
            key += f"_{LEVELS[slide_level(options.seed, slide)]}"
        reveals = (options.shortcut or 0.0) if options.shortcut_in == "center" and split == "train" else 0.0
        center = center_of(options.seed, slide, options.centers, reveals) if options.centers else None
        pairs.append(Pair(key, slide, patch, split, center))
    return pairs


def _draw_all(pairs: list[Pair], options: SynthOptions) -> Iterator[_Drawn]:
    """Draw every pair, in their order."""
    draw, workers = functools.partial(_draw, options), options.workers or count_cpus()
    with progress(len(pairs), "virtual tissue", "pairs") as bar, contextlib.ExitStack() as stack:
        all_drawn: Iterator[_Drawn] = map(draw, pairs)
        if workers > 1:
            # Spawned, because a fork of a process with threads (torch, Ray) can hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(workers, len(pairs)), mp_context=context, initializer=_end_with_parent)
            all_drawn = stack.enter_context(pool).map(draw, pairs, chunksize=4)
        for drawn in all_drawn:
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


def _draw(options: SynthOptions, pair: Pair) -> _Drawn:
    scene = Scene(options.stain, center=pair.center)
    if options.shortcut is not None and options.shortcut_in != "center":
        drawn = shortcut_of(options.seed, pair.slide, options.shortcut if pair.split == "train" else 0.0)
        scene = scene._replace(strength=drawn) if options.shortcut_in == "stain" else scene._replace(glass=drawn)
    he, ihc, truth = draw_pair(options.seed, pair.slide, pair.patch, options.size, options.coupling, scene=scene)
    encode = functools.partial(simplejpeg.encode_jpeg, quality=_QUALITY, colorsubsampling="420")
    return truth, {"HE": encode(he), "IHC": encode(ihc)}
