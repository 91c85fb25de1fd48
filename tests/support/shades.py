"""A network that is known by heart, for slides: the darker a tile, the higher its class or its value; and its slide."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from lgd.base.target import find_target
from lgd.models.description import StudentConfig
from lgd.scoring.predict import Scorer
from lgd.tissue.pyramid import write_pyramid
from tests.support.networks import TINY

HE = (0.55, 0.95, 0.45)
SPEC = {
    "name": "shades",
    "backbone": {"model_type": "resnet", **TINY["resnet"]},
    "batchnorm": "group",
    "mean": [0.5] * 3,
}
SPEC |= {"std": [0.5] * 3, "pool": "mean", "size": None, "mpp": None, "licence": None}


class Shades(nn.Module):
    """(B, 3, H, W) in 0..255 -> `logits` of the mean darkness, and `features`, the mean colours of its 16 parts.

    With `grids`, also the darkness of each of 4 x 4 cells, times 20, as nuclei, and the colours of 2 x 2 as membranes.
    """

    def __init__(self, width, grids=False):
        super().__init__()
        self.width, self.grids = width, grids

    def forward(self, he_B3HW):
        darkness_B1 = 1 - he_B3HW.float().mean((1, 2, 3))[:, None] / 255
        level_B1 = 6 * darkness_B1 - 1.5
        logits = level_B1 if self.width == 1 else -4 * (level_B1 - torch.arange(self.width)) ** 2
        cell_B344 = nn.functional.adaptive_avg_pool2d(he_B3HW.float(), 4)
        grids = {}
        if self.grids:
            grids["nuclei"] = torch.log1p(20 * (1 - cell_B344.mean(1) / 255))
            grids["membrane"] = nn.functional.adaptive_avg_pool2d(cell_B344, 2).permute(0, 2, 3, 1) / 255
        return {"logits": logits, "features": cell_B344.flatten(1), **grids}


def make_scorer(target="her2", mpp=0.5, size=64, shape=(128, 128), labels=40, grids=False, **fields):
    """Of patches of 128 x 128 pixels that were shrunk to 64 x 64."""
    target = target if not isinstance(target, str) else find_target(target)
    shapes = [{"width": shape[0], "height": shape[1], "mpp": mpp, "samples": 40}]
    training = {"target": target.as_json(), "marker": None, "labels": {target.counted[-1]: labels, "unknown": 0}}
    training |= {"shapes": shapes, "virtual": False, "shards": ["0" * 64]}
    if target.is_number:
        training["values"] = {"mean": 30.0, "std": 20.0, "least": 0.0, "most": 90.0}
    facts = {"weights_sha256": "0" * 64, "size": size, "training": training, "licence": None, "temperature": 1.0}
    facts |= {"validation": {}, "inputs": "0" * 64, "steps": 1, "epochs": 1.0, "skipped": 0, "engine": "torch"}
    facts |= {"workers": 1, "versions": {}, "method": "he-only", "morphology": SPEC, "hallucination": None}
    facts |= {"latents": {}, "nuclei_grid": 1, "membrane_grid": 1, "teachers": [], "kind": "student"}
    return Scorer(
        model=Shades(target.width, grids), config=StudentConfig.from_json(facts | fields), device="cpu", role="he"
    )


def draw_ramp(height=900, width=1300, edge=100):
    """Tissue that gets darker from left to right, with nuclei, on glass."""
    random = np.random.default_rng(0)
    amount = np.linspace(0.35, 1.6, width) * np.ones((height, 1))
    amount *= np.where(random.random((height // 4, width // 4)) < 0.1, 1.5, 1).repeat(4, 0).repeat(4, 1)
    amount[:edge] = amount[-edge:] = amount[:, :edge] = amount[:, -edge:] = 0
    return (240 * 10 ** -(0.5 * amount[..., None] * np.array(HE))).clip(0, 255).astype(np.uint8)


def write_ramp(path: Path, mpp=0.5, times=1, **sizes):
    """The ramp as a slide, each of its pixels `times` as large."""
    write_pyramid(path, draw_ramp(**sizes).repeat(times, 0).repeat(times, 1), mpp)
    return path
