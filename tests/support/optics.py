"""The way back from stains to light."""

import torch
from torch import Tensor


def od_to_rgb(od_B3HW: Tensor, white: float | Tensor = 255.0) -> Tensor:
    """RGB as float, white * 10^-od: the inverse of `rgb_to_od`, neither clipped nor rounded."""
    return torch.pow(10.0, -od_B3HW) * white


def mix(concentration_B3HW: Tensor, stains_33: Tensor) -> Tensor:
    """Optical density of stain concentrations, (B, 3, H, W): the inverse of `unmix`."""
    return torch.einsum("bchw,cs->bshw", concentration_B3HW, stains_33.to(concentration_B3HW))
