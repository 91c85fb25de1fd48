"""Virtual tissue on disk, in BCI's layout: paired H&E and IHC of virtual slides, with the truth about them.

Run as `lgd synth OUT --pairs N`. It leaves OUT/HE/{train,test}/00000_train_1+.png and the same names under
OUT/IHC (the level is the slide's; as in BCI, the `.png` files hold JPEG streams), OUT/truth.csv, of membranes
OUT/questions.csv, and, last, OUT/synth.json. The same options give the same bytes with any number of workers. With
`--stain nuclei` names hold no level; then, and with `--centers N`, OUT/pairs.csv has the labels, for `lgd build-shards
--layout csv`. With `--slides-only N` it leaves whole slides instead: see `lgd.tissue.slide_set`.
"""

import contextlib
import dataclasses
import functools
import itertools
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import simplejpeg
from pydantic import JsonValue

from lgd.base.errors import DataError
from lgd.base.records import Count, Line, Record
from lgd.io.documents import Document
from lgd.io.files import explain_write_errors, is_litter
from lgd.io.folders import refuse_foreign
from lgd.io.location import as_output_location, require_local
from lgd.io.locks import LOCK, exclusive
from lgd.tissue.drawing_pool import draw_all
from lgd.tissue.sections import Scene, center_of, draw_pair, shortcut_of, slide_level
from lgd.tissue.slide_set import SLIDES, TRUTH, TRUTH_FILE, draw_slides
from lgd.tissue.synth_options import ADDED, SynthOptions
from lgd.tissue.truth import LEVELS, Pair, Truth, write_pairs, write_questions, write_truth

_QUALITY = 92
_DONE, _BEGUN = "synth.json", ".synth-begun"


class Summary(Record):
    """What was drawn: pairs, also by folder and, of HER2, by level name, and bytes of the images; or whole slides."""

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


def synthesise(options: SynthOptions) -> dict[str, JsonValue]:
    """Draw the set, or find it already drawn; return its summary.

    The summary holds out, pairs, slides, train, test, levels (pairs by level name; or whole slides), discordant
    (pairs), bytes of the images, and `reused`: True where a complete set with the same options was there. Raises
    `DataError` where `out` holds anything else, or a set with other options, and while another process draws there.
    One that was interrupted is redone from scratch.
    """
    given = as_output_location(options.out, "OUT")
    out = require_local(given, f"OUT is {given}: virtual tissue is drawn into a local folder: name one")
    # The options that decide about the bytes.
    recipe = dataclasses.asdict(options) | {"slides": options.slide_count}
    for name in ("out", "workers", *(name for name, usual in ADDED.items() if recipe[name] == usual)):
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
        for folder in ("HE", "IHC", TRUTH):
            shutil.rmtree(out / folder, ignore_errors=True)
    else:
        refuse_foreign(out, {LOCK}, "choose a new folder")
    (out / _BEGUN).touch()
    summary = _draw_slides(out, options) if options.slides_only else _draw_patches(out, options, recipe)
    Drawing(options=recipe, summary=summary).write(out / _DONE)
    (out / _BEGUN).unlink()
    return summary


def _draw_slides(out: Path, options: SynthOptions) -> Summary:
    levels = Counter(draw_slides(out, options))
    return Summary(
        pairs=0,
        slides=options.slides_only,
        train=0,
        test=0,
        levels={name: levels[name] for name in LEVELS},
        discordant=0,
        bytes=_count_bytes(out),
    )


def _draw_patches(out: Path, options: SynthOptions, recipe: dict[str, int | float | str | None]) -> Summary:
    pairs = _plan(options)
    for stain, split in itertools.product(("HE", "IHC"), {pair.split for pair in pairs}):
        (out / stain / split).mkdir(parents=True)
    truths = {}
    drawn = draw_all(functools.partial(_draw, options), pairs, options.workers, "pairs", chunk=4)
    for pair, (truth, files) in zip(pairs, drawn, strict=True):
        # Written here and not where it was drawn: a process that draws may outlive this one, and its lock.
        for stain, content in files.items():
            (out / stain / pair.split / f"{pair.key}.png").write_bytes(content)
        truths[pair] = truth
    write_truth(out / "truth.csv", options.stain, options.coupling, truths, bool(options.beyond))
    if options.stain == "membranes":
        write_questions(out / "questions.csv", truths)
    if _has_pairs(recipe):
        write_pairs(out / "pairs.csv", options.stain, truths)
    splits, levels = Counter(pair.split for pair in pairs), Counter(truth.get("level") for truth in truths.values())
    return Summary(
        pairs=len(pairs),
        slides=len({pair.slide for pair in pairs}),
        train=splits["train"],
        test=splits["test"],
        levels={name: levels[level] for level, name in enumerate(LEVELS)} if options.stain == "membranes" else {},
        discordant=sum(int(truth["discordant"]) for truth in truths.values()),
        bytes=_count_bytes(out),
    )


def _reuse(out: Path, recipe: dict[str, int | float | str | None]) -> Summary:
    """The summary of a complete set, when it was made with this recipe and is still whole."""
    made = Drawing.read(out / _DONE)
    before, now = ADDED | made.options, ADDED | recipe
    differing = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
    if differing:
        raise DataError(
            f"{out} holds virtual tissue made with {', '.join(differing)}: choose another folder, or delete it"
        )
    found = _count_bytes(out)
    tables = ["truth.csv", *(["pairs.csv"] if _has_pairs(recipe) else [])]
    if "slides_only" in recipe:
        tables = [SLIDES, TRUTH_FILE]
    if found != made.summary.bytes or not all((out / name).exists() for name in tables):
        raise DataError(
            f"{out} is not as it was made (its images hold {found} bytes, not "
            f"{made.summary.bytes}, or {' or '.join(tables)} is gone): delete it and draw it again"
        )
    return made.summary


def _has_pairs(recipe: Mapping[str, int | float | str | None]) -> bool:
    """Whether there is a pairs.csv: names of files say all where HER2 comes from nowhere."""
    return "stain" in recipe or "centers" in recipe


def _count_bytes(out: Path) -> int:
    folders = ("HE", "IHC", TRUTH)
    found = (path for name in folders for path in (out / name).rglob("*.*") if path.suffix in (".png", ".tif"))
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


def _draw(options: SynthOptions, pair: Pair) -> _Drawn:
    scene = Scene(options.stain, center=pair.center, beyond=options.beyond)
    if options.shortcut is not None and options.shortcut_in != "center":
        drawn = shortcut_of(options.seed, pair.slide, options.shortcut if pair.split == "train" else 0.0)
        scene = scene._replace(strength=drawn) if options.shortcut_in == "stain" else scene._replace(glass=drawn)
    he, ihc, truth = draw_pair(options.seed, pair.slide, pair.patch, options.size, options.coupling, scene=scene)
    encode = functools.partial(simplejpeg.encode_jpeg, quality=_QUALITY, colorsubsampling="420")
    return truth, {"HE": encode(he), "IHC": encode(ihc)}
