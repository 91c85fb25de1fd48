"""The image that an IHC is compared with while a teacher learns `parts` or `pairs`.

Shapes: B samples, H and W pixels.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lgd.config import Config
from lgd.models.losses import joint_loss
from lgd.stream.plan import draw, drawn_views, to_device
from lgd.train.batch import Batch

LEAST_AREA = 0.25
"""Of a part, as a share of the whole."""


def add_partner(batch: Batch, config: Config) -> Batch:
    """The batch with each IHC and, behind it, its H&E or a part of it: (B, 6, H, W) float32."""
    ihc_B3HW = batch.images["ihc"].float()
    other_B3HW = batch.images["he"].float() if "pairs" in config.teacher.learns else cut_part(batch, config.run.seed)
    return replace(batch, images={"ihc": torch.cat([ihc_B3HW, other_B3HW], dim=1)})


def cut_part(batch: Batch, seed: int) -> torch.Tensor:
    """A square part of each IHC at the size of the whole, turned by another element of D4.

    It depends on seed, epoch and sample alone.
    """
    image_B3HW = batch.images["ihc"].float()
    area_B, x_B, y_B = torch.from_numpy(draw(seed, batch.epoch_B, batch.number_B, "part", 3)).unbind(dim=1)
    side_B = (LEAST_AREA + (1 - LEAST_AREA) * area_B).sqrt()
    view_B = torch.from_numpy(drawn_views(seed + 1, batch.epoch_B, batch.number_B))
    # From places of the part, -1 to 1, to places of the whole.
    angle_B, sign_B = view_B % 4 * torch.pi / 2, 1 - 2 * (view_B // 4)
    cos_B, sin_B = side_B * angle_B.cos(), side_B * angle_B.sin()
    free_B = 1 - side_B
    row_B3 = torch.stack([cos_B * sign_B, -sin_B, free_B * (2 * x_B - 1)], dim=1)
    other_B3 = torch.stack([sin_B * sign_B, cos_B, free_B * (2 * y_B - 1)], dim=1)
    place_B23 = to_device(torch.stack([row_B3, other_B3], dim=1).float(), image_B3HW.device)
    grid_BHW2 = F.affine_grid(place_B23, [*image_B3HW.shape], align_corners=False)
    return F.grid_sample(image_B3HW, grid_BHW2, padding_mode="reflection", align_corners=False)


def compare_images(joint_B2P: torch.Tensor) -> torch.Tensor:
    """`joint_loss` of this rank's samples, (B,), among those of all ranks; each has as many, and calls this."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    everyone = [torch.empty_like(joint_B2P) for _ in range(size)]
    if size > 1:
        dist.all_gather(everyone, joint_B2P.detach().contiguous())
    everyone[rank] = joint_B2P
    first = rank * len(joint_B2P)
    return joint_loss(torch.cat(everyone), slice(first, first + len(joint_B2P)))
