"""The two sections of a whole virtual slide as images, drawn in blocks that join without a seam.

Each block is drawn with a margin, from cells and textures that depend on their place alone; so the memory does not
grow with the slide's height, and its look is that of the patches of `lgd.tissue.sections`. Legend: N cells, H and W
pixels.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, special

from lgd.tissue.drawing import CANDIDATES, MARGIN, MPP, STROMA, TUMOUR, Cells, cut_cells, smooth_noise
from lgd.tissue.painting import Amounts, Marks, mark_nuclei, paint_he, paint_ihc, scan
from lgd.tissue.pyramid import TILE, TileRow
from lgd.tissue.sections import WHOLE, open_stream
from lgd.tissue.staining import (
    DRIFT,
    TEXTURES,
    Cut,
    Expression,
    Membranes,
    Textures,
    choose_membranes,
    paint_membranes,
    ripple,
)
from lgd.tissue.world import CHUNK, Noise, World, enlarge

BLOCK = 2 * TILE
GRAIN = 32
"""The truth has one place for so many pixels a side."""
_EDGE = 8  # pixels around a block: the lens' blur, and a multiple of 4 (see `_tessellate`)
_PERIOD = 1024  # pixels after which textures repeat
_MOVES, _TEXTURES, _SECTION, _GRAIN, _INK = range(10, 15)
_INK_STEP = 4.0  # micrometres
_INKS = {"blue": (0.95, 0.75, 0.15), "green": (0.95, 0.30, 0.75), "black": (0.8, 0.8, 0.8)}
_FAR = Cells(
    yx=np.full((CANDIDATES, 2), -1e5, np.float32),
    kind=np.full(CANDIDATES, STROMA),
    **{name: np.ones(CANDIDATES, np.float32) for name in ("reach", "weight", "angle", "density")},
    **{name: np.ones((CANDIDATES, 2), np.float32) for name in ("nucleus", "offset")},
)


class Moves(NamedTuple):
    """How far the IHC lies from where it should, in micrometres."""

    shift: tuple[float, float] = (0.0, 0.0)
    """Down and right."""
    warp: float = 0.0
    """Standard deviation, over the slide, of a smooth warp."""
    registered: bool = True


class Stroke(NamedTuple):
    """A stroke of a pen on the cover glass."""

    colour: str
    width: float
    """In micrometres."""
    line: list[tuple[float, float]]
    """Its (x, y), in micrometres from the slide's corner."""


def draw_strokes(seed: int, slide: int, size: tuple[float, float]) -> list[Stroke]:
    """None on each third slide; else one beside the tissue and one over its border, as if around something."""
    rng = open_stream(WHOLE, _INK, seed, slide)
    if slide % 3 == 2:
        return []
    strokes = []
    for middle, reach, arc in ((0.5, 0.475, 0.7), (rng.uniform(0.25, 0.4), rng.uniform(0.12, 0.2), 4.5)):
        start = rng.uniform(0, 2 * np.pi)
        angle = start + np.linspace(0, arc, 40)
        wobble = reach * (1 + 0.03 * np.sin(5 * angle) + 0.02 * np.sin(11 * angle + 1))
        x, y = size[1] * (middle + wobble * np.cos(angle)), size[0] * (middle + wobble * np.sin(angle))
        colour = str(rng.choice(sorted(_INKS)))
        line = [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y, strict=True)]
        strokes.append(Stroke(colour, round(float(0.018 * min(size) + 12), 1), line))
    return strokes


