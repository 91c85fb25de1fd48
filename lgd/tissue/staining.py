"""What is brown in a section of virtual tissue, and how brown it truly is: membranes (HER2), or nuclei (Ki67, ER, PR).

Amounts are optical density, base 10. Legend: N cells, H and W pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from lgd.tissue.drawing import MPP, TUMOUR, Cells, Place, Tissue, cut_cells, locate, smooth_noise

# By level: share of stained tumour cells, optical density of a membrane, its completeness (each from, to), and its
# width in micrometres. The words (faint, moderate, intense; incomplete, complete; 10 %) are ASCO/CAP 2018's.
_STAINING: tuple[tuple[tuple[float, float], tuple[float, float], tuple[float, float], float], ...] = (
    ((0.00, 0.08), (0.08, 0.18), (0.15, 0.35), 0.64),
    ((0.30, 0.75), (0.28, 0.42), (0.30, 0.55), 0.64),
    ((0.35, 0.85), (0.48, 0.70), (0.80, 0.95), 1.00),
    ((0.65, 1.00), (0.80, 1.25), (0.95, 1.00), 2.14),
)

_ANY_SHARE = 0.12, 1.0
"""Share of stained cells of levels above 0 where the H&E says something of it; ASCO/CAP ask for more than 10 %."""

DRIFT = 0.9
"""How far cells lie in the neighbouring section from where they lie in the H&E, in micrometres."""
TEXTURES = (0.7, 1.7, 6.0)
"""How large grain, clumps and patches are, in pixels."""

# Of a nuclear marker: share of weak ones of the positive nuclei, of positive ones of lymphocytes and stroma, and the
# least amount.
_WEAK, _OTHERS_POSITIVE, _FAINTEST = 0.15, 0.03, 0.2


class Textures(NamedTuple):
    """Noise of the pixels (H, W): grain, clumps and patches."""

    fine: np.ndarray
    broad: np.ndarray
    wide: np.ndarray


class Cut:
    """One section of the tissue in its own pixels (H, W), which lie at the coordinates `yx` (H, W, 2) of the tissue."""

    def __init__(self, tissue: Tissue, cells: Cells, textures: Textures, yx: np.ndarray) -> None:
        self.cells, self.yx = cells, yx
        self.fine, self.broad, self.wide = textures
        self.place = locate(tissue, cells, yx, self.broad)
        self.tumour = self.place.kind == TUMOUR
        self.body = self.tumour * np.clip(self.place.edge / MPP + 0.5, 0, 1)


def cut_patch(rng: np.random.Generator, tissue: Tissue, cells: Cells, size: int, *, neighbouring: bool) -> Cut:
    """A section of a patch of `size` pixels: the H&E, or the neighbouring one, which is the IHC."""
    cells = cut_cells(rng, cells, drift=DRIFT if neighbouring else 0.0)
    textures = Textures(*(smooth_noise(rng, (size, size), sigma) for sigma in TEXTURES))
    yx = _neighbouring(rng, size) if neighbouring else lay_grid(size)
    return Cut(tissue, cells, textures, yx + ripple(np.roll(textures.wide, 7, 0), np.roll(textures.wide, 7, 1)))


def ripple(down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How far membranes, which are not straight, are moved at each pixel (H, W, 2) by noise of the texture `wide`."""
    moved: np.ndarray = np.float32(0.45) * np.stack([down, right], -1)
    return moved


class Stained(NamedTuple):
    """A stain of a section."""

    dab: np.ndarray
    """Amount at each pixel (H, W)."""
    blue: np.ndarray | float
    """Share of the counterstain that still shows in the nuclei."""
    measured: dict[str, float]
    """The truth about it."""


class Membranes(NamedTuple):
    """How each of N cells takes the stain of membranes."""

    stained: np.ndarray
    amount: np.ndarray
    completeness: np.ndarray
    sigma: np.ndarray
    """Of the membrane's profile, in micrometres."""


class Expression(NamedTuple):
    """How a tumour, or the tumour around each of N cells, expresses HER2."""

    share: float | np.ndarray
    """Of the tumour cells that are stained."""
    density: float | np.ndarray
    """Optical density of a usual membrane."""
    complete: float | np.ndarray
    """Share of a cell's membrane that is stained."""
    width: float | np.ndarray


def draw_expression(rng: np.random.Generator, level: int, place: float = 0.0, weight: float = 0.0) -> Expression:
    """Anywhere in the ranges of a HER2 level.

    With a `weight` the share of stained cells is drawn from a wider range, and moves by this weight towards a `place`
    in it, 0..1.
    """
    *ranges, width = _STAINING[level]
    share, density, complete = (rng.uniform(*limits) for limits in ranges)
    if weight:
        least, most = ranges[0]
        low, high = _ANY_SHARE if level else ranges[0]
        drawn = (share - least) / (most - least)
        share = low + (high - low) * ((1 - weight) * drawn + weight * place)
    return Expression(share, density, complete, width)


