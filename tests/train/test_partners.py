"""What a teacher compares an IHC with, and a teacher that nobody trains."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from lgd import pipeline
from lgd.base.errors import DataError
from lgd.models.losses import joint_loss
from lgd.models.teacher import load_teacher
from lgd.store.store import Store
from lgd.train.partners import LEAST_AREA, cut_part


def some_batch(image_B3HW, first=0):
    count = len(image_B3HW)
    return SimpleNamespace(
        images={"ihc": image_B3HW}, epoch_B=np.zeros(count, np.int64), number_B=np.arange(first, first + count)
    )


def test_a_part_is_a_turned_square_of_the_whole():
    """Of an image whose channels are the place: places go to places by a turn or flip, a scale, a shift."""
    place = (torch.arange(64) + 0.5) / 32 - 1
    y_HW, x_HW = torch.meshgrid(place, place, indexing="ij")
    image_B3HW = torch.stack([x_HW, y_HW, torch.zeros(64, 64)]).repeat(200, 1, 1, 1)
    part_B3HW = cut_part(some_batch(image_B3HW), 7)
    inner = part_B3HW[:, :2, 2:-2, 2:-2]
    across_B2, down_B2 = ((inner[:, :, 31 + dy, 31 + dx] - inner[:, :, 30, 30]) * 32 for dy, dx in ((-1, 0), (0, -1)))
    side_B = across_B2.norm(dim=1)
    torch.testing.assert_close(side_B, down_B2.norm(dim=1), atol=1e-3, rtol=0)
    assert (across_B2 * down_B2).sum(1).abs().max() < 1e-3
    assert side_B.min() > LEAST_AREA**0.5 - 1e-3 and side_B.max() < 1 + 1e-3 and side_B.std() > 0.1
    turns = torch.cat([across_B2, down_B2], dim=1).div(side_B[:, None]).round().int()
    assert len({*map(tuple, turns.tolist())}) == 8 and part_B3HW[:, :2].abs().max() <= 1
    assert inner.mean(dim=(2, 3)).std(dim=0).min() > 0.1


def test_a_part_depends_on_the_sample_alone():
    image_B3HW = torch.rand(6, 3, 32, 32) * 255
    whole = cut_part(some_batch(image_B3HW), 1)
    assert torch.equal(whole[2:], cut_part(some_batch(image_B3HW[2:], 2), 1))
    assert not torch.equal(whole, cut_part(some_batch(image_B3HW), 2))
    torch.testing.assert_close(
        cut_part(some_batch(torch.full((4, 3, 32, 32), 9.0)), 1), torch.full((4, 3, 32, 32), 9.0)
    )


def test_the_loss_of_two_images_is_infonce_both_ways_and_its_gradient_that_of_all():
    joint_N2P = torch.randn(6, 2, 5, dtype=torch.float64).float().requires_grad_()
    unit = (joint_N2P / joint_N2P.norm(dim=2, keepdim=True)).detach().double().numpy()
    logits = unit[:, 0] @ unit[:, 1].T / 0.1
    naive = logsumexp(logits, axis=1) + logsumexp(logits, axis=0) - 2 * np.diag(logits)
    value_B = joint_loss(joint_N2P, slice(2, 4))
    np.testing.assert_allclose(value_B.detach().numpy(), naive[2:4] / 2, rtol=1e-4)
    (part,) = torch.autograd.grad(value_B.sum(), joint_N2P)
    (whole,) = torch.autograd.grad(joint_loss(joint_N2P, slice(0, 6)).sum(), joint_N2P)
    torch.testing.assert_close(part, whole)


def test_a_random_teacher_is_centred_and_cached_and_of_its_seed(tissue_config, change, tmp_path):
    weights = []
    for seed in (0, 1):
        parts = {name: {"dir": str(tmp_path / f"{name}-{seed}")} for name in ("run", "teacher", "latents", "student")}
        config = change(tissue_config, **parts | {"teacher": parts["teacher"] | {"source": "random"}})
        config = change(config, run={"seed": seed})
        pipeline.train_teacher(config)
        pipeline.cache_latents(config)
        teacher, described = load_teacher(config.teacher.dir)
        assert described.source == "random" and described.learns == () and described.steps == 0
        store = Store(config.latents.dir)
        pooled_nD = np.concatenate([part.array("pooled")[:, 0] for part in store.parts if part.split == "train"])
        assert np.abs(pooled_nD.mean(0)).max() < 0.05 * pooled_nD.std() and pooled_nD.std() > 0
        weights.append(next(teacher.encoder.parameters()))
        pipeline.train_teacher(config)
    assert not torch.equal(*weights)
    with pytest.raises(DataError, match="of other inputs"):
        pipeline.train_teacher(change(config, run={"seed": 0}))
