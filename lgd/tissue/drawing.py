"""The tissue of a virtual patch: its slide's look, nests, stroma and cells, and what lies at any of its coordinates.

Cells are points. A power diagram over the points gives each pixel its cell and its distance to the shared
membrane, at any coordinates; so a neighbouring section is drawn by looking at the same tissue at shifted and
warped coordinates, without resampling an image.

Lengths are micrometres, coordinates are (y, x) from the field's corner. Legend: N cells, H and W pixels.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage, spatial, special

MPP = 0.46
"""Micrometres per pixel, BCI's scale."""

STROMA, LYMPHOCYTE, TUMOUR = range(3)
_MARGIN = 24.0  # the neighbouring section reaches this far outside the field
_CRIMP = 14.0  # how far the bends of the stroma carry its fibres
_NOWHERE = np.array(-8, np.float32)
_BLOCK, _CANDIDATES = 4, 6

# Optical density of red, green and blue light. Ruifrok and Johnston 2001; eosin and the two hematoxylins are moved
# more than half way towards what Macenko's method finds on BCI's patches, whose pink absorbs blue light and whose
# counterstain is greyish.
_HEMATOXYLIN, _EOSIN, _DAB = (0.63, 0.68, 0.35), (0.23, 0.88, 0.41), (0.268, 0.570, 0.776)
_COUNTERSTAIN = (0.60, 0.64, 0.48)


class Look:
    """A slide's look, which never sees the level; a stain's vector has red, green and blue."""

    def __init__(self, rng: np.random.Generator) -> None:
        grey = rng.random() < 0.3
        white = rng.uniform(170, 205) if grey else rng.uniform(228, 250)
        vectors = (_HEMATOXYLIN, _EOSIN, _COUNTERSTAIN, _DAB)
        self.hematoxylin, self.eosin, self.counterstain, self.dab = [_tilt(rng, vector) for vector in vectors]
        self.hematoxylin_amount, self.eosin_amount, self.dab_amount = rng.lognormal(0.0, (0.22, 0.22, 0.10))
        self.counter = rng.uniform(0.16, 0.36)
        self.haze = rng.uniform(0.0, 0.06)
        self.he_white = white * rng.normal(1.0, (0.008, 0.008, 0.008))
        self.ihc_white = np.minimum(white * rng.uniform(1.0, 1.03), 252.0) * rng.normal(1.0, (0.006, 0.006, 0.008))
        self.gamma = rng.normal(1.0, 0.03, 3)
        self.blur = rng.uniform(0.55, 1.0)
        self.noise = rng.uniform(0.8, 2.0)
        self.share = rng.uniform(0.35, 0.75)
        self.nest_size = rng.uniform(13.0, 24.0)
        self.cords = rng.uniform(0.0, 0.9)
        self.lumen = rng.uniform(0.0, 0.30) if rng.random() < 0.5 else 0.0
        self.cleft = rng.uniform(0.6, 2.5) if rng.random() < 0.4 else 0.0
        self.fibre = rng.uniform(0.25, 0.65)
        self.basophilia = rng.uniform(0.07, 0.17)
        self.pink = rng.uniform(0.13, 0.26)
        self.lymphocytes = rng.uniform(0.0, 0.25)
        self.pitch = rng.normal(1.0, 0.05)
        self.girth = rng.normal(1.0, 0.05)


def _tilt(rng: np.random.Generator, vector: tuple[float, float, float]) -> np.ndarray:
    """A stain vector turned by a few degrees, as batches of dye differ."""
    turned = np.maximum(np.array(vector) + rng.normal(0.0, 0.018, 3), 0.01)
    unit: np.ndarray = turned / np.linalg.norm(turned)
    return unit


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


def _distance(field: np.ndarray) -> np.ndarray:
    """About the distance to the field's zero, in samples, at most 8."""
    distance: np.ndarray = field / np.maximum(np.hypot(*np.gradient(field)), 1e-3)
    return distance.clip(-8, 8).astype(np.float32)


def _at(field: np.ndarray, yx: np.ndarray) -> np.ndarray:
    """A field of one sample a micrometre, read at (..., 2) coordinates of the tissue."""
    if field is _NOWHERE:
        return field
    at = np.stack([yx[..., 0], yx[..., 1]]) + np.float32(_MARGIN)
    return np.asarray(ndimage.map_coordinates(field, at, order=1, mode="wrap"))


