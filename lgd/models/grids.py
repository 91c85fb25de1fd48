"""Heads that learn the grids of the domain targets: a student's, and those of a teacher that learns without labels.

Shapes: B samples, C channels of a feature map, s side of a grid.
"""

import torch
from torch import nn
from torch.nn import functional as F

GRIDS = {"nuclei": "nuclei", "membranes": "membrane"}
"""What `teacher.learns` names, and the dataset of the store that teaches it."""
CHANNELS = {"nuclei": 1, "membrane": 3}
"""Numbers in each place of a grid: density of nuclei; DAB density, stained share and completeness of membranes."""


def make_grid_head(name: str, channels: int) -> nn.Conv2d:
    """The untrained head of a dataset, on a map of so many channels."""
    return nn.Conv2d(channels, CHANNELS[name], 1)


def predict_grid(head: nn.Conv2d, map_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """What a head makes of a map that is resized to (side, side): (B, s, s), or of several channels (B, s, s, c)."""
    grid_BcSS = F.softplus(head(_resize(map_BCHW, side)))
    return grid_BcSS.squeeze(1) if head.out_channels == 1 else grid_BcSS.permute(0, 2, 3, 1)


def _resize(map_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Average down, or interpolate up, to (side, side)."""
    if map_BCHW.shape[-1] >= side:
        return F.adaptive_avg_pool2d(map_BCHW, side)
    return F.interpolate(map_BCHW, size=(side, side), mode="bilinear", align_corners=False)
