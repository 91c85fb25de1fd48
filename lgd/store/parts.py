"""The rows of one shard, read through maps of its parts, one a layer of the store.

The datasets of a part are contiguous and unfiltered: rows are read where the sidecar says that they lie, after each
dataset's digest was found right, so that a reader of pooled latents alone never reads the maps. HDF5 itself is asked
by `lgd verify` only.
"""

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from lgd.base.errors import DataError
from lgd.base.labels import Labels
from lgd.base.target import NO_CLASS, Target
from lgd.io.digests import digest_of
from lgd.io.download_cache import idle_maps
from lgd.io.location import Location
from lgd.io.remote import drop_damaged, open_checked, open_file
from lgd.store.document import PATCHES, REMEDY, Dataset, Entry, Layout, Sidecar, read_sidecar

OPEN_PARTS = 16_384
"""Shards whose parts a process keeps mapped; Linux allows it 65,530 maps in all."""

_open: deque["Part"] = deque()
_mapping = threading.Lock()


class PartFile:
    """One HDF5 file of a store, mapped lazily; the digest of a dataset is checked once before its first use."""

    def __init__(self, folder: Location, name: str, digest: str, layout: Mapping[str, Layout], target: Target) -> None:
        """`folder` is the layer's; `digest` that of the sidecar which store.json was written over; `target` what labels
        are of.
        """
        self.folder, self.name, self.digest, self.layout, self.target = folder, name, digest, layout, target
        self.content: memoryview | None = None
        self._identity: tuple[int, ...] = ()
        self._checked: set[str] = set()

    @property
    def path(self) -> Location:
        """The HDF5 file."""
        return self.folder / f"{self.name}.h5"

    def sidecar(self) -> Sidecar:
        """The part's sidecar, which must be the one that store.json was written over."""
        sidecar = read_sidecar(self.folder, self.name)
        path = self.folder / f"{self.name}.json"
        if sidecar.digest != self.digest:
            raise DataError(f"sidecar {path} is not the one of store.json: run lgd cache-latents again")
        if sidecar.layout != self.layout:
            raise DataError(f"sidecar {path} states other datasets than store.json: {REMEDY}")
        return sidecar

    def open(self, sidecar: Sidecar) -> BinaryIO:
        """The file, unbuffered; of a url through the cache."""
        try:
            return open_file(self.path, sidecar.xxh3, sidecar.bytes)
        except FileNotFoundError as error:
            raise DataError(f"part {self.path} is missing: run lgd cache-latents again") from error

    def read(self, sidecar: Sidecar, name: str) -> np.ndarray:
        """A dataset, (rows, ...) read-only; `DataError` for one that is not as its digest says."""
        dataset = sidecar.datasets[name]
        part = self._read(sidecar, dataset)
        if name not in self._checked:
            if xxhash.xxh3_128_hexdigest(part) != dataset.xxh3:
                self.content = None
                with self.open(sidecar) as file:
                    dropped = drop_damaged(self.path, sidecar.xxh3, file)
                part = self._read(sidecar, dataset)
                if not dropped or xxhash.xxh3_128_hexdigest(part) != dataset.xxh3:
                    self.content = None
                    raise DataError(f"part {self.path} does not match its digest (dataset {name}): {REMEDY}")
            try:
                check_rows(name, dataset.rows(part), self.target)
            except ValueError as error:
                raise DataError(f"part {self.path}: {error}: {REMEDY}") from error
            self._checked.add(name)
        return dataset.rows(part)

    def _read(self, sidecar: Sidecar, dataset: Dataset) -> memoryview:
        if self.content is None:
            self.content = self._map(sidecar)
        return self.content[dataset.offset : dataset.offset + dataset.bytes]

    def _map(self, sidecar: Sidecar) -> memoryview:
        import torch

        with self.open(sidecar) as file:
            facts = os.fstat(file.fileno())
            if facts.st_size != sidecar.bytes:
                raise DataError(f"part {self.path} has {facts.st_size} bytes and not {sidecar.bytes}: {REMEDY}")
            identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if identity != self._identity:
                self._identity, self._checked = identity, set()
            # Unlike numpy.memmap this keeps no descriptor: thousands of parts would use up what a process may have.
            size, name = facts.st_size, f"/dev/fd/{file.fileno()}"
            content = torch.from_file(name, shared=False, size=size, dtype=torch.uint8).numpy()
        return content.data.toreadonly()

    def problem(self) -> str | None:
        """What is wrong with the part, or None; reads all of it."""
        try:
            sidecar = self.sidecar()
            self.open(sidecar).close()
            with open_checked(self.path, sidecar.xxh3, sidecar.bytes, REMEDY) as file:
                _check_hdf5(self.path, file, sidecar)
            for name in sidecar.datasets:
                self.read(sidecar, name)
        except DataError as error:
            return str(error)
        finally:
            self.content = None
        return None


class Mapped(NamedTuple):
    """Datasets over maps of their files, read-only."""

    arrays: dict[str, np.ndarray]
    """(rows, ...) each."""
    bytes: dict[str, memoryview]
    """The same as plain bytes."""


