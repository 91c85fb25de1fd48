"""A probe: the labels that a teacher gives which no label taught, read off its stored latents.

    DIR/probe/TEACHER.json    the probe of a teacher's latents, and of which rows it was fitted

A multinomial logistic regression with a ridge, or a ridge regression where labels are values, from the pooled latents
(first view, standardised) of the labelled training patches to their labels. `lgd cache-latents`, or `import-latents`,
fits it. All that it needs lies in the store, so that a pretrained encoder, a teacher that was trained without labels,
and latents that were computed elsewhere have one alike.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from lgd.base.errors import DataError
from lgd.base.labels import Labels, find_known
from lgd.base.records import Count, Line, Many, Sha256
from lgd.base.target import KNOWN
from lgd.io.documents import Document, MissingDocument
from lgd.io.files import list_folder, remove
from lgd.io.location import Location
from lgd.metrics import Floats, Ints
from lgd.models.teacher import Probe
from lgd.shards.archive import Shard
from lgd.shards.manifest import Values, Word
from lgd.store.parts import Part, read_labels
from lgd.store.regression import regress_labels
from lgd.store.store import Store

logger = logging.getLogger(__name__)

FIT_ROWS = 20_000
"""Labelled patches that a probe is fitted on at most, evenly spaced."""
_REMEDY = "run lgd cache-latents"


class ProbeDocument(Document):
    """A probe, and what it was fitted on."""

    FORMAT: ClassVar[str] = "lgd-probe/1"
    ABSENT: ClassVar[str] = _REMEDY
    REMEDY: ClassVar[str] = f"delete it and {_REMEDY} again"

    teacher: Word
    parts: Annotated[Many[Sha256], Field(min_length=1)]
    """Digest of each part of the training split: latents, labels and slides of its rows."""
    patches: dict[Line, Count]
    """Patches of each class, or `known` values, that it was fitted on."""
    slides: Count
    """Their slides, or patches where slides are unknown: none is on both sides of a cross-validation."""
    ridge: Annotated[float, Field(gt=0)]
    losses: dict[Line, float]
    """Ridge -> mean loss of patches of left-out slides; none where too few slides are labelled for that."""
    weight: Annotated[Many[Many[float]], Field(min_length=1)]
    """A row a class, or one of the value, of the latents as they are stored."""
    bias: Many[float]

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        rows = {len(self.weight), len(self.bias), len(self.patches)}
        if len(rows) != 1 or len({len(row) for row in self.weight}) != 1 or not self.weight[0]:
            raise ValueError("fields weight, bias and patches do not fit each other")
        return self

    @property
    def dim(self) -> int:
        """Length of the latents."""
        return len(self.weight[0])

    @property
    def classes(self) -> list[int]:
        """The numbers of the classes that it knows."""
        return [number for number, count in enumerate(self.patches.values()) if count]

    @property
    def values(self) -> Values | None:
        """What its outputs are relative to, where they are values: nothing."""
        return Values(mean=0.0, std=1.0, least=0.0, most=0.0) if {*self.patches} == {KNOWN} else None

    def network(self) -> Probe:
        """What reads labels off latents."""
        return Probe(torch.tensor(self.weight), torch.tensor(self.bias))

    def describe(self) -> str:
        """What it was fitted on, in words."""
        count = sum(self.patches.values())
        return f"{count} labelled training patches of {self.slides} slides, ridge {self.ridge:g}"


def probe_path(store: Store) -> Location:
    """Where the probe of the store's first teacher lies."""
    return store.folder / "probe" / f"{store.teacher}.json"


def read_probe(store: Store, parts: Sequence[Part]) -> ProbeDocument | None:
    """The probe of just these training parts; None where there is none, or one of other rows or labels."""
    with contextlib.suppress(MissingDocument):
        probe = ProbeDocument.read(probe_path(store))
        own_labels = (*probe.patches,) == store.target.counted
        if own_labels and probe.parts == _digests(store, parts) and probe.dim == _dim(parts):
            return probe
    return None


def lacks_probe(store: Store, training: Sequence[Shard]) -> bool:
    """Whether the training split of a run has two different labels, and the store no probe of just its rows."""
    parts = store.parts_of(training)
    return bool(parts) and read_probe(store, parts) is None and len(_different(read_labels(parts))) > 1