class Section:
    """The H&E of a slide of `pixels` (height, width), or the neighbouring IHC."""

    def __init__(
        self, world: World, key: tuple[int, int], pixels: tuple[int, int], strokes: list[Stroke], moves: Moves | None
    ) -> None:
        self.world, self.pixels, self.moves = world, pixels, moves
        self._key = (int(moves is not None), *key)
        rng = open_stream(WHOLE, _TEXTURES, *self._key)
        self._textures = Textures(*(smooth_noise(rng, (_PERIOD, _PERIOD), sigma) for sigma in TEXTURES))
        rng = open_stream(WHOLE, _MOVES, *self._key)
        self._bends = [(Noise(rng, sigma), Noise(rng, sigma)) for sigma in (150.0, 50.0, 250.0)] if moves else []
        rows = 4 * (int(pixels[1] * MPP / CHUNK) + 4)
        self._cells = functools.lru_cache(rows)(self._cut_cells)
        self._inks = [(np.array(_INKS[stroke.colour]), _raster(stroke, world.size)) for stroke in strokes]

    def draw_rows(self, truth: np.ndarray | None = None) -> Iterator[TileRow]:
        """Rows of tiles, from top to bottom; fills `truth` (H / 32, W / 32, 3): see `lgd.tissue.slide_set`."""
        height, width = self.pixels
        for y in range(0, height, BLOCK):
            strip = np.concatenate([self._draw_block(y, x, truth) for x in range(0, width, BLOCK)], 1)
            strip = strip[: height - y, :width]
            for top in range(0, len(strip), TILE):
                yield [strip[top : top + TILE, left : left + TILE] for left in range(0, width, TILE)]

    def _draw_block(self, y: int, x: int, truth: np.ndarray | None) -> np.ndarray:
        rows, columns = (np.arange(start - _EDGE, start + BLOCK + _EDGE) for start in (y, x))
        grid = np.stack(np.meshgrid(*((at + 0.5) * MPP for at in (rows, columns)), indexing="ij"), -1)
        yx = self._move_block(grid, y, x) + ripple(self._take(2, rows - 7, columns), self._take(2, rows, columns - 7))
        corner = (int(yx[..., 0].min()) - 1, int(yx[..., 1].min()) - 1)
        shape = (int(yx[..., 0].max()) + 2 - corner[0], int(yx[..., 1].max()) + 2 - corner[1])
        tissue, look = self.world.tissue_at(corner, shape), self.world.look
        amounts: Amounts = [(look.eosin, np.zeros(grid.shape[:2], np.float32))]
        cut = None
        if tissue.rim.min() < 2:
            cells, marks = self._gather(corner, shape)
            textures = Textures(*(self._take(number, rows, columns) for number in range(3)))
            cut = Cut(tissue, cells, textures, (yx - corner).astype(np.float32))
            if isinstance(marks, Marks):
                amounts = paint_he(cut, tissue, marks)
            else:
                amounts = paint_ihc(cut, tissue, paint_membranes(cut, marks, look.dab_amount))
        inks = [(colour, ink) for colour, raster in self._inks if (ink := _sample(raster, grid)).any()]
        if truth is not None:
            self._note_truth(truth[y // GRAIN :, x // GRAIN :], grid, cut, [ink for _, ink in inks])
        rng = open_stream(WHOLE, _GRAIN, *self._key, y // BLOCK, x // BLOCK)
        white = look.he_white if self.moves is None else look.ihc_white
        return scan(rng, look, [*amounts, *inks], white)[_EDGE:-_EDGE, _EDGE:-_EDGE]

    def _note_truth(self, truth: np.ndarray, grid: np.ndarray, cut: Cut | None, inks: list[np.ndarray]) -> None:
        """Fill in the region where at least half is tissue, the share of tumour, and the share under a pen."""
        places = np.zeros((BLOCK // GRAIN, BLOCK // GRAIN, 3))
        if cut:
            tissue = cut.place.hole < 0.5
            middles = grid[_EDGE + GRAIN // 2 : -_EDGE : GRAIN, _EDGE + GRAIN // 2 : -_EDGE : GRAIN]
            regions = 1 + self.world.region_at(middles.reshape(-1, 2)).reshape(places.shape[:2])
            places[..., 0] = regions * (_average(tissue) >= 0.5)
            places[..., 1] = 255 * _average(tissue & (cut.body > 0.5))
        if inks:
            places[..., 2] = 255 * _average(np.max(inks, 0) > 0.2)
        truth = truth[: len(places), : len(places)]
        truth[...] = np.rint(places)[: truth.shape[0], : truth.shape[1]]

    def _move_block(self, grid: np.ndarray, y: int, x: int) -> np.ndarray:
        """`_move` of each pixel, linear between each 16th."""
        if self.moves is None:
            return grid
        axes = [(np.arange(start - _EDGE, start + BLOCK + _EDGE + 17, 16) + 0.5) * MPP for start in (y, x)]
        coarse = self._move(np.stack(np.meshgrid(*axes, indexing="ij"), -1))
        return enlarge(coarse, 16, (0, 0), (grid.shape[0], grid.shape[1]))

    def _move(self, yx: np.ndarray) -> np.ndarray:
        """Where pixels of the next section lie in the tissue: as in patches, moved and warped by a few um."""
        assert self.moves
        moved: np.ndarray = yx - np.array(self.moves.shift)
        for (down, right), reach in zip(self._bends, (3.0, 1.0, self.moves.warp), strict=True):
            if reach:
                moved = moved + reach * np.stack([down.at(yx), right.at(yx)], -1)
        return moved

    def _take(self, number: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.asarray(self._textures[number][np.ix_(rows % _PERIOD, columns % _PERIOD)])

    def _cut_cells(self, row: int, column: int) -> tuple[Cells, Marks | Membranes]:
        """The cells of a square as this section meets them, and how each is stained."""
        whole, regions = self.world.cells_at(row, column)
        rng = open_stream(WHOLE, _SECTION, *self._key, row + 8, column + 8)
        cells = cut_cells(rng, whole, drift=DRIFT if self.moves else 0.0)
        drawn = self.world.regions
        if self.moves is None:
            return cells, mark_nuclei(rng, cells, np.array([region.grade for region in drawn])[regions])
        # Clones are alike: neighbours stain together.
        rank = special.ndtr(0.7 * self.world.mood.at(whole.yx) + 0.7 * rng.standard_normal(len(whole.yx)))
        expressed = Expression(*(np.array(of)[regions] for of in zip(*(r.expression for r in drawn), strict=True)))
        return cells, choose_membranes(rng, cells.kind == TUMOUR, rank, expressed)

    def _gather(self, corner: tuple[int, int], shape: tuple[int, int]) -> tuple[Cells, Marks | Membranes]:
        """The cells of a rectangle and of its margin, from its corner; some are far away, where no pixel is."""
        reach = [
            range((at - int(MARGIN)) // CHUNK, (at + side + int(MARGIN)) // CHUNK + 1)
            for at, side in zip(corner, shape, strict=True)
        ]
        chunks = [self._cells(row, column) for row in reach[0] for column in reach[1]]
        cells, marks = (
            [_FAR],
            [type(chunks[0][1])(*(np.ones((CANDIDATES, *m.shape[1:]), m.dtype) for m in chunks[0][1]))],
        )
        for chunk, chunk_marks in chunks:
            yx = chunk.yx - np.array(corner)
            near = ((yx > -MARGIN) & (yx < np.array(shape) + MARGIN)).all(-1)
            cells.append(dataclasses.replace(chunk, yx=yx.astype(np.float32)).take(near))
            marks.append(type(chunk_marks)(*(of[near] for of in chunk_marks)))
        names = [field.name for field in dataclasses.fields(Cells)]
        joined = Cells(**{name: np.concatenate([getattr(of, name) for of in cells]) for name in names})
        return joined, type(marks[0])(*(np.concatenate(of) for of in zip(*marks, strict=True)))


def _average(shown: np.ndarray) -> np.ndarray:
    """The mean of a block over the places of the truth, its edge left out."""
    side = BLOCK // GRAIN
    inner = shown[_EDGE:-_EDGE, _EDGE:-_EDGE]
    return np.asarray(inner.reshape(side, GRAIN, side, GRAIN).mean((1, 3)))


def _raster(stroke: Stroke, size: tuple[float, float]) -> np.ndarray:
    """Amount of ink of a stroke, at each `_INK_STEP`."""
    image = Image.new("L", (int(size[1] / _INK_STEP) + 1, int(size[0] / _INK_STEP) + 1))
    line = [(x / _INK_STEP, y / _INK_STEP) for x, y in stroke.line]
    ImageDraw.Draw(image).line(line, fill=255, width=max(1, round(stroke.width / _INK_STEP)), joint="curve")
    return np.asarray(ndimage.gaussian_filter(np.asarray(image, np.float32) / 255, 1.2))


def _sample(raster: np.ndarray, yx: np.ndarray) -> np.ndarray:
    at = np.moveaxis(yx, -1, 0) / _INK_STEP - 0.5
    (top, left), (bottom, right) = (np.maximum(corner.astype(int), 0) for corner in (at[:, 0, 0], at[:, -1, -1]))
    if not raster[top : bottom + 2, left : right + 2].any():
        return np.zeros(yx.shape[:2], np.float32)
    return np.asarray(ndimage.map_coordinates(raster, at, order=1))
