"""The IHC teacher: trained once, on labels or grids of domain targets, and frozen; or a pretrained encoder as it is.

Its latents are what the student hallucinates.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal, Self, cast

import torch
from torch import nn

from lgd.base.errors import ConfigError, DataError
from lgd.base.target import Target
from lgd.config_sections import Learns
from lgd.io.location import Location
from lgd.models.description import TeacherConfig
from lgd.models.encoder import Encoder
from lgd.models.export import load_weights
from lgd.models.heads import Ordinal, make_head
from lgd.models.student import make_grid_head, predict_grid

NO_SOFT_LABELS = (
    "no label taught the teacher, so that a probe on its latents would give its {0}s, and the training split has "
    "labels of fewer than two {0}s to fit one on: set student.distil_weight and student.contrast_weight to 0, take "
    "another method than distil, or label patches"
)
"""Of the word for a label."""


ONLY_TRAINED = ("grid_heads.", "joint.")
"""What the names of weights begin with that only training needs."""
_JOINT = 128
"""Length of the vectors by which two images are compared."""


class Joint(nn.Module):
    """What compares a teacher's image with a second one while it is trained."""

    def __init__(self, dim: int, partner: Encoder | None) -> None:
        """`dim`: length of the teacher's latent; `partner` reads the second image, None stands for the teacher's own
        encoder.
        """
        super().__init__()
        self.partner, self.own = partner, self._make_projector(dim)
        self.other = self._make_projector(partner.dim) if partner else None

    def forward(self, pooled_BD: torch.Tensor, other_B3HW: torch.Tensor, encoder: Encoder) -> torch.Tensor:
        """Vectors of both images, (B, 2, P)."""
        other_BD = (self.partner or encoder)(other_B3HW).pooled_BD
        return torch.stack([self.own(pooled_BD), (self.other or self.own)(other_BD)], dim=1)

    @staticmethod
    def _make_projector(dim: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, _JOINT))