class Part:
    """The rows of one shard, over some layers of a store."""

    def __init__(self, files: Mapping[str, PartFile], entry: Entry) -> None:
        """`files` by their layer: the patches, a teacher, and further ones whose datasets are named `pooled@NAME`."""
        self.files, self.name, self.split, self.tar_sha256 = files, entry.name, entry.split, entry.tar_sha256
        self.rows, self.first, self.last = entry.rows, entry.first, entry.last
        self.layout: dict[str, Layout] = {}
        self._lies_in: dict[str, tuple[PartFile, str]] = {}
        for number, (layer, file) in enumerate(files.items()):
            for dataset, layout in file.layout.items():
                name = dataset if number < 2 or dataset == "key" else f"{dataset}@{layer}"
                # Every layer has the keys.
                self.layout.setdefault(name, layout)
                self._lies_in.setdefault(name, (file, dataset))
        self._mapped = Mapped({}, {})
        self._lock = threading.Lock()

    @property
    def path(self) -> Location:
        """The file of the first layer, to name the part by."""
        return next(iter(self.files.values())).path

    @property
    def target(self) -> Target:
        """What labels are of."""
        return next(iter(self.files.values())).target

    def digest(self, teacher: str) -> str:
        """Digest of all that the patches' and a teacher's part hold."""
        return digest_of([self.files[layer].digest for layer in (PATCHES, teacher)])

    def mapped(self, names: frozenset[str]) -> Mapped:
        """Some datasets at least; raises `DataError` for one that is missing, or not as its digest says."""
        mapped = self._mapped
        if names <= mapped.arrays.keys():
            return mapped
        # The first reader checks the digests; those who want other parts do not wait.
        with self._lock:
            before = self._mapped
            arrays = self._map(names, before.arrays)
            views = {name: array.reshape(-1).view(np.uint8).data for name, array in arrays.items()}
            mapped = self._mapped = Mapped(arrays, views)
        if not before.arrays:
            with _mapping:
                _open.append(self)
                oldest = _open.popleft() if len(_open) > OPEN_PARTS else None
            if oldest is not None:
                oldest.forget()
        return mapped

    def _map(self, names: frozenset[str], before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays, sidecars = dict(before), dict[PartFile, Sidecar]()
        for name in sorted(names - arrays.keys()):
            if name not in self._lies_in:
                raise DataError(f"{self.path} has no dataset {name!r}: cache into a store that has it")
            file, dataset = self._lies_in[name]
            if file not in sidecars:
                sidecars[file] = file.sidecar()
            arrays[name] = file.read(sidecars[file], dataset)
        return arrays

    def array(self, dataset: str) -> np.ndarray:
        """One dataset, (rows, ...), read-only."""
        return self.mapped(frozenset((dataset,))).arrays[dataset]

    def forget(self, wait: bool = True) -> bool:
        """Drop the maps; they go when the last array of them is dropped. False where they are being made."""
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            self._mapped = Mapped({}, {})
            for file in self.files.values():
                file.content = None
        finally:
            self._lock.release()
        return True


def _forget_idle() -> None:
    """Drop the maps of all parts that are not being mapped."""
    with _mapping:
        kept = [part for part in _open if not part.forget(wait=False)]
        _open.clear()
        _open.extend(kept)


idle_maps.append(_forget_idle)


def read_all(parts: Sequence[Part], dataset: str) -> np.ndarray:
    """A whole dataset over the given parts, (rows, ...)."""
    return np.concatenate([part.array(dataset) for part in parts])


def read_labels(parts: Sequence[Part]) -> Labels:
    """The label of every row of the given parts, of which there is one at least."""
    return as_labels(read_all(parts, "label"), parts[0].target)


def as_labels(label_n: np.ndarray, target: Target) -> Labels:
    """Stored labels, NaN where unknown: int64 numbers of classes with -1, or float64 values with NaN."""
    if target.is_number:
        # What float32 made of 12.3 is written as 12.3 again.
        return np.array([float(str(value)) for value in label_n.astype(np.float32)], np.float64)
    return np.where(np.isnan(label_n), NO_CLASS, label_n).astype(np.int64)


def check_rows(name: str, rows_n: np.ndarray, target: Target) -> None:
    """Raise `ValueError` where keys or slides are no text, or labels none of a target; other datasets may hold
    anything.
    """
    if name in ("key", "slide"):
        try:
            b"\n".join(rows_n.tolist()).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"a {name} is not UTF-8") from error
    elif name == "label" and target.is_number:
        low, high = map(np.float32, target.range or (-np.inf, np.inf))
        if not (np.isnan(rows_n) | (np.isfinite(rows_n) & (rows_n >= low) & (rows_n <= high))).all():
            raise ValueError(f"a label is not {target.describe_labels()}")
    elif name == "label" and not (np.isnan(rows_n) | np.isin(rows_n, range(target.width))).all():
        raise ValueError(f"a label is none of 0 to {target.width - 1}")


def _check_hdf5(path: Location, file: BinaryIO, sidecar: Sidecar) -> None:
    """Raise `DataError` where HDF5 finds other datasets in a part's open file than its sidecar states."""
    try:
        found = _described_by_hdf5(file, sidecar.datasets)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"part {path} is no HDF5 file of ours ({error})") from error
    if found != sidecar.datasets:
        raise DataError(f"part {path}: HDF5 finds other datasets in it than its sidecar states")


def _described_by_hdf5(content: BinaryIO, stated: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The datasets of an HDF5 file as a sidecar states them; `ValueError` for anything but plain contiguous ones."""
    import h5py

    found = {}
    # By a name, /dev/fd/N too, HDF5 does not open a file that was replaced or evicted meanwhile.
    with h5py.File(content, "r") as file:
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
            if name not in stated:
                raise ValueError(f"dataset {name!r:.80} is not in the sidecar")
            facts = {"dtype": dataset.dtype.str, "shape": dataset.shape, "offset": dataset.id.get_offset()}
            found[name] = Dataset(xxh3=stated[name].xxh3, **facts)
    return found
