"""From a section of virtual tissue to its scanned image: what each stain colours, light through it, lens and sensor.

Stains are amounts in optical density (base 10) and become light by Beer-Lambert:
`I = I0 * 10 ** -(sum_s amount_s * vector_s)`. Legend: N cells, H and W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from lgd.tissue.drawing import TUMOUR, Cells, Tissue
from lgd.tissue.look import Look
from lgd.tissue.staining import Cut, Stained

Amounts = Sequence[tuple[np.ndarray, np.ndarray]]
"""Each stain's colour (3,), and its amount at each pixel (H, W)."""


class Marks(NamedTuple):
    """What tells the N cells of an H&E apart."""

    grade: np.ndarray
    nucleolus: np.ndarray
    spot: np.ndarray
    """(N, 2): where it lies in the nucleus."""
    plump: np.ndarray


def mark_nuclei(rng: np.random.Generator, cells: Cells, grade: float | np.ndarray) -> Marks:
    """Draw them; tumour cells lie around the grade, 0..1."""
    n = len(cells.yx)
    grades = np.where(cells.kind == TUMOUR, np.clip(grade + rng.normal(0.0, 0.15, n), 0, 1), 0.1).astype(np.float32)
    nucleolus = ((rng.random(n) < 0.9 * grades) * rng.uniform(0.5, 1.0, n)).astype(np.float32)
    spot = (rng.normal(0.0, 0.22, (n, 2)) * cells.nucleus).astype(np.float32)
    return Marks(grades, nucleolus, spot, np.exp(rng.normal(0.0, 0.16, n)).astype(np.float32))


def paint_he(cut: Cut, tissue: Tissue, marks: Marks) -> Amounts:
    """Hematoxylin and eosin."""
    look, place, tumour, body = tissue.look, cut.place, cut.tumour, cut.body
    chromatin = _chromatin(cut, marks)
    cleft = look.cleft * np.clip(0.5 + 0.7 * cut.wide, 0, 1.5)
    gap = tumour * np.clip((cleft + place.edge) / 1.0, 0, 1) * (1 - body) if look.cleft else 0.0 * body
    fibres = tissue.fibres(cut.yx)
    bundles = look.pink * np.clip(1 + look.fibre * fibres + 0.2 * cut.wide + 0.06 * cut.fine, 0.1, 3.0)
    ground = (1 - body) * (1 - gap)
    cytoplasm = marks.plump[place.cell] * (1 + 0.15 * cut.broad + 0.10 * cut.wide + 0.08 * cut.fine)
    hematoxylin = ground * (0.05 + 0.06 * bundles) + body * look.basophilia * cytoplasm
    eosin = ground * bundles + body * (0.20 * cytoplasm + 0.04 * np.exp(-((place.edge / 0.5) ** 2)))
    hematoxylin = hematoxylin * (1 - 0.6 * place.cover) + chromatin
    eosin = eosin * (1 - 0.45 * place.cover) + 0.12 * chromatin
    tissue_here = 1 - np.maximum(place.hole, 0)
    return [
        (look.hematoxylin, look.hematoxylin_amount * tissue_here * np.maximum(hematoxylin, 0)),
        (look.eosin, look.eosin_amount * tissue_here * np.maximum(eosin, 0)),
    ]


def _chromatin(cut: Cut, marks: Marks) -> np.ndarray:
    """Amount of hematoxylin in nuclei (H, W). A high grade has open, clumped chromatin, a crisp rim and nucleoli."""
    cells, place = cut.cells, cut.place
    g = marks.grade[place.cell]
    clumps = (0.10 + 0.10 * g) * cut.fine + (0.06 + 0.22 * g) * cut.broad
    rim = np.exp(-(((1 - place.rho) * cells.nucleus[place.cell, 0] / 0.45) ** 2))
    away = np.hypot(*np.moveaxis(place.from_nucleus - marks.spot[place.cell], -1, 0))
    dots = marks.nucleolus[place.cell] * np.exp(-((away / 0.75) ** 2))
    open_ = 1 - 0.22 * g * np.clip(1.15 - place.rho, 0, 1)
    amount = open_ * (1 + clumps) + (0.10 + 0.25 * g) * rim + 0.55 * dots
    density: np.ndarray = 0.62 * cells.density[place.cell] * place.cover * np.clip(amount, 0.2, 2.5)
    return density


def paint_ihc(cut: Cut, tissue: Tissue, stained: Stained) -> Amounts:
    """The stain of the next section, the counterstain and haze."""
    look, cells, place, body = tissue.look, cut.cells, cut.place, cut.body
    nuclei = 0.55 + 0.5 * np.exp(-(((1 - place.rho) * 3 / 0.5) ** 2)) + 0.10 * cut.fine + 0.10 * cut.broad
    nuclei *= cells.density[place.cell] * place.cover
    nuclei *= stained.blue
    fibres = np.clip(0.5 + 0.3 * tissue.fibres(cut.yx), 0, 1.5)
    counter = look.counter * (nuclei + 0.10 * body + 0.12 * fibres * (1 - body))
    here = 1 - place.hole
    haze = look.haze * (0.5 + 0.9 * body + 0.3 * fibres * (1 - body)) * np.clip(1 + 0.3 * cut.wide, 0, 2)
    return [(look.counterstain, here * np.maximum(counter, 0)), (look.dab, here * (stained.dab + haze))]


def scan(rng: np.random.Generator, look: Look, amounts: Amounts, white: np.ndarray) -> np.ndarray:
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
