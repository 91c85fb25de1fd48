"""The stream of images joined with stored supervision by address -> batches.

A shard and its part mirror each other, so (shard, row) finds both; the stored key is compared with the sample's.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lgd.config import DataError
from lgd.data.augment import draw
from lgd.data.plan import Plan, World, eval_numbers, rank_positions
from lgd.data.stream import Reader, Sample, in_batches, stream
from lgd.store.latents import Part

SUPERVISION = ("pooled", "map", "nuclei", "membrane")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples on their way into a network."""

    keys: list[str]
    groups: list[str]
    number_B: np.ndarray
    """int64: sample numbers."""
    epoch_B: np.ndarray
    """int64: the epoch of each sample, since a batch may run on into the next."""
    view_B: torch.Tensor
    """int64: the element of D4 that training applies; 0 is none."""
    level_B: torch.Tensor
    """int64: 0 to 3, or -1 for unknown."""
    images: dict[str, torch.Tensor]
    """Role -> uint8 (B, 3, H, W)."""
    stored: dict[str, torch.Tensor]
    """`pooled` (B, D), `map` (B, D, m, m), `nuclei` (B, g, g), `membrane` (B, k, k, 3), float32."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: str) -> "Batch":
        """The same batch on a device; the views stay on the CPU, where `d4` reads them without waiting."""
        if device == "cpu":
            return self

        def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return replace(
            self,
            level_B=self.level_B.to(device),
            images=move(self.images),
            stored=move(self.stored),
        )


def collate(
    samples: Sequence[Sample], epoch_B: np.ndarray, parts: Sequence[Part] | None, seed: int, turn: bool
) -> Batch:
    """One batch of samples, with their rows of the store when `parts` are given."""
    number_B = np.array([sample.number for sample in samples], np.int64)
    view_B = np.zeros(len(samples), np.int64)
    if turn:
        view_B = np.floor(8 * draw(seed, epoch_B, number_B, "view", 1)[:, 0]).astype(np.int64)
    images = {
        role: torch.from_numpy(np.stack([s.images[role] for s in samples])).permute(0, 3, 1, 2).contiguous()
        for role in samples[0].images
    }
    return Batch(
        keys=[sample.key for sample in samples],
        groups=[sample.meta["group"] for sample in samples],
        number_B=number_B,
        epoch_B=epoch_B,
        view_B=torch.from_numpy(view_B),
        level_B=torch.tensor([sample.level for sample in samples]),
        images=images,
        stored={} if parts is None else _stored(samples, parts, view_B),
    )


def _stored(samples: Sequence[Sample], parts: Sequence[Part], view_B: np.ndarray) -> dict[str, torch.Tensor]:
    for sample in samples:
        there = bytes(parts[sample.shard].array("key")[sample.row]).decode()
        if there != sample.key:
            raise DataError(
                f"{parts[sample.shard].path}, row {sample.row}, is of {there}, but the shard's sample is {sample.key}: "
                "delete the part and run lgd cache-latents again"
            )
    stored = {}
    for name in SUPERVISION:
        if name not in parts[0].sidecar["datasets"]:
            continue
        rows = []
        for sample, view in zip(samples, view_B, strict=True):
            row = parts[sample.shard].array(name)[sample.row]
            if name in ("pooled", "map"):
                row = row[view if len(row) == 8 else 0]
            rows.append(row)
        stored[name] = torch.from_numpy(np.stack(rows).astype(np.float32))
    return stored


def training_batches(
    reader: Reader,
    plan: Plan,
    parts: Sequence[Part] | None,
    *,
    steps: Iterable[int],
    batch: int,
    accumulate: int,
    world: World,
    threads: int,
    turn: bool,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step, one list a step."""
    epochs: collections.deque[np.ndarray] = collections.deque()

    def numbers() -> Iterator[np.ndarray]:
        for step in steps:
            for positions in rank_positions(step, batch, accumulate, world):
                epoch_B, number_B = plan.samples(positions)
                epochs.append(epoch_B)
                yield number_B

    waiting: list[Batch] = []
    for samples_B in stream(reader, numbers(), threads=threads):
        waiting.append(collate(samples_B, epochs.popleft(), parts, plan.seed, turn))
        if len(waiting) == accumulate:
            yield waiting
            waiting = []


def evaluation_batches(
    reader: Reader, *, batch: int, world: World, threads: int, parts: Sequence[Part] | None = None
) -> Iterator[Batch]:
    """This rank's share of one pass over all samples, unturned."""
    numbers = in_batches(eval_numbers(reader.total, world), batch)
    for samples in stream(reader, numbers, threads=threads):
        yield collate(samples, np.zeros(len(samples), np.int64), parts, 0, turn=False)
