"""The tissue of a whole virtual slide: its outline, holes and regions, and the nests and cells at any place in it.

Nothing is held but noise that repeats: each place is made anew from the seed wherever it is needed, always the same.
Lengths are micrometres, coordinates are (y, x) from the slide's corner. Legend: N points, H and W samples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage, spatial

from lgd.tissue.drawing import (
    MARGIN,
    NEST_PARTS,
    NOWHERE,
    TUMOUR,
    Cells,
    Tissue,
    as_distance,
    form_nests,
    lattice,
    populate,
    smooth_noise,
)
from lgd.tissue.look import Look
from lgd.tissue.sections import WHOLE, grade_of, open_stream
from lgd.tissue.staining import Expression, draw_expression

REGIONS = 14
CHUNK = 240
"""Side of the squares in which cells are drawn."""
# Samples after which each part of a noise repeats; both together after 4480, and after 2240 of more than a micrometre.
_PERIODS, _COARSE_PERIODS = (640, 896), (320, 448)
_CACHED = 320  # squares of cells that are kept, of about 0.1 MB each: both sections need them
_FIELDS, _REGIONS, _CELLS = range(3)
_SEPTUM = 9.0  # half the width of the stroma between two regions


class Noise:
    """Noise of a plane without end: standard normal, smoothed by a Gaussian of `sigma` micrometres."""

    def __init__(self, rng: np.random.Generator, sigma: float) -> None:
        self._step = 1.0 if sigma < 25 else sigma / 12
        periods = _PERIODS if self._step == 1 else _COARSE_PERIODS
        self._parts = [smooth_noise(rng, (period, period), sigma / self._step) for period in periods]

    def at(self, yx: np.ndarray) -> np.ndarray:
        """Its values (...) at coordinates (..., 2)."""
        at = np.moveaxis(yx, -1, 0) / self._step
        parts = [ndimage.map_coordinates(part, at, order=1, mode="grid-wrap") for part in self._parts]
        return np.asarray(np.float32(np.sqrt(0.5)) * (parts[0] + parts[1]))

    def window(self, corner: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
        """Its values at each whole micrometre of a rectangle (H, W)."""
        if self._step != 1:
            return _interpolate(self.at, corner, shape)
        rows, columns = (np.arange(c, c + n) for c, n in zip(corner, shape, strict=True))
        parts = [part[np.ix_(rows % len(part), columns % len(part))] for part in self._parts]
        return np.asarray(np.float32(np.sqrt(0.5)) * (parts[0] + parts[1]))


def _interpolate(
    field_at: Callable[[np.ndarray], np.ndarray], corner: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """A smooth field at each whole micrometre of a rectangle, asked for at each fourth of the slide only."""
    axes = [np.arange(c - c % 4, c + n + 4, 4.0) for c, n in zip(corner, shape, strict=True)]
    values = field_at(np.stack(np.meshgrid(*axes, indexing="ij"), -1))
    return enlarge(values, 4, (corner[0] % 4, corner[1] % 4), shape)


def enlarge(values: np.ndarray, factor: int, first: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Linear between samples (H, W, ...) which lie `factor` apart, from sample `first` of the result on."""
    for axis in (0, 1):
        at = first[axis] + np.arange(shape[axis])
        part = ((at % factor) / factor).astype(np.float32)
        part = part.reshape((-1,) + (1,) * (values.ndim - 1))
        values = np.moveaxis(values, axis, 0).astype(np.float32)
        values = np.moveaxis(values[at // factor] * (1 - part) + values[at // factor + 1] * part, 0, axis)
    return values


class Region(NamedTuple):
    """A part of the tissue that has one level."""

    number: int
    """From 1."""
    level: int
    grade: float
    expression: Expression


class World:
    """The tissue of slide number `slide`, `height` by `width` micrometres with its glass."""

    def __init__(
        self, seed: int, slide: int, look: Look, size: tuple[float, float], level: int, coupling: float
    ) -> None:
        self.look, self.size, self._key = look, size, (seed, slide)
        rng = open_stream(WHOLE, _FIELDS, seed, slide)
        self._broad, self._branching = (Noise(rng, part * look.nest_size) for part in NEST_PARTS)
        self._fine, self._crowd, self._bend = (Noise(rng, sigma) for sigma in (5.0, 18.0, 22.0))
        self._loose, self._outline, self._rough = (Noise(rng, sigma) for sigma in (160.0, 0.07 * min(size), 22.0))
        self._hole, self._gate, self._warp = (Noise(rng, sigma) for sigma in (30.0, 120.0, 60.0))
        self.mood = Noise(rng, 14.4)
        fibre = smooth_noise(rng, (1024, 1024), (1.0, 6.0))
        # Its first samples once more at its end, which is how it is read.
        self._fibre = np.pad(fibre, ((0, 1), (0, 1)), mode="wrap")
        self._direction, self._turn = rng.uniform(0, np.pi, 2)
        shape = (512, 512)
        nests = form_nests(look, *(noise.window((0, 0), shape) for noise in (self._broad, self._branching, self._fine)))
        self._nest, self._lumen = np.quantile(nests, [1 - look.share, 1 - look.share * look.lumen])
        self._piece = rng.uniform(0.05, 0.09), rng.integers(0, 2, 2) * 0.8 + 0.1, rng.uniform(0.40, 0.44, 2)
        rng = open_stream(WHOLE, _REGIONS, seed, slide)
        self._middles = self._spread_middles(rng)
        self.regions = self._draw_regions(rng, level, coupling)
        self.cells_at = functools.lru_cache(_CACHED)(self._draw_cells)

    def region_at(self, yx: np.ndarray) -> np.ndarray:
        """The place in `regions` of what lies at (N, 2) coordinates, glass or not."""
        return np.asarray(spatial.KDTree(self._middles).query(self._bent(yx))[1])

    def _to_border(self, yx: np.ndarray) -> np.ndarray:
        """About how far coordinates (..., 2) lie from the next region."""
        first, second = np.moveaxis(spatial.KDTree(self._middles).query(self._bent(yx), k=2)[0], -1, 0)
        return np.asarray((second - first) / 2)

    def _bent(self, yx: np.ndarray) -> np.ndarray:
        """Coordinates in which borders of regions are straight."""
        reach = 0.03 * min(self.size)
        return yx + reach * np.stack([self._warp.at(yx), self._warp.at(yx + 300.0)], -1)

    def _spread_middles(self, rng: np.random.Generator) -> np.ndarray:
        """Middles of regions in the tissue (N, 2), each the one of some drawn that is farthest from those before."""
        middles: list[np.ndarray] = []
        while len(middles) < REGIONS:
            drawn = np.array(self.size) * rng.uniform(0.1, 0.9, (40, 2))
            drawn = drawn[self._outside(drawn) < 0]
            if len(drawn):
                apart = [min((np.hypot(*(one - other)) for other in middles), default=0.0) for one in drawn]
                middles.append(drawn[int(np.argmax(apart))])
        return np.array(middles)

    def _draw_regions(self, rng: np.random.Generator, level: int, coupling: float) -> list[Region]:
        """The smallest regions have the higher levels, one each; two each of the others have the lower ones."""
        axes = [np.linspace(0, side, 96) for side in self.size]
        yx = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        areas = np.bincount(self.region_at(yx[self._outside(yx) < 0]), minlength=REGIONS)
        levels = np.full(REGIONS, level)
        small = np.argsort(areas, kind="stable")
        above = 3 - level
        levels[small[:above]] = rng.permutation(np.arange(level + 1, 4))
        below = np.repeat(np.arange(level), 2)
        levels[rng.permutation(small[above:])[: len(below)]] = below
        return [
            Region(
                number + 1,
                int(shown),
                grade_of(*self._key, number, float(shown), coupling),
                draw_expression(open_stream(WHOLE, _REGIONS, *self._key, number), int(shown)),
            )
            for number, shown in enumerate(levels)
        ]

    def _outside(self, yx: np.ndarray) -> np.ndarray:
        """About how far outside the tissue points (N, 2) lie, its roughness and holes left out."""
        small, corner, half = self._piece
        size, least = np.array(self.size), min(self.size)
        large = (np.hypot(*np.moveaxis((yx / size - 0.5) / half, -1, 0)) - 1) * half.min() * least
        piece = np.hypot(*np.moveaxis(yx - size * corner, -1, 0)) - small * least
        return np.asarray(np.minimum(large, piece)) + 0.035 * least * self._outline.at(yx)

    def tissue_at(self, corner: tuple[int, int], shape: tuple[int, int]) -> Tissue:
        """The tissue of a rectangle at whole micrometres; its fields reach `MARGIN` farther, as those of patches."""
        # One sample more on each side, for the slopes at the border.
        start = (corner[0] - int(MARGIN) - 1, corner[1] - int(MARGIN) - 1)
        size = (shape[0] + 2 * int(MARGIN) + 2, shape[1] + 2 * int(MARGIN) + 2)
        broad, branching, fine, crowd, bend, loose, rough, hole, gate = (
            noise.window(start, size)
            for noise in (
                *(self._broad, self._branching, self._fine, self._crowd, self._bend),
                *(self._loose, self._rough, self._hole, self._gate),
            )
        )
        outside, septum = (_interpolate(field, start, size) for field in (self._outside, self._to_border))
        nests = form_nests(self.look, broad, branching, fine) + 0.35 * loose
        crack = np.minimum(3.0 - 40 * np.abs(hole - 0.3), 12 * (gate - 1.4))
        rim = np.maximum(outside + 10 * rough + 4 * fine, np.maximum(30 * (hole - 2.2), crack))
        fields = {
            "nest": np.minimum(as_distance(nests - self._nest), septum - _SEPTUM),
            "lumen": np.minimum(as_distance(nests - self._lumen), septum - _SEPTUM - 6) if self.look.lumen else NOWHERE,
            "rim": rim.clip(-8, 8),
            "crowd": crowd,
            "bend": bend,
        }
        cut = {
            name: field if field is NOWHERE else field[1:-1, 1:-1].astype(np.float32) for name, field in fields.items()
        }
        return Tissue(look=self.look, fibre=self._fibre, direction=self._direction, origin=corner, **cut)

    def _draw_cells(self, row: int, column: int) -> tuple[Cells, np.ndarray]:
        """The cells of one square of `CHUNK`, at coordinates of the slide, and the place in `regions` of each (N,)."""
        corner = (row * CHUNK, column * CHUNK)
        tissue = self.tissue_at(corner, (CHUNK, CHUNK))
        rng = open_stream(WHOLE, _CELLS, *self._key, row + 8, column + 8)

        def regions_of(yx: np.ndarray) -> np.ndarray:
            return self.region_at(yx + corner)

        axis = np.linspace(0, CHUNK, 9)
        near = np.unique(regions_of(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)))

        def scatter(kind: int) -> np.ndarray:
            if kind != TUMOUR:
                return self._scatter(rng, corner, *lattice(self.look, kind, 0.0))
            of_each = []
            for number in near:
                points = self._scatter(rng, corner, *lattice(self.look, kind, self.regions[number].grade))
                of_each.append(points[regions_of(points) == number])
            return np.concatenate(of_each)

        grades = np.array([region.grade for region in self.regions])
        cells = populate(rng, tissue, scatter, lambda yx: grades[regions_of(yx)])
        # What is far away is no cell (see `populate`).
        cells = cells.take(cells.yx[:, 0] > -CHUNK)
        regions = regions_of(cells.yx)
        return dataclasses.replace(cells, yx=cells.yx + corner), regions

    def _scatter(self, rng: np.random.Generator, corner: tuple[int, int], pitch: float, jitter: float) -> np.ndarray:
        """The points (N, 2) of a turned hexagonal lattice of the slide that belong to a square, from its corner."""
        cos, sin = np.cos(self._turn), np.sin(self._turn)
        rotation = np.array([[cos, -sin], [sin, cos]])
        middle = (np.array(corner) + CHUNK / 2) @ rotation.T / pitch
        reach = int(0.9 * CHUNK / pitch) + 3
        first, second = int(middle[0] / 0.866) - reach, int(middle[1]) - reach
        row, column = np.mgrid[first : first + 2 * reach, second : second + 2 * reach].reshape(2, -1)
        points = np.stack([row * 0.866, column + 0.5 * (row % 2)], -1) * pitch @ rotation - corner
        points = points[((points >= 0) & (points < CHUNK)).all(-1)]
        points += np.clip(rng.normal(0.0, jitter, points.shape), -0.4, 0.4) * pitch
        return np.asarray(points)
