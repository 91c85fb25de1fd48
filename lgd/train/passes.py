"""Passes without gradients over a split: validation, and the centre of the teacher's latents."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lgd.config import Config
from lgd.metrics import score
from lgd.shards.archive import Shard
from lgd.stream.plan import World
from lgd.stream.reader import Reader
from lgd.train.batch import Batch, evaluation_batches
from lgd.train.engine import Engine
from lgd.train.tasks import Task


def forward_split(
    engine: Engine, role: str, shards: list[Shard], config: Config, world: World, skip: bool = False
) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
    """One pass without gradients over this rank's share of the shards: each batch, and what the network gives.

    `skip`: samples that cannot be read are in the batch as invalid ones, instead of raising `DataError`.
    """
    reader = Reader(shards, (role,), config.data.size)
    batch = max(1, config.train.batch // world.size)
    rounds = math.ceil(math.ceil(reader.total / world.size) / batch)
    engine.model.eval()
    with torch.no_grad():
        for one in evaluation_batches(reader, batch=batch, world=world, threads=config.data.threads, skip=skip):
            yield one, engine.forward(one.to(world.device).images[role])
            rounds -= 1
        # Under ZeRO-3 a forward pass is a collective: a rank with fewer batches joins in with an empty one.
        for _ in range(rounds):
            engine.forward(torch.zeros(1, 3, config.data.size, config.data.size, device=world.device))
    engine.model.train()
    reader.close()


def validate(
    engine: Engine, task: Task, shards: list[Shard], config: Config, world: World
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Logits (n, 4) and levels (n,) of all labelled samples of the shards, on every rank, and their scores."""
    mine = [
        (out["logits"].float().cpu().numpy(), one.level_B.numpy())
        for one, out in forward_split(engine, task.role, shards, config, world)
    ]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, mine)
    pairs = [pair for rank in gathered for pair in rank]
    logits = np.concatenate([np.zeros((0, 4), np.float32), *(a for a, _ in pairs)])
    levels = np.concatenate([np.zeros(0, np.int64), *(b for _, b in pairs)])
    logits, levels = logits[levels >= 0], levels[levels >= 0]
    return logits, levels, score(levels, softmax(logits)) if len(levels) else {}


def centre_latents(engine: Engine, shards: list[Shard], config: Config, world: World) -> None:
    """Put the origin of the teacher's latents at their mean over the training split, skipping what training skipped."""
    dim = engine.model.dim
    sums = torch.zeros(2 * dim + 1, dtype=torch.float64, device=world.device)
    for batch, out in forward_split(engine, "ihc", shards, config, world, skip=config.data.on_bad.skips > 0):
        ones = out["pooled"].new_ones(len(batch), 1)
        rows = torch.cat([out["pooled"], out["map"].mean(dim=(2, 3)), ones], dim=1)
        sums += rows[batch.valid_B.to(rows.device)].double().sum(dim=0)
    if world.size > 1:
        dist.all_reduce(sums)
    mean = (sums[:-1] / sums[-1]).float()
    engine.model.centre(mean[:dim], mean[dim:])


def softmax(logits_nK: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of logits, float64."""
    scaled = torch.from_numpy(np.asarray(logits_nK, np.float64)) / temperature
    return torch.softmax(scaled, dim=1).numpy()
