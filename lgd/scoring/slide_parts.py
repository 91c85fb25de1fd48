"""What a network says of the tiles of a slide, in parts, so that a killed job resumes.

    DIR/SLIDE/parts/000000.npz     of the first tiles of the plan (`ScoredTiles`), and so on

Shapes: n tiles, K numbers of an answer, D of the features.
"""

import io
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.io.files import exists, list_folder, read_bytes, remove, write_bytes
from lgd.io.location import Location
from lgd.scoring.slide_plan import PARTS, SlidePlan


class ScoredTiles(NamedTuple):
    """What a network says of some tiles; of grids that it does not predict, arrays without cells."""

    output_nK: np.ndarray
    """float32; NaN of a tile that could not be read, as `features_nD`."""
    features_nD: np.ndarray
    """float32; those of the morphology stream."""
    note_n: np.ndarray
    """What a reader must know of a tile, in UTF-8."""
    error_n: np.ndarray
    """Why a tile could not be read, in UTF-8; empty where it could."""
    nuclei: np.ndarray
    """float16 (n, g, g), as all grids of `lgd.models.grids`; NaN of a tile that could not be read."""
    membrane: np.ndarray
    """float16 (n, k, k, 3)."""
    positive: np.ndarray
    """float16 (n, k, k, 2)."""


def _name_part(number: int) -> str:
    return f"{number:06d}.npz"


def write_part(folder: Location, number: int, tiles: ScoredTiles) -> None:
    """Publish a part."""
    with io.BytesIO() as content:
        np.savez(content, **tiles._asdict())
        write_bytes(folder / PARTS / _name_part(number), content.getvalue())


def has_part(folder: Location, number: int) -> bool:
    """Whether a part is there."""
    return exists(folder / PARTS / _name_part(number))


def list_missing(folder: Location, plan: SlidePlan) -> list[int]:
    """The numbers of the parts that are still to be scored."""
    names = list_folder(folder / PARTS)
    return [number for number in range(plan.chunks) if _name_part(number) not in names]


def read_parts(folder: Location, plan: SlidePlan) -> Iterator[ScoredTiles]:
    """The parts in their order, one at a time.

    Raises `DataError` for one that is damaged, which is removed, so that the same command scores it again.
    """
    for number in range(plan.chunks):
        path, rows = folder / PARTS / _name_part(number), plan.find_rows(number)
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
                tiles = ScoredTiles(**{name: arrays[name] for name in ScoredTiles._fields})
            if {len(array) for array in tiles} != {rows.stop - rows.start}:
                raise ValueError("it has another number of rows")
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            remove(path)
            raise DataError(
                f"{path} was damaged ({str(error)[:200]}) and is removed: the same command scores its tiles again"
            ) from error
        yield tiles
