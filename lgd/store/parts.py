"""One HDF5 part: written as its shard's batches come, committed by its sidecar, read through a map of the file.

    DIR/parts/NAME.h5       contiguous datasets, one row a sample, in the order of the shard
    DIR/parts/NAME.json     the sidecar: rows, offsets, digests, the tar's sha256; its appearance commits the part

A part is named for its shard and the first digits of the tar's digest, so a changed shard gets a new part. The
datasets are contiguous and unfiltered: rows are read from a map of the file, at the offset that the sidecar names.
HDF5 itself is asked only once, after the digest was found right: a file that it describes otherwise is refused.
"""

import contextlib
import hashlib
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lgd.config import DataError
from lgd.data.shards import Shard
from lgd.files import digest_of, publish, sha256, sync, write_json
from lgd.remote import open_file
from lgd.store.sidecar import FORMAT, REMEDY, layout_of, part_name, read_sidecar

OPEN_PARTS = 16_384
"""Parts that a process keeps mapped; Linux allows it 65,530 maps in all."""

_METADATA = 65_536
"""Bytes that HDF5 takes for itself, at most; it needs about 3,000."""

_open: deque["Part"] = deque()
_mapping = threading.Lock()

_NAME = re.compile("[A-Za-z0-9_-]{1,120}")


class PartWriter:
    """Takes the rows of a shard, batch by batch; `part_writer` makes one."""

    def __init__(self, path: Path, rows: int) -> None:
        import h5py

        self._path, self._rows, self._done = path, rows, 0
        with h5py.File(path, "w", libver="latest", driver="core", backing_store=False) as empty:
            empty.flush()
            path.write_bytes(empty.id.get_file_image())
        self._file = h5py.File(path, "r+", libver="latest")
        self._texts: dict[str, list[bytes]] = {}
        self._datasets: dict[str, Any] = {}
        self.rounding: dict[str, Any] = {}
        """What the sidecar tells of the loss by the stored type; the caller fills it."""

    def _reserve(self, size: int) -> None:
        # HDF5 2.0 crashes some time after it has met a full disk: it may only write where there is room for sure.
        with open(self._path, "r+b") as file:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size + _METADATA)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the next rows; every array has one row a sample, and `key` is among them.

        Raises `DataError` for keys that do not come in order: rows are found by key through that.
        """
        stop = self._done + len(arrays["key"])
        assert stop <= self._rows and all(len(array) == stop - self._done for array in arrays.values())
        numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "S"}
        if not self._done:
            self._reserve(sum(self._rows * array[0].nbytes for array in numbers.values()))
            for name, array in numbers.items():
                shape = (self._rows, *array.shape[1:])
                self._datasets[name] = self._file.create_dataset(name, shape, array.dtype, fill_time="never")
        for name, array in numbers.items():
            self._datasets[name][self._done : stop] = array
        # The width of texts is that of the longest, so they are written at the end.
        for name in arrays.keys() - numbers.keys():
            self._texts.setdefault(name, []).extend(arrays[name].tolist())
        keys = self._texts["key"][max(0, self._done - 1) :]
        if any(after <= before for before, after in itertools.pairwise(keys)):
            raise DataError("its keys are not sorted: lgd verify its shard folder, and build it again")
        self._done = stop

    def finish(self) -> dict[str, Any]:
        """Write what is left; gives what the sidecar says of the datasets."""
        assert self._done == self._rows, f"{self._done} of {self._rows} rows were written"
        # HDF5 knows no width of 0.
        texts = {name: np.array(texts, f"S{max(1, *map(len, texts))}") for name, texts in sorted(self._texts.items())}
        self._reserve(sum(array.nbytes for array in texts.values()))
        for name, array in texts.items():
            self._datasets[name] = self._file.create_dataset(name, data=array)
        self._file.flush()
        return {
            "datasets": {
                name: {"dtype": dataset.dtype.str, "shape": list(dataset.shape), "offset": dataset.id.get_offset()}
                for name, dataset in self._datasets.items()
            },
            "first": self._texts["key"][0].decode(),
            "last": self._texts["key"][-1].decode(),
            "rounding": self.rounding,
        }

    def close(self) -> None:
        """Close the file, which cuts off what was reserved and not used."""
        self._file.close()


@contextlib.contextmanager
def part_writer(store: Path, shard: Shard, recipe: dict[str, Any]) -> Iterator[PartWriter]:
    """Give a writer for a shard's part; on success publish the part, and then its sidecar."""
    name = part_name(shard)
    path = store / "parts" / f"{name}.h5"
    with publish(path) as temporary:
        with contextlib.closing(PartWriter(temporary, shard.samples)) as writer:
            yield writer
            described = writer.finish()
        # The disk takes the file while the digest is worked out.
        with ThreadPoolExecutor(1) as pool:
            synced = pool.submit(sync, temporary)
            digest = sha256(temporary)
            synced.result()
        size = temporary.stat().st_size
    sidecar = {
        "format": FORMAT,
        "name": name,
        "shard": shard.name,
        "split": shard.split,
        "tar_sha256": shard.sha256,
        "recipe": digest_of(recipe),
        "rows": shard.samples,
        "bytes": size,
        "sha256": digest,
        **described,
    }
    write_json(store / "parts" / f"{name}.json", sidecar | {"digest": digest_of(sidecar)})


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
            return open_file(self.path, sidecar["sha256"], sidecar["bytes"])
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
    if hashlib.file_digest(file, "sha256").hexdigest() != sidecar["sha256"]:  # type: ignore[arg-type]
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
