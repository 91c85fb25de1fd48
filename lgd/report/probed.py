"""What a report reads from a store: pooled latents, and the levels that a probe reads off them.

No network of a teacher is asked: its latents were computed when the store was filled, here or elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lgd.metrics import Predictions
from lgd.report.caveats import PROBE_ROW
from lgd.scoring.predict import TEACHER_ROW
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_all, read_levels
from lgd.store.probe import ProbeDocument
from lgd.store.store import Store
from lgd.train.finished import fit_temperature


def pooled_latents(store: Store, shards: Sequence[Shard]) -> np.ndarray:
    """The teacher's latents of all patches of some shards, (n, D), in their order."""
    return read_all(store.parts_of(shards), "pooled")[:, 0].astype(np.float64)


def score_by_probe(
    store: Store, probe: ProbeDocument | None, shards: ShardSet, split: Sequence[Shard], like: Predictions
) -> Predictions:
    """What a probe says of the stored latents of `split`, whose patches `like` has; nothing where there is no probe.

    Its temperature is fitted on the validation split, as those of networks are.
    """
    if probe is None:
        unknown, empty = np.full_like(like.level, -1), np.full_like(like.probability, np.nan)
        return replace(like, name=TEACHER_ROW, level=unknown, probability=empty)
    held_out, network, temperature = shards.of_split("val"), probe.network(), 1.0

    def logits(some: Sequence[Shard]) -> np.ndarray:
        found: np.ndarray = network.levels_of(torch.from_numpy(pooled_latents(store, some))).double().numpy()
        return found

    if held_out:
        level_n = read_levels(store.parts_of(held_out))
        # A level that it does not know would draw the temperature to its bound.
        if len(known_n := np.flatnonzero(np.isin(level_n, probe.levels))):
            temperature = fit_temperature(level_n[known_n], logits(held_out)[known_n])
    probability_n4 = (torch.from_numpy(logits(split)) / temperature).softmax(dim=1).numpy()
    return replace(like, name=PROBE_ROW, probability=probability_n4)
