"""What stands in the cells of a student's grids: channels, their units, and the ranges of their colours."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from lgd.models.description import ModelConfig, StudentConfig
from lgd.models.student import GRIDS


class GridChannel(NamedTuple):
    """A number of a grid's cells."""

    name: str
    dataset: str
    """Of `lgd.models.student.GRIDS`."""
    channel: int
    """Its place in the dataset's last axis; 0 of nuclei, which have no such axis."""
    title: str
    unit: str | None
    """None for a share, of 0 to 1."""
    top: float
    """The value that has the last colour on the map of a slide, as all values above it."""

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


# Measured with 8 x 8 cells a patch, real H&E (BCI, MIST, her2st) has at most 11.7 nuclei per 1,000 um2. With 4 x 4,
# five of six real IHC (BCI, MIST) stay below an OD of 0.81, and PR reaches 1.13; its positive nuclei reach 2.03.
CHANNELS_BY_NAME = {
    channel.name: channel
    for channel in (
        GridChannel("nuclei", "nuclei", 0, "nuclei", "per 1,000 µm²", 12.0),
        GridChannel("dab", "membrane", 0, "DAB density", "OD", 1.0),
        GridChannel("stained", "membrane", 1, "stained share", None, 1.0),
        GridChannel("complete", "membrane", 2, "completeness of membranes", None, 1.0),
        GridChannel("positive", "positive", 0, "share of positive nuclei", None, 1.0),
        GridChannel("positive-dab", "positive", 1, "DAB density of positive nuclei", "OD", 2.0),
    )
}
"""In their order in pictures, and in the channels of the store."""


def read_grids(out: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """The grids in what a student of this config gives, float32: `nuclei` (B, g, g) per 1,000 um2, `membrane`
    (B, k, k, 3) or `positive` (B, k, k, 2); those that it predicts and was taught.
    """
    untaught = (config.untaught or ()) if isinstance(config, StudentConfig) else ()
    names = [name for name in GRIDS.values() if name in out and name not in untaught]
    grids = {name: out[name].float().cpu().numpy() for name in names}
    # Their logarithm was taught.
    return {name: np.expm1(grid) if name == "nuclei" else grid for name, grid in grids.items()}
