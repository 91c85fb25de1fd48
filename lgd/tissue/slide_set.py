"""Whole virtual slides on disk, with the truth about them; see `lgd synth DIR --slides-only N`.

DIR/HE/slide-0000.tif   the H&E, and under IHC/ the neighbouring section in the same frame: pyramidal TIFF
DIR/slides.csv          he, ihc, label, slide, mpp, marker (and center, scanner): `build-shards --layout slides`
DIR/truth.json          of each slide its regions with their levels, its pen strokes, how far its IHC was moved
DIR/truth/slide-0000.png  RGB, one pixel for 32 x 32 of the H&E's level 0: number of the region (0 where less than
                        half is tissue), share of tumour (of 255), share under a pen (of 255)
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from lgd.base.records import Count, Line, Record
from lgd.io.documents import Document
from lgd.io.files import publish
from lgd.io.tables import write_csv
from lgd.tissue.centers import Center
from lgd.tissue.drawing import MPP
from lgd.tissue.drawing_pool import draw_all
from lgd.tissue.pyramid import write_pyramid
from lgd.tissue.sections import WHOLE, Scene, center_of, draw_look, open_stream, slide_level
from lgd.tissue.synth_options import SynthOptions
from lgd.tissue.truth import LEVELS, name_origin
from lgd.tissue.whole_slide import GRAIN, Moves, Section, Stroke, draw_strokes
from lgd.tissue.world import World

SLIDES, TRUTH, TRUTH_FILE = "slides.csv", "truth", "truth.json"
_QUALITY = 92
_REGISTRATION = 20  # a random stream


class RegionTruth(Record):
    """A region of a slide."""

    number: Count
    """As truth/SLIDE.png has it."""
    label: Line
    grade: float
    """Of the H&E's morphology, 0..1."""
    stained_fraction: float
    """Of its tumour cells, as drawn from the range of its level."""
    membrane_od: float
    completeness: float
    area_mm2: float
    """Of its tissue."""
    tumour_mm2: float


class StrokeTruth(Record):
    """A stroke of a pen on the H&E."""

    colour: Line
    width: float
    """In pixels of level 0."""
    line: list[list[float]]
    """Its (x, y) in pixels of level 0."""


class SlideTruth(Record):
    """What is known of a slide."""

    slide: Line
    label: Line
    """The highest level of at least a tenth of the tissue; also the one of most of it."""
    center: Line | None
    scanner: Line | None
    width: Count
    height: Count
    mpp: float
    registered: bool
    shift_um: list[float]
    """How far the IHC's content was moved right and down, beyond the few micrometres of any neighbouring section."""
    regions: list[RegionTruth]
    strokes: list[StrokeTruth]


class SlidesTruth(Document):
    """DIR/truth.json."""

    FORMAT: ClassVar[str] = "lgd-virtual-slides/1"
    ABSENT: ClassVar[str] = "run lgd synth --slides-only"
    REMEDY: ClassVar[str] = "delete the folder and run lgd synth again"

    grain: Count
    """Pixels of level 0 a side for one pixel of truth/SLIDE.png."""
    slides: list[SlideTruth]


class _Drawn(NamedTuple):
    """A slide that lies on the disk."""

    name: str
    level: int
    side: int
    center: Center | None
    world: World
    truth: np.ndarray
    strokes: list[Stroke]
    moves: Moves


def draw_slides(out: Path, options: SynthOptions) -> list[str]:
    """Draw the slides, and write the tables after them; returns the label of each."""
    for folder in ("HE", "IHC", TRUTH):
        (out / folder).mkdir(parents=True)
    draw = functools.partial(_draw_slide, out, options)
    truths = list(draw_all(draw, range(options.slides_only), options.workers, "slides"))
    SlidesTruth(grain=GRAIN, slides=truths).write(out / TRUTH_FILE)
    _write_slides(out / SLIDES, truths)
    return [truth.label for truth in truths]


