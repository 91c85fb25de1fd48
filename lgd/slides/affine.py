"""The affine map from places on one slide to places on another, in level-0 pixels of each, as a user gives it."""

import math
import re
from typing import NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.io.files import peek_kind, read_bytes
from lgd.io.location import Location

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LARGEST_FILE = 10_000
_FORM = "give the six numbers a b c d e f of x' = a x + b y + c, y' = d x + e y + f, or the nine of a 3 x 3 matrix"


class Affine(NamedTuple):
    """(x, y) becomes (a x + b y + c, d x + e y + f)."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    @property
    def scale(self) -> float:
        """Pixels of the second slide along a pixel of the first one; 0 for a map that is singular."""
        return math.sqrt(abs(self.a * self.e - self.b * self.d))

    def apply(self, xy_n2: np.ndarray) -> np.ndarray:
        """Places on the second slide, float64 (n, 2)."""
        matrix_23 = np.array(self).reshape(2, 3)
        mapped_n2: np.ndarray = xy_n2 @ matrix_23[:, :2].T + matrix_23[:, 2]
        return mapped_n2


def read_affine(text: str, base: Location) -> Affine:
    """The map of some numbers, or of a file with them, relative to `base`: separated by anything, brackets included.

    Raises `DataError` for other numbers than six, or nine that end in 0 0 1, and for a map that is singular.
    """
    if re.search("[A-Za-z]", _NUMBER.sub("", text)):
        if peek_kind(base / text, "file") != "file":
            raise DataError(f"transform {text!r:.200} is no file: correct its path, relative to the CSV, or {_FORM}")
        text = read_bytes(base / text)[:_LARGEST_FILE].decode(errors="replace")
    numbers = [float(number) for number in _NUMBER.findall(text)]
    rest = _NUMBER.sub("", text)
    if len(numbers) == 9 and numbers[6:] == [0, 0, 1]:
        numbers = numbers[:6]
    if len(numbers) != 6 or re.search(r"[^][(){},;\s]", rest) or not all(map(math.isfinite, numbers)):
        raise DataError(f"transform is {' '.join(text.split())!r:.80}, which is no affine map: {_FORM}")
    affine = Affine(*numbers)
    if affine.scale < 1e-3:
        raise DataError(f"transform is singular ({' '.join(f'{one:g}' for one in affine)}): {_FORM}")
    return affine
