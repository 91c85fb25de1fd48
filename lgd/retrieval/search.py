"""The index of a store's latents, opened for queries; the only importer of faiss.

    DIR/index/TEACHER/DIGEST.faiss   inner product of unit vectors, which is the cosine
    DIR/index/TEACHER/DIGEST.npy     part, row, label, key and slide of each indexed latent, in the index's order
    DIR/index/TEACHER/index.json     what the index is and reached, its files, the parts that it is of; written last

Both files are mapped, not read: what is resident is the operating system's cache, which it can take back. Opening
costs their digest and a look at their structure: 1.1 s and 31 MB at a million 512-dimensional latents (1.07 GB).
Files are named by their digest, so that an index which is replaced is the old one or the new one to each reader.
A file that is cut short while it is mapped ends the process; `build_index` writes new files instead.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Annotated, Any, BinaryIO, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from lgd.base.errors import DataError
from lgd.base.records import Count, Many, Record, Sha256, Xxh3
from lgd.io.documents import Document
from lgd.io.location import Location
from lgd.io.remote import open_checked
from lgd.retrieval.faiss_file import cells_of, check_file
from lgd.retrieval.table import read_table
from lgd.shards.manifest import Text, Word
from lgd.store.parts import Part
from lgd.store.store import TEACHER, Store

_REMEDY = "run lgd build-index"
_ATTEMPTS = 5


class IndexFile(Record):
    """A file of the index, named by its digest."""

    bytes: Annotated[int, Field(ge=1, lt=2**53)]
    xxh3: Xxh3


class IndexDocument(Document):
    """index.json."""

    FORMAT: ClassVar[str] = "lgd-index/3"
    ABSENT: ClassVar[str] = f"there is no index; {_REMEDY}"
    REMEDY: ClassVar[str] = _REMEDY

    asked: Text
    """latents.index."""
    gallery: Many[Word]
    target: Annotated[float, Field(gt=0, le=1)]
    """latents.recall."""
    parts: Annotated[Many[Sha256], Field(min_length=1)]
    """Digest of each of the parts that are indexed."""
    factory: Text
    nprobe: Count
    rows: Annotated[int, Field(ge=1, lt=2**40)]
    dim: Annotated[int, Field(ge=1, lt=2**20)]
    why: Text
    trained_on: Count
    seconds: dict[Text, float]
    recall_at_10: Annotated[float, Field(ge=0, le=1)]
    queries: Text
    faiss: IndexFile
    table: IndexFile

    @model_validator(mode="after")
    def _check_probes(self) -> Self:
        cells = cells_of(self.factory)
        if not min(1, cells) <= self.nprobe <= cells:
            raise ValueError(f"field nprobe is {self.nprobe}, and {self.factory} has {cells} cells")
        return self


def faiss_problem() -> str | None:
    """Why there is no FAISS here, or None; it is not imported."""
    if importlib.util.find_spec("faiss") is None:
        return "FAISS is not installed: pip install 'lgd[cpu]', or 'lgd[gpu]' on a CUDA machine"
    return None


def require_faiss() -> None:
    """Raise `DataError` with the remedy where there is no FAISS."""
    problem = faiss_problem()
    if problem:
        raise DataError(problem)


def import_faiss() -> Any:
    """The package, or `DataError` with the remedy."""
    require_faiss()
    import faiss

    return faiss


def unit(vectors_nD: np.ndarray) -> np.ndarray:
    """Scale each vector to length 1, float32."""
    vectors_nD = np.asarray(vectors_nD, np.float32)
    return np.ascontiguousarray(vectors_nD / np.maximum(np.linalg.norm(vectors_nD, axis=1, keepdims=True), 1e-12))


def index_folder(store: Store) -> Location:
    """Where the index of the run's teacher lies."""
    return store.folder / "index" / TEACHER


