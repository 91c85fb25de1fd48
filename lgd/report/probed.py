"""What a report reads from a store: pooled latents, and the labels that a probe reads off them.

No network of a teacher is asked: its latents were computed when the store was filled, here or elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lgd.labels.predictions import Predictions
from lgd.models.heads import read_answers
from lgd.report.caveats import PROBE_ROW
from lgd.scoring.predict import TEACHER_ROW
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_all, read_labels
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
        return replace(like.without_labels(), name=TEACHER_ROW, output=np.full_like(like.output, np.nan))
    held_out, network, temperature = shards.of_split("val"), probe.network(), 1.0

    def read_logits(some: Sequence[Shard]) -> torch.Tensor:
        return network.logits_of(torch.from_numpy(pooled_latents(store, some))).double()

    if held_out and not like.target.is_number:
        label_n = read_labels(store.parts_of(held_out))
        # A class that it does not know would draw the temperature to its bound.
        if len(known_n := np.flatnonzero(np.isin(label_n, probe.classes))):
            temperature = fit_temperature(label_n[known_n].astype(np.int64), read_logits(held_out).numpy()[known_n])
    output_nK = read_answers(read_logits(split), like.target, probe.values, temperature).numpy()
    return replace(like, name=PROBE_ROW, conformal=None, output=output_nK)
