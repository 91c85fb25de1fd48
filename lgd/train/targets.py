"""Which of the teacher's latents a sample is taught with, and which are its negatives.

The teacher is frozen and its latents are stored, so the queue of a contrastive loss needs no memory of its own: it is
what the plan took last, read from the store. It is alike on every rank, whatever their number, and a run that goes on
has it at once.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lgd.base.labels import Labels, find_known
from lgd.models.heads import scale_of
from lgd.models.losses import Negatives
from lgd.shards.manifest import Values
from lgd.store.parts import Part, read_labels
from lgd.store.store import SUPERVISION, Rows
from lgd.stream.plan import Plan, drawn_views, offsets


def standardise(label_n: Labels, values: Values | None) -> Labels:
    """Labels as losses take them: values in standard deviations from the training mean; classes as they are.

    Where no training value is known, neither is any other.
    """
    if label_n.dtype.kind == "i":
        return label_n.astype(np.int64)
    if values is None:
        return np.full(len(label_n), np.nan, np.float32)
    return ((label_n - values.mean) / scale_of(values)).astype(np.float32)


def partners(label_n: Labels, within: bool, seed: int) -> np.ndarray:
    """For each sample the number of another, int64 (n,): each is the partner of one.

    `within`: of the same class, or of the same quarter of the values, where unknown is one too. A sample that has no
    other is its own partner.
    """
    dice = np.random.default_rng([seed, 0x70616972])
    partner_n = np.empty(len(label_n), np.int64)
    group_n = np.zeros(len(label_n), np.int64)
    if within and label_n.dtype.kind == "i":
        group_n = label_n.astype(np.int64)
    elif within:
        known_n = find_known(label_n)
        quarters = np.quantile(label_n[known_n], (0.25, 0.5, 0.75)) if known_n.any() else np.zeros(0)
        group_n = np.where(known_n, np.searchsorted(quarters, label_n), -1)
    for group in np.unique(group_n):
        order = dice.permutation(np.flatnonzero(group_n == group))
        partner_n[order] = np.roll(order, 1)
    return partner_n


class Targets(Rows):
    """The supervision of samples; of pairs that are not own, all is a partner's but the nuclei, which the H&E has."""

    def __init__(
        self, parts: Sequence[Part], pairs: str = "own", seed: int = 0, datasets: Sequence[str] = SUPERVISION
    ) -> None:
        """`parts`: of each shard; `pairs`: own, shuffled or within-level."""
        super().__init__(parts, datasets)
        self.first = offsets([part.rows for part in parts])
        self._partner_n = None
        if pairs != "own":
            self._partner_n = partners(read_labels(parts), pairs == "within-level", seed)

    def source(self, number_n: np.ndarray) -> np.ndarray:
        """Number of the sample whose latents each sample is taught with."""
        return number_n if self._partner_n is None else self._partner_n[number_n]

    def read(
        self,
        part_n: Sequence[int],
        row_n: Sequence[int],
        key_n: Sequence[str | None],
        view_n: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """As `Rows.read`; the keys are those of the samples, not of their partners."""
        own = super().read(part_n, row_n, key_n, view_n)
        if self._partner_n is None:
            return own
        source_n = self.source(self.first[list(part_n)] + np.asarray(row_n))
        other_n, other_row_n = self.address(source_n)
        other = super().read(other_n, other_row_n, [None] * len(source_n), view_n)
        return other | {name: own[name] for name in ("nuclei",) if name in own}

    def address(self, number_n: np.ndarray) -> tuple[list[int], list[int]]:
        """The part and the row of samples."""
        part_n = np.searchsorted(self.first, number_n, side="right") - 1
        return part_n.tolist(), (number_n - self.first[part_n]).tolist()


class Queue:
    """The teacher's latents of the samples that the plan took last."""

    def __init__(self, targets: Targets, plan: Plan, size: int, turn: bool, values: Values | None = None) -> None:
        """`size`: latents; `turn`: whether the images are turned, and the latents are those of the turned IHC;
        `values`:
        those of the training split, where labels are such.
        """
        self.targets, self.plan, self.size, self.turn = targets, plan, size, turn
        self._rows = Rows(targets.parts, ("pooled",))
        self._label_n = standardise(read_labels(targets.parts), values)
        self._end = 0
        self._pooled_QD = np.empty((0, targets.parts[0].layout["pooled"].shape[-1]), np.float32)
        self._number_Q = np.empty(0, np.int64)

    def negatives(self, number_B: np.ndarray, end: int) -> Negatives:
        """For samples of a step: the queue up to the plan's position `end`, behind that step.

        Positions may not go back.
        """
        self._take(end)
        source_B = self.targets.source(number_B)
        return Negatives(
            source_B=torch.from_numpy(source_B),
            label_B=torch.from_numpy(self._label_n[source_B]),
            pooled_QD=torch.from_numpy(self._pooled_QD),
            number_Q=torch.from_numpy(self._number_Q),
            label_Q=torch.from_numpy(self._label_n[self._number_Q]),
        )

    def _take(self, end: int) -> None:
        start = max(self._end, end - self.size, 0)
        if start >= end:
            return
        epoch_n, number_n = self.plan.samples(np.arange(start, end))
        view_n = drawn_views(self.plan.seed, epoch_n, number_n) if self.turn else np.zeros(len(number_n), np.int64)
        part_n, row_n = self.targets.address(number_n)
        new_nD = self._rows.read(part_n, row_n, [None] * len(row_n), view_n.tolist())["pooled"].astype(np.float32)
        # New arrays: steps that were handed out may still be in use.
        self._pooled_QD = np.concatenate([self._pooled_QD, new_nD])[-self.size :]
        self._number_Q = np.concatenate([self._number_Q, number_n])[-self.size :]
        self._end = end
