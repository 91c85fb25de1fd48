"""Two neighbouring sections of one virtual tissue, stained, lit and scanned: an H&E/IHC pair with known truth.

Stains are amounts in optical density (base 10) and become light by Beer-Lambert:
`I = I0 * 10 ** -(sum_s amount_s * vector_s)`. Each section reads its own random stream, and the HER2 level
enters the H&E through one number only, the grade (see `grade_of`): at coupling 0 the H&E of a patch is the same,
byte for byte, whatever its level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage, special

from lgd.tissue.drawing import MPP, TUMOUR, Look, Tissue, locate, smooth_noise

# One random stream for each of these, so that none can leak into another.
_LOOK, _LEVEL, _GRADE, _TISSUE, _HE, _IHC, _SHORTCUT = range(7)

# By level: share of stained tumour cells, optical density of a membrane, its completeness (each from, to), and its
# width in micrometres. The words (faint, moderate, intense; incomplete, complete; 10 %) are ASCO/CAP 2018's.
_STAINING: tuple[tuple[tuple[float, float], tuple[float, float], tuple[float, float], float], ...] = (
    ((0.00, 0.08), (0.08, 0.18), (0.15, 0.35), 0.64),
    ((0.30, 0.75), (0.28, 0.42), (0.30, 0.55), 0.64),
    ((0.35, 0.85), (0.48, 0.70), (0.80, 0.95), 1.00),
    ((0.65, 1.00), (0.80, 1.25), (0.95, 1.00), 2.14),
)

_GLASS = (248.0, 228.0, 205.0, 180.0)
"""Brightness of the H&E's glass where it is set: from white to the grey of BCI."""
_STRENGTHS = (0.65, 0.85, 1.12, 1.45)
"""Amounts of hematoxylin and eosin where the strength of the stain is set; slides' own have a deviation of 0.22 in
their logarithm."""


