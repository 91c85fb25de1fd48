"""H&E files -> levels and probabilities, by patch and by slide."""

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lgd.config import LEVEL_NAMES
from lgd.data.image import decode_upright
from lgd.data.pairs import read_slides, safe_key
from lgd.data.shards import Shard
from lgd.data.stream import Reader, in_batches, stream
from lgd.errors import DataError
from lgd.metrics import Predictions
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.models.student import load_student
from lgd.models.teacher import load_teacher

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


def score_files(scorer: Scorer, paths: Sequence[Path], batch: int = 32) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """Score image files; yields each path with its row of what `Scorer.score` gives."""
    for start in range(0, len(paths), batch):
        some = paths[start : start + batch]
        out = scorer.score(np.stack([read_image(path, scorer.config.size) for path in some]))
        for row, path in enumerate(some):
            yield path, {name: array[row] for name, array in out.items()}


def as_row(name: str, probability_4: np.ndarray) -> dict[str, Any]:
    """A prediction as it is printed: image, level, and the probability of each level."""
    return {"image": name} | as_level(probability_4)


def as_level(probability_4: np.ndarray) -> dict[str, Any]:
    """The most probable level, and the probability of each."""
    level = int(np.argmax(probability_4))
    chances = {name: round(float(p), 4) for name, p in zip(LEVEL_NAMES, probability_4, strict=True)}
    return {"level": LEVEL_NAMES[level], "probabilities": chances}


def predict(scorer: Scorer, paths: Sequence[Path], slides: Path | None = None) -> list[dict[str, Any]]:
    """Rows of `as_row`, one an image, or one a slide: `slide`, its `patches`, and their mean probability.

    `slides` is a CSV with columns key (file name without suffix) and slide.
    """
    slide_of = {} if slides is None else read_slides(slides)
    unknown = [path for path in paths if slides is not None and safe_key(path.stem) not in slide_of]
    if unknown:
        raise DataError(
            f"{slides} names no slide for {len(unknown)} of {len(paths)} images, the first of them {unknown[0]}: add "
            f"a row {unknown[0].stem},SLIDE"
        )
    scored = [(path, row["probability"]) for path, row in score_files(scorer, paths)]
    if slides is None:
        return [as_row(str(path), probability) for path, probability in scored]
    by_slide: dict[str, list[np.ndarray]] = {}
    for path, probability in scored:
        by_slide.setdefault(slide_of[safe_key(path.stem)], []).append(probability)
    return [
        {"slide": slide, "patches": len(rows)} | as_level(np.mean(rows, axis=0))
        for slide, rows in sorted(by_slide.items())
    ]
