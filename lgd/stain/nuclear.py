"""The domain-knowledge target of a nuclear marker (Ki67, ER, PR): which share of the nuclei is brown, and how brown.

It is measured once, on the IHC alone, and cached: the H&E's nuclei are another section's. Nuclei are blue, or, where
they are strongly positive, brown without any blue. A positive nucleus is a brown blob that ends on most sides:
evenly brown cytoplasm, its rim and haze are none, and neither is what lies in thin lines, or round a blue nucleus on
most sides, as membranes do. It is a teaching signal, not a diagnosis: no threshold here is validated for any marker.

Every amount is optical density, base 10, along the stain's unit vector (see `lgd.stain.deconvolve`), after the
image's own background was set to white.

Shapes: B batch, H and W pixels, h and w those at which nuclei are found, g sides of the grid, N nuclei.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lgd.stain.deconvolve import H_DAB, rgb_to_od, unmix
from lgd.stain.filters import find_highest, find_quantile, mean_around, shrink
from lgd.stain.targets import (
    TARGET_SETTINGS,
    detection_step,
    estimate_white,
    find_along_rays,
    find_cells,
    find_peaks,
    find_threshold,
    measure_in_chunks,
    respond_to_blobs,
    sum_by_cell,
)

POSITIVE_SETTINGS: dict[str, float] = {
    "version": 1,  # raise it with any change of the numbers below or of what is done with them
    "haze_share": 0.15,  # as much DAB as this share of the pixels has at most is haze, and left out of what follows
    "brown_of_blue": 0.35,  # greyish counterstain reads as DAB: MIST's by 0.1 to 0.2 of its hematoxylin, up to 0.46
    "blue_contrast": 0.005,  # least blob response by blue: the palest counterstains of virtual centers need it
    "blue_over_brown": 0.6,  # least hematoxylin of a nucleus that is found by its blue, in units of its DAB
    "line_um": 1.25,  # reach of the square that removes lines and specks
    "brown_radius_um": 2.8,  # less than the blue ones': at 3.25 crowded nuclei were merged more often
    "brown_contrast": 0.03,  # least blob response; a disc of a nucleus' size has 0.33 of its density
    "brown_contrast_share": 0.05,  # in units of the core's density: none where all is evenly brown
    "brown_least": 0.15,  # mean density of a positive core
    "brown_most": 0.4,  # of a negative core: black rims and middles of dark brown nuclei read as blue too
    "ringed_sectors": 10,  # a nucleus that has brown in so many directions is that of a cell with a stained membrane
    "ringed_um": 7.0,  # brown this near to it, along each axis, is its membrane
    "end_sectors": 9,  # a brown nucleus ends in so many directions at least, the rim of a brown area in half of them
    "end_share": 0.85,  # it ends where brown falls to this share of its core's
    "membrane_contrast": 1.5,  # brown is a membrane where it is so many times as brown as its nucleus
    "membrane_from_um": 2.8,  # where rays look for membranes and ends
    "membrane_to_um": 6.0,
    "membrane_step_um": 0.46,
    "membrane_sectors": 12,
}
"""What the target depends on beside `TARGET_SETTINGS`, as plain numbers, for the feature store's recipe."""

_S = POSITIVE_SETTINGS
_UNITS = 1 << 16
"""Densities are added up as integers: sums are the same in any order."""


class FoundNuclei(NamedTuple):
    """The nuclei of IHC images, as masks that are true at their middles."""

    nuclei_Bhw: Tensor
    positive_Bhw: Tensor
    density_Bhw: Tensor
    """Mean DAB of each place and its neighbours."""
    step: int
    """Pixels of the images to one of these masks, along each axis."""


@measure_in_chunks
def positive_grid(ihc_B3HW: Tensor, grid: int, mpp: float) -> Tensor:
    """Positive nuclei in each cell of a grid, float32 (B, grid, grid, 2).

    `ihc_B3HW` is uint8 at native resolution, `mpp` its micrometres per pixel (None: 0.46). Channels:

    0. share of the detected nuclei that are positive, 0 where there is none;
    1. intensity: mean DAB of the cores of the positive nuclei, 0 where none is.

    All nuclei count, also those of lymphocytes and stroma. Raises `DataError` for an `mpp` that is not positive.
    """
    found = find_stained_nuclei(ihc_B3HW, mpp)
    batch, shape = len(ihc_B3HW), found.nuclei_Bhw.shape
    place_P3 = found.positive_Bhw.nonzero()
    unit_P = (found.density_Bhw[place_P3.unbind(1)] * _UNITS).round_().long()
    cell_P = find_cells(place_P3, shape, grid)
    nuclei_Bgg = sum_by_cell(find_cells(found.nuclei_Bhw.nonzero(), shape, grid), None, batch, grid)
    positive_Bgg = sum_by_cell(cell_P, None, batch, grid)
    density_Bgg = sum_by_cell(cell_P, unit_P, batch, grid) / _UNITS
    return torch.stack([positive_Bgg / nuclei_Bgg.clamp(min=1), density_Bgg / positive_Bgg.clamp(min=1)], dim=-1)


