"""The index of a store's latents, opened for queries; the only importer of faiss.

    DIR/index/TEACHER/DIGEST.faiss   inner product of unit vectors, which is the cosine
    DIR/index/TEACHER/DIGEST.npy     part, row, label, key and slide of each indexed latent, in the index's order
    DIR/index/TEACHER/DIGEST.axes    mean and axes that latents are whitened by, float32 (`lgd.retrieval.index_files`)
    DIR/index/TEACHER/index.json     what the index is and reached, its files, the parts that it is of; written last

The first two are mapped, not read: what is resident is the operating system's cache, which it can take back. Opening
costs their digest and a look at their structure: 1.1 s and 31 MB at a million 512-dimensional latents (1.07 GB), and
in an index of cells 8 bytes a latent more (computed, not measured).
Files are named by their digest, so that an index which is replaced is the old one or the new one to each reader.
A file that is cut short while it is mapped ends the process; `build_index` writes new files instead.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.io.remote import open_checked
from lgd.retrieval.index_files import REMEDY, IndexDocument, IndexFile, Whitening, check_file, read_table
from lgd.store.store import Store

if TYPE_CHECKING:
    from faiss import Index as Index
    from faiss import IndexIVF as IndexIVF
    from faiss import SearchParameters

NEAR_DUPLICATE = 0.001
"""Cosine distance below which a neighbour is marked, of latents as they are. Measured with a small teacher of virtual
tissue: float16 moves a distance by less than 1e-7. Real IHC saved again as JPEG of quality 90 lies at 5e-5 from itself
(median; 95 % within 5e-4), moved by one pixel at 5e-4 (95 % within 2.5e-3). Of 480 different patches the nearest other
one lies at 6e-3 (median), but 11 pairs of them below 0.001: a mark is a reason to look, not a proof."""
NEAR_WHITENED = 0.05
"""The same of whitened latents, where patches lie further apart. Of 180 different virtual patches and 22 real ones the
nearest other one lay at 0.43 and 0.51 (median), never below 0.19; saved as JPEG of quality 90 they lay at 0.004 from
themselves (0.032 at most), moved by one pixel at 0.04 and 0.02 (95 % within 0.09 and 0.05)."""
_ENOUGH_AXES = 16
"""With fewer, different patches can lie as close as that."""


class OpenIndex(NamedTuple):
    """An index whose files were checked."""

    document: IndexDocument
    table: np.ndarray
    whitening: Whitening | None
    faiss: "Index | None"
    """None where FAISS was not asked for."""


def require_faiss() -> None:
    """Raise `DataError` with the remedy where there is no FAISS; it is not imported."""
    if importlib.util.find_spec("faiss") is None:
        raise DataError("FAISS is not installed: pip install 'lgd[cpu]', or 'lgd[gpu]' on a CUDA machine")


def import_faiss() -> ModuleType:
    """The package, or `DataError` with the remedy."""
    require_faiss()
    import faiss

    return faiss


def index_folder(store: Store) -> Location:
    """Where the index of the store's first teacher lies."""
    return store.folder / "index" / store.teacher


def read_document(store: Store) -> IndexDocument:
    """index.json, checked; `DataError` where there is none, or it is of parts that the store does not have."""
    path = index_folder(store) / "index.json"
    document = IndexDocument.read(path)
    if not set(document.parts) <= set(_numbers(store)):
        raise DataError(f"{path} was built from another state of the store: {REMEDY}")
    return document


def _numbers(store: Store) -> dict[str, int]:
    """Digest of a part -> its number in the store."""
    return {part.digest(store.teacher): number for number, part in enumerate(store.parts)}


@contextlib.contextmanager
def _open_file(path: Location, said: IndexFile) -> Iterator[BinaryIO]:
    """A file of the index; `DataError` where it is not as index.json says, or where its reader finds that."""
    try:
        with open_checked(path, said.xxh3, said.bytes, REMEDY) as file:
            yield file
    except DataError:
        raise
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        raise DataError(f"{path} is not the index that index.json describes ({error}): {REMEDY}") from error


