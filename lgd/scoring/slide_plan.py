"""Which tiles of a slide are scored, and at which scale: the plan that a job follows, and resumes by.

    DIR/SLIDE/parts/plan.json      the slide, its tissue and what its result depends on (`SlidePlan`)
    DIR/SLIDE/parts/plan.npz       the places of the tiles, their share of tissue, and the mask (`PlanArrays`)

Shapes: n tiles, H and W of the mask.
"""

import hashlib
import io
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from lgd.base.errors import DataError
from lgd.base.records import Line, Many, Sha256
from lgd.base.text import escape_text
from lgd.io.digests import format_diff, sha256
from lgd.io.files import list_folder, read_bytes, write_bytes
from lgd.io.folders import refuse_foreign
from lgd.io.location import Location
from lgd.models.description import Training
from lgd.scoring.images import COARSEST, ENLARGED, SAME
from lgd.scoring.slide_answer import Positive, SlideInputs, SlideScore, SlideTissue, TiledSlide
from lgd.slides.slide import Slide
from lgd.slides.tiles import lay_tiles
from lgd.slides.tissue_mask import find_tissue

PARTS = "parts"
FILES = ("slide.json", "heatmap.png", "patches.geojson", "features.h5", "grids.h5", "tiles.csv")
"""What is left of a slide; grids.h5 only of a student that predicts grids."""
CHUNK = 256
"""Tiles that are scored together: some seconds of a CPU, and half a megabyte."""
LEAST_TISSUE = 0.5
"""Share of a tile that must be tissue."""
_ELSEWHERE = "name another folder as --out, or delete that of the slide"
_MOST_ASPECT = 1.1


class SlidePlan(TiledSlide):
    """plan.json."""

    FORMAT: ClassVar[str] = "lgd-slide-plan/2"
    ABSENT: ClassVar[str] = "score the slide again"

    mask_mpp: Positive
    tiles: Annotated[int, Field(ge=1)]
    notes: Many[Line]
    arrays: Sha256
    """Of plan.npz."""

    @property
    def chunks(self) -> int:
        """How many parts there are."""
        return -(-self.tiles // self.inputs.chunk)

    def find_rows(self, number: int) -> slice:
        """The tiles of a part."""
        start = number * self.inputs.chunk
        return slice(start, min(start + self.inputs.chunk, self.tiles))


class PlanArrays(NamedTuple):
    """plan.npz."""

    xy_n2: np.ndarray
    """int64: upper left corners of the tiles, in level-0 pixels."""
    tissue_n: np.ndarray
    """float32: share of each that is tissue."""
    mask_HW: np.ndarray
    """bool: the tissue of the slide."""


class TileScale(NamedTuple):
    """How a network sees a slide."""

    pixels: int
    mpp: float
    """Micrometres per pixel of a tile."""
    native: float
    """Those of the training patches before they were shrunk."""


def find_scale(training: Training, size: int) -> TileScale:
    """The tiles that look like a network's training patches; `size` is the side to which these were shrunk.

    Of several sizes of patches the commonest that has a scale counts. Raises `DataError` where none has one, or it is
    not square.
    """
    shape = next((one for one in training.shapes if one.mpp), None)
    if shape is None or shape.mpp is None:
        raise DataError(
            "the scale of the network's training patches is unknown, so that it can score no slide: build its shards "
            "with --mpp X and train it again"
        )
    if max(shape.width, shape.height) > _MOST_ASPECT * min(shape.width, shape.height):
        raise DataError(
            f"the network was trained on patches of {shape.width} x {shape.height} pixels, and slides are cut into "
            "squares: train it on square patches"
        )
    return TileScale(size, float(np.sqrt(shape.width * shape.height)) * shape.mpp / size, shape.mpp)


def check_scale(slide: Slide, scale: TileScale) -> float:
    """How much coarser than the training patches a slide is; raises `DataError` where it is too coarse."""
    coarser = slide.mpp / scale.native
    if coarser > COARSEST:
        raise DataError(
            f"{slide.path} has {slide.mpp:.4g} um a pixel, and the network was trained on patches of {scale.native:g}: "
            "what it looks for is not in so coarse a scan; scan it at a finer scale, or correct its scale by --mpp"
        )
    return coarser


def plan_slide(slide: Slide, scale: TileScale, model: str, folder: Location) -> SlidePlan | None:
    """Lay the tiles of a slide, or take up what was planned; None where it is scored already.

    `model` is the digest of the network's config.

    Raises `DataError` for a slide that is too coarse or holds no tissue, and for a folder that holds something else, or
    the result of another network or slide.
    """
    refuse_foreign(folder, {*FILES, PARTS}, _ELSEWHERE)
    coarser = check_scale(slide, scale)
    inputs = SlideInputs(
        sha256=sha256(slide.path),
        mpp=slide.mpp,
        model=model,
        pixels=scale.pixels,
        tile_mpp=scale.mpp,
        chunk=CHUNK,
    )
    names = list_folder(folder)
    if "slide.json" in names:
        _require_same(folder, SlideScore.read(folder / "slide.json").inputs, inputs)
        return None
    if "plan.json" in list_folder(folder / PARTS):
        plan = SlidePlan.read(folder / PARTS / "plan.json")
        _require_same(folder, plan.inputs, inputs)
        return plan
    tissue = find_tissue(slide)
    tiles = lay_tiles(slide, tissue, scale.pixels, scale.mpp, least=LEAST_TISSUE)
    with io.BytesIO() as content:
        np.savez_compressed(content, xy_n2=tiles.xy_n2, tissue_n=tiles.tissue_n, mask_HW=tissue.mask_HW)
        arrays = content.getvalue()
    plan = SlidePlan(
        slide=escape_text(slide.name),
        inputs=inputs,
        width=slide.width,
        height=slide.height,
        vendor=slide.vendor,
        bounds=tuple(slide.bounds),
        tissue=SlideTissue(area_mm2=tissue.area_mm2, pen=tissue.pen, blurred=tissue.blurred),
        mask_mpp=tissue.mpp,
        side=tiles.side,
        tiles=len(tiles.xy_n2),
        notes=(*slide.notes, *([ENLARGED.replace("image", "slide")] if coarser > SAME else []), *tissue.notes),
        arrays=hashlib.sha256(arrays).hexdigest(),
    )
    write_bytes(folder / PARTS / "plan.npz", arrays)
    plan.write(folder / PARTS / "plan.json")
    return plan


def read_arrays(folder: Location, plan: SlidePlan) -> PlanArrays:
    """The arrays of a plan."""
    path = folder / PARTS / "plan.npz"
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != plan.arrays:
        raise DataError(f"{path} is not what plan.json beside it was written with: {SlidePlan.REMEDY}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return PlanArrays(**{name: arrays[name] for name in PlanArrays._fields})


def _require_same(folder: Location, there: SlideInputs, asked: SlideInputs) -> None:
    if there != asked:
        lines = format_diff(there.as_json(), asked.as_json(), "there")
        raise DataError(f"{folder} holds what came of another slide, scale or network: {_ELSEWHERE}", *lines)