def find_stained_nuclei(ihc_B3HW: Tensor, mpp: float) -> FoundNuclei:
    """The nuclei of uint8 IHC images, blue or brown, and those that are positive."""
    step = detection_step(mpp)
    low_mpp = step * mpp
    stains_B3hw = unmix(rgb_to_od(shrink(ihc_B3HW, step), estimate_white(ihc_B3HW)), H_DAB)
    blue_Bhw, dab_Bhw = stains_B3hw[:, 0].contiguous(), stains_B3hw[:, 1].contiguous()
    dab_over_Bhw = dab_Bhw - find_quantile(dab_Bhw, _S["haze_share"]).clamp(min=0)
    brown_Bhw = dab_over_Bhw - _S["brown_of_blue"] * blue_Bhw.clamp(min=0)

    core_Bhw = mean_around(brown_Bhw)
    # Both responses by what they must pass, so that one nucleus has one peak.
    by_blue_Bhw = respond_to_blobs(blue_Bhw - TARGET_SETTINGS["ihc_brown_weight"] * dab_Bhw.clamp(min=0), low_mpp)
    by_blue_Bhw = by_blue_Bhw / find_threshold(by_blue_Bhw, _S["blue_contrast"])
    is_blue_Bhw = (by_blue_Bhw > 1) & (blue_Bhw > TARGET_SETTINGS["ihc_least_hematoxylin"])
    is_blue_Bhw &= (blue_Bhw > _S["blue_over_brown"] * dab_over_Bhw) & (core_Bhw < _S["brown_most"])
    by_brown_Bhw = respond_to_blobs(_remove_lines(brown_Bhw, low_mpp), low_mpp, _S["brown_radius_um"])
    is_brown_Bhw = (core_Bhw > _S["brown_least"]) & (by_brown_Bhw > _S["brown_contrast_share"] * core_Bhw)
    by_brown_Bhw = by_brown_Bhw / _S["brown_contrast"]
    response_Bhw = torch.where(is_blue_Bhw, by_blue_Bhw, 0.0).maximum(by_brown_Bhw)
    nuclei_Bhw = find_peaks(response_Bhw, low_mpp) & (response_Bhw > 1) & (is_blue_Bhw | is_brown_Bhw)

    negative_Bhw = nuclei_Bhw & ~is_brown_Bhw
    positive_Bhw = nuclei_Bhw & is_brown_Bhw & ~_find_membranes(brown_Bhw, core_Bhw, negative_Bhw, low_mpp)
    positive_Bhw &= _stand_alone(brown_Bhw, core_Bhw, positive_Bhw, low_mpp)
    return FoundNuclei(negative_Bhw | positive_Bhw, positive_Bhw, mean_around(dab_Bhw), step)


def _remove_lines(brown_Bhw: Tensor, mpp: float) -> Tensor:
    """The image without bright lines and specks (a morphological opening by a square)."""
    reach = int(_S["line_um"] / mpp)
    return find_highest(-find_highest(-brown_Bhw, reach), reach)


def _find_membranes(brown_Bhw: Tensor, core_Bhw: Tensor, negative_Bhw: Tensor, mpp: float) -> Tensor:
    """Where brown belongs to the membrane of a cell whose nucleus is blue."""
    place_N3 = negative_Bhw.nonzero()
    least_N = (_S["membrane_contrast"] * core_Bhw[place_N3.unbind(1)]).clamp(min=_S["brown_least"])
    ray_NS = find_along_rays(brown_Bhw, place_N3, 1, mpp, _S)
    ringed_N = (ray_NS > least_N[:, None]).sum(-1) >= _S["ringed_sectors"]
    ringed_Bhw = torch.zeros_like(brown_Bhw)
    ringed_Bhw[place_N3[ringed_N].unbind(1)] = 1.0
    return find_highest(ringed_Bhw, max(1, int(_S["ringed_um"] / mpp))) > 0


def _stand_alone(brown_Bhw: Tensor, core_Bhw: Tensor, positive_Bhw: Tensor, mpp: float) -> Tensor:
    """The brown nuclei that end on most sides, where something paler lies beyond: not so the rim of a brown area."""
    place_N3 = positive_Bhw.nonzero()
    paler_N = _S["end_share"] * core_Bhw[place_N3.unbind(1)]
    ends_NS = -find_along_rays(-brown_Bhw, place_N3, 1, mpp, _S) < paler_N[:, None]
    alone_Bhw = torch.zeros_like(positive_Bhw)
    alone_Bhw[place_N3.unbind(1)] = ends_NS.sum(-1) >= _S["end_sectors"]
    return alone_Bhw
