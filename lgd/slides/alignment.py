"""How well two images show the same field: z, in standard deviations above displaced places.

Of both images the optical density of all channels, over the image's own white, is limited to a band of details. r_0 is
the correlation of the two as they lie, and r_k that at 24 displacements: 8 directions, by 15, 30 and 44 um. Then
z = (r_0 - mean r_k) / std r_k, of which the larger one of two bands counts: 0.5 to 2 um, where BCI's neighbouring
sections agree, and 3 to 9 um, where sections agree that share glands but no cells. It needs no threshold of its own for
a stain, a scanner or a blur, which change all r_k alike, and tissue that lies against glass does not raise it.
`tools/studies/alignment_score.py` measures it.
"""

import itertools
import math

import numpy as np

WINDOW_UM = 177.0
"""Least side of a window."""
COARSEST = 0.5
"""Most um a pixel: at coarser ones, sections that are 16 um apart look as well aligned."""
_BANDS = ((0.5, 2.0), (3.0, 9.0))  # um: sigmas between which details lie
_DISTANCES = (15.0, 30.0, 44.0)  # um
_DIRECTIONS = 8


def measure_alignment(he_HW3: np.ndarray, ihc_HW3: np.ndarray, mpp: float) -> float | None:
    """Z of two images of one size and scale, uint8 (H, W, 3); about 0.5 where they do not fit.

    None where they have nothing to compare, such as plain glass. Sides are at least `WINDOW_UM` and `mpp` at most
    `COARSEST`, else it says little.
    """
    he_HW, ihc_HW = _measure_density(he_HW3), _measure_density(ihc_HW3)
    found = [_compare(he_HW, ihc_HW, mpp, *band) for band in _BANDS]
    return max((z for z in found if z is not None), default=None)


def _measure_density(image_HW3: np.ndarray) -> np.ndarray:
    """Optical density of all channels together, over that of the brightest hundredth, float32 (H, W)."""
    density_HW = np.zeros(image_HW3.shape[:2], np.float32)
    for channel in range(3):
        white = np.quantile(image_HW3[::4, ::4, channel], 0.99)
        of_byte = -np.log10(np.maximum(np.arange(256), 1) / max(white, 1)).astype(np.float32)
        density_HW += np.maximum(of_byte, 0)[image_HW3[..., channel]]
    return density_HW


def _compare(he_HW: np.ndarray, ihc_HW: np.ndarray, mpp: float, fine: float, coarse: float) -> float | None:
    """Z of one band of details."""
    # Half of the finest detail is a pixel still.
    by = max(1, int(fine / mpp / 2))
    he_HW, ihc_HW = (_take_details(_shrink(image, by), mpp * by, fine, coarse) for image in (he_HW, ihc_HW))
    at_rest = _correlate(he_HW, ihc_HW)
    displaced = np.array([_correlate(*_displace(he_HW, ihc_HW, *one)) for one in _list_displacements(mpp * by)])
    spread = displaced.std()
    # Of plain glass no correlation is defined.
    return float((at_rest - displaced.mean()) / spread) if np.isfinite(at_rest) and spread > 0 else None


def _shrink(image_HW: np.ndarray, by: int) -> np.ndarray:
    """Means of squares of so many pixels."""
    height, width = (side // by for side in image_HW.shape)
    shrunk: np.ndarray = image_HW[: height * by, : width * by].reshape(height, by, width, by).mean(axis=(1, 3))
    return shrunk


def _take_details(density_HW: np.ndarray, mpp: float, fine: float, coarse: float) -> np.ndarray:
    """A band of details, of which few strong ones do not outweigh all others."""
    from scipy.ndimage import gaussian_filter

    smooth_HW, smoother_HW = (gaussian_filter(density_HW, sigma / mpp, truncate=3.0) for sigma in (fine, coarse))
    details_HW = smooth_HW - smoother_HW
    limited_HW: np.ndarray = np.tanh(details_HW / max(float(details_HW.std()), 1e-6))
    return limited_HW


def _list_displacements(mpp: float) -> list[tuple[int, int]]:
    """Rows and columns of each displacement, in pixels."""
    angles = [2 * math.pi * number / _DIRECTIONS for number in range(_DIRECTIONS)]
    return [
        (round(distance / mpp * math.sin(angle)), round(distance / mpp * math.cos(angle)))
        for distance, angle in itertools.product(_DISTANCES, angles)
    ]


def _displace(one_HW: np.ndarray, other_HW: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """What two images share when the other one is moved by so many rows and columns."""
    (one_rows, other_rows), (one_columns, other_columns) = _overlap(rows), _overlap(columns)
    return one_HW[one_rows, one_columns], other_HW[other_rows, other_columns]


def _overlap(by: int) -> tuple[slice, slice]:
    moved, kept = slice(max(by, 0), min(by, 0) or None), slice(max(-by, 0), min(-by, 0) or None)
    return moved, kept


def _correlate(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of them is constant."""
    one, other = one_HW - one_HW.mean(), other_HW - other_HW.mean()
    norm = math.sqrt(float(np.vdot(one, one)) * float(np.vdot(other, other)))
    return float(np.vdot(one, other)) / norm if norm > 0 else math.nan