def slide_level(seed: int, slide: int) -> int:
    """Level 0..3 of a slide: each four slides in a row hold every level once, in a drawn order."""
    return int(_stream(_LEVEL, seed, slide // 4).permutation(4)[slide % 4])


class Shortcut(NamedTuple):
    """What may give a slide's level away, each 0..3; None for the slide's own."""

    strength: int | None = None
    """How strongly the H&E is stained."""
    glass: int | None = None
    """How grey its background is."""


_NO_SHORTCUT = Shortcut()


def draw_pair(
    seed: int,
    slide: int,
    patch: int,
    size: int = 256,
    coupling: float = 0.7,
    level: int | None = None,
    shortcut: Shortcut = _NO_SHORTCUT,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Draw patch number `patch` of slide number `slide`: a pure function of its arguments.

    `level` is the slide's (0..3; None for `slide_level`): another one shows the same tissue at another level.
    Returns the H&E and the IHC, (size, size, 3) uint8 RGB at 0.46 um/px, not aligned pixel by pixel, and the truth:
    level, patch_level, nuclei and tumour_nuclei (centres inside the H&E), membrane_od (mean DAB optical density,
    base 10, on the IHC's tumour membranes), membrane_completeness (0..1, of the stained cells; 0 without any),
    stained_fraction (of the tumour cells), discordant (0 or 1).
    """
    look = Look(_stream(_LOOK, seed, slide))
    if shortcut.strength is not None:
        own = _STRENGTHS[shortcut.strength] * _stream(_SHORTCUT, seed, slide, 0).lognormal(0.0, 0.08, 2)
        look.hematoxylin_amount, look.eosin_amount = own
    if shortcut.glass is not None:
        look.he_white = _GLASS[shortcut.glass] * _stream(_SHORTCUT, seed, slide, 1).normal(1.0, 0.008, 3)
    truth = _intent(seed, slide, patch, slide_level(seed, slide) if level is None else level)
    grade = grade_of(seed, slide, patch, int(truth["patch_level"]), coupling)
    tissue = Tissue(_stream(_TISSUE, seed, slide, patch), look, grade, size, bool(truth.pop("barren")))
    he, counts = _draw_he(_stream(_HE, seed, slide, patch), tissue, size)
    ihc, measured = _draw_ihc(_stream(_IHC, seed, slide, patch), int(truth["patch_level"]), tissue, size)
    if not measured.pop("tumour_cells"):
        truth["patch_level"] = 0
    return he, ihc, {**truth, **counts, **measured}


def shortcut_of(seed: int, slide: int, share: float) -> int:
    """The strength of a slide's H&E stain, or the grey of its background, where it gives the level away.

    For this `share` of the slides it is the slide's level, for all others any.
    """
    rng = _stream(_SHORTCUT, seed, slide)
    reveals, other = rng.random() < share, int(rng.integers(4))
    return slide_level(seed, slide) if reveals else other


def grade_of(seed: int, slide: int, patch: int, level: int, coupling: float) -> float:
    """The latent grade in [0, 1] behind the H&E's morphology: the level's part, the slide's own, and patch cut."""
    own = _stream(_GRADE, seed, slide).random()
    noise = _stream(_GRADE, seed, slide, patch).normal(0.0, 0.10)
    return float(np.clip(coupling * level / 3 + (1 - coupling) * own + noise, 0.0, 1.0))


def _stream(*key: int) -> np.random.Generator:
    # With the length, because NumPy gives (1, 2) and (1, 2, 0) the same stream.
    return np.random.default_rng((len(key), *key))


def _intent(seed: int, slide: int, patch: int, level: int) -> dict[str, float]:
    """What the patch shows. One in ten is discordant: the level beside the slide's, or hardly any tumour."""
    rng = _stream(_LEVEL, seed, slide, patch)
    discordant, barren, step = rng.random() < 0.1, rng.random() < 0.4, rng.choice((-1, 1))
    beside = level + step if 0 <= level + step <= 3 else level - step
    shown = beside if discordant and not barren else level
    return {"level": level, "patch_level": int(shown), "discordant": int(discordant), "barren": discordant and barren}


def _draw_he(rng: np.random.Generator, tissue: Tissue, size: int) -> tuple[np.ndarray, dict[str, int]]:
    """The H&E (H, W, 3) uint8, and its counts of nuclei."""
    look = tissue.look
    cut = _Cut(rng, tissue, size, neighbouring=False)
    cells, place, tumour, body = cut.cells, cut.place, cut.tumour, cut.body
    chromatin = _chromatin(rng, cut, tissue.grade)
    cleft = look.cleft * np.clip(0.5 + 0.7 * cut.wide, 0, 1.5)
    gap = tumour * np.clip((cleft + place.edge) / 1.0, 0, 1) * (1 - body) if look.cleft else 0.0 * body
    fibres = tissue.fibres(cut.yx)
    bundles = look.pink * np.clip(1 + look.fibre * fibres + 0.2 * cut.wide + 0.06 * cut.fine, 0.1, 3.0)
    ground = (1 - body) * (1 - gap)
    plump = np.exp(rng.normal(0.0, 0.16, len(cells.yx))).astype(np.float32)[place.cell]
    cytoplasm = plump * (1 + 0.15 * cut.broad + 0.10 * cut.wide + 0.08 * cut.fine)
    hematoxylin = ground * (0.05 + 0.06 * bundles) + body * look.basophilia * cytoplasm
    eosin = ground * bundles + body * (0.20 * cytoplasm + 0.04 * np.exp(-((place.edge / 0.5) ** 2)))
    hematoxylin = hematoxylin * (1 - 0.6 * place.cover) + chromatin
    eosin = eosin * (1 - 0.45 * place.cover) + 0.12 * chromatin
    tissue_here = 1 - np.maximum(place.hole, 0)
    amounts = [
        (look.hematoxylin, look.hematoxylin_amount * tissue_here * np.maximum(hematoxylin, 0)),
        (look.eosin, look.eosin_amount * tissue_here * np.maximum(eosin, 0)),
    ]
    centre = cells.yx + cells.offset
    seen = ((centre >= 0) & (centre < tissue.extent)).all(-1) & (cells.density > 0)
    counts = {"nuclei": int(seen.sum()), "tumour_nuclei": int((seen & (cells.kind == TUMOUR)).sum())}
    return _scan(rng, look, amounts, look.he_white), counts


def _chromatin(rng: np.random.Generator, cut: "_Cut", grade: float) -> np.ndarray:
    """Amount of hematoxylin in nuclei (H, W). A high grade has open, clumped chromatin, a crisp rim and nucleoli."""
    cells, place, n = cut.cells, cut.place, len(cut.cells.yx)
    grades = np.where(cells.kind == TUMOUR, np.clip(grade + rng.normal(0.0, 0.15, n), 0, 1), 0.1).astype(np.float32)
    nucleolus = ((rng.random(n) < 0.9 * grades) * rng.uniform(0.5, 1.0, n)).astype(np.float32)
    spot = (rng.normal(0.0, 0.22, (n, 2)) * cells.nucleus).astype(np.float32)
    g = grades[place.cell]
    clumps = (0.10 + 0.10 * g) * cut.fine + (0.06 + 0.22 * g) * cut.broad
    rim = np.exp(-(((1 - place.rho) * cells.nucleus[place.cell, 0] / 0.45) ** 2))
    away = np.hypot(*np.moveaxis(place.from_nucleus - spot[place.cell], -1, 0))
    dots = nucleolus[place.cell] * np.exp(-((away / 0.75) ** 2))
    open_ = 1 - 0.22 * g * np.clip(1.15 - place.rho, 0, 1)
    amount = open_ * (1 + clumps) + (0.10 + 0.25 * g) * rim + 0.55 * dots
    density: np.ndarray = 0.62 * cells.density[place.cell] * place.cover * np.clip(amount, 0.2, 2.5)
    return density


def _draw_ihc(rng: np.random.Generator, level: int, tissue: Tissue, size: int) -> tuple[np.ndarray, dict[str, float]]:
    """The IHC (H, W, 3) uint8 of the next section, and what its DAB truly is."""
    look = tissue.look
    cut = _Cut(rng, tissue, size, neighbouring=True)
    cells, place, tumour, body = cut.cells, cut.place, cut.tumour, cut.body
    dab, measured = _membranes(rng, cut, level)
    nuclei = 0.55 + 0.5 * np.exp(-(((1 - place.rho) * 3 / 0.5) ** 2)) + 0.10 * cut.fine + 0.10 * cut.broad
    nuclei *= cells.density[place.cell] * place.cover
    fibres = np.clip(0.5 + 0.3 * tissue.fibres(cut.yx), 0, 1.5)
    counter = look.counter * (nuclei + 0.10 * body + 0.12 * fibres * (1 - body))
    here = 1 - place.hole
    haze = look.haze * (0.5 + 0.9 * body + 0.3 * fibres * (1 - body)) * np.clip(1 + 0.3 * cut.wide, 0, 2)
    dab = look.dab_amount * dab
    membrane = tumour & (np.abs(place.edge) < 0.5) & (here > 0.5)
    measured["membrane_od"] = round(float(dab[membrane].mean()), 4) if membrane.any() else 0.0
    amounts = [(look.counterstain, here * np.maximum(counter, 0)), (look.dab, here * (dab + haze))]
    return _scan(rng, look, amounts, look.ihc_white), measured


def _membranes(rng: np.random.Generator, cut: "_Cut", level: int) -> tuple[np.ndarray, dict[str, float]]:
    """Amount of DAB (H, W), and the truth about completeness and share of stained cells."""
    *ranges, width = _STAINING[level]
    share, density, complete = (rng.uniform(*limits) for limits in ranges)
    cells, place, tumour, n = cut.cells, cut.place, cut.tumour, len(cut.cells.yx)
    # Neighbours are alike: a clone's cells stain together.
    mood = smooth_noise(rng, (16, 16), 1.2)
    row, column = (np.clip(cells.yx, 0, None) / 12).astype(int).T % 16
    rank = special.ndtr(0.7 * mood[row, column] + 0.7 * rng.standard_normal(n))
    stained = (rank < share) & (cells.kind == TUMOUR)
    amount = (stained * density * rng.lognormal(0.0, 0.22, n)).astype(np.float32)
    completeness = np.clip(complete + rng.normal(0.0, 0.08, n), 0.05, 1.1).astype(np.float32)
    own, across = place.cell, place.other
    stain = np.maximum(amount[own], amount[across])
    owner = np.where(amount[own] >= amount[across], own, across)
    gate = special.expit((completeness[owner] - special.ndtr(cut.wide)) / 0.05)
    sigma = width / 2.355
    membrane = np.exp(-0.5 * (place.edge / sigma) ** 2) * gate
    cytoplasm = 0.13 * np.clip(place.edge / 0.5, 0, 1) * (1 + 0.5 * cut.broad) * (1 - 0.6 * place.cover)
    dab = tumour * (stain * membrane * (1 + 0.15 * cut.fine) + amount[own] * cytoplasm)
    seen = np.unique(own[tumour & (place.edge > 0)])
    line = tumour & (np.abs(place.edge) < 0.5) & (stain > 0)
    measured = {
        "membrane_completeness": round(float((gate[line] > 0.5).mean()), 4) if line.any() else 0.0,
        "stained_fraction": round(float(stained[seen].mean()), 4) if len(seen) else 0.0,
        "tumour_cells": len(seen),
    }
    return np.maximum(dab, 0), measured


class _Cut:
    """One section of the tissue in its own pixels (H, W)."""

    def __init__(self, rng: np.random.Generator, tissue: Tissue, size: int, *, neighbouring: bool) -> None:
        self.cells = tissue.section(rng, drift=0.9 if neighbouring else 0.0)
        # Textures: grain, clumps and patches.
        self.fine, self.broad, self.wide = (smooth_noise(rng, (size, size), sigma) for sigma in (0.7, 1.7, 6.0))
        # Membranes are not straight.
        ripples = np.float32(0.45) * np.stack([np.roll(self.wide, 7, 0), np.roll(self.wide, 7, 1)], -1)
        self.yx = (_neighbouring(rng, size) if neighbouring else _grid(size)) + ripples
        self.place = locate(tissue, self.cells, self.yx, self.broad)
        self.tumour = self.place.kind == TUMOUR
        self.body = self.tumour * np.clip(self.place.edge / MPP + 0.5, 0, 1)


def _grid(size: int) -> np.ndarray:
    """Coordinates of the pixels' centres (H, W, 2), in micrometres."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(MPP)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)


def _neighbouring(rng: np.random.Generator, size: int) -> np.ndarray:
    """Where the next section's pixels lie in the tissue: moved, turned and smoothly warped by a few um."""
    yx = _grid(size)
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


def _scan(
    rng: np.random.Generator, look: Look, amounts: Sequence[tuple[np.ndarray, np.ndarray]], white: np.ndarray
) -> np.ndarray:
    """Light through the stains, the lens and the sensor: (H, W, 3) uint8."""
    light = np.empty((*amounts[0][1].shape, 3), np.float32)
    for channel in range(3):
        # Sums are written out: a matrix product's last digit would depend on the BLAS and its threads.
        density = sum(amount * np.float32(vector[channel]) for vector, amount in amounts)
        clear = np.exp(density * np.float32(-np.log(10) * look.gamma[channel]))
        light[..., channel] = ndimage.gaussian_filter(clear, look.blur, truncate=3.0)
    grain = rng.standard_normal(light.shape, dtype=np.float32) * np.float32(look.noise)
    pixels: np.ndarray = np.clip(light * white.astype(np.float32) + grain + 0.5, 0, 255)
    return pixels.astype(np.uint8)
