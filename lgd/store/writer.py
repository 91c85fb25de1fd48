"""One HDF5 part: written as its shard's batches come, committed by its sidecar.

    DIR/parts/LAYER/NAME.h5       contiguous datasets, one row a sample, in the order of the shard
    DIR/parts/LAYER/NAME.json     the sidecar (`lgd.store.document`); its appearance commits the part

A part is named for its shard and the first digits of the tar's digest, so a changed shard gets a new part.
"""

import contextlib
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from lgd.base.errors import DataError
from lgd.io.digests import digest_of
from lgd.io.files import publish
from lgd.io.location import Location
from lgd.shards.archive import Shard
from lgd.store.document import PATCHES, TEACHER, Dataset, Recipe, Rounding, Sidecar, part_name

_LATENTS = ("pooled", "map")
"""The datasets that depend on a teacher."""
_METADATA = 65_536
"""Bytes that HDF5 takes for itself, at most; it needs about 3,000."""
_UNKNOWN = "0" * 32
"""Stands for a digest until the file is written."""


class PartWriter:
    """Takes the rows of a part, batch by batch."""

    def __init__(self, path: Path, rows: int) -> None:
        import h5py

        self._path, self._rows, self._done = path, rows, 0
        with h5py.File(path, "w", libver="latest", driver="core", backing_store=False) as empty:
            empty.flush()
            path.write_bytes(empty.id.get_file_image())
        self._file = h5py.File(path, "r+", libver="latest")
        self._texts: dict[str, list[bytes]] = {}
        self._datasets: dict[str, h5py.Dataset] = {}
        self._maps: dict[str, np.ndarray] = {}

    def _reserve(self, size: int) -> None:
        # HDF5 2.0 crashes some time after it has met a full disk, and who writes through a map there is killed by
        # SIGBUS: both may only write where there is room for sure.
        with self._path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size + _METADATA)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the next rows; every array has one row a sample, and `key` is among them.

        Raises `DataError` for keys that do not come in order: rows are found by key through that.
        """
        import h5py

        stop = self._done + len(arrays["key"])
        assert stop <= self._rows and all(len(array) == stop - self._done for array in arrays.values())
        numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "S"}
        if not self._done:
            self._reserve(self._rows * sum(array[0].nbytes for array in numbers.values()))
            # Each gets its place in the file, and nothing in it.
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            for name, array in numbers.items():
                shape = (self._rows, *array.shape[1:])
                dataset = self._datasets[name] = self._file.create_dataset(name, shape, array.dtype, dcpl=plist)
                self._maps[name] = np.memmap(self._path, array.dtype, "r+", dataset.id.get_offset(), shape)
        # Past HDF5, which takes at least twice as long.
        for name, array in numbers.items():
            self._maps[name][self._done : stop] = array
        # The width of texts is that of the longest, so they are written at the end.
        for name in arrays.keys() - numbers.keys():
            self._texts.setdefault(name, []).extend(arrays[name].tolist())
        keys = self._texts["key"][max(0, self._done - 1) :]
        if any(after <= before for before, after in itertools.pairwise(keys)):
            raise DataError("its keys are not sorted: lgd verify its shard folder, and build it again")
        self._done = stop

    def finish(self) -> tuple[dict[str, Dataset], str, str]:
        """Write the texts; returns what lies where, still without digests, and the first and the last key."""
        assert self._done == self._rows, f"{self._done} of {self._rows} rows were written"
        # HDF5 knows no width of 0.
        texts = {name: np.array(texts, f"S{max(1, *map(len, texts))}") for name, texts in sorted(self._texts.items())}
        self._reserve(sum(array.nbytes for array in texts.values()))
        for name, array in texts.items():
            self._datasets[name] = self._file.create_dataset(name, data=array)
        self._file.flush()
        datasets = {
            name: Dataset(dtype=one.dtype.str, shape=one.shape, offset=one.id.get_offset(), xxh3=_UNKNOWN)
            for name, one in self._datasets.items()
        }
        keys = self._texts["key"]
        return datasets, keys[0].decode(), keys[-1].decode()

    def close(self) -> None:
        """Close the file, and cut off what was reserved and not used, of which HDF5 does not know."""
        self._maps.clear()
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._path, size)


class ShardWriter(NamedTuple):
    """Takes the rows of a shard, batch by batch, and deals their datasets to the parts of the layers."""

    patches: PartWriter
    teacher: PartWriter
    rounding: dict[str, Rounding]
    """What the sidecars tell of the loss by the stored type; the caller fills it."""

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the next rows, as `PartWriter.add`."""
        latents = {name: array for name, array in arrays.items() if name in _LATENTS}
        self.patches.add({name: array for name, array in arrays.items() if name not in latents})
        self.teacher.add(latents | {"key": arrays["key"]})


@contextlib.contextmanager
def shard_writer(store: Location, shard: Shard, recipe: Recipe) -> Iterator[ShardWriter]:
    """Give a writer for a shard's rows; on success publish its parts."""
    rounding: dict[str, Rounding] = {}
    with (
        _part_writer(store, PATCHES, shard, recipe, rounding) as patches,
        _part_writer(store, TEACHER, shard, recipe, rounding) as teacher,
    ):
        yield ShardWriter(patches, teacher, rounding)


@contextlib.contextmanager
def _part_writer(
    store: Location, layer: str, shard: Shard, recipe: Recipe, rounding: dict[str, Rounding]
) -> Iterator[PartWriter]:
    """Give a writer for a shard's part of a layer; on success publish the part, and then its sidecar."""
    folder, name = store / "parts" / layer, part_name(shard)
    with publish(folder / f"{name}.h5") as temporary:
        with contextlib.closing(PartWriter(temporary, shard.samples)) as writer:
            yield writer
            datasets, first, last = writer.finish()
        with temporary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size, digest = len(content), xxhash.xxh3_128_hexdigest(content)
            datasets = {name: _with_digest(dataset, content) for name, dataset in datasets.items()}
    sidecar = Sidecar(
        name=name,
        layer=layer,
        shard=shard.name,
        split=shard.split,
        tar_sha256=shard.sha256,
        recipe=digest_of(recipe.of(layer).as_json()),
        rows=shard.samples,
        bytes=size,
        xxh3=digest,
        datasets=datasets,
        first=first,
        last=last,
        rounding={of: lost for of, lost in rounding.items() if of in datasets},
    )
    sidecar.write(folder / f"{name}.json")


def _with_digest(dataset: Dataset, content: mmap.mmap) -> Dataset:
    with memoryview(content) as view, view[dataset.offset : dataset.offset + dataset.bytes] as rows:
        return dataset.model_copy(update={"xxh3": xxhash.xxh3_128_hexdigest(rows)})
