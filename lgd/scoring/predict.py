"""H&E files -> labels and probabilities by patch, with notes: what a reader must know of the result of one image."""

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lgd.base.device import exact_float32, find_device
from lgd.base.errors import DataError
from lgd.base.labels import as_labels
from lgd.base.target import Target
from lgd.config_files import find_in_run
from lgd.io.location import Location
from lgd.labels.predictions import Predictions
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.models.grids import read_grids
from lgd.models.heads import read_answers
from lgd.models.loading import load_student
from lgd.models.methods import Method, find_method
from lgd.models.teacher import load_teacher
from lgd.scoring.images import Fitted, Images, Mpp, OneImage, read_fitted, take_images
from lgd.scoring.label_sets import LabelSet, read_set
from lgd.scoring.notes import collect_notes
from lgd.shards.archive import Shard
from lgd.shards.manifest import PatchMeta
from lgd.shards.profiles import describe_profiles
from lgd.stream.reader import Reader, in_batches, stream

logger = logging.getLogger(__name__)

_READ = ("logits", "pooled", "features", "query")
_RETRIEVES_BY = {"latents": ("pooled", "query"), "features": ("features",)}
SITES = ("center", "scanner")
"""What is known of where a patch is from."""
TEACHER_ROW = "IHC teacher"
"""The teacher's row in a table."""

Alter = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""A change of a batch: uint8 (B, size, size, 3) and the samples' keys -> the same shape and type."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A trained network, ready to score images."""

    model: nn.Module
    config: StudentConfig | TeacherConfig
    device: str
    role: str
    """The image that it reads: he or ihc."""
    folder: str = ""
    """Where it lies."""

    @property
    def name(self) -> str:
        """Its row in a table."""
        return TEACHER_ROW if self.method is None else self.method.title

    @property
    def method(self) -> type[Method] | None:
        """The student's method; None of a teacher."""
        return find_method(self.config.method) if isinstance(self.config, StudentConfig) else None

    @property
    def retrieves_by(self) -> str | None:
        """By which of its vectors patches are found: latents, which a teacher's are too, features, or none."""
        return "latents" if self.method is None else self.method.retrieves_by

    def score(self, image_BHW3: np.ndarray, grids: bool = False) -> dict[str, np.ndarray]:
        """uint8 (B, H, W, 3) -> `output`, and where there are such `logits`, `pooled` and `query` (B, D), of further
        teachers `pooled@NAME` and `query@NAME`, and `features` (B, C); with `grids` also those of `read_grids`.

        `output` has the probabilities of the classes (B, K), or values (B, 1); NaN of a network that saw no label.
        """
        with torch.inference_mode(), exact_float32():
            image_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2).to(self.device)
            out = self.model(image_B3HW)
        found = {name: one.float().cpu().numpy() for name, one in out.items() if name.partition("@")[0] in _READ}
        found |= read_grids(out, self.config) if grids else {}
        training = self.config.training
        if not training.labelled:
            # What its head says was never taught; a frozen teacher has none.
            return found | {"output": np.full((len(image_BHW3), training.target.width), np.nan)}
        logits_BK = torch.from_numpy(found["logits"])
        output_BK = read_answers(logits_BK, training.target, training.values, self.config.temperature)
        return found | {"output": output_BK.numpy()}


def load_scorer(folder: str | Location, kind: str = "student", code: Collection[str] = ()) -> Scorer:
    """A trained network, ready to score images, on the GPU where there is one.

    Args:
        folder: Of the student or the teacher; or, for the student, of its run.
        kind: `student`, or `teacher`.
        code: Code outside LGD that the network may run, as `python:package.module:name`.

    Returns:
        What `predict` and `query` take, so that the network is loaded once for many calls.

    Raises:
        DataError: For a folder without such a network, and for one that names other code.

    Example:
        >>> scorer = lgd.load_scorer("runs/demo/student")
        >>> rows = lgd.predict(scorer, "he.png")
    """
    folder = find_in_run(folder, "student") if kind == "student" else folder
    model, config = load_student(folder, code) if kind == "student" else load_teacher(folder, code)
    device = find_device()
    role = "he" if kind == "student" else "ihc"
    return Scorer(model=model.to(device), config=config, device=device, role=role, folder=str(folder))