def stain_membranes(
    rng: np.random.Generator, cut: Cut, expression: Expression, dye: float, exactly: bool = False
) -> Stained:
    """Membranes, `dye` times as brown as they are expressed; true membrane_od, membrane_completeness,
    stained_fraction, tumour_cells.

    `exactly`: the share is that of the cells in sight, among which clones would lie unevenly.
    """
    rank = _rank_in_clones(rng, cut.cells.yx)
    if exactly:
        in_sight = np.sort(rank[_find_tumour(cut)])
        rank = (np.searchsorted(in_sight, rank) + 0.5) / max(1, len(in_sight))
    membranes = choose_membranes(rng, cut.cells.kind == TUMOUR, rank, expression)
    return paint_membranes(cut, membranes, dye)


def choose_membranes(
    rng: np.random.Generator, tumour: np.ndarray, rank: np.ndarray, expression: Expression
) -> Membranes:
    """Which of N cells stain, by their rank in 0..1, and how."""
    n = len(rank)
    stained = (rank < expression.share) & tumour
    amount = (stained * expression.density * rng.lognormal(0.0, 0.22, n)).astype(np.float32)
    completeness = np.clip(expression.complete + rng.normal(0.0, 0.08, n), 0.05, 1.1).astype(np.float32)
    sigma = np.broadcast_to(np.asarray(expression.width) / 2.355, n).astype(np.float32)
    return Membranes(stained, amount, completeness, sigma)


def paint_membranes(cut: Cut, membranes: Membranes, dye: float) -> Stained:
    """The stain of a section, and the truth about it (see `stain_membranes`)."""
    place, tumour, amount = cut.place, cut.tumour, membranes.amount
    own, across = place.cell, place.other
    stain = np.maximum(amount[own], amount[across])
    owner = np.where(amount[own] >= amount[across], own, across)
    gate = special.expit((membranes.completeness[owner] - special.ndtr(cut.wide)) / 0.05)
    membrane = np.exp(-0.5 * (place.edge / membranes.sigma[owner]) ** 2) * gate
    cytoplasm = 0.13 * np.clip(place.edge / 0.5, 0, 1) * (1 + 0.5 * cut.broad) * (1 - 0.6 * place.cover)
    dab = dye * np.maximum(tumour * (stain * membrane * (1 + 0.15 * cut.fine) + amount[own] * cytoplasm), 0)
    seen = _find_tumour(cut)
    line = tumour & (np.abs(place.edge) < 0.5) & (stain > 0)
    shown = tumour & (np.abs(place.edge) < 0.5) & (1 - place.hole > 0.5)
    measured = {
        "membrane_completeness": round(float((gate[line] > 0.5).mean()), 4) if line.any() else 0.0,
        "stained_fraction": round(float(membranes.stained[seen].mean()), 4) if len(seen) else 0.0,
        "tumour_cells": len(seen),
        "membrane_od": round(float(dab[shown].mean()), 4) if shown.any() else 0.0,
    }
    return Stained(dab, 1.0, measured)


def _find_tumour(cut: Cut) -> np.ndarray:
    """The numbers of the tumour cells in sight."""
    return np.unique(cut.place.cell[cut.tumour & (cut.place.edge > 0)])


@dataclass(frozen=True, kw_only=True, slots=True)
class NuclearStain:
    """How the nuclei of a patch take a nuclear marker."""

    share: float
    """Of the tumour nuclei that are positive, 0..1."""
    density: float
    """Amount of DAB in a usual positive nucleus."""
    bleed: float
    """Amount in the cytoplasm of a positive cell, in units of that in its nucleus."""


class Nuclei(NamedTuple):
    """The nuclei that an IHC shows; every field has N rows."""

    yx: np.ndarray
    """(N, 2) middles, in pixels of the image."""
    tumour: np.ndarray
    positive: np.ndarray
    density: np.ndarray
    """Mean amount of DAB, haze left out; 0 in negative ones."""


