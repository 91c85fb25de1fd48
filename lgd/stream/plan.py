"""Which samples, in which order: integers only.

A sample's number counts over all shards in their order. A position counts what training has used; it runs on across
epochs, so a batch may begin in one epoch and end in the next, and it is all that a run needs to go on from.

The order depends on seed, epoch and lanes; never on the number of workers, threads or restarts:

1. The shards are put into a random order, once for a seed, and the line of their samples is cut into as many equal
   runs as there are lanes. A lane keeps its run in all epochs, so that a node's cache of shards stays useful.
2. In each epoch a lane takes the shards of its run in a new random order, one after the other, and the samples of
   each shard in a new random order.
3. Position p is the next sample of lane p mod lanes. Consecutive positions come from different lanes, so no two
   samples of a batch share a shard's turn as long as the batch is no larger than the lanes.

Nothing here grows with the samples: one array over the shards, and of each lane the shards of its run and the rows
of the shard that it is in.

Shapes: n positions, S shards, L lanes.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ORDER = "lgd-order/1"
"""Named by whatever depends on the order; another order gets another name."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class World:
    """Which of the training processes this is; plain integers, so that a test can play any number of them."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"


class _Run(NamedTuple):
    """A lane's way through one epoch, over the shards, or pieces of shards, of its run."""

    before: int
    """Turns that the lane took before this epoch."""
    shards: np.ndarray
    """int64: shard of each piece, in the order of this epoch."""
    ends: np.ndarray
    """int64: place in the lane at which each piece ends."""
    shifts: np.ndarray
    """int64: what a place in the lane and its place in the shard's order differ by, for each piece."""


class Plan:
    """The order of samples, epoch after epoch."""

    def __init__(self, sizes: Sequence[int], *, seed: int, lanes: int) -> None:
        """`sizes`: samples in each shard; `seed` and `lanes` as in the module's text."""
        self.sizes_S = np.asarray(sizes, np.int64)
        self.first_S1 = offsets(self.sizes_S)
        self.total = int(self.first_S1[-1])
        """Samples in one epoch."""
        self.seed = seed
        self.lanes = lanes
        self._line_S = _permutation(len(self.sizes_S), seed, "shards")
        self._line_S1 = offsets(self.sizes_S[self._line_S])
        self._places_L = _spread(lanes)
        # A lane is in one shard at a time, and in two epochs at their border.
        self._run = functools.lru_cache(maxsize=2 * lanes)(self._new_run)
        self._rows = functools.lru_cache(maxsize=lanes + 16)(self._new_rows)

    def samples(self, positions_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epoch and the sample number at each position, both int64 (n,)."""
        # One by one: a lane has one or two positions of a batch, and numpy's calls cost ten times as much on so few.
        numbers = [self._number(position) for position in positions_n.tolist()]
        return positions_n // self.total, np.array(numbers, np.int64)

    def _number(self, position: int) -> int:
        epoch = position // self.total
        turn, lane = divmod(position, self.lanes)
        run = self._run(epoch, lane)
        place = turn - run.before
        piece = run.ends.searchsorted(place, "right")
        shard = int(run.shards[piece])
        return int(self.first_S1[shard] + self._rows(epoch, shard)[place + run.shifts[piece]])

    def _new_run(self, epoch: int, lane: int) -> _Run:
        """Cut the lane's run out of the line of shards, and shuffle its pieces."""
        # Turns of each lane within this epoch; they differ by one where the lanes do not divide the samples.
        offsets_L = (np.arange(self.lanes) - epoch * self.total) % self.lanes
        turns_L = (self.total - offsets_L + self.lanes - 1) // self.lanes
        # The run of lane l is the _places_L[l]-th of the line.
        before = self._places_L < self._places_L[lane]
        begin = int(turns_L[before].sum())
        end = begin + int(turns_L[lane])
        first, last = np.searchsorted(self._line_S1, [begin, end - 1], side="right") - 1
        pieces = first + _permutation(max(0, last - first + 1), self.seed, f"lane {epoch} {lane}")
        begins = np.maximum(self._line_S1[pieces], begin)
        lengths = np.minimum(self._line_S1[pieces + 1], end) - begins
        ends = np.cumsum(lengths)
        shifts = begins - self._line_S1[pieces] - (ends - lengths)
        turns_before = -((lane - epoch * self.total) // self.lanes)
        return _Run(turns_before, self._line_S[pieces], ends, shifts)

    def _new_rows(self, epoch: int, shard: int) -> np.ndarray:
        """The order of a shard's rows in an epoch."""
        return _permutation(int(self.sizes_S[shard]), self.seed, f"rows {epoch} {shard}").astype(np.int32)


def offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """The number of each shard's first sample, and the total: int64 (S + 1,)."""
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])


def _spread(lanes: int) -> np.ndarray:
    """The place in the line of each lane's run, int64 (L,): reversed digits of the lane's number.

    Rank r of W takes the lanes l with l mod W = r. Their runs lie side by side in the line, so that a shard that is
    cut between two runs is hardly ever read by two ranks. With lanes a power of two that holds for every W that
    divides them.
    """
    places, rest, width = np.zeros(lanes, np.int64), np.arange(lanes), lanes
    factor = 2
    while width > 1:
        while width % factor:
            factor += 1
        rest, digits = np.divmod(rest, factor)
        places = places * factor + digits
        width //= factor
    return places


def _permutation(n: int, seed: int, purpose: str) -> np.ndarray:
    """A random order of n, int64 (n,), that no version of numpy changes."""
    name = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    start = np.full(n, int.from_bytes(name[:8], "little"), np.uint64)
    return np.argsort(splitmix64(start + GOLDEN * np.arange(n, dtype=np.uint64)), kind="stable")


def splitmix64(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from the state x, uint64; a bijection."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def rank_positions(position: int, batch: int, accumulate: int, world: World) -> list[np.ndarray]:
    """This rank's positions in each micro-batch of the step that begins at `position`, one int64 array a micro-batch.

    The step covers the positions up to `position + batch`. Each micro-batch is a run of them, and the ranks take its
    positions in turn: where the world divides the lanes, a rank reads its own lanes.
    """
    micro = batch // accumulate
    starts = position + micro * np.arange(accumulate)
    return [np.arange(start + world.rank, start + micro, world.size) for start in starts]


def eval_numbers(total: int, world: World) -> range:
    """This rank's sample numbers of one pass that sees every sample once: a run, so that it reads few shards."""
    return range(world.rank * total // world.size, (world.rank + 1) * total // world.size)
