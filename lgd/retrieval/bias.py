"""The bias of an index against hubs: IHCs near which too many H&Es lie are pushed back, each by a number of its own.

An IHC y is ranked for a query q by the inverted softmax (Smith et al. 2017), exp(b cos(q, y)) / sum over q' of
exp(b cos(q', y)), where q' are what the student makes of held-out H&Es, the bank, and b is `latents.bias`. Its
logarithm by b is cos(q, y) + bias(y), so the bias is one more number of an indexed vector, which the query meets with a
1. The vectors are unit vectors, whitened as the index is; only the order is changed, no distance.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lgd.retrieval.index_files import BiasSource
from lgd.scoring.predict import Scorer, choose_latents, score_shards
from lgd.shards.shard_set import ShardSet

logger = logging.getLogger(__name__)

_BLOCK = 1024
"""Rows of the gallery that are compared with the bank at a time: 34 MB of float64."""
_BANK_ROWS = 4096
"""H&Es at most, evenly spaced."""


def learn_bias(blocks: Iterable[np.ndarray], bank_nD: np.ndarray, sharpness: float) -> np.ndarray:
    """The bias of each row of a gallery, float32 (m,), of mean 0.

    Args:
        blocks: The gallery's unit vectors, (., D) each.
        bank_nD: Those of the bank.
        sharpness: The b above. Towards 0 the bias is minus the mean cosine of the bank, towards infinity minus that of
            the nearest H&E.
    """
    found = []
    for block_mD in blocks:
        for start in range(0, len(block_mD), _BLOCK):
            cosine_mn = (block_mD[start : start + _BLOCK] @ bank_nD.T).astype(np.float64)
            nearest_m = cosine_mn.max(1)
            # exp(x) - 1 and log(1 + x) keep their digits where b is small, and no power overflows where it is large.
            mean_m = np.expm1(sharpness * (cosine_mn - nearest_m[:, None])).mean(1)
            found.append(-nearest_m - np.log1p(mean_m) / sharpness)
    if not found:
        return np.zeros(0, np.float32)
    bias_m = np.concatenate(found)
    centred_m: np.ndarray = (bias_m - bias_m.mean()).astype(np.float32)
    return centred_m


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """The H&E that a bias is learnt from."""

    source: BiasSource
    make_latents: Callable[[], np.ndarray]
    """What the student makes of it, (n, D), not whitened."""


def open_bank(scorer: Scorer, of: str, shards: ShardSet, sharpness: float, threads: int) -> Bank:
    """The H&E of a run's split val, or of the training split where there is none, with a note.

    `of` ends the names of the student's latents, as `choose_latents` takes it; they are made when they are needed.
    """
    split, held_out = "val", shards.of_split("val")
    if not held_out:
        logger.warning(
            "note: there is no split val, so the bias against hubs is learnt from the H&E that the student was trained "
            "on, which lies nearer to its IHC than new H&E does"
        )
        split, held_out = "train", shards.require_split("train", "latents.bias is learnt from split val or")
    source = BiasSource(
        sharpness=sharpness,
        student=scorer.config.weights_sha256,
        split=split,
        shards=tuple(shard.sha256 for shard in held_out),
    )

    def make_latents() -> np.ndarray:
        logger.info("a bias against hubs: scoring the H&E of the split %s", split)
        latents_nD = choose_latents(score_shards(scorer, held_out, threads=threads)[1], of)
        kept = np.linspace(0, len(latents_nD) - 1, min(len(latents_nD), _BANK_ROWS)).round().astype(np.int64)
        return latents_nD[kept]

    return Bank(source=source, make_latents=make_latents)