def _write_slides(path: Path, truths: Sequence[SlideTruth]) -> None:
    origins = [[truth.center, truth.scanner] if truth.center else [] for truth in truths]
    columns = ("he", "ihc", "label", "slide", "mpp", "marker", *(("center", "scanner") if origins[0] else ()))
    rows = (
        [f"HE/{truth.slide}.tif", f"IHC/{truth.slide}.tif", truth.label, truth.slide, truth.mpp, "HER2", *origin]
        for truth, origin in zip(truths, origins, strict=True)
    )
    with publish(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        write_csv(stream, columns, rows)


def _draw_slide(out: Path, options: SynthOptions, slide: int) -> SlideTruth:
    seed, side, name = options.seed, options.slide_size, f"slide-{slide:04d}"
    center = center_of(seed, slide, options.centers) if options.centers else None
    level, extent = slide_level(seed, slide), (side * MPP, side * MPP)
    world = World(seed, slide, draw_look(seed, slide, Scene(center=center)), extent, level, options.coupling)
    strokes, moves = draw_strokes(seed, slide, extent), _draw_moves(options, slide)
    truth = np.zeros((-(-side // GRAIN), -(-side // GRAIN), 3), np.uint8)
    for stain, section in (
        ("HE", Section(world, (seed, slide), (side, side), strokes, None)),
        ("IHC", Section(world, (seed, slide), (side, side), [], moves)),
    ):
        rows = section.draw_rows(truth if stain == "HE" else None)
        write_pyramid(out / stain / f"{name}.tif", rows, MPP, size=(side, side), quality=_QUALITY)
    with publish(out / TRUTH / f"{name}.png") as temporary:
        Image.fromarray(truth).save(temporary, format="png")
    return _describe(_Drawn(name, level, side, center, world, truth, strokes, moves))


def _draw_moves(options: SynthOptions, slide: int) -> Moves:
    """The slides that are not registered lie evenly among the others."""
    rng = open_stream(WHOLE, _REGISTRATION, options.seed, slide)
    lost = int((slide + 1) * options.unregistered) > int(slide * options.unregistered)
    reach = rng.uniform(150.0, 300.0) if lost else options.shift
    angle = rng.uniform(0, 2 * np.pi)
    return Moves((reach * float(np.sin(angle)), reach * float(np.cos(angle))), options.warp, not lost)


def _describe(drawn: _Drawn) -> SlideTruth:
    world, moves = drawn.world, drawn.moves
    places_mm2 = (GRAIN * MPP / 1000) ** 2
    number_HW, tumour_HW = drawn.truth[..., 0], drawn.truth[..., 1] / 255
    regions = [
        RegionTruth(
            number=region.number,
            label=LEVELS[region.level],
            grade=round(region.grade, 4),
            stained_fraction=round(float(region.expression.share), 4),
            membrane_od=round(float(region.expression.density), 4),
            completeness=round(float(region.expression.complete), 4),
            area_mm2=round(float((number_HW == region.number).sum()) * places_mm2, 4),
            tumour_mm2=round(float(tumour_HW[number_HW == region.number].sum()) * places_mm2, 4),
        )
        for region in world.regions
    ]
    strokes = [
        StrokeTruth(
            colour=stroke.colour,
            width=round(stroke.width / MPP, 1),
            line=[[round(x / MPP, 1), round(y / MPP, 1)] for x, y in stroke.line],
        )
        for stroke in drawn.strokes
    ]
    center, scanner = name_origin(drawn.center) if drawn.center else (None, None)
    return SlideTruth(
        slide=drawn.name,
        label=LEVELS[drawn.level],
        center=center,
        scanner=scanner,
        width=drawn.side,
        height=drawn.side,
        mpp=MPP,
        registered=moves.registered,
        shift_um=[round(moves.shift[1], 2) + 0.0, round(moves.shift[0], 2) + 0.0],
        regions=regions,
        strokes=strokes,
    )