def open_index(store: Store, with_faiss: bool = True) -> OpenIndex:
    """The index of a store; raises `DataError` for one that is missing or damaged."""
    folder, document, numbers, index = index_folder(store), read_document(store), _numbers(store), None
    whitening = None
    parts = [store.parts[numbers[digest]] for digest in document.parts]
    try:
        with _open_file(folder / f"{document.table.xxh3}.npy", document.table) as file:
            table = read_table(file, document.rows, parts)
        if said := document.whitening:
            with _open_file(folder / f"{said.xxh3}.axes", said) as file:
                whitening = Whitening.read(file, document.latent_dim, document.dim)
        with _open_file(folder / f"{document.faiss.xxh3}.faiss", document.faiss) as file:
            check_file(file, document.factory, document.rows, document.width, document.nprobe)
            if with_faiss:
                faiss = import_faiss()
                # The descriptor names the file that was checked, whatever has taken its place meanwhile.
                index = faiss.read_index(f"/dev/fd/{file.fileno()}", faiss.IO_FLAG_MMAP_IFC)
        return OpenIndex(document, table, whitening, index)
    except FileNotFoundError as error:
        if read_document(store) != document:
            # It was replaced between the two readings.
            return open_index(store, with_faiss)
        raise DataError(f"{folder} lacks a file that index.json names ({error.__cause__}): {REMEDY}") from error


def problems(store: Store) -> list[str]:
    """What is wrong with the index of a store; FAISS is not asked."""
    try:
        open_index(store, with_faiss=False)
    except DataError as error:
        return [str(error)]
    return []


def choose_near(document: IndexDocument) -> float:
    """Below which distance neighbours in an index are near-duplicates."""
    return NEAR_WHITENED if document.whitening and document.dim >= _ENOUGH_AXES else NEAR_DUPLICATE


def near_duplicates(
    keys: Sequence[str], distance_k: np.ndarray, vectors_kD: np.ndarray, near: float = NEAR_DUPLICATE
) -> list[str | None]:
    """For each neighbour, nearest first, `query` or the key of the nearest neighbour before it that it repeats.

    `distance_k` is that to the query; `vectors_kD` are of length 1; `near` is the distance of `choose_near`.
    """
    found: list[str | None] = []
    for rank, distance in enumerate(distance_k):
        before = np.flatnonzero(1 - vectors_kD[:rank] @ vectors_kD[rank] < near)
        found.append("query" if distance < near else keys[before[0]] if len(before) else None)
    return found


