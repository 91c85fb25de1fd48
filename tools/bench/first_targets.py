"""The domain targets as the first edition computed them, kept as what `targets` is measured against.

The settings are shared: they are part of every store's recipe. What the functions do is said in `lgd.stain.targets`.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lgd.stain.deconvolve import H_DAB, H_E
from lgd.stain.targets import TARGET_SETTINGS

_S = TARGET_SETTINGS

# Native pixels that go through at once: a batch of 1024 px patches would need gigabytes of
# intermediate floats.
_CHUNK_PIXELS = 4 * 1024 * 1024


def _in_chunks(measure: Callable[[Tensor, int, float], Tensor]) -> Callable[[Tensor, int, float | None], Tensor]:
    """What `measure` gives for so many images at a time as fit the memory."""

    @functools.wraps(measure)
    @torch.no_grad()
    def measure_all(rgb_B3HW: Tensor, grid: int, mpp: float | None) -> Tensor:
        mpp = _S["default_mpp"] if mpp is None else mpp
        # Decoders give channels last; whole planes made everything after them nearly twice as fast.
        chunks = torch.split(rgb_B3HW.contiguous(), max(1, _CHUNK_PIXELS // rgb_B3HW[0, 0].numel()))
        return torch.cat([measure(part, grid, mpp) for part in chunks])

    return measure_all


def rgb_to_od(rgb_B3HW: Tensor, white: float | Tensor = 255.0) -> Tensor:
    """Optical density -log10(max(rgb, 1) / white) as float32."""
    scaled = rgb_B3HW.to(torch.float32).clamp(min=1.0) / white
    return scaled.log10_().neg_()


def unmix(od_B3HW: Tensor, stains_33: Tensor) -> Tensor:
    """Concentration of each stain, (B, 3, H, W)."""
    return torch.einsum("bchw,cs->bshw", od_B3HW, torch.linalg.inv(stains_33).to(od_B3HW))


@_in_chunks
def nuclei_grid(he_B3HW: Tensor, grid: int, mpp: float) -> Tensor:
    """Nuclei per 1000 um2 in each cell of a grid, float32 (B, grid, grid).

    `he_B3HW` is uint8 at native resolution, `mpp` its micrometres per pixel (None: 0.46). A nucleus is a
    local maximum of a difference of Gaussians of the hematoxylin, at the scale of a nucleus. Crowded or
    pale nuclei are undercounted. Raises `DataError` for an `mpp` that is not positive.
    """
    step = _detection_step(mpp)
    od_B3hw = rgb_to_od(_shrink(he_B3HW.float(), step), estimate_white(he_B3HW))
    nuclei_Bhw = detect_nuclei(unmix(od_B3hw, H_E)[:, 0], mpp * step, _S["nucleus_contrast_he"])
    count_Bgg = _sum_by_cell(nuclei_Bhw, torch.ones_like(nuclei_Bhw[nuclei_Bhw], dtype=torch.int64), grid)
    height, width = he_B3HW.shape[-2:]
    return count_Bgg / (height * width * mpp**2 / grid**2 / 1000)


@_in_chunks
def membrane_grid(ihc_B3HW: Tensor, grid: int, mpp: float) -> Tensor:
    """Membrane staining in each cell of a grid, float32 (B, grid, grid, 3).

    `ihc_B3HW` is uint8 at native resolution, `mpp` its micrometres per pixel (None: 0.46). Channels:

    0. focal OD: mean DAB of the stained pixels (DAB above 0.15), 0 where none is;
    1. stained fraction: share of the pixels that are stained;
    2. completeness: mean share of a cell's outline that is stained, over all detected nuclei, 0 where there
       are none. Rays leave each nucleus in 12 directions; one counts as stained where, at 3 to 9 um, DAB
       passes the threshold and 1.3 times that of the nucleus, so that evenly brown tissue has no outlines.

    Raises `DataError` for an `mpp` that is not positive.
    """
    stains_B3HW = unmix(rgb_to_od(ihc_B3HW, estimate_white(ihc_B3HW)), H_DAB)
    dab_BHW = stains_B3HW[:, 1]
    stained_BHW = (dab_BHW > _S["dab_stained"]).float()
    fraction_Bmm = F.adaptive_avg_pool2d(stained_BHW, grid)
    # The fraction is at least one pixel of the cell, or the sum above it is 0 too.
    focal_Bmm = F.adaptive_avg_pool2d(dab_BHW * stained_BHW, grid) / fraction_Bmm.clamp(min=1e-12)

    step = _detection_step(mpp)
    small_B2hw = _shrink(stains_B3HW[:, :2], step)
    small_dab_Bhw = small_B2hw[:, 1].clamp(min=0)
    blue_Bhw = small_B2hw[:, 0] - _S["ihc_brown_weight"] * small_dab_Bhw
    nuclei_Bhw = detect_nuclei(blue_Bhw, mpp * step, _S["nucleus_contrast_ihc"])
    nuclei_Bhw &= small_B2hw[:, 0] > _S["ihc_least_hematoxylin"]
    outlined_N = _stained_sectors(dab_BHW, small_dab_Bhw, nuclei_Bhw, step, mpp)
    sectors_Bmm = _sum_by_cell(nuclei_Bhw, outlined_N, grid)
    cells_Bmm = _sum_by_cell(nuclei_Bhw, torch.ones_like(outlined_N), grid)
    complete_Bmm = sectors_Bmm / (cells_Bmm * _S["membrane_sectors"]).clamp(min=1)
    return torch.stack([focal_Bmm, fraction_Bmm, complete_Bmm], dim=-1)


def estimate_white(rgb_B3HW: Tensor) -> Tensor:
    """The unstained background of each uint8 image, white or grey, float32 (B, 3, 1, 1).

    The 99th percentile of each channel. A patch without any background must not lose all its stain: no
    channel may fall below 0.9 of the brightest one, since backgrounds are nearly neutral while DAB and eosin
    are not. It still loses some: a patch filled with DAB of 0.4 reads as 0.25.
    """
    assert rgb_B3HW.dtype == torch.uint8, f"images are uint8, not {rgb_B3HW.dtype}"
    batch, pixels = len(rgb_B3HW), rgb_B3HW[0, 0].numel()
    # One histogram a channel: 6 ms for 1024 px, where `kthvalue` takes 12 to 24.
    offset = 256 * torch.arange(batch * 3, dtype=torch.int32, device=rgb_B3HW.device)
    values = rgb_B3HW.reshape(batch * 3, pixels) + offset[:, None]
    counts = torch.bincount(values.flatten(), minlength=batch * 3 * 256).view(batch, 3, 256)
    white_B3 = (counts.cumsum(-1) < _S["white_share"] * pixels).sum(-1).float()
    white_B3 = white_B3.maximum(_S["white_cast"] * white_B3.amax(1, keepdim=True))
    return white_B3.clamp(min=_S["white_least"])[:, :, None, None]


def detect_nuclei(stain_BHW: Tensor, mpp: float, least: float) -> Tensor:
    """Centres of nuclei as a bool mask (B, H, W).

    A blob of radius r answers most to Gaussians near sigma = r / sqrt 2 (Lindeberg, IJCV 30:79, 1998). A
    centre is the largest response within the least distance, and above both `least` (OD) and a share of the
    image's strong responses, which adapts to how darkly a slide is stained.
    """
    sigma = _S["nucleus_radius_um"] / math.sqrt(2) / mpp
    # The pair 0.9 and 1.44 sigma approximates the Laplacian of a Gaussian between them.
    response = _blur(stain_BHW, 0.9 * sigma) - _blur(stain_BHW, 1.44 * sigma)
    flat = response.flatten(1)
    strong_B = flat.kthvalue(max(1, math.ceil(0.99 * flat.shape[1])), dim=1).values
    threshold_B = (_S["nucleus_contrast_share"] * strong_B).clamp(min=least)
    reach = max(1, int(_S["nucleus_distance_um"] / mpp))
    highest = F.max_pool2d(response, 2 * reach + 1, stride=1, padding=reach)
    return (response == highest) & (response > threshold_B[:, None, None])


def _stained_sectors(dab_BHW: Tensor, low_dab_Bhw: Tensor, nuclei_Bhw: Tensor, step: int, mpp: float) -> Tensor:
    """How many directions around each nucleus meet a stained membrane: int64 (N,), in the mask's order."""
    image_N, y_N, x_N = nuclei_Bhw.nonzero(as_tuple=True)
    around_Bhw = F.avg_pool2d(low_dab_Bhw, 3, stride=1, padding=1, count_include_pad=False)
    radius_R = torch.arange(_S["membrane_from_um"], _S["membrane_to_um"] + 1e-6, _S["membrane_step_um"])
    radius_R = radius_R.to(dab_BHW.device) / mpp
    sectors = int(_S["membrane_sectors"])
    angle_S = (torch.arange(sectors, device=dab_BHW.device) + 0.5) * (2 * math.pi / sectors)

    def along(centre_N: Tensor, direction_S: Tensor, size: int) -> Tensor:
        start_N = (centre_N + 0.5) * step - 0.5
        at_NSR = start_N[:, None, None] + direction_S[:, None] * radius_R
        return at_NSR.round().long().clamp(0, size - 1)

    y_NSR = along(y_N, angle_S.sin(), dab_BHW.shape[1])
    x_NSR = along(x_N, angle_S.cos(), dab_BHW.shape[2])
    ray_NS = dab_BHW[image_N[:, None, None], y_NSR, x_NSR].amax(-1)
    least_N = (_S["membrane_contrast"] * around_Bhw[image_N, y_N, x_N]).clamp(min=_S["dab_stained"])
    return (ray_NS > least_N[:, None]).sum(-1)


