"""Image files -> their slides by a CSV (columns key, the file's name without suffix, and slide), and rows to print."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.scoring.images import OneImage
from lgd.scoring.predict import (
    Prediction,
    choose_level,
    count_notes,
    join_notes,
    name_probabilities,
    round_probabilities,
)
from lgd.shards.candidate import safe_key
from lgd.shards.pairs import read_slides


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidePrediction:
    """What a network says of one slide: the mean of its patches."""

    slide: str
    patches: int
    level: str | None
    probabilities: dict[str, float | None]
    notes: list[str]
    """Each with the number of patches that have it."""


def slides_of_images(slides: Location, paths: Sequence[Path]) -> dict[str, str]:
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


def require_names(slides: Location, images: Sequence[OneImage]) -> None:
    """Raise `DataError` where a CSV of slides cannot distinguish two images."""
    seen: dict[str, OneImage] = {}
    for image in images:
        first = seen.setdefault(safe_key(image.stem), image)
        if str(first) != str(image):
            raise DataError(
                f"{slides} names slides by file name, and {first} and {image} have the same: rename one, or ask for "
                "the slides one at a time"
            )


def join_slides(predictions: Sequence[Prediction], slide_of: Mapping[str, str]) -> list[SlidePrediction]:
    """Slides from their patches; `slide_of` is what `slides_of_images` gave.

    A slide has the mean probabilities of its patches that have such.
    """
    by_slide: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_slide.setdefault(slide_of[safe_key(Path(prediction.image).stem)], []).append(prediction)
    rows = []
    for slide, patches in sorted(by_slide.items()):
        known = [np.array([*patch.probabilities.values()], float) for patch in patches if patch.level is not None]
        probabilities = name_probabilities(np.mean(known, axis=0) if known else None)
        rows.append(
            SlidePrediction(
                slide=slide,
                patches=len(patches),
                level=choose_level(probabilities),
                probabilities=probabilities,
                notes=count_notes((patch.notes for patch in patches), "patches"),
            )
        )
    return rows


def as_json(row: Prediction | SlidePrediction) -> dict[str, object]:
    """A row as it is printed: `image`, or `slide` and `patches`; `level`, `probabilities` and `notes`."""
    fields = asdict(row) | {"probabilities": round_probabilities(row.probabilities)}
    fields.pop("usable", None)
    return fields


def as_cells(row: Prediction | SlidePrediction) -> dict[str, object]:
    """A row for a table or a CSV: a column a probability, the notes in the last one."""
    fields = as_json(row)
    del fields["probabilities"], fields["notes"]
    return {**fields, **round_probabilities(row.probabilities), "notes": join_notes(row.notes)}
