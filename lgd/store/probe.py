"""A probe: the labels that a teacher gives which no label taught, read off its stored latents.

    DIR/probe/TEACHER.json    the probe of a teacher's latents, and of which rows it was fitted

A multinomial logistic regression with a ridge, from the pooled latents (first view, standardised) of the labelled
training patches to their levels. `lgd cache-latents`, or `import-latents`, fits it. All that it needs lies in the
store, so that a pretrained encoder, a teacher that was trained without labels, and latents that were computed elsewhere
have one alike.
"""

import contextlib
import logging
import warnings
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from lgd.base.errors import DataError
from lgd.base.records import Count, Line, Many, Sha256
from lgd.config_sections import LEVEL_NAMES
from lgd.io.documents import Document, MissingDocument
from lgd.io.files import list_folder, remove
from lgd.io.location import Location
from lgd.metrics import Floats, Ints
from lgd.models.teacher import Probe
from lgd.shards.archive import Shard
from lgd.shards.manifest import Word
from lgd.store.parts import Part, read_levels
from lgd.store.store import Store

logger = logging.getLogger(__name__)

RIDGES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Weights of half the squared length of the coefficients, beside the mean loss of a patch; the strongest first."""
FOLDS = 5
FIT_ROWS = 20_000
"""Labelled patches that a probe is fitted on at most, evenly spaced."""
UNSEEN = -1e4
"""The logit of a level that no training patch has: no temperature gives it a probability."""
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
    """Patches of each level that it was fitted on."""
    slides: Count
    """Their slides, or patches where slides are unknown: none is on both sides of a cross-validation."""
    ridge: Annotated[float, Field(gt=0)]
    losses: dict[Line, float]
    """Ridge -> mean loss of patches of left-out slides; none where too few slides are labelled for that."""
    weight: Annotated[Many[Many[float]], Field(min_length=len(LEVEL_NAMES), max_length=len(LEVEL_NAMES))]
    """A row a level, of the latents as they are stored."""
    bias: Annotated[Many[float], Field(min_length=len(LEVEL_NAMES), max_length=len(LEVEL_NAMES))]

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if len({len(row) for row in self.weight}) != 1 or not self.weight[0] or {*self.patches} != {*LEVEL_NAMES}:
            raise ValueError("fields weight and patches do not fit the levels")
        return self

    @property
    def dim(self) -> int:
        """Length of the latents."""
        return len(self.weight[0])

    @property
    def levels(self) -> list[int]:
        """The numbers of the levels that it knows."""
        return [number for number, name in enumerate(LEVEL_NAMES) if self.patches[name]]

    def network(self) -> Probe:
        """What reads levels off latents."""
        return Probe(torch.tensor(self.weight), torch.tensor(self.bias))

    def describe(self) -> str:
        """What it was fitted on, in words."""
        count = sum(self.patches.values())
        return f"{count} labelled training patches of {self.slides} slides, ridge {self.ridge:g}"


def probe_path(store: Store) -> Location:
    """Where the probe of the store's first teacher lies."""
    return store.folder / "probe" / f"{store.teacher}.json"


def read_probe(store: Store, parts: Sequence[Part]) -> ProbeDocument | None:
    """The probe of just these training parts; None where there is none, or one of other rows."""
    with contextlib.suppress(MissingDocument):
        probe = ProbeDocument.read(probe_path(store))
        if probe.parts == _digests(store, parts) and probe.dim == _dim(parts):
            return probe
    return None


def lacks_probe(store: Store, training: Sequence[Shard]) -> bool:
    """Whether the training split of a run has labels of two levels, and the store no probe of just its rows."""
    parts = store.parts_of(training)
    return bool(parts) and read_probe(store, parts) is None and len(_known_levels(read_levels(parts))) > 1


def find_probe(store: Store, training: Sequence[Shard]) -> ProbeDocument | None:
    """The probe of a store for the training split of a run; None where that has labels of fewer than two levels.

    Raises `DataError` where it is missing, or was fitted on other rows.
    """
    if lacks_probe(store, training):
        raise DataError(
            f"{probe_path(store)} is missing, or of other rows than the training split: run lgd {store.verb}"
        )
    return read_probe(store, store.parts_of(training))


