"""The stream of images joined with stored supervision by address -> batches.

A shard and its part mirror each other, so (shard, row) finds both; the stored key is compared with the sample's.
"""

import collections
import itertools
import logging
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lgd.base.errors import DataError
from lgd.base.labels import as_labels, find_known
from lgd.base.target import Target
from lgd.config import Config
from lgd.config_sections import Data
from lgd.models.losses import Lesson, Negatives
from lgd.shards.manifest import PatchMeta, Values
from lgd.store.store import Rows
from lgd.stream.plan import Plan, World, d4, drawn_views, jitter_he, rank_positions, to_device, turn_stored
from lgd.stream.reader import Reader, Samples, stream
from lgd.train.targets import Queue, standardise

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(Lesson):
    """Samples on their way into a network."""

    keys: list[str]
    groups: list[str]
    """Slide of each sample, or its source patch where slides are unknown."""
    errors: dict[int, str]
    """Number of each sample that is skipped -> why."""
    number_B: np.ndarray
    """int64: sample numbers."""
    epoch_B: np.ndarray
    """int64: the epoch of each sample, since a batch may run on into the next."""
    view_B: torch.Tensor
    """int64: the element of D4 that training applies; 0 is none."""
    valid_B: torch.Tensor
    """bool: false for a sample that could not be read and is skipped; its image is black and it has no loss."""
    label_count: int
    """Samples whose label is known."""
    valid_count: int
    """Samples that are valid, also those that were left out for want of a label."""
    images: dict[str, torch.Tensor]
    """Role -> (B, 3, H, W) in 0..255, uint8 as decoded or float32."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: str) -> "Batch":
        """The same batch on a device; the views stay on the CPU, where `d4` reads them without waiting."""
        if device == "cpu":
            return self

        return replace(
            self,
            valid_B=to_device(self.valid_B, device),
            label_B=to_device(self.label_B, device),
            alignment_B=self.alignment_B if self.alignment_B is None else to_device(self.alignment_B, device),
            images={role: to_device(image, device) for role, image in self.images.items()},
            stored={name: to_device(stored_B, device) for name, stored_B in self.stored.items()},
            negatives=self.negatives and Negatives(*(to_device(tensor, device) for tensor in self.negatives)),
        )


def drop_unlabelled(samples: Samples, epoch_B: np.ndarray) -> tuple[Samples, np.ndarray]:
    """The samples whose label is known, for a loss that has no other use, and their epochs; one where none is."""
    places = [place for place, sample in enumerate(samples.rows) if sample.label is not None] or [0]
    if len(places) == len(samples.rows):
        return samples, epoch_B
    images = {role: image[places] for role, image in samples.images.items()}
    return Samples([samples.rows[place] for place in places], images), epoch_B[places]


def find_alignment(metas: Sequence[PatchMeta]) -> torch.Tensor | None:
    """The alignment of each pair, as in `Lesson`."""
    known = [meta.alignment for meta in metas]
    if all(one is None for one in known):
        return None
    return torch.tensor([math.nan if one is None else one for one in known], dtype=torch.float32)


def collate(
    samples: Samples,
    epoch_B: np.ndarray,
    store: Rows | None,
    seed: int | None,
    *,
    target: Target,
    values: Values | None,
    labels_only: bool = False,
) -> Batch:
    """One batch of samples, with their rows of the store where one is given.

    `seed` draws the views that images are turned to; None turns none. `values` are those of the training split, where
    the labels of the `target` are such.
    """
    errors = {sample.number: sample.error for sample in samples.rows if sample.error}
    valid_count = sum(not sample.error for sample in samples.rows)
    if labels_only:
        samples, epoch_B = drop_unlabelled(samples, epoch_B)
    rows = samples.rows
    number_B = np.array([sample.number for sample in rows], np.int64)
    valid_B = torch.tensor([not sample.error for sample in rows])
    label_B = as_labels(target, [sample.label for sample in rows])
    if target.is_number:
        label_B = standardise(label_B, values)
    view_B = np.zeros(len(rows), np.int64) if seed is None else drawn_views(seed, epoch_B, number_B)
    stored: dict[str, np.ndarray] = {}
    if store is not None:
        # A sample that is skipped has no key; it has no loss either.
        key_B = [None if sample.error else sample.key for sample in rows]
        stored = store.read([s.shard for s in rows], [s.row for s in rows], key_B, view_B.tolist())
    return Batch(
        keys=[sample.key for sample in rows],
        groups=[sample.meta.group for sample in rows],
        errors=errors,
        number_B=number_B,
        epoch_B=epoch_B,
        view_B=torch.from_numpy(view_B),
        valid_B=valid_B,
        label_B=torch.from_numpy(label_B),
        alignment_B=find_alignment([sample.meta for sample in rows]),
        # Counted here, where no device has to be waited for.
        label_count=int(find_known(label_B).sum()),
        valid_count=valid_count,
        # A view: the pixels stay as they were decoded, which torch calls channels-last.
        images={role: torch.from_numpy(image).permute(0, 3, 1, 2) for role, image in samples.images.items()},
        stored={name: torch.from_numpy(array.astype(np.float32)) for name, array in stored.items()},
    )


def augment(batch: Batch, config: Config) -> Batch:
    """The batch with its images turned, and H&E jittered, and grids and maps turned alike."""
    images = {role: d4(image, batch.view_B) for role, image in batch.images.items()}
    if "he" in images:
        images["he"] = jitter_he(images["he"], batch.epoch_B, batch.number_B, config.data, config.run.seed)
    return replace(batch, images=images, stored=turn_stored(batch.stored, batch.view_B, config.latents.views))


class Step(NamedTuple):
    """What one step of training takes."""

    micro: list[Batch]
    """This rank's micro-batches."""
    position: int
    """The plan's position after this step: the state to resume from, alike on every rank."""


