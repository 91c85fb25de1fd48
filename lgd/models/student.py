"""The students: a morphology stream reads the H&E; a second stream may be fused with it into the label.

The full text of the paper's method is not public to us: LGD-Net's network is an independent design of what its
abstract says. Its hallucination stream has its own encoder, started from the teacher's weights (Hoffman et al. 2016),
or shares the trunk of the morphology stream. Which method trains which network is said in `lgd.models.methods`.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack, cast

import torch
from torch import nn
from torch.nn import functional as F

from lgd.base.target import Target
from lgd.config_sections import Staining
from lgd.models.description import LatentSizes, StudentConfig
from lgd.models.encoder import Encoder
from lgd.models.heads import Ordinal, make_head
from lgd.models.query_map import QueryMap

Outputs = dict[str, torch.Tensor]
"""What a network gives, by name."""
GRIDS = {"nuclei": "nuclei", "membranes": "membrane", "positive": "positive"}
"""What `teacher.learns` names, and the dataset of the store that teaches it."""
STAININGS: dict[Staining, str | None] = {"membranes": "membrane", "nuclei": "positive", "none": None}
"""What the second stain shows, and the dataset of its grid."""
CHANNELS = {"nuclei": 1, "membrane": 3, "positive": 2}
"""Numbers in each place of a grid: density of nuclei; DAB density, stained share and completeness of membranes; share
and DAB density of positive nuclei."""


class Sizes(TypedDict):
    """What a student gives, and its sizes."""

    target: Target
    ordinal: Ordinal | None
    """How an ordinal is taught; None where that is by cross-entropy."""

    latents: Mapping[str, LatentSizes]
    """By teacher, the first of which comes first in what a network gives; empty where there is one stream."""
    nuclei_grid: int
    membrane_grid: int
    staining: Staining | None
    """What the second stain shows; None for membranes."""


class Student(nn.Module):
    """H&E -> label, by the morphology stream alone.

    All students are built by the same arguments, so that one is built again from the config.json of its folder.
    """

    grids: tuple[str, ...] = ()
    """The datasets of `GRIDS` that it predicts."""

    def __init__(self, *, morphology: Encoder, hallucination: Encoder | None, **sizes: Unpack[Sizes]) -> None:
        """`hallucination` None shares the trunk, where there are two streams."""
        super().__init__()
        self.sizes = sizes
        self.morphology = morphology
        self.head = make_head(morphology.dim, sizes["target"], sizes["ordinal"])
        self.hallucination = hallucination

    def forward(self, he_B3HW: torch.Tensor) -> Outputs:
        """(B, 3, H, W) in 0..255 -> `logits` (B, K), and `features` (B, width), which are the pooled morphology."""
        morphology_BC = self.morphology(he_B3HW).pooled_BD
        return {"logits": self.head(morphology_BC), "features": morphology_BC}

    def describe(self, **facts: object) -> StudentConfig:
        """What builds it again, beside its weights, with the facts of its training."""
        own = self.hallucination
        facts |= {"morphology": self.morphology.spec, "hallucination": None if own is None else own.spec}
        terms = [one.spec.licence for one in (self.morphology, own) if one is not None and one.spec.licence]
        facts["licence"] = "; ".join(dict.fromkeys(terms)) or None
        sizes = {name: size for name, size in self.sizes.items() if name != "target"}
        return StudentConfig.from_json({**facts, **sizes})


class Adaptor(nn.Module):
    """A map of H&E features -> the latents of one teacher."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.to_latent_map = nn.Conv2d(channels, dim, 1)
        self.to_latent = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, source_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent map (B, D, h, w) and the pooled latent (B, D)."""
        # Each place is hallucinated, and their mean is the whole: a CLS token of H&E has no place.
        latent_BDHW = self.to_latent_map(source_BCHW)
        return latent_BDHW, self.to_latent(latent_BDHW.mean(dim=(2, 3)))


class TwoStreamStudent(Student):
    """H&E -> label, by two streams that a gate fuses; the second has an adaptor for the latents of each teacher."""

    def __init__(self, *, morphology: Encoder, hallucination: Encoder | None, **sizes: Unpack[Sizes]) -> None:
        super().__init__(morphology=morphology, hallucination=hallucination, **sizes)
        source, dims = (hallucination or morphology).channels, [one.dim for one in sizes["latents"].values()]
        self.adaptors = nn.ModuleList(Adaptor(source, dim) for dim in dims)
        self.from_latent = nn.Linear(sum(dims), morphology.dim)
        self.gate = nn.Linear(2 * morphology.dim, morphology.dim)

    def forward(self, he_B3HW: torch.Tensor) -> Outputs:
        """As of `Student`, and `gate` (B, width): 1 trusts the morphology."""
        map_BCHW, morphology_BC = self.morphology(he_B3HW)
        source_BCHW = map_BCHW if self.hallucination is None else self.hallucination(he_B3HW).map_BCHW
        latents = [adaptor(source_BCHW) for adaptor in self.adaptors]
        molecular_BC = self.from_latent(torch.cat([pooled_BD for _, pooled_BD in latents], dim=1))
        gate_BC = torch.sigmoid(self.gate(torch.cat([morphology_BC, molecular_BC], dim=1)))
        logits = self.head(gate_BC * morphology_BC + (1 - gate_BC) * molecular_BC)
        return {
            "logits": logits,
            "features": morphology_BC,
            "gate": gate_BC,
            **self.hallucinate(map_BCHW, latents),
        }

    def hallucinate(self, map_BCHW: torch.Tensor, latents: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Outputs:
        """What is given beside, of the morphology's map and each teacher's map and pooled latents: nothing here."""
        return {}


class HallucinatingStudent(TwoStreamStudent):
    """H&E -> label, the hallucinated IHC latents, and both domain grids."""

    def __init__(self, *, morphology: Encoder, hallucination: Encoder | None, **sizes: Unpack[Sizes]) -> None:
        super().__init__(morphology=morphology, hallucination=hallucination, **sizes)
        self.dims = [one.dim for one in sizes["latents"].values()]
        self.nuclei_head = make_grid_head("nuclei", morphology.channels)
        self.stained = STAININGS[sizes["staining"] or "membranes"]
        """The dataset of the second stain's grid; None for none."""
        self.grids = ("nuclei", self.stained) if self.stained else ("nuclei",)
        if self.stained:
            setattr(self, f"{self.stained}_head", make_grid_head(self.stained, self.dims[0]))
        self.streams = morphology.channels + 2 * sum(self.dims)
        self.query_map: QueryMap | None = None
        """To the latents of all teachers; fitted when the network is finished (`lgd.train.finished`)."""

    def hallucinate(self, map_BCHW: torch.Tensor, latents: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Outputs:
        """`pooled` (B, D), `map` (B, D, m, m) when maps are cached, `nuclei` (B, g, g) as log(1 + density), `membrane`
        (B, k, k, 3) or `positive` (B, k, k, 2), `streams` (B, S), all that was pooled, without gradient, and `query`
        (B, D), the latent that the map makes of them, once it is fitted. Of each teacher but the first `pooled`, `map`
        and `query` bear its name, such as `pooled@NAME`.
        """
        pooled = [one_BD for latent_BDHW, pooled_BD in latents for one_BD in (latent_BDHW.mean(dim=(2, 3)), pooled_BD)]
        out = {"streams": torch.cat([map_BCHW.mean(dim=(2, 3)), *pooled], dim=1).detach()}
        queries = [] if self.query_map is None else self.query_map(out["streams"]).split(self.dims, dim=1)
        for number, (name, sizes) in enumerate(self.sizes["latents"].items()):
            (latent_BDHW, pooled_BD), of = latents[number], f"@{name}" if number else ""
            out[f"pooled{of}"] = pooled_BD
            if queries:
                out[f"query{of}"] = queries[number]
            if sizes.map:
                out[f"map{of}"] = F.adaptive_avg_pool2d(latent_BDHW, sizes.map)
        out["nuclei"] = predict_grid(self.nuclei_head, map_BCHW, self.sizes["nuclei_grid"])
        if self.stained:
            head = cast(nn.Conv2d, getattr(self, f"{self.stained}_head"))
            out[self.stained] = predict_grid(head, latents[0][0], self.sizes["membrane_grid"])
        return out


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
