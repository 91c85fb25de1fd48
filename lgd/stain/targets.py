"""Domain-knowledge targets: where the nuclei are, and how the membranes are stained.

They are measured once, at native resolution, and cached: `nuclei_grid` on the H&E's own hematoxylin (the
IHC is another section), `membrane_grid` on the IHC's DAB. Both are coarse grids, so that they stand the few
micrometres by which neighbouring sections are misregistered. They are teaching signals, not a diagnosis: no
threshold here is validated for HER2.

Every stain amount and threshold is optical density, base 10, along the stain's unit vector (see
`lgd.stain.deconvolve`), after the image's own background was set to white.

Shapes: B batch, H and W pixels, g and m sides of the grids, N detected nuclei, S sectors, R steps of a ray.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lgd.base.errors import DataError
from lgd.stain.deconvolve import H_DAB, H_E, byte_stains, rgb_to_od, unmix, unmix_bytes
from lgd.stain.filters import blur, find_highest, find_quantile, mean_around, shrink

TARGET_SETTINGS: dict[str, float] = {
    "version": 1,  # raise it with any change of the numbers below or of what is done with them
    "default_mpp": 0.46,  # um per pixel of BCI, where an image does not say
    "white_share": 0.99,  # the background is as bright as this share of the pixels at most
    "white_cast": 0.9,  # least channel of the background, in units of its brightest one
    "white_least": 140.0,  # BCI's grey backgrounds lie at 165 to 180
    "detection_mpp": 0.92,  # nuclei are found at this resolution
    "nucleus_radius_um": 3.25,
    "nucleus_distance_um": 2.5,  # no other detection this near, along each axis
    "nucleus_contrast_share": 0.35,  # of the 99th percentile of the blob response
    "nucleus_contrast_he": 0.04,  # least blob response in the H&E
    "nucleus_contrast_ihc": 0.008,  # counterstains are faint: BCI's nuclei reach about 0.03
    "ihc_brown_weight": 0.2,  # nuclei in the IHC are blue and less brown than their cell
    "ihc_least_hematoxylin": 0.03,  # gaps between brown cells are not brown either, but hold none
    "dab_stained": 0.15,  # between the haze of BCI's 1+ cytoplasm, below 0.1, and its 2+ membranes, above 0.2
    "membrane_contrast": 1.3,  # a membrane is so many times as brown as its cell's centre
    "membrane_from_um": 3.0,  # rays look for it from here
    "membrane_to_um": 9.0,
    "membrane_step_um": 0.5,
    "membrane_sectors": 12,
}
"""Everything the targets depend on, as plain numbers; part of the feature store's recipe."""

_S = TARGET_SETTINGS

# Native pixels that go through at once: a batch of 1024 px patches would need gigabytes of intermediate floats. A GPU
# has them, and waits for the next kernel where there is little to do.
_CHUNK_PIXELS = {"cpu": 4 << 20, "cuda": 32 << 20}
# Nuclei whose membranes are looked for at once.
_NUCLEI = {"cpu": 128, "cuda": 1 << 20}


