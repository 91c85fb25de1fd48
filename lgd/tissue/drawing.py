"""The tissue of a virtual patch: its nests, stroma and cells, and what lies at any of its coordinates.

Cells are points. A power diagram over the points gives each pixel its cell and its distance to the shared
membrane, at any coordinates; so a neighbouring section is drawn by looking at the same tissue at shifted and
warped coordinates, without resampling an image.

Lengths are micrometres, coordinates are (y, x) from the field's corner. Legend: N cells, H and W pixels.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage, spatial, special

from lgd.tissue.look import Look

MPP = 0.46
"""Micrometres per pixel, BCI's scale."""

STROMA, LYMPHOCYTE, TUMOUR = range(3)
MARGIN = 24.0
"""The neighbouring section reaches this far outside the field."""
_CRIMP = 14.0  # how far the bends of the stroma carry its fibres
NOWHERE = np.array(-8, np.float32)
"""A field of distances that has no inside."""
NEST_PARTS = (1.0, 0.8)
"""How large the noise is that makes nests and cords, in sizes of a nest."""
_BLOCK, CANDIDATES = 4, 6
_ELONGATED = 0.3
"""Logarithm by which the half axes of a tumour cell's nucleus grow and shrink at elongation 1."""


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells of one section; every field has N rows."""

    yx: np.ndarray
    kind: np.ndarray
    reach: np.ndarray  # a cell body ends this far from its centre where no neighbour ends it earlier
    weight: np.ndarray  # of the power diagram: larger cells push their neighbours' membranes away
    nucleus: np.ndarray  # (N, 2) half axes
    angle: np.ndarray
    offset: np.ndarray  # (N, 2) of the nucleus from the cell's centre
    density: np.ndarray  # of the chromatin, 0 where the section misses the nucleus

    def take(self, which: np.ndarray) -> "Cells":
        """Some of them."""
        return Cells(**{field.name: getattr(self, field.name)[which] for field in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True)
class Place:
    """What lies at each pixel of a section."""

    kind: np.ndarray  # of the nearest cell
    cell: np.ndarray  # its row in Cells
    other: np.ndarray  # the row across the nearest membrane; the cell's own where it has no neighbour there
    edge: np.ndarray  # distance to the end of the cell, negative outside its body
    from_nucleus: np.ndarray  # (H, W, 2) from the nucleus' centre
    rho: np.ndarray  # the same in units of the nucleus: 1 is its membrane
    cover: np.ndarray  # 0..1, how much of the pixel the nucleus covers
    hole: np.ndarray  # 0..1, no tissue


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float | tuple[float, float]) -> np.ndarray:
    """Noise (H, W) float32 that repeats at its borders: standard normal, smoothed by a Gaussian of `sigma` samples."""
    sigma_y, sigma_x = np.broadcast_to(sigma, 2)
    down = np.exp(-2 * (np.pi * sigma_y * fft.fftfreq(shape[0])) ** 2).astype(np.float32)
    right = np.exp(-2 * (np.pi * sigma_x * fft.rfftfreq(shape[1])) ** 2).astype(np.float32)
    spectrum = fft.rfft2(rng.standard_normal(shape, dtype=np.float32)) * down[:, None] * right
    spectrum[0, 0] = 0
    smooth: np.ndarray = fft.irfft2(spectrum, s=shape)
    smooth /= smooth.std()
    return smooth


def as_distance(field: np.ndarray) -> np.ndarray:
    """About the distance to the field's zero, in samples, at most 8."""
    distance: np.ndarray = field / np.maximum(np.hypot(*np.gradient(field)), 1e-3)
    return distance.clip(-8, 8).astype(np.float32)