def fit_probe(store: Store, training: Sequence[Shard]) -> ProbeDocument:
    """Fit a probe on the labelled patches of the training split, which are of two levels at least, and write it."""
    parts = store.parts_of(training)
    level_n = read_levels(parts)
    labelled_n = np.flatnonzero(level_n >= 0)
    chosen_n = labelled_n[np.linspace(0, len(labelled_n) - 1, min(len(labelled_n), FIT_ROWS)).round().astype(int)]
    latent_nD, slide_n = _read_rows(parts, chosen_n)
    weight_4D, bias_4, ridge, losses = regress_levels(latent_nD, level_n[chosen_n], slide_n)
    counts = np.bincount(level_n[chosen_n], minlength=len(LEVEL_NAMES)).tolist()
    probe = ProbeDocument(
        teacher=store.teacher,
        parts=_digests(store, parts),
        patches=dict(zip(LEVEL_NAMES, counts, strict=True)),
        slides=len(np.unique(slide_n)),
        ridge=ridge,
        losses={f"{one:g}": loss for one, loss in losses.items()},
        weight=tuple(map(tuple, weight_4D.tolist())),
        bias=tuple(bias_4.tolist()),
    )
    probe.write(probe_path(store))
    return probe


def ensure_probe(store: Store, training: Sequence[Shard]) -> None:
    """Fit a probe where one can be fitted and is lacking."""
    if lacks_probe(store, training):
        logger.info("[latents] a probe for the level was fitted on %s", fit_probe(store, training).describe())


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


def regress_levels(
    latent_nD: Floats, level_n: Ints, group_n: np.ndarray
) -> tuple[Floats, Floats, float, dict[float, float]]:
    """Weights (4, D) and biases (4,) from latents to logits, the ridge, and the loss on left-out groups by ridge.

    The ridge is that of the least loss on left-out groups, whose levels the rest has too; the strongest where no group
    can be left out.
    """
    mean_D, scale_D = latent_nD.mean(0), latent_nD.std(0)
    # What hardly varies says nothing, and dividing by it would blow up what the stored type rounds.
    scale_D[scale_D <= 1e-6 * scale_D.max()] = np.inf
    latent_nD = (latent_nD - mean_D) / scale_D
    losses = _left_out_losses(latent_nD, level_n, group_n)
    ridge = min(losses, key=losses.__getitem__, default=RIDGES[0])
    weight_4D, bias_4 = _regress(latent_nD, level_n, ridge)
    weight_4D = weight_4D / scale_D
    return weight_4D, bias_4 - weight_4D @ mean_D, ridge, losses


def _left_out_losses(latent_nD: Floats, level_n: Ints, group_n: np.ndarray) -> dict[float, float]:
    from scipy.special import log_softmax
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, len(np.unique(group_n)), int(np.bincount(level_n).max()))
    sums, rows = dict.fromkeys(RIDGES, 0.0), 0
    split = StratifiedGroupKFold(folds).split(latent_nD, level_n, group_n) if folds > 1 else ()
    with warnings.catch_warnings():
        # Of levels that fewer groups have than there are folds.
        warnings.simplefilter("ignore", UserWarning)
        for fitted, left_out in split:
            left_out = left_out[np.isin(level_n[left_out], level_n[fitted])]
            if not len(left_out) or len(np.unique(level_n[fitted])) < 2:
                continue
            rows += len(left_out)
            for ridge in RIDGES:
                weight_4D, bias_4 = _regress(latent_nD[fitted], level_n[fitted], ridge)
                log_n4 = log_softmax(latent_nD[left_out] @ weight_4D.T + bias_4, axis=1)
                sums[ridge] -= float(log_n4[np.arange(len(left_out)), level_n[left_out]].sum())
    return {ridge: loss / rows for ridge, loss in sums.items()} if rows else {}


def _regress(latent_nD: Floats, level_n: Ints, ridge: float) -> tuple[Floats, Floats]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # A fit that has not ended by then is of a ridge that is too weak, and its loss shows that.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=1 / (ridge * len(level_n)), max_iter=1000, tol=1e-6).fit(latent_nD, level_n)
    weight_KD, bias_K = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        weight_KD, bias_K = np.vstack([-weight_KD, weight_KD]) / 2, np.append(-bias_K, bias_K) / 2
    weight_4D, bias_4 = np.zeros((len(LEVEL_NAMES), latent_nD.shape[1])), np.full(len(LEVEL_NAMES), UNSEEN)
    weight_4D[model.classes_], bias_4[model.classes_] = weight_KD, bias_K
    return weight_4D, bias_4


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


def _known_levels(level_n: Ints) -> Ints:
    known: Ints = np.unique(level_n[level_n >= 0])
    return known


def _digests(store: Store, parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(part.digest(store.teacher) for part in parts)


def _dim(parts: Sequence[Part]) -> int:
    return parts[0].layout["pooled"].shape[-1]