def measure_in_chunks(measure: Callable[[Tensor, int, float], Tensor]) -> Callable[[Tensor, int, float | None], Tensor]:
    """What `measure` gives for so many images at a time as fit the memory."""

    @functools.wraps(measure)
    @torch.no_grad()
    def measure_all(rgb_B3HW: Tensor, grid: int, mpp: float | None) -> Tensor:
        mpp = _S["default_mpp"] if mpp is None else mpp
        if not 0 < mpp < math.inf:
            raise DataError(f"mpp is {mpp}: give the image's micrometres per pixel, or null where it is unknown")
        # Decoders give channels last; whole planes made everything after them nearly twice as fast.
        chunks = torch.split(
            rgb_B3HW.contiguous(), max(1, _CHUNK_PIXELS[rgb_B3HW.device.type] // rgb_B3HW[0, 0].numel())
        )
        return torch.cat([measure(part, grid, mpp) for part in chunks])

    return measure_all


@measure_in_chunks
def nuclei_grid(he_B3HW: Tensor, grid: int, mpp: float) -> Tensor:
    """Nuclei per 1000 um2 in each cell of a grid, float32 (B, grid, grid).

    `he_B3HW` is uint8 at native resolution, `mpp` its micrometres per pixel (None: 0.46). A nucleus is a
    local maximum of a difference of Gaussians of the hematoxylin, at the scale of a nucleus. Crowded or
    pale nuclei are undercounted. Raises `DataError` for an `mpp` that is not positive.
    """
    step = detection_step(mpp)
    od_B3hw = rgb_to_od(shrink(he_B3HW, step), estimate_white(he_B3HW))
    nuclei_Bhw = detect_nuclei(unmix(od_B3hw, H_E)[:, 0], mpp * step, _S["nucleus_contrast_he"])
    count_Bgg = sum_by_cell(find_cells(nuclei_Bhw.nonzero(), nuclei_Bhw.shape, grid), None, len(he_B3HW), grid)
    height, width = he_B3HW.shape[-2:]
    return count_Bgg / (height * width * mpp**2 / grid**2 / 1000)


@measure_in_chunks
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
    stains_BHW, step = unmix_bytes(ihc_B3HW, byte_stains(estimate_white(ihc_B3HW), H_DAB)), detection_step(mpp)
    dab_BHW = stains_BHW.imag.contiguous()
    stained_BHW = torch.gt(dab_BHW, _S["dab_stained"], out=torch.empty_like(dab_BHW))
    fraction_Bmm = F.adaptive_avg_pool2d(stained_BHW, grid)
    # The fraction is at least one pixel of the cell, or the sum above it is 0 too.
    focal_Bmm = F.adaptive_avg_pool2d(stained_BHW.mul_(dab_BHW), grid) / fraction_Bmm.clamp(min=1e-12)

    small_Bhw = shrink(stains_BHW, step)
    small_blue_Bhw, small_dab_Bhw = small_Bhw.real.contiguous(), small_Bhw.imag.clamp(min=0)
    blue_Bhw = small_blue_Bhw - _S["ihc_brown_weight"] * small_dab_Bhw
    nuclei_Bhw = detect_nuclei(blue_Bhw, mpp * step, _S["nucleus_contrast_ihc"])
    nuclei_Bhw &= small_blue_Bhw > _S["ihc_least_hematoxylin"]
    place_N3 = nuclei_Bhw.nonzero()
    least_N = _S["membrane_contrast"] * mean_around(small_dab_Bhw)[place_N3.unbind(1)]
    ray_NS = find_along_rays(dab_BHW, place_N3, step, mpp)
    outlined_N = (ray_NS > least_N.clamp(min=_S["dab_stained"])[:, None]).sum(-1)
    cell_N = find_cells(place_N3, nuclei_Bhw.shape, grid)
    sectors_Bmm = sum_by_cell(cell_N, outlined_N, len(ihc_B3HW), grid)
    cells_Bmm = sum_by_cell(cell_N, None, len(ihc_B3HW), grid)
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
    if rgb_B3HW.is_cuda:
        offset = 256 * torch.arange(batch * 3, dtype=torch.int32, device=rgb_B3HW.device)
        values = rgb_B3HW.reshape(batch * 3, pixels) + offset[:, None]
        counts = torch.bincount(values.flatten(), minlength=batch * 3 * 256).view(batch, 3, 256)
    else:
        # 1.8 ms for 1024 px, where `bincount` takes 7 and `kthvalue` 12 to 24.
        counts = torch.tensor([[Image.fromarray(p).histogram() for p in image] for image in rgb_B3HW.numpy()])
    white_B3 = (counts.cumsum(-1) < _S["white_share"] * pixels).sum(-1).float()
    white_B3 = white_B3.maximum(_S["white_cast"] * white_B3.amax(1, keepdim=True))
    return white_B3.clamp(min=_S["white_least"])[:, :, None, None]


def detect_nuclei(stain_BHW: Tensor, mpp: float, least: float) -> Tensor:
    """Centres of nuclei as a bool mask (B, H, W).

    A blob of radius r answers most to Gaussians near sigma = r / sqrt 2 (Lindeberg, IJCV 30:79, 1998). A
    centre is the largest response within the least distance, and above both `least` (OD) and a share of the
    image's strong responses, which adapts to how darkly a slide is stained.
    """
    response = respond_to_blobs(stain_BHW, mpp)
    threshold_B11 = find_threshold(response, least)
    return find_peaks(response, mpp) & (response > threshold_B11)


def respond_to_blobs(stain_BHW: Tensor, mpp: float, radius_um: float = _S["nucleus_radius_um"]) -> Tensor:
    """How much each place looks like the middle of a nucleus that is darker than what is around it."""
    sigma = radius_um / math.sqrt(2) / mpp
    # The pair 0.9 and 1.44 sigma approximates the Laplacian of a Gaussian between them.
    return blur(stain_BHW, 0.9 * sigma) - blur(stain_BHW, 1.44 * sigma)


def find_threshold(response: Tensor, least: float) -> Tensor:
    """The response that nuclei of each image pass, float32 (B, 1, 1)."""
    strong_B11 = find_quantile(response, 0.99)
    return (_S["nucleus_contrast_share"] * strong_B11).clamp(min=least)


def find_peaks(response: Tensor, mpp: float) -> Tensor:
    """Where a response is the largest within the least distance of nuclei, as a bool mask (B, H, W)."""
    return response == find_highest(response, max(1, int(_S["nucleus_distance_um"] / mpp)))


def find_along_rays(
    stain_BHW: Tensor, place_N3: Tensor, step: int, mpp: float, settings: Mapping[str, float] = _S
) -> Tensor:
    """The largest value in each direction around each nucleus, by its image, y and x in a mask `step` times as coarse.

    Float32 (N, sectors): `settings` say how many directions, and from where to where a ray goes.
    """
    first, last, gap = (settings[f"membrane_{name}_um"] for name in ("from", "to", "step"))
    radius_R1 = torch.arange(first, last + 1e-6, gap)[:, None] / mpp
    angle_S = (torch.arange(sectors := int(settings["membrane_sectors"])) + 0.5) * (2 * math.pi / sectors)
    sides = stain_BHW.shape[1:]
    steps = [(radius_R1 * along_S).flatten().to(stain_BHW.device) for along_S in (angle_S.sin(), angle_S.cos())]
    rays, stain = [], stain_BHW.flatten()
    # A few nuclei at a time: what lies around them is in the processor's cache.
    for some_n3 in torch.split(place_N3, _NUCLEI[stain_BHW.device.type]):
        row_nP, column_nP = (
            (((centre_n + 0.5) * step - 0.5)[:, None] + step_P).round_().clamp_(0, side - 1).long()
            for centre_n, step_P, side in zip(some_n3.unbind(1)[1:], steps, sides, strict=True)
        )
        place_nP = row_nP.mul_(sides[1]).add_(column_nP).add_(some_n3[:, :1] * sides.numel())
        rays.append(stain.take(place_nP).view(-1, len(radius_R1), sectors).amax(1))
    return torch.cat(rays)


def find_cells(place_N3: Tensor, shape: torch.Size, grid: int) -> Tensor:
    """The cell of a grid, counted over all images, of each place (image, y, x) in masks of a shape (B, H, W)."""
    _, height, width = shape
    image_N, y_N, x_N = place_N3.unbind(1)
    # Pixel centres, in integers: (y + 1/2) * grid / height, rounded down.
    row_N = (2 * y_N + 1) * grid // (2 * height)
    column_N = (2 * x_N + 1) * grid // (2 * width)
    return (image_N * grid + row_N) * grid + column_N


def sum_by_cell(cell_N: Tensor, value_N: Tensor | None, batch: int, grid: int) -> Tensor:
    """The sum of integers in each cell, or by None their number, float32 (B, grid, grid)."""
    return torch.bincount(cell_N, value_N, batch * grid**2).view(batch, grid, grid).float()


def detection_step(mpp: float) -> int:
    """Native pixels to one pixel of the resolution at which nuclei are found."""
    return max(1, round(_S["detection_mpp"] / mpp))