def find_probe(store: Store, training: Sequence[Shard]) -> ProbeDocument | None:
    """The probe of a store for the training split of a run; None where that has fewer than two
    different labels.

    Raises `DataError` where it is missing, or was fitted on other rows.
    """
    if lacks_probe(store, training):
        raise DataError(
            f"{probe_path(store)} is missing, or of other rows than the training split: run lgd {store.verb}"
        )
    return read_probe(store, store.parts_of(training))


def fit_probe(store: Store, training: Sequence[Shard]) -> ProbeDocument:
    """Fit a probe on the labelled patches of the training split, which have two labels at least, and write it."""
    probe = make_probe(store, training, read_labels(store.parts_of(training)))
    probe.write(probe_path(store))
    return probe


def make_probe(store: Store, training: Sequence[Shard], label_n: Labels) -> ProbeDocument:
    """Fit a probe on the patches of the training split that have a label among these, in their order; two at least."""
    parts, target = store.parts_of(training), store.target
    labelled_n = np.flatnonzero(find_known(label_n))
    chosen_n = labelled_n[np.linspace(0, len(labelled_n) - 1, min(len(labelled_n), FIT_ROWS)).round().astype(int)]
    latent_nD, slide_n = _read_rows(parts, chosen_n)
    weight_KD, bias_K, ridge, losses = regress_labels(latent_nD, label_n[chosen_n], slide_n, target)
    counts = [len(chosen_n)] if target.is_number else np.bincount(label_n[chosen_n], minlength=target.width).tolist()
    return ProbeDocument(
        teacher=store.teacher,
        parts=_digests(store, parts),
        patches=dict(zip(target.counted, counts, strict=True)),
        slides=len(np.unique(slide_n)),
        ridge=ridge,
        losses={f"{one:g}": loss for one, loss in losses.items()},
        weight=tuple(map(tuple, weight_KD.tolist())),
        bias=tuple(bias_K.tolist()),
    )


def ensure_probe(store: Store, training: Sequence[Shard]) -> None:
    """Fit a probe where one can be fitted and is lacking."""
    if lacks_probe(store, training):
        logger.info(
            "[latents] a probe for the %s was fitted on %s",
            store.target.label_word,
            fit_probe(store, training).describe(),
        )


def find_problems(store: Store) -> list[str]:
    """What is wrong with the probe of the store's first teacher."""
    try:
        stale = _is_stale(store)
    except DataError as error:
        return [str(error)]
    return [f"{probe_path(store)} is of rows that the store does not have: run lgd {store.verb}"] if stale else []


def prune_probes(store: Store) -> None:
    """Remove the probes, of any teacher, of rows that the store does not have any more."""
    for file in list_folder(store.folder / "probe"):
        teacher = file.removesuffix(".json")
        if teacher not in store.document.teachers or _is_stale(Store(store.folder, teachers=(teacher,))):
            remove(store.folder / "probe" / file)


def _is_stale(store: Store) -> bool:
    try:
        probe = ProbeDocument.read(probe_path(store))
    except MissingDocument:
        return False
    rows = {*_digests(store, store.parts)}
    return probe.teacher != store.teacher or not rows.issuperset(probe.parts) or probe.dim != _dim(store.parts)


def _read_rows(parts: Sequence[Part], number_n: Ints) -> tuple[Floats, np.ndarray]:
    """The latents (n, D) and the slides (n,) of rows, which count over the parts and rise; a patch whose slide is
    unknown is one of its own.
    """
    latents, slides, first = [], [], 0
    for part in parts:
        row_n = number_n[(number_n >= first) & (number_n < first + part.rows)] - first
        first += part.rows
        if len(row_n):
            latents.append(part.array("pooled")[row_n, 0].astype(np.float64))
            slide_n, key_n = part.array("slide")[row_n], part.array("key")[row_n]
            slides.append(np.where(slide_n == b"", np.char.add(b"key ", key_n), slide_n))
    return np.concatenate(latents), np.concatenate(slides)


def _different(label_n: Labels) -> Labels:
    known: Labels = np.unique(label_n[find_known(label_n)])  # type: ignore[assignment]
    return known


def _digests(store: Store, parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(part.digest(store.teacher) for part in parts)


def _dim(parts: Sequence[Part]) -> int:
    return parts[0].layout["pooled"].shape[-1]