@dataclass(frozen=True, slots=True)
class Batches:
    """One rank's share of the batches of a training."""

    config: Config
    reader: Reader
    plan: Plan
    world: World
    store: Rows | None = None
    queue: Queue | None = None
    """Gives each batch its negatives."""
    values: Values | None = None
    """Those of the training split, where labels are such."""
    partner: Callable[["Batch", Config], "Batch"] | None = None
    """Puts behind each image the one that it is compared with. Without that and a store labels alone teach: an
    unlabelled patch would cost as much, and its loss is 0; it is left out."""

    def draw(self, start: int, steps: int) -> Iterator[Step]:
        """The batches of `steps` steps from position `start` on, on their device and not yet augmented."""
        config, plan, store = self.config, self.plan, self.store
        batch, accumulate = config.train.batch, config.train.accumulate
        skip, turn = config.data.on_bad.skips > 0, config.data.augment != "none"
        epochs: collections.deque[np.ndarray] = collections.deque()
        positions = range(start, start + steps * batch, batch)

        def numbers() -> Iterator[np.ndarray]:
            for position in positions:
                for positions_n in rank_positions(position, batch, accumulate, self.world):
                    epoch_B, number_B = plan.samples(positions_n)
                    epochs.append(epoch_B)
                    yield number_B

        # A step's micro-batches are wanted at once; what is read ahead should still fit a processor's cache.
        ahead = 2 * accumulate + 1
        batches = stream(self.reader, numbers(), threads=config.data.threads, prefetch=ahead, skip=skip)
        for position in positions:
            micro = [
                collate(
                    samples,
                    epochs.popleft(),
                    store,
                    plan.seed if turn else None,
                    target=self.reader.shards[0].target,
                    values=self.values,
                    labels_only=store is None and self.partner is None,
                )
                for samples in itertools.islice(batches, accumulate)
            ]
            if queue := self.queue:
                micro = [replace(one, negatives=queue.negatives(one.number_B, position + batch)) for one in micro]
            yield Step([one.to(self.world.device) for one in micro], position + batch)

    def draw_augmented(self, start: int, steps: int) -> Iterator[Step]:
        """The same, as they are trained on."""

        def augmented(step: Step) -> Step:
            micro = [augment(one, self.config) for one in step.micro]
            return Step([self.partner(one, self.config) for one in micro] if self.partner else micro, step.position)

        # By `map`, which keeps no batch that was given.
        return map(augmented, self.draw(start, steps))


def gather(mine: Sequence[Value], world: World) -> list[Value]:
    """What all ranks have, in their order; every rank calls this."""
    if world.size == 1:
        return [*mine]
    everyone: list[Sequence[Value]] = [[]] * world.size
    dist.all_gather_object(everyone, mine)
    return [value for values in everyone for value in values]


def require_same(mine: str, subject: str, remedy: str, world: World) -> None:
    """Raise `DataError`, on every rank, with what the ranks say and the first that says so, unless all say the same."""
    said = gather([(mine, platform.node())], world)
    firsts = {value: (rank, host) for rank, (value, host) in reversed([*enumerate(said)])}
    if len(firsts) > 1:
        lines = (
            f"  rank {rank} on {host}: {value}"
            for value, (rank, host) in sorted(firsts.items(), key=lambda one: one[1])
        )
        raise DataError(f"{subject}:", *lines, remedy)


class Skipped:
    """The samples that could not be read and were skipped, against the budget of `data.on_bad`; alike on every rank."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.numbers: set[int] = set()
        """Of the samples that were skipped so far."""

    def add(self, mine: dict[int, str], world: World) -> None:
        """Count what a step skips for the first time on any rank, and log this rank's numbers and why.

        Every rank calls this; `DataError` beyond the budget.
        """
        for error in mine.values():
            logger.warning("[data] skipped: %s", error)
        self.numbers.update(gather(sorted(mine), world))
        if len(self.numbers) > self.data.on_bad.skips:
            raise DataError(
                f"{len(self.numbers)} bad samples were skipped, more than data.on_bad {self.data.on_bad} allows: each "
                "is named above; lgd verify checks the shards"
            )