def _at(field: np.ndarray, yx: np.ndarray) -> np.ndarray:
    """A field of one sample a micrometre, read at (..., 2) coordinates of the tissue."""
    if field is NOWHERE:
        return field
    at = np.stack([yx[..., 0], yx[..., 1]]) + np.float32(MARGIN)
    return np.asarray(ndimage.map_coordinates(field, at, order=1, mode="wrap"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tissue:
    """The block from which both sections are cut: architecture fields, with one sample a micrometre.

    The fields reach `MARGIN` outside the block on each side. Those of distances are above 0 inside tumour nests,
    inside their lumens, and beyond the section's rim.
    """

    look: Look
    nest: np.ndarray
    lumen: np.ndarray
    rim: np.ndarray
    crowd: np.ndarray
    bend: np.ndarray
    fibre: np.ndarray
    direction: float
    """Of the fibres, in radians."""
    origin: tuple[float, float] = (0.0, 0.0)
    """Where the block's corner lies on its slide."""

    def fibres(self, yx: np.ndarray) -> np.ndarray:
        """Strength of the collagen fibres at (H, W, 2) coordinates, about standard normal."""
        cos, sin = np.float32(np.cos(self.direction)), np.float32(np.sin(self.direction))
        y, x = (yx[..., axis] + np.float32(self.origin[axis]) for axis in (0, 1))
        across = y * cos - x * sin - np.float32(_CRIMP) * _at(self.bend, yx)
        along = y * sin + x * cos
        coarse = _at(self.fibre, np.stack([0.7 * across, 0.6 * along], -1))
        return 0.6 * coarse + 0.8 * _at(self.fibre, np.stack([1.6 * across, 1.3 * along], -1))


def draw_tissue(
    rng: np.random.Generator, look: Look, grade: float, size: int, barren: bool, elongation: float = 0.0
) -> tuple[Tissue, Cells]:
    """The tissue of a patch of `size` pixels, and all its cells, of which those of the tumour have elongated nuclei."""
    side = int(np.ceil(size * MPP + 2 * MARGIN))
    shape = (side, side)
    share = np.clip(look.share + rng.normal(0.0, 0.12), 0.15, 0.9)
    share = rng.uniform(0.0, 0.05) if barren else share
    broad, branching = (smooth_noise(rng, shape, part * look.nest_size) for part in NEST_PARTS)
    fine = smooth_noise(rng, shape, 5.0)
    nest = form_nests(look, broad, branching, fine)
    inner = nest[int(MARGIN) : -int(MARGIN), int(MARGIN) : -int(MARGIN)]
    lumen = as_distance(nest - np.quantile(inner, 1 - share * look.lumen)) if look.lumen else NOWHERE
    # About one patch in four meets the rim of the section, or a crack.
    rim = as_distance(smooth_noise(rng, shape, 30.0) + 0.05 * fine - rng.uniform(0.9, 1.9))
    tissue = Tissue(
        look=look,
        nest=as_distance(nest - np.quantile(inner, 1 - share)),
        lumen=lumen,
        rim=rim if rng.random() < 0.25 else NOWHERE,
        crowd=smooth_noise(rng, shape, 18.0),
        bend=smooth_noise(rng, shape, 22.0),
        fibre=smooth_noise(rng, (2 * side, 2 * side), (1.0, 6.0)),
        direction=rng.uniform(0, np.pi),
    )
    cells = populate(rng, tissue, lambda kind: _scatter(rng, side, *lattice(look, kind, grade)), lambda _: grade)
    if elongation:
        drawn_out = np.exp(np.outer(cells.kind == TUMOUR, (-_ELONGATED, _ELONGATED)) * elongation)
        cells = dataclasses.replace(cells, nucleus=cells.nucleus * drawn_out)
    return tissue, cells


def form_nests(look: Look, broad: np.ndarray, branching: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Tumour is where this is high: round nests or branching cords, of standard normal noise."""
    nests: np.ndarray = (1 - look.cords) * broad - look.cords * 1.5 * np.abs(branching) + 0.12 * fine
    return nests


def lattice(look: Look, kind: int, grade: float) -> tuple[float, float]:
    """The pitch, in micrometres, and the jitter of the points at which cells of a kind may lie."""
    return {TUMOUR: (float(_pitch(look, grade)), 0.24), LYMPHOCYTE: (7.6, 0.35), STROMA: (15.0, 0.45)}[kind]


def _pitch(look: Look, grade: float | np.ndarray) -> float | np.ndarray:
    return (10.8 - 2.0 * grade) * look.pitch


def populate(
    rng: np.random.Generator,
    tissue: Tissue,
    scatter: Callable[[int], np.ndarray],
    grade_at: Callable[[np.ndarray], float | np.ndarray],
) -> Cells:
    """The cells at those scattered points (N, 2) of each kind where the tissue has room for them."""
    tumour = scatter(TUMOUR)
    tumour = tumour[(_at(tissue.nest, tumour) > 0) & (_at(tissue.lumen, tumour) < 0) & (_at(tissue.rim, tumour) < 0)]
    immune = scatter(LYMPHOCYTE)
    keep = _at(tissue.crowd, immune) > special.ndtri(1 - tissue.look.lymphocytes)
    keep |= rng.random(len(immune)) < 0.02
    immune = immune[keep & (_at(tissue.nest, immune) < -5) & (_at(tissue.rim, immune) < -3)]
    spindle = scatter(STROMA)
    spindle = spindle[(_at(tissue.nest, spindle) < -5) & (_at(tissue.rim, spindle) < -3)]
    if len(immune) and len(spindle):
        spindle = spindle[spatial.KDTree(immune).query(spindle)[0] > 7.0]
    # Far away, so that the search always finds its candidates.
    spindle = np.concatenate([spindle, np.full((CANDIDATES, 2), -50.0 * MARGIN)])
    yx = np.concatenate([spindle, immune, tumour])
    kind = np.repeat([STROMA, LYMPHOCYTE, TUMOUR], [len(spindle), len(immune), len(tumour)])
    return _shape_cells(rng, tissue, yx, kind, grade_at(yx))


def _shape_cells(
    rng: np.random.Generator, tissue: Tissue, yx: np.ndarray, kind: np.ndarray, grade: float | np.ndarray
) -> Cells:
    n, pitch = len(yx), _pitch(tissue.look, grade)
    is_tumour, is_stroma = kind == TUMOUR, kind == STROMA
    radius = (2.8 + 1.1 * grade) * tissue.look.girth * rng.lognormal(0.0, 0.07 + 0.13 * grade, n)
    stretch = rng.lognormal(0.0, 0.10 + 0.12 * grade, n)
    long, short = radius * stretch, radius / stretch
    long = np.where(is_stroma, rng.uniform(4.0, 7.0, n), np.where(is_tumour, long, rng.uniform(2.5, 3.1, n)))
    short = np.where(is_stroma, rng.uniform(1.1, 1.9, n), np.where(is_tumour, short, 0.92 * long))
    down, right = np.gradient(tissue.bend)
    slope = _at(down, yx) * np.sin(tissue.direction) + _at(right, yx) * np.cos(tissue.direction)
    along = tissue.direction + np.arctan(_CRIMP * slope) + rng.normal(0.0, 0.15, n)
    return Cells(
        yx=yx,
        kind=kind,
        reach=np.where(is_tumour, 0.85 * pitch * rng.uniform(0.9, 1.1, n), np.where(is_stroma, 9.0, 3.6)),
        weight=np.where(is_tumour, 2.0 + np.minimum(radius, 5.0), 0.0),
        nucleus=np.stack([short, long], -1),
        angle=np.where(is_stroma, along, rng.uniform(0, np.pi, n)),
        offset=rng.normal(0.0, 0.6, (n, 2)) * is_tumour[:, None],
        density=rng.lognormal(0.0, 0.16, n) * np.where(is_tumour, 1.0, np.where(is_stroma, 1.1, 1.35)),
    )


def cut_cells(rng: np.random.Generator, cells: Cells, drift: float) -> Cells:
    """The cells as one cut meets them: moved by `drift` um, nuclei grown or shrunk, some missed."""
    n = len(cells.yx)
    moved = dataclasses.replace(
        cells,
        yx=cells.yx + rng.normal(0.0, drift, (n, 2)),
        nucleus=cells.nucleus * rng.uniform(0.86, 1.05, (n, 1)),
        density=cells.density * (rng.random(n) < 0.92) * rng.uniform(0.8, 1.15, n),
    )
    single = {f.name: getattr(moved, f.name).astype(np.float32) for f in dataclasses.fields(moved)}
    return Cells(**{**single, "kind": cells.kind})


def _scatter(rng: np.random.Generator, side: int, pitch: float, jitter: float) -> np.ndarray:
    """(N, 2) points of a turned hexagonal lattice, each moved by `jitter` pitches (standard deviation)."""
    reach = int(0.75 * side / pitch) + 3
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    lattice = np.stack([row * 0.866, column + 0.5 * (row % 2)], -1) * pitch
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # Clipped, so that no two cells fall together.
    moved = lattice @ rotation + np.clip(rng.normal(0.0, jitter, lattice.shape), -0.4, 0.4) * pitch
    low, high = -MARGIN, side - MARGIN
    middle: np.ndarray = moved + (low + high) / 2
    return middle[((middle > low) & (middle < high)).all(-1)]


def locate(tissue: Tissue, cells: Cells, yx: np.ndarray, wobble: np.ndarray) -> Place:
    """What lies at each of the (H, W, 2) coordinates; `wobble` (H, W) roughens the nuclei's outlines."""
    first, second, edge = _tessellate(cells, yx)
    kind = cells.kind[first]
    y, x = (yx[..., axis] - cells.yx[first, axis] for axis in (0, 1))
    nest, lumen, rim = (_at(field, yx) for field in (tissue.nest, tissue.lumen, tissue.rim))
    # A cell ends at its neighbour's membrane; or where it meets no cell of its kind, at its reach or its nest's end.
    to_rim = cells.reach[first] - np.hypot(y, x)
    to_rim = np.where(kind == TUMOUR, np.minimum(to_rim, np.minimum(nest, -lumen) + 3.2 + 0.4 * wobble), to_rim)
    free = (cells.kind[second] != kind) | (to_rim < edge)
    second, edge = np.where(free, first, second), np.where(free, to_rim, edge)
    y, x = y - cells.offset[first, 0], x - cells.offset[first, 1]
    cos, sin = np.cos(cells.angle)[first], np.sin(cells.angle)[first]
    short, long = cells.nucleus[first, 0], cells.nucleus[first, 1]
    rho = np.hypot((y * cos - x * sin) / short, (y * sin + x * cos) / long) * (1 + 0.07 * wobble)
    cover = np.clip((1 - rho) * short / MPP + 0.5, 0, 1) * (cells.density[first] > 0)
    cover = np.where(kind == TUMOUR, cover * np.clip(edge / MPP + 0.2, 0, 1), cover)
    hole = np.clip(np.maximum(rim, np.where((lumen > -3) & (kind == TUMOUR), -edge, -1)) / MPP, 0, 1)
    hole = np.maximum(hole, np.clip(lumen / MPP, 0, 1))
    return Place(kind, first, second, edge, np.stack([y, x], -1), rho, cover, hole)


def _tessellate(cells: Cells, yx: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two cells of least power distance at each pixel (H, W), and the distance to the face between them.

    The k nearest points are looked up once a block of 4 x 4 pixels: four times as fast as once a pixel.
    """
    height, width = yx.shape[:2]
    blocks = yx.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, 2).swapaxes(1, 2)
    blocks = blocks.reshape(-1, _BLOCK * _BLOCK, 2)
    points, squared_weight = cells.yx, cells.weight**2
    _, candidates = spatial.KDTree(cells.yx).query(blocks.mean(1), k=CANDIDATES)
    y, x = np.ascontiguousarray(blocks[..., 0]), np.ascontiguousarray(blocks[..., 1])
    shape = y.shape
    best, next_best = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
    slot, next_slot = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    for number, candidate in zip(np.arange(CANDIDATES, dtype=np.int8), candidates.T, strict=True):
        at = points[candidate]
        power = (y - at[:, :1]) ** 2 + (x - at[:, 1:]) ** 2 - squared_weight[candidate, None]
        wins, places = power < best, power < next_best
        next_slot = np.where(wins, slot, np.where(places, number, next_slot))
        next_best = np.where(wins, best, np.where(places, power, next_best))
        slot, best = np.where(wins, number, slot), np.where(wins, power, best)
    first, second = (np.take_along_axis(candidates, s.astype(np.intp), 1) for s in (slot, next_slot))
    apart = np.hypot(*(points[first] - points[second]).T)
    edge = (next_best - best) / (2 * np.maximum(apart.T, 0.1))

    def image(flat: np.ndarray) -> np.ndarray:
        tiled = flat.reshape(height // _BLOCK, width // _BLOCK, _BLOCK, _BLOCK)
        return tiled.swapaxes(1, 2).reshape(height, width)

    return image(first), image(second), image(edge)