def read_document(store: Store) -> IndexDocument:
    """index.json, checked; `DataError` where there is none, or it is of parts that the store does not have."""
    path = index_folder(store) / "index.json"
    document = IndexDocument.read(path)
    if not set(document.parts) <= set(_numbers(store)):
        raise DataError(f"{path} was built from another state of the store: {_REMEDY}")
    return document


def _numbers(store: Store) -> dict[str, int]:
    """Digest of a part -> its number in the store."""
    return {part.digest(TEACHER): number for number, part in enumerate(store.parts)}


def _opened(path: Location, said: IndexFile, read: Callable[[BinaryIO], Any]) -> Any:
    """What `read` makes of a file of the index, which must be as index.json says."""
    try:
        with open_checked(path, said.xxh3, said.bytes, _REMEDY) as file:
            return read(file)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not the index that index.json describes ({error}): {_REMEDY}") from error


def _read_index(document: IndexDocument, file: BinaryIO) -> Any:
    check_index(document, file)
    faiss = import_faiss()
    # The descriptor names the file that was checked, whatever has taken its place meanwhile.
    return faiss.read_index(f"/dev/fd/{file.fileno()}", faiss.IO_FLAG_MMAP_IFC)


class Opened(NamedTuple):
    """An index as it was at one moment."""

    document: IndexDocument
    parts: list[int]
    """Number in the store of each of its parts."""
    table: np.ndarray
    index: Any


def open_index(store: Store, read: Callable[[IndexDocument, BinaryIO], Any]) -> Opened:
    """The index of a store, of which `read` opens the FAISS file; `DataError` for one that is missing or damaged."""
    folder = index_folder(store)
    for attempt in range(_ATTEMPTS):
        document, numbers = read_document(store), _numbers(store)
        parts = [numbers[digest] for digest in document.parts]
        of = [store.parts[number] for number in parts]

        def read_keys(file: BinaryIO, document: IndexDocument = document, of: list[Part] = of) -> np.ndarray:
            return read_table(file, document.rows, of)

        def read_faiss(file: BinaryIO, document: IndexDocument = document) -> Any:
            return read(document, file)

        try:
            table = _opened(folder / f"{document.table.xxh3}.npy", document.table, read_keys)
            index = _opened(folder / f"{document.faiss.xxh3}.faiss", document.faiss, read_faiss)
        except FileNotFoundError as error:
            # It was replaced between the two readings.
            if attempt + 1 < _ATTEMPTS and read_document(store) != document:
                continue
            raise DataError(f"{folder} lacks a file that index.json names ({error.__cause__}): {_REMEDY}") from error
        return Opened(document, parts, table, index)
    raise AssertionError


def check_index(document: IndexDocument, file: BinaryIO) -> None:
    """Raise `ValueError` unless a file is of the kind and size that index.json states."""
    check_file(file, document.factory, document.rows, document.dim, document.nprobe)


def problems(store: Store) -> list[str]:
    """What is wrong with the index of a store; FAISS is not asked."""
    try:
        open_index(store, check_index)
    except DataError as error:
        return [str(error)]
    return []


