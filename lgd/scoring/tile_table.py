"""The columns of a slide's tiles.csv, and the file read back.

Shapes: n tiles, K classes.
"""

import csv
import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.base.target import Target
from lgd.io.files import read_bytes
from lgd.io.location import Location
from lgd.io.tables import unescape_cell
from lgd.metrics import Floats, Ints
from lgd.scoring.label_sets import name_set
from lgd.scoring.slide_answer import SlideScore
from lgd.stain.checks import NEARLY_BLANK

TILES = "tiles.csv"


class TileTable(NamedTuple):
    """The tiles of a slide that is scored, column by column, in the order of the file."""

    xy_n2: Ints
    """Upper left corners in level-0 pixels."""
    tissue_n: Floats
    """Share of each that is tissue."""
    label_n: list[str | float | None]
    """The class or the value; None where there is no answer."""
    grade_n: Floats
    """As `lgd.scoring.colours.grade_answers` has it, to six digits; NaN where there is no answer."""
    probability_nK: Floats
    """NaN where there is no answer; (n, 0) of a number."""
    note_n: list[str]
    """What a reader must know of each."""
    error_n: list[str]
    """Why a tile could not be read; empty where it could."""

    @property
    def blank_n(self) -> np.ndarray:
        """Bool (n,): tiles that hold hardly any tissue after all, and do not count."""
        return np.array([note == NEARLY_BLANK for note in self.note_n], bool)


def list_columns(target: Target) -> list[str]:
    """The head of tiles.csv."""
    shown = () if target.is_number else ("grade", *target.classes)
    return ["x", "y", "side", "tissue", target.label_word, *shown, name_set(target), "notes", "error"]


def read_tiles(folder: Location, score: SlideScore) -> TileTable:
    """The tiles.csv of a slide's folder, in which slide.json says `score`; 100,000 tiles take 1.6 s of a CPU.

    Raises `DataError` for a file that is missing or damaged, or has other tiles.
    """
    path, columns = folder / TILES, list_columns(score.target)
    try:
        with io.StringIO(read_bytes(path).decode(), newline="") as text:
            head, *rows = csv.reader(text, strict=True)
        if [*map(unescape_cell, head)] != columns or len(rows) != score.tiles:
            raise ValueError(f"it should have {score.tiles} rows of {', '.join(columns)}")
        return _as_table(rows, score.target)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({str(error)[:200]}): {SlideScore.REMEDY}") from error


def _as_table(rows: list[list[str]], target: Target) -> TileTable:
    """Of rows under the columns of `list_columns`; `ValueError` for a cell that is no number."""
    x_n, y_n, _, tissue_n, said_n, *number_n, _, note_n, error_n = zip(*rows, strict=True)
    value_n = _as_floats(said_n if target.is_number else number_n[0])
    label_n: list[str | float | None] = [unescape_cell(label) or None for label in said_n]
    if target.is_number:
        label_n = [value if np.isfinite(value) else None for value in value_n.tolist()]
    return TileTable(
        xy_n2=np.array([[*map(int, x_n)], [*map(int, y_n)]], np.int64).T,
        tissue_n=_as_floats(tissue_n),
        label_n=label_n,
        grade_n=value_n,
        probability_nK=np.stack([*map(_as_floats, number_n[1:]), value_n], axis=1)[:, :-1],
        note_n=[*map(unescape_cell, note_n)],
        error_n=[*map(unescape_cell, error_n)],
    )


def _as_floats(cells: Iterable[str]) -> Floats:
    return np.array([float(cell) if cell else np.nan for cell in cells])
