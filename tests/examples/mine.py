"""A method, an encoder and a layout as a user writes them, in a file outside the package.

PYTHONPATH=tests/examples lgd build-shards --layout python:mine:Flat ...
PYTHONPATH=tests/examples lgd train --student.method python:mine:Focal --student.encoder python:mine:tiny ...
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from lgd.models.losses import Lesson, Terms
from lgd.models.methods import LgdNet
from lgd.models.student import HallucinatingStudent, Outputs
from lgd.shards.candidate import Candidate, Layout, Problem


class Deeper(HallucinatingStudent):
    """LGD-Net's network with one layer more before its latents."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes)
        for adaptor, dim in zip(self.adaptors, self.dims, strict=True):
            adaptor.to_latent.append(nn.Linear(dim, dim))


class Focal(LgdNet):
    """LGD-Net with a focal loss of the level (Lin et al. 2017)."""

    title = "focal LGD-Net"
    network = Deeper
    controls: ClassVar = {}

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        terms = super().losses(out, batch)
        return terms | {"level": (1 - torch.exp(-terms["level"])) ** 2 * terms["level"]}


class Tiny(nn.Module):
    """Three convolutions."""

    channels = 24

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, self.channels, 3, stride=2, padding=1),
        )

    def forward(self, rgb_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in 0..255 -> (B, 24, h, w)."""
        return self.layers(rgb_B3HW / 127.5 - 1)


def tiny() -> Tiny:
    """The encoder, as LGD asks for it."""
    return Tiny()


def not_an_encoder() -> str:
    """What LGD must refuse."""
    return "resnet10"


class Flat(Layout):
    """`SLIDE-NUMBER-he.png` and `SLIDE-NUMBER-ihc.png` in one folder, without labels."""

    def scan(self, root: Path) -> Iterator[Candidate | Problem]:
        for he in sorted(root.glob("*-he.png")):
            stem = he.stem.removesuffix("-he")
            ihc = he.with_name(f"{stem}-ihc.png")
            if ihc.exists():
                yield Candidate(stem, he, ihc, None, slide=stem.partition("-")[0], split="train")
            else:
                yield Problem(he.name, f"has no partner {ihc.name}: add it, or remove this one")
