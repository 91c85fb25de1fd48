"""Files of features that other tools computed: found, and read by rows. `lgd.store.feature_layouts` opens them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

import numpy as np

from lgd.base.errors import DataError
from lgd.io.folders import walk_files

if TYPE_CHECKING:
    import h5py

LayoutName = Literal["table", "trident", "clam", "stamp"]
TOOLS: dict[LayoutName, str] = {"table": "a table by key", "trident": "TRIDENT", "clam": "CLAM", "stamp": "STAMP"}
SUFFIXES = (".h5", ".hdf5", ".npz", ".parquet")
_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy")
_BLOCK = 2048
"""Rows that are read at a time."""
_SPARSE = 8
"""Of a block with fewer wanted rows than one in so many these alone are read."""


class Tiles(NamedTuple):
    """Where the rows of a slide's file lie: squares on the slide."""

    place_n2: np.ndarray
    """Upper left corners, x and y, float64."""
    side: float
    step: float
    """Distance of neighbours."""
    in_um: bool
    """Whether all these are micrometres, and not pixels of level 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureFile:
    """One file, of which the features are not read yet, unless its format holds them in one piece."""

    path: Path
    layout: LayoutName
    sha256: str
    rows: int
    dim: int
    """Numbers in a row; 0 where there is no row."""
    key_n: np.ndarray | None = None
    """Of a table: the key of each row, bytes."""
    tiles: Tiles | None = None
    """Of the others."""
    encoder: str | None = None
    """What computed them, as the file states it."""
    version: str | None = None
    """Of the tool."""
    licence: str | None = None
    centred: bool = False
    """Whether the mean was subtracted, as `lgd export-latents` states."""
    held_nD: np.ndarray | None = None
    """The features of a file that is no HDF5."""
    stamp: tuple[int, int] = (0, 0)
    """`stamp_of` the file before it was opened."""

    @property
    def slide(self) -> str:
        """The slide of a file that is one slide's."""
        return self.path.stem

    def read(self, row_n: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows whose numbers rise, some at a time: the slice of `row_n`, and their features (m, D) as they are stored.

        Raises `DataError` where the file cannot be read any more.
        """
        if self.held_nD is not None:
            for start in range(0, len(row_n), _BLOCK):
                part = slice(start, min(start + _BLOCK, len(row_n)))
                yield part, self.held_nD[row_n[part]]
            return
        with open_hdf5(self.path) as file:
            dataset = file["feats" if self.layout == "stamp" else "features"]
            start = 0
            while start < len(row_n):
                first = int(row_n[start])
                stop = int(np.searchsorted(row_n, first + _BLOCK))
                wanted_n = row_n[start:stop]
                if len(wanted_n) * _SPARSE < wanted_n[-1] - first:
                    block = dataset[wanted_n]
                else:
                    block = dataset[first : int(wanted_n[-1]) + 1][wanted_n - first]
                yield slice(start, stop), block
                start = stop


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of change: of a file that was written to since, they are others."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def find_files(named: Sequence[Path]) -> list[Path]:
    """The files of features that were named, and all in the folders that were, in any depth and through links.

    Hidden ones and other kinds are not taken.

    Raises `DataError` for what is not there, holds none, or is of a kind that is not read.
    """
    found: dict[Path, None] = {}
    for path in named:
        if path.is_dir():
            walked = walk_files(path)
            shown = (one for one, lies, hidden in walked if lies == "file" and not hidden)
            inside = sorted(Path(str(one)) for one in shown)
            files = [one for one in inside if one.suffix.lower() in SUFFIXES]
            if not files:
                pickled = next((one for one in inside if one.suffix.lower() in _PICKLED), None)
                _refuse_kind(pickled or path)
            found |= dict.fromkeys(files)
        elif not path.exists():
            raise DataError(f"{path} does not exist: name a file of features, or the folder that they lie in")
        else:
            if path.suffix.lower() not in SUFFIXES:
                _refuse_kind(path)
            found[path] = None
    return [*found]


def _refuse_kind(path: Path) -> NoReturn:
    known = ", ".join(SUFFIXES)
    if path.suffix.lower() == ".npy":
        raise DataError(f"{path} holds no keys: save features and key together, as by numpy.savez (.npz)")
    if path.suffix.lower() in _PICKLED:
        raise DataError(
            f"{path} is a pickle, which may run any code when it is read, and is never read here: name the HDF5 files "
            "that the tool wrote beside it, or save features and key by numpy.savez where you trust it"
        )
    raise DataError(f"{path} holds no file of features ({known}): name the files, or the folder that they lie in")


@contextmanager
def open_hdf5(path: Path) -> Iterator["h5py.File"]:
    """An HDF5 file; what is wrong with it, also when it is read, is a `DataError`."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as HDF5 ({str(error)[:200]}): it is cut short or damaged, as a stopped tool leaves "
            "it: compute it again, or copy it again"
        ) from error
