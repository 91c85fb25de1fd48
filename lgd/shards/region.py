"""A square of two slides that show one tissue: read as a pair of patches, and measured whether the two fit.

Where the slides have one frame, the square lies on the same pixels of both. Else an affine map says where it lies on
the IHC, which is then resampled once.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lgd.slides.affine import Affine
from lgd.slides.alignment import COARSEST, WINDOW_UM, measure_alignment
from lgd.slides.slide import Slide
from lgd.slides.source import SAME

_MARGIN = 4
"""Pixels around what is resampled."""
_LONG = 1 << 20
"""Pixels of which the side is exact enough to give that of one."""


@dataclass(frozen=True, slots=True)
class Region:
    """A square of an H&E slide, and of the IHC slide that an affine map leads to."""

    x: int
    """Upper left corner on the H&E, in level-0 pixels."""
    y: int
    pixels: int
    """Side of the patches."""
    mpp: float
    """Micrometres per pixel that they shall have."""
    scales: tuple[float, float]
    """Micrometres per level-0 pixel of the H&E and of the IHC."""
    affine: Affine | None
    """From level-0 pixels of the H&E to those of the IHC; None where they are the same."""

    def read(self, he: Slide, ihc: Slide) -> tuple[np.ndarray, np.ndarray]:
        """Both patches, uint8 (pixels, pixels, 3)."""
        return self._read(he, ihc, self.x, self.y, self.pixels, self.mpp)

    def measure(self, he: Slide, ihc: Slide, images: tuple[np.ndarray, np.ndarray]) -> float | None:
        """The alignment z of the `images`, or of a window around them where they are too small or coarse for it.

        None too for slides that are too coarse.
        """
        if max(self.scales) > COARSEST * SAME:
            return None
        mpp = min(self.mpp, COARSEST)
        pixels = max(math.ceil(self.pixels * self.mpp / mpp), math.ceil(WINDOW_UM / mpp))
        side, own_side = he.find_side(pixels, mpp), he.find_side(self.pixels, self.mpp)
        if pixels != self.pixels:
            x, y = (at - (side - own_side) // 2 for at in (self.x, self.y))
            images = self._read(he, ihc, x, y, pixels, mpp)
        return measure_alignment(*images, side / pixels * he.mpp)

    def find_square(self, side: int) -> tuple[float, float, float]:
        """Upper left corner and side of the upright square on the IHC around what lies on a square of the H&E."""
        if self.affine is None:
            return self.x, self.y, side
        ((x, y),) = self.affine.apply(np.array([[self.x + side / 2, self.y + side / 2]]))
        mapped = side * self.affine.scale
        return round(float(x - mapped / 2), 2), round(float(y - mapped / 2), 2), round(mapped, 2)

    def _read(self, he: Slide, ihc: Slide, x: int, y: int, pixels: int, mpp: float) -> tuple[np.ndarray, np.ndarray]:
        image, side = he.read(x, y, pixels, pixels, mpp), he.find_side(pixels, mpp)
        # Levels of two files may differ, and one within 2 % is taken as it is.
        if self.affine is None and ihc.find_side(pixels, mpp) == side:
            return image, ihc.read(x, y, pixels, pixels, mpp)
        return image, _read_mapped(ihc, self.affine or Affine(1, 0, 0, 0, 1, 0), x, y, side, pixels)


def _read_mapped(slide: Slide, affine: Affine, x: int, y: int, side: int, pixels: int) -> np.ndarray:
    """What lies on the slide where an affine map leads from a square, uint8 (pixels, pixels, 3)."""
    near, far = (x, y), (x + side, y + side)
    corner_42 = affine.apply(np.array([near, (near[0], far[1]), (far[0], near[1]), far]))
    mpp = side / pixels * affine.scale * slide.mpp
    # Of the pixels that are read, for a level within 2 % is taken as it is.
    step = slide.find_side(_LONG, mpp) / _LONG
    left, top = (math.floor(at - _MARGIN * step) for at in corner_42.min(axis=0))
    width, height = (math.ceil(at / step) + 2 * _MARGIN + 1 for at in np.ptp(corner_42, axis=0))
    box = slide.read(left, top, width, height, mpp)
    by = side / pixels
    # Pillow counts from the edges of pixels, as affine maps of slides do.
    across = (affine.a * by / step, affine.b * by / step, (affine.a * x + affine.b * y + affine.c - left) / step)
    down = (affine.d * by / step, affine.e * by / step, (affine.d * x + affine.e * y + affine.f - top) / step)
    turned = Image.fromarray(box).transform(
        (pixels, pixels), Image.Transform.AFFINE, (*across, *down), Image.Resampling.BICUBIC
    )
    return np.asarray(turned)
