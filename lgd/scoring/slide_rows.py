"""Image files -> their slides by a CSV (columns key, the file's name without suffix, and slide), and rows to print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lgd.base.errors import DataError
from lgd.base.target import Target
from lgd.io.location import Location
from lgd.models.description import ModelConfig
from lgd.scoring.images import OneImage
from lgd.scoring.label_sets import (
    LabelSet,
    format_set,
    name_set,
    read_set,
    round_probabilities,
    show_label,
    show_set,
    write_label,
)
from lgd.scoring.notes import count_notes, join_notes
from lgd.scoring.predict import Prediction, read_answer
from lgd.scoring.slide_answer import SlideScore
from lgd.shards.candidate import safe_key
from lgd.shards.pairs import read_slides


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidePrediction:
    """What a network says of one slide: the mean of its patches."""

    slide: str
    patches: int
    label: str | float | None
    probabilities: dict[str, float | None]
    label_set: LabelSet | None
    notes: list[str]
    """Each with the number of patches that have it."""
    target: Target

    @property
    def level(self) -> str | float | None:
        """The label by its old name, that of HER2."""
        return self.label


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


def join_slides(
    config: ModelConfig, predictions: Sequence[Prediction], slide_of: Mapping[str, str]
) -> list[SlidePrediction]:
    """Slides from their patches, of a network of this config; `slide_of` is what `slides_of_images` gave.

    A slide has the mean probabilities, or the mean value, of its patches that have such.
    """
    by_slide: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_slide.setdefault(slide_of[safe_key(Path(prediction.image).stem)], []).append(prediction)
    rows = []
    for slide, patches in sorted(by_slide.items()):
        target = patches[0].target
        known: list[list[str | float | None]] = [
            [*patch.probabilities.values()] or [patch.label] for patch in patches if patch.label is not None
        ]
        mean_K = np.mean(np.array(known, float), axis=0) if known else None
        label, probabilities = read_answer(target, mean_K)
        rows.append(
            SlidePrediction(
                slide=slide,
                patches=len(patches),
                label=label,
                probabilities=probabilities,
                label_set=read_set(config.conformal, target, mean_K, "slide"),
                notes=count_notes((patch.notes for patch in patches), "patches"),
                target=target,
            )
        )
    return rows


def as_json(row: Prediction | SlidePrediction) -> dict[str, object]:
    """A row as it is printed: `image`, or `slide` and `patches`; the label by its word, `probabilities` and `notes`.

    A value has its unit beside it, and null in place of probabilities. `label_set` has the classes that cannot be
    excluded, `interval` the lowest and the highest value; null where too little calibrated that.
    """
    shown: dict[str, object] = {**show_label(row.target, row.label)}
    shown["probabilities"] = round_probabilities(row.probabilities) or None
    shown[name_set(row.target)] = show_set(row.target, row.label_set)
    return _name_row(row) | shown | {"notes": row.notes}


def as_cells(row: Prediction | SlidePrediction) -> dict[str, object]:
    """A row for a table or a CSV: a column a probability, the notes in the last one."""
    shown: dict[str, object] = {**write_label(row.target, row.label)}
    shown |= round_probabilities(row.probabilities) | {name_set(row.target): format_set(row.target, row.label_set)}
    return _name_row(row) | shown | {"notes": join_notes(row.notes)}


def _name_row(row: Prediction | SlidePrediction) -> dict[str, object]:
    return {"image": row.image} if isinstance(row, Prediction) else {"slide": row.slide, "patches": row.patches}


def list_scores(
    target: Target, scores: Sequence[SlideScore], problems: Mapping[Path, Sequence[str]]
) -> list[dict[str, object]]:
    """Rows of whole slides for a table or a CSV; of one that cannot be scored the reason stands in its notes."""
    rows = []
    for score in scores:
        answer = score.answer
        row: dict[str, object] = {"slide": score.slide, "tiles": score.tiles, "failed": score.failed}
        row["tissue_mm2"] = round(score.tissue.area_mm2, 4)
        row |= write_label(target, answer.label)
        if target.area_percent is not None:
            row["by_area"] = answer.area.label if answer.area else None
        means = {name: answer.probabilities[name].value if answer.probabilities else None for name in target.classes}
        row |= round_probabilities(means)
        row |= {name_set(target): format_set(target, answer.label_set), "notes": join_notes(score.notes)}
        rows.append(row)
    columns = rows[0] if rows else ("slide", "notes")
    for path, problem in problems.items():
        rows.append(dict.fromkeys(columns) | {"slide": path.stem, "notes": join_notes(problem)})
    return rows
