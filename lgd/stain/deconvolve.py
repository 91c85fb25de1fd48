"""RGB <-> optical density <-> stains, batched, on any device.

Light that passes a stained section is absorbed by each stain in proportion to its amount, so stains add up in
optical density (OD; base 10 here). A stain matrix has one unit-length RGB vector a row:

    od = concentration @ stains        concentration = od @ inverse(stains)

Concentrations are OD along the stain's unit vector. `skimage.color.separate_stains` gives the same numbers
divided by 6 and clipped at 0 (it divides the natural logarithm by ln 1e-6 = -6 ln 10): a threshold of 0.2
here is 0.033 there.

Shapes: B batch, 3 channels or stains, H and W pixels.
"""

import torch
from torch import Tensor

# Ruifrok and Johnston, Anal Quant Cytol Histol 23:291 (2001): absorption of red, green and blue.
HEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
DAB = (0.268, 0.570, 0.776)

_STRIP_PIXELS = 64 << 10
"""Pixels that are looked up at once: those stay in a processor's cache."""


def stain_matrix(first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    """Two stains and their residual, their cross product, as unit rows of a (3, 3) float64 matrix."""
    pair = torch.nn.functional.normalize(torch.tensor([first, second], dtype=torch.float64), dim=1)
    residual = torch.nn.functional.normalize(torch.linalg.cross(pair[0], pair[1]), dim=0)
    return torch.cat([pair, residual[None]])


H_E = stain_matrix(HEMATOXYLIN, EOSIN)
H_DAB = stain_matrix(HEMATOXYLIN, DAB)


def rgb_to_od(rgb_B3HW: Tensor, white: float | Tensor = 255.0) -> Tensor:
    """Optical density -log10(max(rgb, 1) / white) as float32.

    `rgb_B3HW` is uint8, or float in 0..255. `white` is the unstained background: one number, or a tensor that
    broadcasts, such as (B, 3, 1, 1). Brighter than white gives a negative OD: nothing is clipped.
    """
    scaled = rgb_B3HW.to(torch.float32).clamp(min=1.0) / white
    return scaled.log10_().neg_()


def byte_stains(white_B311: Tensor, stains_33: Tensor) -> Tensor:
    """What each byte of each channel adds to the first two stains over a `white`: complex64 (B, 3, 256)."""
    value_B31V = torch.arange(256, dtype=torch.float32, device=white_B311.device).expand(len(white_B311), 3, 1, 256)
    od_B3V, of_33 = rgb_to_od(value_B31V, white_B311)[:, :, 0], torch.linalg.inv(stains_33).to(white_B311)
    return torch.complex(od_B3V * of_33[:, :1], od_B3V * of_33[:, 1:2])


def unmix_bytes(rgb_B3HW: Tensor, stain_B3V: Tensor) -> Tensor:
    """The first two stains of uint8 images, by what each byte adds to them: real and imaginary part, (B, H, W).

    Bit for bit what `unmix` gives of `rgb_to_od`, in a third of the time: one look into a table finds both.
    """
    batch, _, height, width = rgb_B3HW.shape
    total_BHW = torch.empty(batch, height, width, dtype=stain_B3V.dtype, device=rgb_B3HW.device)
    rows = height if rgb_B3HW.is_cuda else max(1, _STRIP_PIXELS // width)
    for rgb_3HW, stain_3V, total_HW in zip(rgb_B3HW, stain_B3V, total_BHW, strict=True):
        for strip_3rW, total_rW in zip(rgb_3HW.split(rows, 1), total_HW.split(rows), strict=True):
            red, green, blue = (channel_rW.int().flatten() for channel_rW in strip_3rW)
            total = torch.index_select(stain_3V[0], 0, red, out=total_rW.view(-1))
            total += stain_3V[1].index_select(0, green)
            total += stain_3V[2].index_select(0, blue)
    return total_BHW


def unmix(od_B3HW: Tensor, stains_33: Tensor) -> Tensor:
    """Concentration of each stain, (B, 3, H, W), in OD along its unit vector; may be negative."""
    return torch.einsum("bchw,cs->bshw", od_B3HW, torch.linalg.inv(stains_33).to(od_B3HW))