def _sum_by_cell(mask_BHW: Tensor, value_N: Tensor, grid: int) -> Tensor:
    """Sum the integer value of each set pixel into its cell of the grid, float32 (B, grid, grid)."""
    batch, height, width = mask_BHW.shape
    image_N, y_N, x_N = mask_BHW.nonzero(as_tuple=True)
    # Pixel centres, in integers: (y + 1/2) * grid / height, rounded down.
    row_N = (2 * y_N + 1) * grid // (2 * height)
    column_N = (2 * x_N + 1) * grid // (2 * width)
    total = torch.zeros(batch * grid * grid, dtype=torch.int64, device=mask_BHW.device)
    total.index_add_(0, (image_N * grid + row_N) * grid + column_N, value_N)
    return total.view(batch, grid, grid).float()


def _detection_step(mpp: float) -> int:
    """Native pixels to one pixel of the resolution at which nuclei are found."""
    return max(1, round(_S["detection_mpp"] / mpp))


def _shrink(x_BCHW: Tensor, step: int) -> Tensor:
    """Mean of step x step pixels; a last, narrower block keeps every pixel."""
    return F.avg_pool2d(x_BCHW, step, ceil_mode=True, count_include_pad=False)


def _blur(x_BHW: Tensor, sigma: float) -> Tensor:
    """Gaussian of `sigma` pixels, cut at 3 sigma; edges repeat."""
    reach = max(1, int(3 * sigma + 0.5))
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32, device=x_BHW.device)
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(x_BHW[:, None], (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]
