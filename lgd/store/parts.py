"""One HDF5 part, read through a map of its file.

Its datasets are contiguous and unfiltered: rows are read where the sidecar says that they lie. HDF5 itself is asked
only once, after the digest was found right: a file that it describes otherwise is refused.
"""

import os
import re
import threading
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lgd.errors import DataError
from lgd.files import xxh3
from lgd.remote import open_file
from lgd.store.sidecar import REMEDY, layout_of, read_sidecar

OPEN_PARTS = 16_384
"""Parts that a process keeps mapped; Linux allows it 65,530 maps in all."""

_open: deque["Part"] = deque()
_mapping = threading.Lock()

_NAME = re.compile("[A-Za-z0-9_-]{1,120}")


class Mapped(NamedTuple):
    """The datasets of a part over a map of its file, read-only."""

    arrays: dict[str, np.ndarray]
    """(rows, ...) each."""
    bytes: dict[str, memoryview]
    """The same as plain bytes."""


class Part:
    """One part of a store, opened lazily; its digest is checked once before the first use."""

    __slots__ = tuple("_checked _lock _mapped digest first folder last layout name rows split tar_sha256".split())

    def __init__(self, folder: Path, entry: dict[str, Any], layout: dict[str, Any]) -> None:
        """`entry` is the part's line in store.json, `layout` its `datasets`.

        Raises `ValueError` for an entry that the writer would not write.
        """
        self.folder, self.layout = folder, layout
        self.name, self.split, self.tar_sha256 = entry["name"], entry["split"], entry["tar_sha256"]
        self.rows, self.digest = entry["rows"], entry["digest"]
        self.first, self.last = entry["first"], entry["last"]
        # A store from elsewhere must not lead out of its folder.
        if not _NAME.fullmatch(self.name) or type(self.rows) is not int or self.rows < 1:
            raise ValueError(f"part {self.name!r:.120} of {self.rows!r:.80} rows")
        if not all(type(text) is str for text in (self.split, self.tar_sha256, self.digest, self.first, self.last)):
            raise ValueError(f"part {self.name}")
        self._mapped: Mapped | None = None
        self._checked: tuple[int, ...] = ()
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The HDF5 file; a `UPath` where the store lies at a url."""
        return self.folder / f"{self.name}.h5"

    def mapped(self) -> Mapped:
        """The part's datasets; raises `DataError` for a file that is not as its digest says."""
        mapped = self._mapped
        if mapped is None:
            # Whoever comes first checks the digest; those who want other parts do not wait.
            with self._lock:
                mapped = self._mapped
                if mapped is None:
                    mapped = self._mapped = self._map()
                    with _mapping:
                        _open.append(self)
                        if len(_open) > OPEN_PARTS:
                            # Unmapped when the last array of it is dropped.
                            _open.popleft()._mapped = None
        return mapped

    def array(self, dataset: str) -> np.ndarray:
        """One dataset, (rows, ...), read-only."""
        arrays = self.mapped().arrays
        if dataset not in arrays:
            raise DataError(f"{self.path} has no dataset {dataset!r}: cache into a store that has it")
        return arrays[dataset]

    def _map(self) -> Mapped:
        import torch

        sidecar = self.sidecar()
        with self._open(sidecar) as file:
            facts = os.fstat(file.fileno())
            identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if identity != self._checked:
                problem = _file_problem(self.path, file, sidecar)
                if problem:
                    raise DataError(f"{problem}: {REMEDY}")
                self._checked = identity
            # Unlike numpy.memmap this keeps no descriptor: thousands of parts would use up what a process may have.
            storage: Any = torch.UntypedStorage.from_file(f"/dev/fd/{file.fileno()}", False, facts.st_size)
        content: Any = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
        whole = memoryview(content).toreadonly()
        arrays, bytes_ = {}, {}
        for name, entry in sidecar["datasets"].items():
            arrays[name] = np.ndarray(entry["shape"], np.dtype(entry["dtype"]), whole, entry["offset"])
            bytes_[name] = whole[entry["offset"] : entry["offset"] + arrays[name].nbytes]
        return Mapped(arrays, bytes_)

    def sidecar(self) -> dict[str, Any]:
        """The part's sidecar, which must be the one that store.json was written over."""
        path = self.folder / f"{self.name}.json"
        try:
            sidecar = read_sidecar(path)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DataError(f"sidecar {path} is missing: run lgd cache-latents again") from error
            raise
        if sidecar["digest"] != self.digest:
            raise DataError(f"sidecar {path} is not the one of store.json: run lgd cache-latents again")
        if layout_of(sidecar) != self.layout:
            raise DataError(f"sidecar {path} states other datasets than store.json: {REMEDY}")
        return sidecar

    def _open(self, sidecar: dict[str, Any]) -> BinaryIO:
        try:
            return open_file(self.path, sidecar["xxh3"], sidecar["bytes"])
        except FileNotFoundError as error:
            raise DataError(f"part {self.path} is missing: run lgd cache-latents again") from error

    def problem(self) -> str | None:
        """What is wrong with the part, or None; reads all of it."""
        try:
            sidecar = self.sidecar()
            with self._open(sidecar) as file:
                return _file_problem(self.path, file, sidecar)
        except DataError as error:
            return str(error)


def _file_problem(path: Path, file: BinaryIO, sidecar: dict[str, Any]) -> str | None:
    """What is wrong with a part's open file: its size, its digest, or, when these are right, what HDF5 makes of it."""
    size = os.fstat(file.fileno()).st_size
    if size != sidecar["bytes"]:
        return f"part {path} has {size} bytes and not {sidecar['bytes']}"
    if xxh3(file) != sidecar["xxh3"]:
        return f"part {path} does not match its digest"
    try:
        found = _described_by_hdf5(f"/dev/fd/{file.fileno()}")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        return f"part {path} is no HDF5 file of ours ({error})"
    if found != sidecar["datasets"]:
        return f"part {path}: HDF5 finds other datasets in it than its sidecar states"
    return None


def _described_by_hdf5(path: str) -> dict[str, Any]:
    """The datasets of an HDF5 file as a sidecar states them; `ValueError` for anything but plain contiguous ones."""
    import h5py

    found = {}
    with h5py.File(path, "r") as file:
        for name in file:
            link = file.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{name!r:.80} is a {type(link).__name__}")
            dataset = file[name]
            if not isinstance(dataset, h5py.Dataset):
                raise ValueError(f"{name!r:.80} is no dataset")
            plist = dataset.id.get_create_plist()
            if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count():
                raise ValueError(f"dataset {name!r:.80} is virtual, chunked, or stored in other files")
            offset = dataset.id.get_offset()
            found[name] = {"dtype": dataset.dtype.str, "shape": list(dataset.shape), "offset": offset}
    return found
