"""H&E files -> levels and probabilities, by patch and by slide."""

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lgd.config import LEVEL_NAMES
from lgd.data.image import decode_upright
from lgd.data.pairs import read_slides, safe_key
from lgd.data.shards import Shard
from lgd.data.stream import Reader, in_batches, stream
from lgd.errors import DataError
from lgd.evaluate.notes import count_notes, join_notes
from lgd.metrics import Predictions
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.models.student import load_student
from lgd.models.teacher import load_teacher
from lgd.stain.checks import find_notes

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
NAMES = {"lgd": "LGD-Net", "he-only": "H&E-only", "two-stream": "two streams", "distil": "label distillation"}
"""Method of a student -> its row in a table."""
_READ = ("logits", "pooled", "features")

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

    @property
    def name(self) -> str:
        """Its row in a table."""
        return NAMES.get(self.method, "IHC teacher")

    @property
    def method(self) -> str:
        """The student's method, or `teacher`."""
        return self.config.method if isinstance(self.config, StudentConfig) else "teacher"

    def score(self, image_BHW3: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (B, size, size, 3) -> `probability` (B, 4), `logits`, and where there are such `pooled` (B, D) and
        `features` (B, C).
        """
        with torch.inference_mode():
            image_B3HW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2).to(self.device)
            out = self.model(image_B3HW)
        found = {name: out[name].float().cpu().numpy() for name in _READ if name in out}
        scaled = torch.from_numpy(found["logits"].astype(np.float64)) / self.config.temperature
        return found | {"probability": torch.softmax(scaled, dim=1).numpy()}


def load_scorer(folder: str | Path, kind: str = "student") -> Scorer:
    """The student, or the teacher, of a folder, on the GPU where there is one."""
    model, config = load_student(folder) if kind == "student" else load_teacher(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Scorer(model=model.to(device), config=config, device=device, role="he" if kind == "student" else "ihc")


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


def find_images(names: Sequence[str]) -> list[Path]:
    """Files of a list of files, folders (searched deep) and glob patterns, sorted and each once."""
    found: set[Path] = set()
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = {p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()}
            if not inside:
                raise DataError(f"{path} holds no {', '.join(sorted(_SUFFIXES))} files")
            found |= inside
        elif path.is_file():
            found.add(path)
        else:
            matching = {Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file()}
            if not matching:
                raise DataError(f"{name} is no file, no folder, and no pattern that matches files")
            found |= matching
    return sorted(found)


def read_image(path: Path, size: int | None) -> np.ndarray:
    """One image file as uint8 (H, W, 3), upright, and shrunk to size x size unless `size` is None."""
    try:
        return decode_upright(path.read_bytes(), str(path), size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


class ScoredImage(NamedTuple):
    """An image file and what the network gave for it."""

    path: Path
    values: dict[str, np.ndarray]
    """Its row of each array that `Scorer.score` gives."""
    notes: list[str]


def score_files(scorer: Scorer, paths: Sequence[Path], batch: int = 32) -> Iterator[ScoredImage]:
    """Score image files, in their order."""
    for start in range(0, len(paths), batch):
        some = paths[start : start + batch]
        images = [read_image(path, scorer.config.size) for path in some]
        out = scorer.score(np.stack(images))
        for row, (path, image_HW3) in enumerate(zip(some, images, strict=True)):
            values = {name: array[row] for name, array in out.items()}
            yield ScoredImage(path, values, collect_notes(scorer, image_HW3))


def collect_notes(scorer: Scorer, image_HW3: np.ndarray) -> list[str]:
    """All notes on what a scorer says of one decoded image of its size; each kind of note is added here."""
    return find_notes(image_HW3) if scorer.role == "he" else []


def as_level(probability_4: np.ndarray) -> dict[str, Any]:
    """The most probable level, and the probability of each."""
    level = int(np.argmax(probability_4))
    chances = {name: round(float(p), 4) for name, p in zip(LEVEL_NAMES, probability_4, strict=True)}
    return {"level": LEVEL_NAMES[level], "probabilities": chances}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is kept of a scored image."""

    image: str
    slide: str | None
    """Its slide, where rows are to be slides."""
    probability_4: np.ndarray
    notes: list[str]


def predict_images(scorer: Scorer, paths: Sequence[Path], slides: Path | None = None) -> list[Prediction]:
    """Score image files; `slides` is a CSV with columns key (file name without suffix) and slide."""
    slide_of = {} if slides is None else read_slides(slides)
    unknown = [path for path in paths if slides is not None and safe_key(path.stem) not in slide_of]
    if unknown:
        raise DataError(
            f"{slides} names no slide for {len(unknown)} of {len(paths)} images, the first of them {unknown[0]}: add "
            f"a row {unknown[0].stem},SLIDE"
        )
    return [
        Prediction(
            image=str(scored.path),
            slide=slide_of.get(safe_key(scored.path.stem)),
            probability_4=scored.values["probability"],
            notes=scored.notes,
        )
        for scored in score_files(scorer, paths)
    ]


def as_rows(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Rows as they are printed: `image`, or `slide` and its `patches`; `level`, `probabilities`, and `notes`.

    A slide has the mean probability of its patches, and its notes say on how many of them each note is.
    """
    if not any(prediction.slide for prediction in predictions):
        return [{"image": p.image} | as_level(p.probability_4) | {"notes": p.notes} for p in predictions]
    by_slide: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        assert prediction.slide is not None, prediction.image
        by_slide.setdefault(prediction.slide, []).append(prediction)
    return [
        {"slide": slide, "patches": len(patches)}
        | as_level(np.mean([patch.probability_4 for patch in patches], axis=0))
        | {"notes": count_notes((patch.notes for patch in patches), "patches")}
        for slide, patches in sorted(by_slide.items())
    ]


def as_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `as_rows` for a table or a CSV: a column a probability, the notes in the last one."""
    plain = {name: value for name, value in row.items() if name not in ("probabilities", "notes")}
    return plain | row["probabilities"] | {"notes": join_notes(row["notes"])}


def predict(scorer: Scorer, paths: Sequence[Path], slides: Path | None = None) -> list[dict[str, Any]]:
    """Rows of `as_rows`, one an image, or one a slide where `slides` names them."""
    return as_rows(predict_images(scorer, paths, slides))
