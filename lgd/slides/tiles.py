"""The squares of a slide that hold tissue: where a network looks, and what is cut into patches."""

from dataclasses import dataclass

import numpy as np

from lgd.base.errors import DataError
from lgd.slides.slide import Slide
from lgd.slides.tissue_mask import Tissue


@dataclass(frozen=True)
class Tiles:
    """Squares side by side, from the top left of the scanned part on, row by row."""

    xy_n2: np.ndarray
    """int64, the top left in level-0 pixels."""
    side: int
    """Level-0 pixels."""
    tissue_n: np.ndarray
    """float32, the share of each that is tissue."""

    def __len__(self) -> int:
        return len(self.xy_n2)


def lay_tiles(slide: Slide, tissue: Tissue, pixels: int, mpp: float, least: float = 0.5) -> Tiles:
    """The tiles of so many pixels at a scale of which at least a share is tissue; none overlaps another.

    Raises `DataError` for an empty slide, and where no tile holds enough tissue.
    """
    if tissue.is_empty:
        raise DataError(f"{slide.path}: {tissue.notes[0]}")
    side, (left, top, width, height) = slide.find_side(pixels, mpp), slide.bounds
    rows = []
    for y in range(top, top + height, side):
        x_n = np.arange(left, left + width, side, dtype=np.int64)
        xy_n2 = np.stack([x_n, np.full_like(x_n, y)], axis=1)
        share_n = tissue.find_shares(xy_n2, side)
        rows.append((xy_n2[share_n >= least], share_n[share_n >= least]))
    xy_n2, share_n = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    if not len(xy_n2):
        raise DataError(
            f"{slide.path}: no square of {side * slide.mpp:.0f} um holds {least:.0%} tissue, of which it has "
            f"{tissue.area_mm2:.2g} mm2"
        )
    return Tiles(xy_n2, side, share_n)
