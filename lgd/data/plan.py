"""Which samples, in which order: integers only.

A sample's number counts over all shards in their order. The order of one epoch depends on the seed, the epoch
and the lanes; never on the number of workers, threads or restarts. Positions run on across epochs: position p
is sample p mod N of epoch p // N, so a batch may begin in one epoch and end in the next.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class World:
    """Which of the training processes this is; plain integers, so that a test can play any number of them."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of samples, epoch after epoch."""

    sizes: tuple[int, ...]
    """Samples in each shard."""
    seed: int
    lanes: int
    """Shards are dealt to so many lanes, and the order takes one sample from each lane in turn."""

    @property
    def total(self) -> int:
        """Samples in one epoch."""
        return sum(self.sizes)

    def order(self, epoch: int) -> np.ndarray:
        """Sample numbers of one epoch, int64 (total,), each exactly once."""
        return _order(self.sizes, self.seed, self.lanes, epoch)

    def samples(self, positions_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epoch and the sample number at each position, both int64 (n,)."""
        epochs_n = positions_n // self.total
        numbers_n = np.empty_like(positions_n)
        for epoch in np.unique(epochs_n):
            here_n = epochs_n == epoch
            numbers_n[here_n] = self.order(int(epoch))[positions_n[here_n] % self.total]
        return epochs_n, numbers_n


@functools.lru_cache(maxsize=4)
def _order(sizes: tuple[int, ...], seed: int, lanes: int, epoch: int) -> np.ndarray:
    """Shards in random order are dealt to lanes, each shard shuffled within itself, lanes interleaved."""
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    first = np.concatenate([[0], np.cumsum(sizes)])
    filled = np.zeros(min(lanes, len(sizes)), np.int64)
    numbers, lane_of, place_in_lane = [], [], []
    for shard in random.permutation(len(sizes)):
        size, lane = sizes[shard], int(np.argmin(filled))
        numbers.append(first[shard] + random.permutation(size))
        lane_of.append(np.full(size, lane))
        place_in_lane.append(filled[lane] + np.arange(size))
        filled[lane] += size
    order = np.concatenate(numbers)[np.lexsort((np.concatenate(lane_of), np.concatenate(place_in_lane)))]
    order.setflags(write=False)
    return order


def rank_positions(step: int, batch: int, accumulate: int, world: World) -> list[np.ndarray]:
    """This rank's positions in each micro-batch of a step, one int64 array a micro-batch.

    Step s covers positions s * batch to (s + 1) * batch - 1. Each micro-batch is a run of them, and the ranks
    take its positions in turn: with as many lanes as ranks, or a multiple, a rank reads its own lanes.
    """
    micro = batch // accumulate
    starts = step * batch + micro * np.arange(accumulate)
    return [np.arange(start + world.rank, start + micro, world.size) for start in starts]


def eval_numbers(total: int, world: World) -> np.ndarray:
    """This rank's sample numbers of one pass that sees every sample once, int64."""
    return np.arange(world.rank, total, world.size)


def address(sizes: Sequence[int], numbers_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row of each sample number, both int64 (n,)."""
    first = np.concatenate([[0], np.cumsum(sizes)])
    shards_n = np.searchsorted(first, numbers_n, side="right") - 1
    return shards_n, numbers_n - first[shards_n]
