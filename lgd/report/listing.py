"""What each model of a report said of each patch and of each slide, as CSV.

    predictions-by-patch.csv    model, key, group, label, predicted, a column a class, label_set, center, scanner
    predictions-by-slide.csv    the same with slide in the place of key and group; only where slides can be scored

A label is the name of a class, or a value; the column of a class has its probability. `label_set`, of a value
`interval`, has what cannot be excluded. What is unknown is empty.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.io.files import write_bytes
from lgd.io.location import Location
from lgd.io.tables import write_csv
from lgd.labels.conformal import By
from lgd.labels.predictions import Predictions
from lgd.report.slides import find_slides
from lgd.scoring.label_sets import format_set, name_set, read_set
from lgd.scoring.predict import SITES

BY_PATCH, BY_SLIDE = "predictions-by-patch.csv", "predictions-by-slide.csv"
DIGITS = 6
"""Of a probability or a value."""


def write_predictions(folder: Location, scored: Sequence[Predictions]) -> None:
    """Write both files; none by slide where no slide has two patches, or the labels of its patches differ."""
    _write(folder / BY_PATCH, scored, ("key", "group"), lambda one, row: [one.keys[row], one.groups[row]])
    try:
        slides = [find_slides(one) for one in scored]
    except DataError:
        return
    _write(folder / BY_SLIDE, slides, ("slide",), lambda one, row: [one.keys[row]])


def _write(
    path: Location,
    scored: Sequence[Predictions],
    names: Sequence[str],
    name_row: Callable[[Predictions, int], list[str]],
) -> None:
    target = scored[0].target
    by: By = "slide" if names == ("slide",) else "patch"
    columns = ["model", *names, "label", "predicted", *target.classes, name_set(target), *SITES]
    with io.StringIO(newline="") as text:
        write_csv(text, columns, (row for one in scored for row in _list_rows(one, by, name_row)))
        write_bytes(path, text.getvalue().encode())


def _list_rows(one: Predictions, by: By, name_row: Callable[[Predictions, int], list[str]]) -> list[list[object]]:
    target, rows = one.target, []
    for row, (label, answer, output_K) in enumerate(zip(one.label, one.answer, one.output, strict=True)):
        said = bool(np.isfinite(output_K).all())
        shown = [float(f"{value:.{DIGITS}g}") if said else None for value in output_K.tolist()]
        named = target.name_label(label.item())
        shown_label = float(f"{named:.{DIGITS}g}") if isinstance(named, float) else named
        predicted = target.name_label(answer.item()) if said and not target.is_number else shown[0]
        rows.append(
            [
                one.name,
                *name_row(one, row),
                shown_label,
                predicted,
                *(() if target.is_number else shown),
                format_set(target, read_set(one.conformal, target, output_K, by)),
                *(one.sites[kind][row] if kind in one.sites else "" for kind in SITES),
            ]
        )
    return rows