class Searcher:
    """An index that answers nearest-latent queries with positions in its table.

    Threads may share one. A child made by fork may not: FAISS hangs there.
    """

    def __init__(self, store: Store) -> None:
        """Open the index of a store; raises `DataError` for one that is missing, damaged or outdated."""
        # Without it `lgd build-index` would be no remedy for an index that is missing.
        require_faiss()
        self.store = store
        self.document, self.table, self.whitening, index = open_index(store)
        assert index is not None
        self.index = index
        numbers = _numbers(store)
        self.parts = np.array([numbers[digest] for digest in self.document.parts])
        """Number in the store of each part that the table names."""
        self._faiss = import_faiss()
        self._ivf: IndexIVF | None = self._faiss.try_extract_index_ivf(self.index)
        self._process = os.getpid()
        if self._ivf is not None:
            # From position to cell, 8 bytes a latent: `vectors` needs it.
            self._ivf.make_direct_map()

    def search(
        self, latents_nD: np.ndarray, k: int, allowed: np.ndarray | None = None, biased: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each latent: cosine distance (1 - cosine) float32, and position in `table` int64.

        The cosine is that of whitened latents, where the index has a whitening. Both are (n, k), nearest first, or with
        `biased` in the order of the cosine and the index's bias together; where there are fewer than k the distance is
        inf and the position -1. `allowed`, bool (rows of the table,), leaves the others out; up to half of them
        allowed, all cells are searched. Raises `DataError` for latents that are not finite.
        """
        assert self._process == os.getpid(), "open a Searcher in the process that searches: in a forked one FAISS hangs"
        dim = self.document.latent_dim
        if latents_nD.ndim != 2 or latents_nD.shape[1] != dim:
            raise DataError(f"vectors of shape {latents_nD.shape}, and the index has {dim} dimensions")
        # Of its own, for FAISS scales in place, in a tenth of numpy's time.
        vectors_nD = (
            np.array(latents_nD, np.float32, order="C") if self.whitening is None else self.whitening.apply(latents_nD)
        )
        self._faiss.normalize_L2(vectors_nD)
        if self.document.bias is not None:
            # What the bias of each row is multiplied by.
            vectors_nD = np.pad(vectors_nD, ((0, 0), (0, 1)), constant_values=float(biased))
        rows, params = len(self.table), None
        if allowed is not None:
            assert allowed.shape == self.table.shape and allowed.dtype == bool
            rows = int(np.count_nonzero(allowed))
            # Those that are allowed may lie far away, where no cell is probed: with a level, a quarter of a million
            # latents, allowed, even four times the probes lost a tenth of the neighbours.
            params = self._parameters(
                self.document.nprobe if 2 * rows > len(self.table) else self.document.rows, allowed
            )
        score_nk, position_nk = self.index.search(vectors_nD, k, params=params)
        # One look where all is well: a search leaves nothing of numpy in the caches, and each step takes 30 us.
        if position_nk.min(initial=0) < 0:
            short_n = (position_nk >= 0).sum(1) < min(k, rows)
            if short_n.any():
                if not np.isfinite(vectors_nD).all():
                    raise DataError("a latent is not finite: the training diverged, lower train.lr")
                # The cells that were probed hold too few.
                params = self._parameters(self.document.rows, allowed)
                score_nk[short_n], position_nk[short_n] = self.index.search(vectors_nD[short_n], k, params=params)
            score_nk[position_nk < 0] = -np.inf
        if biased:
            score_nk -= self._biases(position_nk)
        return np.subtract(1, score_nk, out=score_nk), position_nk

    def find_other_slides(self, slides: Collection[str]) -> np.ndarray:
        """Which rows of the table are of other slides than these, bool; of those of unknown slides none are."""
        names, slide_m = self._slides
        other_m: np.ndarray = ~np.isin(names, [b"", *(slide.encode() for slide in slides)])[slide_m]
        return other_m

    @functools.cached_property
    def _slides(self) -> tuple[np.ndarray, np.ndarray]:
        """The slides of the table, and the number of each row's."""
        names, slide_m = np.unique(self.table["slide"], return_inverse=True)
        return names, slide_m

    def _biases(self, position_nk: np.ndarray) -> np.ndarray:
        """The bias of the rows that were found, (n, k) float32, and anything of those that were not."""
        found_m, number_nk = np.unique(position_nk, return_inverse=True)
        bias_m: np.ndarray = self.index.reconstruct_batch(np.maximum(found_m, 0))[:, -1]
        return bias_m[number_nk].reshape(position_nk.shape)

    def _parameters(self, nprobe: int, allowed: np.ndarray | None) -> "SearchParameters":
        faiss, options = self._faiss, {}
        if allowed is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        kind = faiss.SearchParameters
        if self._ivf is not None:
            kind, options["nprobe"] = faiss.SearchParametersIVF, min(nprobe, self._ivf.nlist)
        parameters: SearchParameters = kind(**options)
        return parameters

    def vectors(self, position_n: np.ndarray) -> np.ndarray:
        """The unit vectors at some positions as the index holds them, float32 (n, D), without their bias."""
        position_n = np.asarray(position_n, np.int64)
        if ((position_n < 0) | (position_n >= len(self.table))).any():
            raise IndexError(f"positions are 0 to {len(self.table) - 1}")
        found_nD: np.ndarray = self.index.reconstruct_batch(position_n)[:, : self.document.dim]
        return found_nD
