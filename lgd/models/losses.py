"""Losses as pure functions of tensors: one value a sample, so that a caller may mask and divide by the global count.

None assumes that H&E and IHC are aligned to the pixel.
"""

import torch
from torch.nn import functional as F


def level_loss(logits_BK: torch.Tensor, level_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the level, (B,); 0 where the level is unknown (-1)."""
    return F.cross_entropy(logits_BK.float(), level_B, ignore_index=-1, reduction="none")


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


def grid_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Huber distance of two grids (B, ...), mean over each sample's cells, (B,)."""
    return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
