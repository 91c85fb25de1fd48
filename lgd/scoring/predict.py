"""H&E files -> levels and probabilities by patch, with notes: what a reader must know of the result of one image.

Notes stand in an image's row. A kind of note is one fixed sentence, so that it can be counted: ten thousand images give
one line a kind.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lgd.base.device import exact_float32, find_device
from lgd.base.errors import DataError
from lgd.config_files import find_in_run
from lgd.config_sections import LEVEL_NAMES
from lgd.io.location import Location
from lgd.metrics import Predictions
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.models.loading import load_student
from lgd.models.methods import Method, find_method
from lgd.models.teacher import load_teacher
from lgd.scoring.images import Fitted, Images, Mpp, OneImage, read_fitted, take_images
from lgd.shards.archive import Shard
from lgd.shards.profiles import describe_profiles
from lgd.stain.checks import find_notes
from lgd.stream.reader import Reader, in_batches, stream

logger = logging.getLogger(__name__)

_READ = ("logits", "pooled", "features", "query")
_RETRIEVES_BY = {"latents": ("pooled", "query"), "features": ("features",)}
TEACHER_ROW = "IHC teacher"
"""The teacher's row in a table."""
NO_NUMBER = "the network gives no number for this image, and so no level: its training diverged"
NO_LABELS = "the network saw no label in training and gives no level; its latents can be queried"
VIRTUAL = "the network was trained on virtual tissue only: what it says of real tissue means nothing"
_MOST = 20
"""Images that a message lists."""

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

    def score(self, image_BHW3: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (B, H, W, 3) -> `probability` (B, 4), and where there are such `logits`, `pooled` and `query` (B, D),
        of further teachers `pooled@NAME` and `query@NAME`, and `features` (B, C). The probabilities of a network that
        saw no label are NaN.
        """
        with torch.inference_mode(), exact_float32():
            image_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2).to(self.device)
            out = self.model(image_B3HW)
        found = {name: one.float().cpu().numpy() for name, one in out.items() if name.partition("@")[0] in _READ}
        if not self.config.training.labelled:
            # What its head says was never taught; a frozen teacher has none.
            return found | {"probability": np.full((len(image_BHW3), len(LEVEL_NAMES)), np.nan)}
        scaled = torch.from_numpy(found["logits"].astype(np.float64)) / self.config.temperature
        probability_B4 = torch.softmax(scaled, dim=1).numpy()
        return found | {"probability": probability_B4}


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
    compare with a level, and so all are unknown.
    """
    reader = Reader(shards, (scorer.role,), scorer.config.size)
    keys, groups, levels, found = [], [], [], []
    for samples, images in stream(reader, in_batches(range(reader.total), batch), threads=threads):
        keys += [sample.key for sample in samples]
        groups += [sample.meta.group for sample in samples]
        levels += [sample.level if scorer.config.training.labelled else -1 for sample in samples]
        image_BHW3 = images[scorer.role]
        if alter is not None:
            image_BHW3 = alter(image_BHW3, [sample.key for sample in samples])
        found.append(scorer.score(image_BHW3))
    reader.close()
    probability = np.concatenate([f["probability"] for f in found])
    predictions = Predictions(
        name=scorer.name, keys=keys, groups=groups, level=np.array(levels, np.int64), probability=probability
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
    level: str | None
    """0, 1+, 2+ or 3+; None where the network gives none."""
    probabilities: dict[str, float | None]
    """Level -> its probability."""
    notes: list[str]
    """Sentences that a reader must know; or why the image cannot be used."""
    usable: bool = True


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
            for row, (image, (image_HW3, notes, _)) in enumerate(zip(names, fitted_of, strict=True)):
                values = {name: array[row] for name, array in out.items()}
                probabilities = name_probabilities(values.get("probability"))
                prediction = Prediction(
                    image=str(image),
                    level=choose_level(probabilities),
                    probabilities=probabilities,
                    notes=notes + (collect_notes(scorer, image_HW3, values) if values else []),
                    usable=bool(values),
                )
                yield prediction, values
    if note := describe_profiles(profiles, "images"):
        logger.warning("%s", note)


def _try_to_read(scorer: Scorer, image: OneImage, mpp: Mpp, keep_going: bool) -> Fitted:
    """As `read_fitted`; with `keep_going` without pixels for an image that cannot be used, and why."""
    try:
        return read_fitted(image, scorer.config.training.shapes, scorer.config.size, mpp)
    except DataError as error:
        if not keep_going:
            raise
        return Fitted(np.empty(0, np.uint8), [str(error).removeprefix(str(image)).lstrip(": ")])


def collect_notes(scorer: Scorer, image_HW3: np.ndarray, values: dict[str, np.ndarray]) -> list[str]:
    """All notes on what a scorer says of one decoded image; each kind of note is added here."""
    notes = find_notes(image_HW3) if scorer.role == "he" else []
    if "logits" in values and not np.isfinite(values["logits"]).all():
        notes.append(NO_NUMBER)
    if not scorer.config.training.labelled:
        notes.append(NO_LABELS)
    if scorer.config.training.virtual:
        notes.append(VIRTUAL)
    return notes


def name_probabilities(probability_4: np.ndarray | None) -> dict[str, float | None]:
    """The probability of each level; None where there is none, or one is no number."""
    if probability_4 is None or not np.isfinite(probability_4).all():
        return dict.fromkeys(LEVEL_NAMES)
    return dict(zip(LEVEL_NAMES, probability_4.tolist(), strict=True))


def choose_level(probabilities: Mapping[str, float | None]) -> str | None:
    """The most probable level; None where there is no probability."""
    known = {name: probability for name, probability in probabilities.items() if probability is not None}
    return max(known, key=known.__getitem__) if known else None


def round_probabilities(probabilities: Mapping[str, float | None]) -> dict[str, float | None]:
    """To the 4 digits that are shown."""
    return {name: None if one is None else round(one, 4) for name, one in probabilities.items()}


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
        >>> rows[0].level, rows[0].probabilities["3+"], rows[0].notes
    """
    if not isinstance(scorer, Scorer):
        scorer = load_scorer(scorer)
    return [prediction for prediction, _ in score_images(scorer, take_images(images), mpp, keep_going=keep_going)]


def count_notes(notes_of: Iterable[Sequence[str]], what: str) -> list[str]:
    """One line a kind of note, `3 of 48 images: nearly blank`, in the order in which they were met.

    `notes_of` has the notes of each image (of each `what`).
    """
    rows = [dict.fromkeys(notes) for notes in notes_of]
    counts = Counter(itertools.chain(*rows))
    return [f"{count} of {len(rows)} {what}: {note}" for note, count in counts.items()]


def join_notes(notes: Sequence[str]) -> str:
    """The notes of a row as one cell of a table or a CSV."""
    return "; ".join(notes)


def describe_unusable(reasons: Mapping[str, Sequence[str]], total: int) -> list[str]:
    """The message on images, by name, that cannot be used; none where all can, and a `DataError` where none can."""
    if not reasons:
        return []
    lines = [f"  {image}: {join_notes(notes)}" for image, notes in reasons.items()]
    more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    message = [f"{len(lines)} of {total} images have no answer:", *lines[:_MOST], *more]
    if len(reasons) == total:
        raise DataError(*message)
    return message
