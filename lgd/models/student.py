"""LGD-Net: a morphology stream and a hallucination stream read the H&E; a gate fuses them into the HER2 level.

The full text of the paper's method is not public to us: this is an independent design of what its abstract says.
The hallucination stream has its own encoder, started from the teacher's weights (Hoffman et al. 2016), or shares
the trunk of the morphology stream.

The baselines: `he-only` is the morphology stream and its head alone; `two-stream` is the fused network, both encoders
from the same start, that is taught the level only; `distil` is that network, taught the teacher's soft levels too.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lgd.config import LEVEL_NAMES
from lgd.models.description import StudentConfig
from lgd.models.encoder import Encoder
from lgd.models.export import load_weights, read_student_config


class Student(nn.Module):
    """H&E -> level; LGD-Net also gives the hallucinated IHC latents and both domain grids."""

    def __init__(
        self,
        *,
        method: str,
        morphology: Encoder,
        hallucination: Encoder | None,
        latent_dim: int,
        latent_map: int,
        nuclei_grid: int,
        membrane_grid: int,
    ) -> None:
        """`hallucination` None shares the trunk (but `he-only` has none); `latent_map` 0 leaves out the map."""
        super().__init__()
        self.method = method
        self.sizes = {
            "latent_dim": latent_dim,
            "latent_map": latent_map,
            "nuclei_grid": nuclei_grid,
            "membrane_grid": membrane_grid,
        }
        self.morphology = morphology
        width = morphology.channels
        self.head = nn.Linear(width, len(LEVEL_NAMES))
        if method == "he-only":
            return
        self.hallucination = hallucination
        source = width if hallucination is None else hallucination.channels
        self.to_latent_map = nn.Conv2d(source, latent_dim, 1)
        self.to_latent = nn.Sequential(nn.Linear(latent_dim, latent_dim), nn.GELU(), nn.Linear(latent_dim, latent_dim))
        self.from_latent = nn.Linear(latent_dim, width)
        self.gate = nn.Linear(2 * width, width)
        if method != "lgd":
            return
        self.nuclei_head = nn.Conv2d(width, 1, 1)
        self.membrane_head = nn.Conv2d(latent_dim, 3, 1)

    def forward(self, he_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) in 0..255 -> `logits` (B, 4), `features` (B, width), which are the pooled morphology, of two
        streams also `gate` (B, width) (1 trusts the morphology), and, for LGD-Net:

        `pooled` (B, D), `map` (B, D, m, m) when maps are cached, `nuclei` (B, g, g) as log(1 + density), `membrane`
        (B, k, k, 3).
        """
        map_BCHW = self.morphology(he_B3HW)
        morphology_BC = map_BCHW.mean(dim=(2, 3))
        if self.method == "he-only":
            return {"logits": self.head(morphology_BC), "features": morphology_BC}
        source_BCHW = map_BCHW if self.hallucination is None else self.hallucination(he_B3HW)
        latent_BDHW = self.to_latent_map(source_BCHW)
        pooled_BD = self.to_latent(latent_BDHW.mean(dim=(2, 3)))
        molecular_BC = self.from_latent(pooled_BD)
        gate_BC = torch.sigmoid(self.gate(torch.cat([morphology_BC, molecular_BC], dim=1)))
        logits = self.head(gate_BC * morphology_BC + (1 - gate_BC) * molecular_BC)
        out = {"logits": logits, "features": morphology_BC, "gate": gate_BC}
        if self.method != "lgd":
            return out
        out["pooled"] = pooled_BD
        if self.sizes["latent_map"]:
            out["map"] = F.adaptive_avg_pool2d(latent_BDHW, self.sizes["latent_map"])
        nuclei_BCGG = _resize(map_BCHW, self.sizes["nuclei_grid"])
        out["nuclei"] = F.softplus(self.nuclei_head(nuclei_BCGG)).squeeze(1)
        membrane_B3MM = self.membrane_head(_resize(latent_BDHW, self.sizes["membrane_grid"]))
        out["membrane"] = F.softplus(membrane_B3MM).permute(0, 2, 3, 1)
        return out

    def describe(self, **facts: Any) -> StudentConfig:
        """What `load_student` needs beside the weights, with the facts of its training."""
        own = None if self.method == "he-only" else self.hallucination
        facts |= {"morphology": self.morphology.spec, "hallucination": None if own is None else own.spec}
        return StudentConfig(method=self.method, **self.sizes, **facts)  # type: ignore[arg-type]


def _resize(map_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Average down, or interpolate up, to (side, side)."""
    if map_BCHW.shape[-1] >= side:
        return F.adaptive_avg_pool2d(map_BCHW, side)
    return F.interpolate(map_BCHW, size=(side, side), mode="bilinear", align_corners=False)


def student_from(config: StudentConfig) -> Student:
    """An untrained student of the shape that `Student.describe` gave."""
    spec = config.hallucination
    return Student(
        method=config.method,
        morphology=Encoder(config.morphology),
        hallucination=None if spec is None else Encoder(spec),
        **{name: getattr(config, name) for name in ("latent_dim", "latent_map", "nuclei_grid", "membrane_grid")},
    )


def load_student(folder: str | Path) -> tuple[Student, StudentConfig]:
    """The student of a folder in evaluation mode, and its `config.json`."""
    config = read_student_config(folder)
    return load_weights(folder, lambda: student_from(config), config).eval(), config