class Teacher(nn.Module):
    """IHC -> latent map, pooled latent and label; its encoder was trained here."""

    source: ClassVar[Literal["trained", "frozen", "random"]] = "trained"

    def __init__(
        self,
        encoder: Encoder,
        learns: Sequence[Learns] = ("label",),
        grids: Mapping[str, int] | None = None,
        *,
        target: Target,
        ordinal: Ordinal | None = None,
    ) -> None:
        """`learns`: what teaches it. `grids`: sides by the datasets that do, while it is trained; their heads are not
        kept. `target`: what labels are of, and `ordinal` how one is taught.
        """
        super().__init__()
        self.encoder, self.learns, self.grids = encoder, tuple(learns), dict(grids or {})
        self.dim = encoder.dim
        """Length of the pooled latent."""
        self.target, self.ordinal = target, ordinal
        self.head = make_head(self.dim, target, ordinal) if "label" in learns else None
        self.grid_heads = nn.ModuleDict({name: make_grid_head(name, encoder.channels) for name in self.grids})
        self.joint: Joint | None = None
        """While it learns which two images belong together."""
        # Subtracted from what is cached: without it the latents share one direction. On the sample of BCI every
        # query then found the same neighbours, all at a cosine of 0.98.
        self.pooled_mean = nn.Buffer(torch.zeros(self.dim))
        self.map_mean = nn.Buffer(torch.zeros(encoder.channels))

    def forward(self, ihc_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) in 0..255 -> `map` (B, C, h, w), `pooled` (B, D), of a teacher that was taught labels `logits`
        (B, K), and while it learns them `nuclei` (B, g, g) as log(1 + density) and `membrane` (B, k, k, 3)
        or `positive` (B, k, k, 2); of (B, 6, H, W), an IHC and the image that it is compared with, `joint` (B, 2, P).

        Map and pooled latent are relative to their means over the training split (`centre`).
        """
        ihc_B3HW, other_BcHW = ihc_BCHW[:, :3], ihc_BCHW[:, 3:]
        map_BCHW, pooled_BD = self.encoder(ihc_B3HW)
        # No normalisation between the mean and the head: with a LayerNorm there, training from random weights left
        # its first plateau later (virtual H&E, one seed: 0.34 against 0.48 of the training patches after 10 epochs).
        out = {"map": map_BCHW - self.map_mean[:, None, None], "pooled": pooled_BD - self.pooled_mean}
        if self.head is not None:
            out["logits"] = self.head(pooled_BD)
        if self.joint is not None and other_BcHW.shape[1]:
            out["joint"] = self.joint(pooled_BD, other_BcHW, self.encoder)
        heads = self.grid_heads.items()
        return out | {name: predict_grid(cast(nn.Conv2d, head), map_BCHW, self.grids[name]) for name, head in heads}

    def logits_of(self, pooled_nD: torch.Tensor) -> torch.Tensor:
        """The logits (n, K) of pooled latents, which are relative to their mean as `forward` gives them.

        Raises `ConfigError` for a teacher that was taught none.
        """
        if self.head is None:
            raise ConfigError(NO_SOFT_LABELS.format(self.target.label_word))
        logits_nK: torch.Tensor = self.head(pooled_nD + self.pooled_mean)
        return logits_nK

    def centre(self, pooled_D: torch.Tensor, map_C: torch.Tensor) -> None:
        """Move the origin of the latents to these means of what `forward` gives."""
        self.pooled_mean.add_(pooled_D)
        self.map_mean.add_(map_C)

    def describe(self, **facts: object) -> TeacherConfig:
        """What builds it again, beside its weights, with the facts of its training."""
        spec = self.encoder.spec
        own = {
            "source": self.source,
            "learns": self.learns,
            "encoder": spec,
            "pool": spec.pool,
            "licence": spec.licence,
            "ordinal": self.ordinal,
        }
        return TeacherConfig.from_json(facts | own)


class Probe(nn.Module):
    """Pooled latent -> label by a linear map, which stands for the head that a teacher was not taught.

    It is fitted on stored latents (`lgd.store.probe`): no network is needed for it.
    """

    def __init__(self, weight_KD: torch.Tensor, bias_K: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight_KD), nn.Buffer(bias_K)

    def logits_of(self, pooled_nD: torch.Tensor) -> torch.Tensor:
        """The logits (n, K) of stored latents; of a number values (n, 1)."""
        return nn.functional.linear(pooled_nD.float(), self.weight, self.bias)


class FrozenTeacher(Teacher):
    """IHC -> latent map and pooled latent, of a pretrained encoder as it is. Nothing of it ever changes."""

    source: ClassVar[Literal["frozen", "random"]] = "frozen"

    def __init__(
        self,
        encoder: Encoder,
        learns: Sequence[Learns] = (),
        grids: Mapping[str, int] | None = None,
        *,
        target: Target,
        ordinal: Ordinal | None = None,
    ) -> None:
        """It learns nothing."""
        super().__init__(encoder, learns=(), target=target)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """It stays in evaluation mode."""
        return super().train(False)


class RandomTeacher(FrozenTeacher):
    """A control: as a preset begins, and nobody trains it."""

    source = "random"


TEACHERS: dict[str, type[Teacher]] = {kind.source: kind for kind in (Teacher, FrozenTeacher, RandomTeacher)}
"""The kinds of teachers, by `source` in config.json."""


def load_teacher(folder: str | Location, code: Collection[str] = ()) -> tuple[Teacher, TeacherConfig]:
    """The frozen teacher of a folder, in evaluation mode, and its `config.json`.

    Raises `DataError` for what cannot be read, and for code that it names and `code`, what the user named, lacks.
    """
    config = TeacherConfig.read_folder(folder)
    kind = TEACHERS.get(config.source)
    if kind is None:
        raise DataError(f"{folder}: field source is {config.source}, which this version of lgd cannot load")

    def build() -> Teacher:
        return kind(Encoder(config.encoder), config.learns, target=config.training.target, ordinal=config.ordinal)

    teacher = load_weights(folder, build, config, code)
    return teacher.requires_grad_(False).eval(), config