class Searcher:
    """An index that answers nearest-latent queries with positions in its table.

    Threads may share one. A child made by fork may not: FAISS hangs there.
    """

    def __init__(self, store: Store) -> None:
        """Open the index of a store; raises `DataError` for one that is missing, damaged or outdated."""
        # Without it `lgd build-index` would be no remedy for an index that is missing.
        require_faiss()
        opened = open_index(store, _read_index)
        self.document, self.table = opened.document, opened.table
        self.parts = np.array(opened.parts)
        """Number in the store of each part that the table names."""
        # FAISS's own, for those who need more of it.
        self.index = opened.index
        self._faiss = import_faiss()
        self._ivf = self._faiss.try_extract_index_ivf(self.index)
        self._process = os.getpid()
        if self._ivf is not None:
            sizes = [self._ivf.invlists.list_size(cell) for cell in range(self._ivf.nlist)]
            self._first_of_cell = np.cumsum([0, *sizes])

    def search(
        self, vectors_nD: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest latents of each vector: cosine distance (1 - cosine) float32, and position in `table` int64.

        Both are (n, k), nearest first; where there are fewer than k the distance is inf and the position -1.
        `allowed`, bool (rows of the table,), leaves the others out; up to half of them allowed, all cells are searched.
        Raises `DataError` for vectors that are not finite.
        """
        assert self._process == os.getpid(), "open a Searcher in the process that searches: in a forked one FAISS hangs"
        # A copy, for FAISS scales in place, in a tenth of numpy's time.
        vectors_nD = np.array(vectors_nD, np.float32, order="C")
        if vectors_nD.ndim != 2 or vectors_nD.shape[1] != self.document.dim:
            raise DataError(f"vectors of shape {vectors_nD.shape}, and the index has {self.document.dim} dimensions")
        self._faiss.normalize_L2(vectors_nD)
        rows = len(self.table) if allowed is None else int(np.count_nonzero(allowed))
        most = min(k, rows)
        if most and len(vectors_nD):
            distance_nk, position_nk = self._found(vectors_nD, most, allowed, rows)
        else:
            distance_nk, position_nk = (np.empty((len(vectors_nD), 0), kind) for kind in (np.float32, np.int64))
            most = 0
        if most < k:
            short = ((0, 0), (0, k - most))
            distance_nk = np.pad(distance_nk, short, constant_values=np.inf)
            position_nk = np.pad(position_nk, short, constant_values=-1)
        return distance_nk, position_nk

    def _found(
        self, vectors_nD: np.ndarray, most: int, allowed: np.ndarray | None, rows: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `most` nearest of the `rows` allowed ones, which are all there."""
        params = None
        if allowed is not None:
            assert allowed.shape == self.table.shape and allowed.dtype == bool
            # Those that are allowed may lie far away, where no cell is probed: with a level, a quarter of a million
            # latents, allowed, even four times the probes lost a tenth of the neighbours.
            nprobe = self.document.nprobe if 2 * rows > len(self.table) else self.document.rows
            params = self._parameters(nprobe, allowed)
        cosine_nk, position_nk = self.index.search(vectors_nD, most, params=params)
        if position_nk[:, -1].min() < 0:
            if not np.isfinite(vectors_nD).all():
                raise DataError("a latent is not finite: the training diverged, lower train.lr")
            # The cells that were probed hold too few.
            short = position_nk[:, -1] < 0
            params = self._parameters(self.document.rows, allowed)
            cosine_nk[short], position_nk[short] = self.index.search(vectors_nD[short], most, params=params)
            cosine_nk[position_nk < 0] = -np.inf
        return np.subtract(1, cosine_nk, out=cosine_nk), position_nk

    def _parameters(self, nprobe: int, allowed: np.ndarray | None) -> Any:
        faiss, options = self._faiss, {}
        if allowed is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self._ivf is None:
            return faiss.SearchParameters(**options)
        return faiss.SearchParametersIVF(nprobe=min(nprobe, self._ivf.nlist), **options)

    def vectors(self, position_n: np.ndarray) -> np.ndarray:
        """The unit vectors at some positions as the index holds them, float32 (n, D)."""
        position_n = np.asarray(position_n, np.int64)
        if ((position_n < 0) | (position_n >= len(self.table))).any():
            raise IndexError(f"positions are 0 to {len(self.table) - 1}")
        found_nD = np.empty((len(position_n), self.document.dim), np.float32)
        if self._ivf is None:
            self.index.reconstruct_batch(position_n, found_nD)
            return found_nD
        # Positions count up through the cells, so no map from position to cell is held: it would take 8 bytes a row.
        cell_n = np.searchsorted(self._first_of_cell, position_n, "right") - 1
        offset_n = position_n - self._first_of_cell[cell_n]
        for vector, cell, offset in zip(found_nD, cell_n.tolist(), offset_n.tolist(), strict=True):
            self._ivf.reconstruct_from_offset(cell, offset, self._faiss.swig_ptr(vector))
        return found_nD