def score_shards(
    scorer: Scorer, shards: Sequence[Shard], *, threads: int, batch: int = 64, alter: Alter | None = None
) -> tuple[Predictions, dict[str, np.ndarray]]:
    """Score every sample once, in the order of the shards; also the vectors that the network retrieves by, (n, D) each,
    by their names in `Scorer.score`.

    `alter` changes the decoded images before the network sees them. A network that saw no label has no answer to
    compare with a label, and so all are unknown. Raises `DataError` for labels of another target than the network's.
    """
    training = scorer.config.training
    reader = Reader(shards, (scorer.role,), scorer.config.size)
    metas, found = list[PatchMeta](), []
    for samples, images in stream(reader, in_batches(range(reader.total), batch), threads=threads):
        metas += [sample.meta for sample in samples]
        image_BHW3 = images[scorer.role]
        if alter is not None:
            image_BHW3 = alter(image_BHW3, [sample.key for sample in samples])
        found.append(scorer.score(image_BHW3))
    reader.close()
    labels = [meta.label if training.labelled else None for meta in metas]
    foreign = [shard for shard in shards if shard.target != training.target]
    if foreign and any(label is not None for label in labels):
        raise DataError(
            f"{foreign[0].path.parent} has labels of {foreign[0].target.name}, and the network {scorer.folder} was "
            f"taught {training.target.name}: score it on a set of that target, or on one without labels"
        )
    sites = {name: [getattr(meta, name) or "" for meta in metas] for name in SITES}
    predictions = Predictions(
        target=training.target,
        name=scorer.name,
        keys=[meta.key for meta in metas],
        groups=[meta.group for meta in metas],
        label=as_labels(training.target, labels),
        output=np.concatenate([f["output"] for f in found]),
        sites={name: values for name, values in sites.items() if any(values)},
        conformal=scorer.config.conformal,
        places=np.array([meta.place for meta in metas], np.float64),
    )
    kinds = _RETRIEVES_BY.get(scorer.retrieves_by or "", ())
    names = [name for name in found[0] if name.partition("@")[0] in kinds]
    return predictions, {name: np.concatenate([f[name] for f in found]) for name in names}


