"""Losses as pure functions of tensors: one value a sample, so that a caller may mask and divide by the global count.

None assumes that H&E and IHC are aligned to the pixel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lgd.models.student import GRIDS

Terms = dict[str, torch.Tensor]
"""Loss term -> value of each sample (B,). `level`, that of the label, counts labelled samples only, all others count
every sample."""


class Negatives(NamedTuple):
    """The latents that a contrastive loss compares those of a batch with."""

    source_B: torch.Tensor
    """int64: number of the sample whose latents are taught."""
    label_B: torch.Tensor
    """Its label, as in `Lesson`."""
    pooled_QD: torch.Tensor
    """float32: the teacher's latents in the queue."""
    number_Q: torch.Tensor
    """int64: the numbers of their samples."""
    label_Q: torch.Tensor
    """Their labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What losses are computed from, beside what the network gives; a batch of training is one."""

    label_B: torch.Tensor
    """int64 number of the class, -1 for unknown; or float32 value, in standard deviations from the mean of those that
    training has, NaN for unknown."""
    stored: dict[str, torch.Tensor]
    """`pooled` (B, D), `map` (B, D, m, m), `nuclei` (B, g, g), and `membrane` (B, k, k, 3) or `positive` (B, k, k, 2),
    float32: what the method needs of them."""
    negatives: Negatives | None = None
    """None without a queue."""
    alignment_B: torch.Tensor | None = None
    """float32: how well the two images of each pair show the same field (`Origin.alignment`), NaN for unknown; None
    where all are unknown."""


def find_known(label_B: torch.Tensor) -> torch.Tensor:
    """Which labels are known, bool (B,)."""
    return ~torch.isnan(label_B) if label_B.is_floating_point() else label_B >= 0


def label_loss(logits_BK: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the class, or Huber distance of the value, (B,); 0 where the label is unknown."""
    if not label_B.is_floating_point():
        return F.cross_entropy(logits_BK.float(), label_B, ignore_index=-1, reduction="none")
    known_B = find_known(label_B)
    # Not the distance to NaN, whose gradient would be NaN too.
    distance_B = F.smooth_l1_loss(logits_BK[:, 0].float(), label_B.nan_to_num(), reduction="none")
    return distance_B * known_B


def hallucination_loss(student_BD: torch.Tensor, teacher_BD: torch.Tensor, kind: str) -> torch.Tensor:
    """Distance of hallucinated and cached latents, (B,), over the channel dimension 1.

    Both are scaled to unit length along the channels first. `cosine` is 1 - cos. `smooth-l1` is the Huber
    distance of the vectors scaled by sqrt(D), so that a channel is about 1 whatever D is; the mean is taken over
    channels and, for maps (B, D, h, w), over places.
    """
    student, teacher = F.normalize(student_BD.float(), dim=1), F.normalize(teacher_BD.float(), dim=1)
    if kind == "cosine":
        return (1 - (student * teacher).sum(dim=1)).reshape(len(student), -1).mean(dim=1)
    scale = student.shape[1] ** 0.5
    return F.smooth_l1_loss(scale * student, scale * teacher, reduction="none").flatten(1).mean(dim=1)


def contrast_loss(
    student_BD: torch.Tensor,
    teacher_BD: torch.Tensor,
    queue_QD: torch.Tensor,
    allowed_BQ: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """InfoNCE of hallucinated latents, (B,): each is to resemble its own teacher latent more than those of the queue.

    -log(exp(s/T) / (exp(s/T) + sum of exp(n/T))), with s the cosine to its own latent and n those to the latents of
    the queue that `allowed_BQ` (bool) marks (van den Oord et al. 2018; the queue: He et al. 2020). 0 where none is.
    """
    student, teacher, queue = (F.normalize(x.float(), dim=1) for x in (student_BD, teacher_BD, queue_QD))
    own_B1 = (student * teacher).sum(dim=1, keepdim=True)
    others_BQ = (student @ queue.T).masked_fill(~allowed_BQ, -torch.inf)
    logits_BN = torch.cat([own_B1, others_BQ], dim=1) / temperature
    return -F.log_softmax(logits_BN, dim=1)[:, 0]


def distillation_loss(logits_BK: torch.Tensor, teacher_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher's softened classes || the student's), (B,), both from logits divided by T (Hinton et al. 2015).

    Of a number, which has one output, the Huber distance of both values.
    """
    if logits_BK.shape[1] == 1:
        return F.smooth_l1_loss(logits_BK.float(), teacher_BK.float(), reduction="none")[:, 0]
    student = F.log_softmax(logits_BK.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_BK.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def grid_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Huber distance of two grids (B, ...), mean over each sample's cells, (B,)."""
    return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def weigh_alignment(alignment_B: torch.Tensor, full: float) -> torch.Tensor:
    """Weights of pairs, (B,): z / `full`, at least 0 and at most 1; 1 where the alignment z is unknown.

    z is that of `Origin.alignment`, which two images of different fields have around 0.
    """
    return (alignment_B / full).clamp(0, 1).nan_to_num(nan=1.0)


def grid_losses(out: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> Terms:
    """`grid_loss` of what a network gives of `nuclei`, as log(1 + density), and of `membrane` or `positive`."""
    targets = {name: stored[name] for name in GRIDS.values() if name in out and name in stored}
    return {
        name: grid_loss(out[name], torch.log1p(target) if name == "nuclei" else target)
        for name, target in targets.items()
    }