def stain_nuclei(rng: np.random.Generator, cut: Cut, stain: NuclearStain, dye: float) -> tuple[Stained, Nuclei]:
    """Brown nuclei, and the truth about each; `dye` times as brown as `stain` says.

    Clones are alike. A positive nucleus has an amount of its own, one in seven of them 0.3 to 0.6 of that, and none
    less than 0.2; it hides its blue. Of lymphocytes and stroma 3 % are positive.
    """
    cells, place, n = cut.cells, cut.place, len(cut.cells.yx)
    rank, tumour = _rank_in_clones(rng, cells.yx), cells.kind == TUMOUR
    # Clones lie unevenly in so small a patch: their places among its tumour cells are what the share is taken of.
    rank[tumour] = (stats.rankdata(rank[tumour]) - 0.5) / max(1, tumour.sum())
    positive = (rank < np.where(tumour, stain.share, _OTHERS_POSITIVE)) & (cells.density > 0)
    weak = np.where(rng.random(n) < _WEAK, rng.uniform(0.3, 0.6, n), 1.0)
    amount = np.maximum(stain.density * rng.lognormal(0.0, 0.25, n) * weak, _FAINTEST)
    own = (positive * amount).astype(np.float32)[place.cell]
    nuclei = own * place.cover * np.clip(1 + 0.12 * cut.fine + 0.12 * cut.broad, 0.3, 2.0)
    dab = dye * (nuclei + stain.bleed * own * cut.body * (1 - place.cover) * np.clip(1 + 0.3 * cut.broad, 0, 2))
    seen = _find_seen(place, n)
    middle_N2, density_N = _measure_covered(place, dab, n)
    nuclei_seen = Nuclei(
        middle_N2[seen], cells.kind[seen] == TUMOUR, positive[seen], np.where(positive, density_N, 0.0)[seen]
    )
    return Stained(dab, np.exp(-1.2 * own * place.cover), summarise_nuclei(nuclei_seen)), nuclei_seen


def summarise_nuclei(nuclei: Nuclei) -> dict[str, float]:
    """Counts, percent of the tumour nuclei that are positive (nan without any), and mean amount in positive ones."""
    tumour, positive = nuclei.tumour, nuclei.positive
    both = int((tumour & positive).sum())
    return {
        "ihc_nuclei": len(tumour),
        "ihc_tumour_nuclei": int(tumour.sum()),
        "ihc_positive_nuclei": int(positive.sum()),
        "ihc_positive_tumour_nuclei": both,
        "percent": round(100 * both / int(tumour.sum()), 1) if tumour.any() else np.nan,
        "positive_od": round(float(nuclei.density[positive].mean()), 4) if positive.any() else 0.0,
    }


def _rank_in_clones(rng: np.random.Generator, yx: np.ndarray) -> np.ndarray:
    """A place 0..1 of each cell (N,), in which neighbours are alike: a clone's cells stain together."""
    mood = smooth_noise(rng, (16, 16), 1.2)
    row, column = (np.clip(yx, 0, None) / 12).astype(int).T % 16
    rank: np.ndarray = special.ndtr(0.7 * mood[row, column] + 0.7 * rng.standard_normal(len(yx)))
    return rank


def _find_seen(place: Place, n: int) -> np.ndarray:
    """Which cells (N,) show the middle of their nucleus in the image."""
    seen = np.zeros(n, bool)
    seen[place.cell[(place.cover > 0.5) & (place.rho < 0.4) & (place.hole < 0.5)]] = True
    return seen


def _measure_covered(place: Place, dab: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles (N, 2) of what is seen of each nucleus, in pixels, and the mean amount there (N,); 0 of those unseen."""
    y, x = np.nonzero(place.cover > 0.5)
    cell = place.cell[y, x]
    total = [np.bincount(cell, values, n) for values in (y + 0.5, x + 0.5, dab[y, x])]
    mean = np.stack(total) / np.maximum(np.bincount(cell, minlength=n), 1)
    return mean[:2].T, mean[2]


def lay_grid(size: int) -> np.ndarray:
    """Coordinates of the pixels' centres (H, W, 2), in micrometres."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(MPP)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)


def _neighbouring(rng: np.random.Generator, size: int) -> np.ndarray:
    """Where the next section's pixels lie in the tissue: moved, turned and smoothly warped by a few um."""
    yx = lay_grid(size)
    y, x = yx[..., 0], yx[..., 1]
    turn, middle = np.float32(rng.normal(0.0, 0.012)), np.float32(size * MPP / 2)
    turned = np.stack([turn * (x - middle), -turn * (y - middle)], -1)
    warped = yx + turned + rng.normal(0.0, 3.0, 2).astype(np.float32)
    for _ in range(3):
        wave = rng.normal(0.0, 2 * np.pi / 150, 2).astype(np.float32)
        push = rng.normal(0.0, 1.2, 2).astype(np.float32)
        phase = np.float32(rng.uniform(0, 2 * np.pi))
        warped += push * np.sin(y * wave[0] + x * wave[1] + phase)[..., None]
    return warped