class Tissue:
    """The block from which both sections are cut: architecture fields and cells.

    Fields have one sample a micrometre and reach `_MARGIN` outside the drawn field of `size` pixels.
    """

    def __init__(self, rng: np.random.Generator, look: Look, grade: float, size: int, barren: bool):
        self.look, self.grade, self.extent = look, grade, size * MPP
        side = int(np.ceil(self.extent + 2 * _MARGIN))
        shape = (side, side)
        share = np.clip(look.share + rng.normal(0.0, 0.12), 0.15, 0.9)
        share = rng.uniform(0.0, 0.05) if barren else share
        broad, branching = (smooth_noise(rng, shape, part * look.nest_size) for part in (1.0, 0.8))
        fine = smooth_noise(rng, shape, 5.0)
        nest = (1 - look.cords) * broad - look.cords * 1.5 * np.abs(branching) + 0.12 * fine
        inner = nest[int(_MARGIN) : -int(_MARGIN), int(_MARGIN) : -int(_MARGIN)]
        # Distances, about: above 0 inside tumour nests, inside their lumens, and beyond the section's rim.
        self.nest = _distance(nest - np.quantile(inner, 1 - share))
        self.lumen = _distance(nest - np.quantile(inner, 1 - share * look.lumen)) if look.lumen else _NOWHERE
        # About one patch in four meets the rim of the section, or a crack.
        rim = _distance(smooth_noise(rng, shape, 30.0) + 0.05 * fine - rng.uniform(0.9, 1.9))
        self.rim = rim if rng.random() < 0.25 else _NOWHERE
        self.crowd = smooth_noise(rng, shape, 18.0)
        self.bend = smooth_noise(rng, shape, 22.0)
        self.fibre = smooth_noise(rng, (2 * side, 2 * side), (1.0, 6.0))
        self.direction = rng.uniform(0, np.pi)
        self.cells = self._populate(rng, side)

    def _populate(self, rng: np.random.Generator, side: int) -> Cells:
        pitch = (10.8 - 2.0 * self.grade) * self.look.pitch
        tumour = _scatter(rng, side, pitch, 0.24)
        tumour = tumour[(_at(self.nest, tumour) > 0) & (_at(self.lumen, tumour) < 0) & (_at(self.rim, tumour) < 0)]
        immune = _scatter(rng, side, 7.6, 0.35)
        keep = (_at(self.crowd, immune) > special.ndtri(1 - self.look.lymphocytes)) | (rng.random(len(immune)) < 0.02)
        immune = immune[keep & (_at(self.nest, immune) < -5) & (_at(self.rim, immune) < -3)]
        spindle = _scatter(rng, side, 15.0, 0.45)
        spindle = spindle[(_at(self.nest, spindle) < -5) & (_at(self.rim, spindle) < -3)]
        if len(immune) and len(spindle):
            spindle = spindle[spatial.KDTree(immune).query(spindle)[0] > 7.0]
        # Far away, so that the search always finds its candidates.
        spindle = np.concatenate([spindle, np.full((_CANDIDATES, 2), -50.0 * _MARGIN)])
        yx = np.concatenate([spindle, immune, tumour])
        kind = np.repeat([STROMA, LYMPHOCYTE, TUMOUR], [len(spindle), len(immune), len(tumour)])
        return self._cells(rng, yx, kind, pitch)

    def _cells(self, rng: np.random.Generator, yx: np.ndarray, kind: np.ndarray, pitch: float) -> Cells:
        grade, n = self.grade, len(yx)
        is_tumour, is_stroma = kind == TUMOUR, kind == STROMA
        radius = (2.8 + 1.1 * grade) * self.look.girth * rng.lognormal(0.0, 0.07 + 0.13 * grade, n)
        stretch = rng.lognormal(0.0, 0.10 + 0.12 * grade, n)
        long, short = radius * stretch, radius / stretch
        long = np.where(is_stroma, rng.uniform(4.0, 7.0, n), np.where(is_tumour, long, rng.uniform(2.5, 3.1, n)))
        short = np.where(is_stroma, rng.uniform(1.1, 1.9, n), np.where(is_tumour, short, 0.92 * long))
        down, right = np.gradient(self.bend)
        slope = _at(down, yx) * np.sin(self.direction) + _at(right, yx) * np.cos(self.direction)
        along = self.direction + np.arctan(_CRIMP * slope) + rng.normal(0.0, 0.15, n)
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

    def fibres(self, yx: np.ndarray) -> np.ndarray:
        """Strength of the collagen fibres at (H, W, 2) coordinates, about standard normal."""
        cos, sin = np.float32(np.cos(self.direction)), np.float32(np.sin(self.direction))
        across = yx[..., 0] * cos - yx[..., 1] * sin - np.float32(_CRIMP) * _at(self.bend, yx)
        along = yx[..., 0] * sin + yx[..., 1] * cos
        coarse = _at(self.fibre, np.stack([0.7 * across, 0.6 * along], -1))
        return 0.6 * coarse + 0.8 * _at(self.fibre, np.stack([1.6 * across, 1.3 * along], -1))

    def section(self, rng: np.random.Generator, drift: float) -> Cells:
        """The cells as one cut meets them: moved by `drift` um, nuclei grown or shrunk, some missed."""
        cells, n = self.cells, len(self.cells.yx)
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
    low, high = -_MARGIN, side - _MARGIN
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
    _, candidates = spatial.KDTree(cells.yx).query(blocks.mean(1), k=_CANDIDATES)
    y, x = np.ascontiguousarray(blocks[..., 0]), np.ascontiguousarray(blocks[..., 1])
    shape = y.shape
    best, next_best = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
    slot, next_slot = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    for number, candidate in zip(np.arange(_CANDIDATES, dtype=np.int8), candidates.T, strict=True):
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