def choose_latents(values: Mapping[str, np.ndarray], of: str = "") -> np.ndarray:
    """Of what `Scorer.score` gives the latents that queries compare: those of the map, else those of the head.

    `of` ends the names of those of a further teacher (`StudentConfig.suffix_of`).
    """
    return values[f"query{of}" if f"query{of}" in values else f"pooled{of}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a network says of one image."""

    image: str
    """The file's path; of an image in memory its place among those that were given, such as images[0]."""
    label: str | float | None
    """Name of the class, such as 2+, or the value; None where the network gives none."""
    probabilities: dict[str, float | None]
    """Class -> its probability; empty where labels are values."""
    label_set: LabelSet | None
    """The classes that cannot be excluded, or the lowest and the highest value (`lgd.labels.conformal`)."""
    notes: list[str]
    """Sentences that a reader must know; or why the image cannot be used."""
    target: Target
    """What is predicted."""
    usable: bool = True

    @property
    def level(self) -> str | float | None:
        """The label by its old name, that of HER2."""
        return self.label


def score_images(
    scorer: Scorer, images: Sequence[OneImage], mpp: Mpp = None, batch: int = 32, keep_going: bool = False
) -> Iterator[tuple[Prediction, dict[str, np.ndarray]]]:
    """Score images, in their order: what the network says of each, and its row of what `Scorer.score` gives.

    `mpp` is what is known of their scale. An image that cannot be used raises `DataError`, or with `keep_going` comes
    without values. At the end a warning says where their colour profiles differ.
    """
    profiles = []
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        read = [(image, _try_to_read(scorer, image, mpp, keep_going)) for image in some]
        profiles += [fitted.profile for _, fitted in read if fitted.pixels.size]
        for _, alike in itertools.groupby(read, lambda one: one[1].pixels.shape):
            names, fitted_of = zip(*alike, strict=True)
            out = scorer.score(np.stack([one.pixels for one in fitted_of])) if fitted_of[0].pixels.size else {}
            for row, (image, fitted) in enumerate(zip(names, fitted_of, strict=True)):
                values = {name: array[row] for name, array in out.items()}
                yield make_prediction(scorer, str(image), fitted, values), values
    if note := describe_profiles(profiles, "images"):
        logger.warning("%s", note)


def make_prediction(scorer: Scorer, image: str, fitted: Fitted, values: Mapping[str, np.ndarray]) -> Prediction:
    """What a network says of one image, of its row of what `Scorer.score` gives; without one it is not usable."""
    training = scorer.config.training
    label, probabilities = read_answer(training.target, values.get("output"))
    return Prediction(
        image=image,
        label=label,
        probabilities=probabilities,
        label_set=read_set(scorer.config.conformal, training.target, values.get("output"), "patch"),
        notes=fitted.notes + (collect_notes(training, scorer.role, fitted.pixels, values) if values else []),
        target=training.target,
        usable=bool(values),
    )


def _try_to_read(scorer: Scorer, image: OneImage, mpp: Mpp, keep_going: bool) -> Fitted:
    """As `read_fitted`; with `keep_going` without pixels for an image that cannot be used, and why."""
    try:
        return read_fitted(image, scorer.config.training, scorer.config.size, mpp)
    except DataError as error:
        if not keep_going:
            raise
        return Fitted(np.empty(0, np.uint8), [str(error).removeprefix(str(image)).lstrip(": ")])


def read_answer(target: Target, output_K: np.ndarray | None) -> tuple[str | float | None, dict[str, float | None]]:
    """The label and the probability of each class, of what `Scorer.score` gives of one image.

    None where there is no output, or it is not finite; of a number there are no probabilities.
    """
    known = output_K is not None and bool(np.isfinite(output_K).all())
    if output_K is None or not known:
        return None, dict.fromkeys(target.classes)
    if target.is_number:
        return float(output_K[0]), {}
    return target.name_label(int(output_K.argmax())), dict(zip(target.classes, output_K.tolist(), strict=True))


def predict(
    scorer: Scorer | str | Location, images: Images, *, mpp: Mpp = None, keep_going: bool = False
) -> list[Prediction]:
    """Score H&E images.

    Args:
        scorer: A trained student, from `load_scorer`, or its folder, or that of its run.
        images: One image or several: files, folders or patterns; uint8 arrays (H, W, 3), RGB; Pillow images. EXIF
            orientations are applied. A JPEG file is shrunk while it is decoded, as in training: against its pixels as
            an array, the probabilities differ in the third or fourth digit.
        mpp: Micrometres per pixel of all of them, or `"unknown"` to score them as they are. By default an image of the
            training patches' size is taken to have their scale, and others are refused.
        keep_going: Give an image that cannot be used a row that is not `usable`, rather than raise.

    Returns:
        A row for each image, in the order given; the files of a folder are sorted.

    Raises:
        ConfigError: For what is no image, and for urls.
        DataError: For a folder that holds no student, a path without images, and an image that cannot be used.

    Example:
        >>> rows = lgd.predict("runs/demo/student", ["he.png", Image.open("other.png"), array])
        >>> rows[0].label, rows[0].probabilities["3+"], rows[0].notes
    """
    if not isinstance(scorer, Scorer):
        scorer = load_scorer(scorer)
    conformal = scorer.config.conformal
    if few := conformal and conformal.explain_size():
        logger.warning("no label sets: %s", few)
    return [prediction for prediction, _ in score_images(scorer, take_images(images), mpp, keep_going=keep_going)]
