"""The rival of `efficiency`: virtual staining by the generator that most of it uses, followed by a classifier.

The generator is the 9-block ResNet of Johnson et al. 2016 as pix2pix and CycleGAN have it (`resnet_9blocks`).
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lgd.models.teacher import Teacher

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Residual(nn.Module):
    """Two convolutions beside a skip connection, at one width and size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        out_BCHW: torch.Tensor = map_BCHW + self.body(map_BCHW)
        return out_BCHW


def generator(width: int = 64, blocks: int = 9) -> nn.Sequential:
    """(B, 3, H, W) in -1..1 -> the same, H and W multiples of 4; by default `resnet_9blocks`, 11.378 M parameters."""
    layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), *_normed(width)]
    for wide in (2 * width, 4 * width):
        layers += [nn.Conv2d(wide // 2, wide, 3, stride=2, padding=1), *_normed(wide)]
    layers += [Residual(4 * width) for _ in range(blocks)]
    for wide in (2 * width, width):
        up = nn.ConvTranspose2d(2 * wide, wide, 3, stride=2, padding=1, output_padding=1)
        layers += [up, *_normed(wide)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


def _normed(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(width), nn.ReLU(inplace=True)


class VirtualStaining:
    """A generator and the teacher that scores what it paints."""

    def __init__(self, teacher: Teacher, size: int, device: str) -> None:
        # The types of `Module.to` do not know memory formats.
        self.generator: Any = generator().eval().to(device)
        self.teacher, self.size, self.device = teacher.eval().to(device), size, device
        self.memory_format = torch.contiguous_format

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Hold the generator's weights and activations in another order."""
        self.memory_format = memory_format
        self.generator.to(memory_format=memory_format)

    def paint(self, he_HW3: np.ndarray) -> torch.Tensor:
        """uint8 (H, W, 3) H&E -> its IHC as the teacher reads it, (1, 3, H, W) in 0..255."""
        with torch.inference_mode():
            he_13HW = torch.from_numpy(he_HW3)[None].permute(0, 3, 1, 2).to(self.device)
            normal_13HW = he_13HW.float().contiguous(memory_format=self.memory_format) / 127.5 - 1
            ihc_13HW: torch.Tensor = (self.generator(normal_13HW) + 1) * 127.5
            return ihc_13HW

    def classify(self, ihc_13HW: torch.Tensor) -> np.ndarray:
        """The four probabilities of a painted IHC, (1, 4)."""
        with torch.inference_mode():
            small_13SS = F.interpolate(ihc_13HW, (self.size, self.size), mode="area")
            logits = self.teacher(small_13SS)["logits"]
            return torch.softmax(logits.float(), dim=1).cpu().numpy()
