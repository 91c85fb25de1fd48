"""H&E files -> levels and probabilities, by patch and by slide."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lgd.config import LEVEL_NAMES
from lgd.data.archive import Shard
from lgd.data.image import decode_upright, resize, upright_size
from lgd.data.pairs import read_slides, safe_key
from lgd.data.stream import Reader, in_batches, stream
from lgd.errors import DataError
from lgd.evaluate.notes import count_notes, join_notes
from lgd.evaluate.scale import Mpp, fit_scale
from lgd.metrics import Predictions
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.models.methods import Method, find_method, load_student
from lgd.models.teacher import load_teacher
from lgd.stain.checks import find_notes

_MOST = 20
"""Files that a message lists."""
_READ = ("logits", "pooled", "features")
NO_NUMBER = "the network gives no number for this image, and so no level: its training diverged"
NO_LABELS = "the network saw no label in training and gives no level; its latents can be queried"
VIRTUAL = "the network was trained on virtual tissue only: what it says of real tissue means nothing"

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
        return "IHC teacher" if self.method is None else self.method.title

    @property
    def method(self) -> type[Method] | None:
        """The student's method; None of a teacher."""
        return find_method(self.config.method) if isinstance(self.config, StudentConfig) else None

    def score(self, image_BHW3: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (B, H, W, 3) -> `probability` (B, 4), `logits`, and where there are such `pooled` (B, D) and `features`
        (B, C). The probabilities of a network that saw no label are NaN.
        """
        with torch.inference_mode():
            image_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2).to(self.device)
            out = self.model(image_B3HW)
        found = {name: out[name].float().cpu().numpy() for name in _READ if name in out}
        scaled = torch.from_numpy(found["logits"].astype(np.float64)) / self.config.temperature
        probability_B4 = torch.softmax(scaled, dim=1).numpy()
        if not self.config.training.labelled:
            # What its head says was never taught.
            probability_B4 = np.full_like(probability_B4, np.nan)
        return found | {"probability": probability_B4}


def load_scorer(folder: str | Path, kind: str = "student", code: Collection[str] = ()) -> Scorer:
    """The student, or the teacher, of a folder, on the GPU where there is one; `code` outside LGD that it may run."""
    model, config = load_student(folder, code) if kind == "student" else load_teacher(folder, code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    role = "he" if kind == "student" else "ihc"
    return Scorer(model=model.to(device), config=config, device=device, role=role, folder=str(folder))


def score_shards(
    scorer: Scorer,
    shards: Sequence[Shard],
    *,
    threads: int,
    batch: int = 64,
    vectors: str = "pooled",
    alter: Alter | None = None,
) -> tuple[Predictions, np.ndarray | None]:
    """Score every sample once, in the order of the shards; also its `vectors` (n, D), if the network has such.

    `alter` changes the decoded images before the network sees them.
    """
    reader = Reader(shards, (scorer.role,), scorer.config.size)
    keys, groups, levels, found = [], [], [], []
    for samples, images in stream(reader, in_batches(range(reader.total), batch), threads=threads):
        keys += [sample.key for sample in samples]
        groups += [sample.meta.group for sample in samples]
        levels += [sample.level for sample in samples]
        image_BHW3 = images[scorer.role]
        if alter is not None:
            image_BHW3 = alter(image_BHW3, [sample.key for sample in samples])
        found.append(scorer.score(image_BHW3))
    reader.close()
    probability = np.concatenate([f["probability"] for f in found])
    predictions = Predictions(
        name=scorer.name, keys=keys, groups=groups, level=np.array(levels, np.int64), probability=probability
    )
    vectors_nD = np.concatenate([f[vectors] for f in found]) if vectors in found[0] else None
    return predictions, vectors_nD


def read_image(path: Path, size: int | None) -> np.ndarray:
    """One image file as uint8 (H, W, 3), upright, and shrunk to size x size unless `size` is None."""
    return decode_upright(_read(path), str(path), size)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def read_fitted(scorer: Scorer, path: Path, mpp: Mpp) -> tuple[np.ndarray, list[str]]:
    """One image file as uint8 (H, W, 3) at the scale of the scorer's training patches, and notes on that."""
    content, size = _read(path), scorer.config.size
    height, width = upright_size(content, str(path))
    try:
        fit = fit_scale(scorer.config.training.shapes, size, height, width, mpp)
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    if (fit.height, fit.width) == (size, size):
        return decode_upright(content, str(path), size), fit.notes
    return resize(decode_upright(content, str(path)), fit.height, fit.width), fit.notes


class ScoredImage(NamedTuple):
    """An image file and what the network gave for it."""

    path: Path
    values: dict[str, np.ndarray]
    """Its row of each array that `Scorer.score` gives; none where the file cannot be used."""
    notes: list[str]
    """What a reader must know; or why the file cannot be used."""


def score_files(
    scorer: Scorer, paths: Sequence[Path], mpp: Mpp = None, batch: int = 32, keep_going: bool = False
) -> Iterator[ScoredImage]:
    """Score image files, in their order; `mpp` is what is known of their scale.

    A file that cannot be used raises `DataError`, or comes without values to who keeps going.
    """
    for start in range(0, len(paths), batch):
        read = [_try_to_read(scorer, path, mpp, keep_going) for path in paths[start : start + batch]]
        for shape, alike in itertools.groupby(read, lambda one: None if one.image_HW3 is None else one.image_HW3.shape):
            some = list(alike)
            if shape is None:
                yield from (ScoredImage(one.path, {}, one.notes) for one in some)
                continue
            out = scorer.score(np.stack([one.image_HW3 for one in some]))
            for row, one in enumerate(some):
                values = {name: array[row] for name, array in out.items()}
                yield ScoredImage(one.path, values, one.notes + collect_notes(scorer, one.image_HW3, values))


class _Read(NamedTuple):
    path: Path
    image_HW3: Any
    """None where the file cannot be used."""
    notes: list[str]


def _try_to_read(scorer: Scorer, path: Path, mpp: Mpp, keep_going: bool) -> _Read:
    try:
        return _Read(path, *read_fitted(scorer, path, mpp))
    except DataError as error:
        if not keep_going:
            raise
        return _Read(path, None, [str(error).removeprefix(str(path)).lstrip(": ")])


def collect_notes(scorer: Scorer, image_HW3: np.ndarray, values: dict[str, np.ndarray]) -> list[str]:
    """All notes on what a scorer says of one decoded image; each kind of note is added here."""
    notes = find_notes(image_HW3) if scorer.role == "he" else []
    if not np.isfinite(values["logits"]).all():
        notes.append(NO_NUMBER)
    if not scorer.config.training.labelled:
        notes.append(NO_LABELS)
    if scorer.config.training.virtual:
        notes.append(VIRTUAL)
    return notes


def as_level(probability_4: np.ndarray | None) -> dict[str, Any]:
    """The most probable level, and the probability of each; None where there is none, or one is no number."""
    if probability_4 is None or not np.isfinite(probability_4).all():
        return {"level": None, "probabilities": dict.fromkeys(LEVEL_NAMES)}
    level = int(np.argmax(probability_4))
    chances = {name: round(float(p), 4) for name, p in zip(LEVEL_NAMES, probability_4, strict=True)}
    return {"level": LEVEL_NAMES[level], "probabilities": chances}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is kept of a scored image."""

    path: Path
    slide: str | None
    """Its slide, where rows are to be slides."""
    probability_4: np.ndarray | None
    """None where the file cannot be used."""
    notes: list[str]


def problems_of(unread: Sequence[ScoredImage | Prediction], total: int) -> list[str]:
    """The message on files that could not be used; none where all could."""
    if not unread:
        return []
    lines = [f"  {one.path}: {'; '.join(one.notes)}" for one in unread[:_MOST]]
    more = [f"  and {len(unread) - _MOST} more"] if len(unread) > _MOST else []
    return [f"{len(unread)} of {total} images have no answer:", *lines, *more]


def predict_images(
    scorer: Scorer, paths: Sequence[Path], slides: Path | None = None, mpp: Mpp = None, keep_going: bool = False
) -> list[Prediction]:
    """Score image files; see `score_files`.

    `slides` is a CSV with columns key (file name without suffix) and slide. Two images of one name are refused then.
    """
    slide_of = {} if slides is None else slides_of_images(slides, paths)
    return [
        Prediction(
            path=scored.path,
            slide=slide_of.get(safe_key(scored.path.stem)),
            probability_4=scored.values.get("probability"),
            notes=scored.notes,
        )
        for scored in score_files(scorer, paths, mpp, keep_going=keep_going)
    ]


def slides_of_images(slides: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Key -> slide of a CSV which names one for each image; `DataError` where it does not, or for equal names."""
    require_names(slides, paths)
    slide_of = read_slides(slides)
    unknown = [path for path in paths if safe_key(path.stem) not in slide_of]
    if unknown:
        raise DataError(
            f"{slides} names no slide for {len(unknown)} of {len(paths)} images, the first of them {unknown[0]}: add "
            f"a row {unknown[0].stem},SLIDE"
        )
    return slide_of


def require_names(slides: Path, paths: Sequence[Path]) -> None:
    """Raise `DataError` where a CSV of slides cannot tell two images apart."""
    seen: dict[str, Path] = {}
    for path in paths:
        first = seen.setdefault(safe_key(path.stem), path)
        if first != path:
            raise DataError(
                f"{slides} tells slides by file name, and {first} and {path} have the same: rename one, or ask for the "
                "slides one at a time"
            )


def as_rows(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Rows as they are printed: `image`, or `slide` and its `patches`; `level`, `probabilities`, and `notes`.

    A slide has the mean probability of its patches, and its notes say on how many of them each note is.
    """
    if not any(prediction.slide for prediction in predictions):
        return [{"image": str(p.path)} | as_level(p.probability_4) | {"notes": p.notes} for p in predictions]
    by_slide: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        assert prediction.slide is not None, prediction.path
        by_slide.setdefault(prediction.slide, []).append(prediction)
    return [
        {"slide": slide, "patches": len(patches)}
        | as_level(_mean([patch.probability_4 for patch in patches]))
        | {"notes": count_notes((patch.notes for patch in patches), "patches")}
        for slide, patches in sorted(by_slide.items())
    ]


def _mean(probability_n4: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The mean of those that are numbers; None where none is."""
    finite = [one for one in probability_n4 if one is not None and np.isfinite(one).all()]
    return np.mean(finite, axis=0) if finite else None


def as_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `as_rows` for a table or a CSV: a column a probability, the notes in the last one."""
    plain = {name: value for name, value in row.items() if name not in ("probabilities", "notes")}
    return plain | row["probabilities"] | {"notes": join_notes(row["notes"])}


def predict(scorer: Scorer, paths: Sequence[Path], slides: Path | None = None, mpp: Mpp = None) -> list[dict[str, Any]]:
    """Rows of `as_rows`, one an image, or one a slide where `slides` names them."""
    return as_rows(predict_images(scorer, paths, slides, mpp))
