"""Which samples, in which order, turned and jittered how.

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

What is done to a sample is drawn alike: a hash of (seed, epoch, sample, purpose), without a state, and the same for any
split into batches. Two kinds of H&E transforms keep a cached target valid. The dihedral group D4 (turns and flips)
moves the stored grids and maps with the image, and a store with eight views holds the teacher's latent of each element:
`d4(ihc, k)` is view k. Jitter of stain and light changes the H&E's colour only, which no stored target depends on.
Anything else, such as a random crop, would train the student towards what the IHC shows elsewhere.

Shapes: n positions, S shards, L lanes; B batch, C channels, H and W pixels.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgd.config_sections import Data
from lgd.io.digests import hash_64
from lgd.stain.deconvolve import H_E, rgb_to_od

ORDER = "lgd-order/1"
"""Named by whatever depends on the order; another order gets another name."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Two standard deviations: with a sigma below 0.5 no stain changes its sign.
_LIMIT = 2.0


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
        self._lanes_in_line = np.argsort(_spread(lanes))
        # A batch may lie in two epochs.
        self._begins = functools.lru_cache(maxsize=2)(self._new_begins)
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

    def _new_begins(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the run of each lane begins and ends in the line of samples, int64 (L,) both."""
        # Turns of each lane within this epoch; they differ by one where the lanes do not divide the samples.
        offsets_L = (np.arange(self.lanes) - epoch * self.total) % self.lanes
        turns_L = (self.total - offsets_L + self.lanes - 1) // self.lanes
        ends_L = np.empty(self.lanes, np.int64)
        ends_L[self._lanes_in_line] = np.cumsum(turns_L[self._lanes_in_line])
        return ends_L - turns_L, ends_L

    def _new_run(self, epoch: int, lane: int) -> _Run:
        """Cut the lane's run out of the line of shards, and shuffle its pieces."""
        begin, end = (int(some_L[lane]) for some_L in self._begins(epoch))
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
    if n < 2:
        # The run of most lanes lies in one shard where shards are few.
        return np.zeros(n, np.int64)
    keys = splitmix64(np.uint64(hash_64(f"{seed}:{purpose}")) + _GOLDEN * np.arange(n, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def splitmix64(x: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from the state x, uint64; a bijection."""
    x = x + _GOLDEN
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


def d4(x_BCHW: Tensor, k_B: Tensor | np.ndarray, dims: tuple[int, int] = (-2, -1)) -> Tensor:
    """Element k of the dihedral group on each image.

    k % 4 quarter turns counter-clockwise, then, where k is 4 or more, a left-right flip. Takes
    (B, ..., H, W) with H = W, of any dtype, and integers 0..7 of shape (B,). `dims` are those of H and W; (1, 2) where
    the channels are last. `k_B` is best on the CPU, where reading it makes no device wait.
    """
    if x_BCHW.shape[dims[0]] != x_BCHW.shape[dims[1]]:
        raise ValueError(f"only squares can be turned, not {x_BCHW.shape[dims[0]]} x {x_BCHW.shape[dims[1]]}")
    k_B = torch.as_tensor(k_B).cpu()
    if not k_B.any():
        return x_BCHW
    turned = torch.empty_like(x_BCHW)
    sorted_B = to_device(k_B.argsort(), x_BCHW.device)
    for k, rows in enumerate(torch.split(sorted_B, k_B.bincount(minlength=8).tolist())):
        if len(rows):
            part = torch.rot90(x_BCHW[rows], k % 4, dims)
            turned[rows] = part.flip(dims[1]) if k >= 4 else part
    return turned


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A tensor of the CPU on a device, for which the CPU does not wait, whatever the device still has to do."""
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def draw(seed: int, epoch_B: np.ndarray, sample_B: np.ndarray, purpose: str, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (B, n), a function of (seed, epoch, sample, purpose) alone.

    `epoch_B` and `sample_B` (the sample's number over all shards) are int64 (B,); `purpose` keeps the draws
    for different uses apart. The hash is SplitMix64, applied to each key in turn.
    """
    key_B = np.full(len(sample_B), hash_64(f"{seed}:{purpose}"), np.uint64)
    for part_B in (epoch_B, sample_B):
        key_B = splitmix64(key_B + np.asarray(part_B, np.int64).view(np.uint64))
    bits_Bn = splitmix64(key_B[:, None] + _GOLDEN * np.arange(n, dtype=np.uint64))
    return (bits_Bn >> np.uint64(11)) * 2.0**-53


def drawn_views(seed: int, epoch_B: np.ndarray, sample_B: np.ndarray) -> np.ndarray:
    """The element of D4 by which training turns each sample, int64 (B,); the arguments are those of `draw`."""
    view_B: np.ndarray = np.floor(8 * draw(seed, epoch_B, sample_B, "view", 1)[:, 0])
    return view_B.astype(np.int64)


def stain_jitter(rgb_B3HW: Tensor, u_B6: Tensor | np.ndarray, sigma: float) -> Tensor:
    """Scale the amounts of hematoxylin, eosin and residual in each H&E by 1 + sigma * normal.

    `rgb_B3HW` is uint8 or float in 0..255, `u_B6` holds uniforms in [0, 1) from `draw`; gives float32 in
    0..255. Normals are cut at two standard deviations. With sigma 0 the image comes back unchanged.
    """
    normal_B3 = _normal(u_B6)
    # unmix, scale, mix and subtract the old OD are one matrix an image: pixels are touched once, and a
    # change of zero leaves them exactly as they were.
    change_B33 = torch.linalg.inv(H_E) @ torch.diag_embed(sigma * normal_B3) @ H_E
    od_B3HW = rgb_to_od(rgb_B3HW)
    added_B3HW = torch.einsum("bchw,bcs->bshw", od_B3HW, to_device(change_B33.to(od_B3HW.dtype), od_B3HW.device))
    return (rgb_B3HW * torch.pow(10.0, -added_B3HW)).clamp(0.0, 255.0)


def light_jitter(rgb_B3HW: Tensor, u_B2: Tensor | np.ndarray, sigma: float) -> Tensor:
    """Multiply the light of each H&E by exp(sigma * normal): another exposure, or glass that is white or grey.

    Arguments and result as of `stain_jitter`; what passes 255 is overexposed. With sigma 0 the image comes back
    unchanged.
    """
    gain_B1 = torch.exp(sigma * _normal(u_B2))
    return (rgb_B3HW * to_device(gain_B1[:, :, None, None].float(), rgb_B3HW.device)).clamp(0.0, 255.0)


def jitter_he(rgb_B3HW: Tensor, epoch_B: np.ndarray, sample_B: np.ndarray, data: Data, seed: int) -> Tensor:
    """The stain and light of H&E images changed as `data` says; without that they come back as they are."""
    if data.augment != "d4+stain":
        return rgb_B3HW
    rgb_B3HW = stain_jitter(rgb_B3HW.float(), draw(seed, epoch_B, sample_B, "stain", 6), data.stain_jitter)
    if data.light_jitter:
        rgb_B3HW = light_jitter(rgb_B3HW, draw(seed, epoch_B, sample_B, "light", 2), data.light_jitter)
    return rgb_B3HW


def turn_stored(stored: Mapping[str, Tensor], k_B: Tensor, views: int) -> dict[str, Tensor]:
    """The stored grids and maps of images that are turned by `k_B`.

    With eight cached views the map is that of the right view already; with one it is turned, which is approximate since
    a network is not exactly equivariant.
    """
    dims = {**dict.fromkeys(("nuclei", "membrane", "positive"), (1, 2)), **({"map": (-2, -1)} if views == 1 else {})}
    kinds = {name: name.partition("@")[0] for name in stored}
    return {name: d4(x, k_B, dims[kinds[name]]) if kinds[name] in dims else x for name, x in stored.items()}


def _normal(u_B2n: Tensor | np.ndarray) -> Tensor:
    """2 n uniforms -> n normals, float64 (B, n), cut at `_LIMIT` (Box and Muller, 1958)."""
    u_B2n = torch.as_tensor(u_B2n, dtype=torch.float64)
    n = u_B2n.shape[1] // 2
    radius_Bn = torch.sqrt(-2 * torch.log1p(-u_B2n[:, :n]))
    return (radius_Bn * torch.cos(2 * torch.pi * u_B2n[:, n:])).clamp(-_LIMIT, _LIMIT)
