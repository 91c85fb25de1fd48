"""One HDF5 part: written as its shard's batches come, committed by its sidecar.

    DIR/parts/LAYER/NAME.h5       contiguous datasets, one row a sample, in the order of the shard
    DIR/parts/LAYER/NAME.json     the sidecar (`lgd.store.document`); its appearance commits the part

A part is named for its shard and the first digits of the tar's digest, so a changed shard gets a new part.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from lgd.base.errors import DataError
from lgd.io.digests import digest_of
from lgd.io.files import publish, sync
from lgd.io.location import Location
from lgd.shards.archive import Shard
from lgd.store.document import PATCHES, TEACHER, Dataset, Recipe, Rounding, Sidecar, TargetsRecipe, part_name

_LATENTS = ("pooled", "map")
"""The datasets that depend on a teacher."""
_METADATA = 65_536
"""Bytes that HDF5 takes for itself, at most; it needs about 3,000."""
_UNKNOWN = "0" * 32
"""Stands for a digest until the file is written."""
_HELD_BYTES, _HELD_BATCHES = 8 << 20, 512
"""Batches are held back until they are so much, since small writes cost a fifth more; Linux takes 1,024 in a call."""


class PartWriter:
    """Takes the rows of a part, batch by batch."""

    def __init__(self, path: Path, rows: int) -> None:
        import h5py

        self._path, self._rows, self._row = path, rows, 0
        self._done = self._written = 0
        with h5py.File(path, "w", libver="latest", driver="core", backing_store=False) as empty:
            empty.flush()
            path.write_bytes(empty.id.get_file_image())
        self._file = h5py.File(path, "r+", libver="latest")
        self._held: list[dict[str, np.ndarray]] = []
        self._texts: dict[str, list[bytes]] = {}
        self._datasets: dict[str, h5py.Dataset] = {}

    def _reserve(self, size: int) -> None:
        # HDF5 2.0 crashes some time after it has met a full disk: it may only write where there is room for sure.
        with self._path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size + _METADATA)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the next rows; every array has one row a sample, and `key` is among them.

        The arrays are the writer's from now on: it may write them later. Raises `DataError` for keys that do not come
        in order: rows are found by key through that.
        """
        import h5py

        stop = self._done + len(arrays["key"])
        assert stop <= self._rows and all(len(array) == stop - self._done for array in arrays.values())
        numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "S"}
        if not self._done:
            self._row = sum(array[0].nbytes for array in numbers.values())
            self._reserve(self._rows * self._row)
            # Each gets its place in the file, and nothing in it.
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            for name, array in numbers.items():
                shape = (self._rows, *array.shape[1:])
                self._datasets[name] = self._file.create_dataset(name, shape, array.dtype, dcpl=plist)
        # The width of texts is that of the longest, so they are written at the end.
        for name in arrays.keys() - numbers.keys():
            self._texts.setdefault(name, []).extend(arrays[name].tolist())
        keys = self._texts["key"][max(0, self._done - 1) :]
        if any(after <= before for before, after in itertools.pairwise(keys)):
            raise DataError("its keys are not sorted: lgd verify its shard folder, and build it again")
        self._done = stop
        self._held.append(numbers)
        if len(self._held) == _HELD_BATCHES or (self._done - self._written) * self._row >= _HELD_BYTES:
            self._put()

    def _put(self) -> None:
        """Write what is held, past HDF5, which takes twice as long as the write itself for a batch of rows."""
        file = self._file.id.get_vfd_handle()
        for name in self._held[0] if self._held else ():
            views = [np.ascontiguousarray(numbers[name]).data.cast("B") for numbers in self._held]
            offset = self._datasets[name].id.get_offset() + self._written * self._held[0][name][0].nbytes
            written = os.pwritev(file, views, offset)
            if written < sum(map(len, views)):
                rest = b"".join(views)
                while written < len(rest):
                    written += os.pwrite(file, memoryview(rest)[written:], offset + written)
        self._written = self._done
        self._held.clear()

    def finish(self) -> tuple[dict[str, Dataset], str, str]:
        """Write what is left; returns what lies where, still without digests, and the first and the last key."""
        assert self._done == self._rows, f"{self._done} of {self._rows} rows were written"
        self._put()
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
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._path, size)


class ShardWriter(NamedTuple):
    """Takes the rows of a shard, batch by batch, and deals their datasets to the parts of the layers."""

    parts: dict[str, PartWriter]
    """By layer."""
    rounding: dict[str, Rounding]
    """What the sidecars state of the loss by the stored type; the caller fills it."""

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the next rows, as `PartWriter.add`."""
        latents = {name: array for name, array in arrays.items() if name in _LATENTS}
        others = {name: array for name, array in arrays.items() if name not in latents}
        for layer, part in self.parts.items():
            part.add(others if layer == PATCHES else latents | {"key": arrays["key"]})


@contextlib.contextmanager
def shard_writer(
    store: Location, shard: Shard, recipe: Recipe | TargetsRecipe, layers: Sequence[str] = (PATCHES, TEACHER)
) -> Iterator[ShardWriter]:
    """Give a writer for a shard's rows; on success publish its parts of these layers."""
    rounding: dict[str, Rounding] = {}
    with contextlib.ExitStack() as stack:
        writers = {layer: stack.enter_context(_part_writer(store, layer, shard, recipe, rounding)) for layer in layers}
        yield ShardWriter(writers, rounding)


@contextlib.contextmanager
def _part_writer(
    store: Location, layer: str, shard: Shard, recipe: Recipe | TargetsRecipe, rounding: dict[str, Rounding]
) -> Iterator[PartWriter]:
    """Give a writer for a shard's part of a layer; on success publish the part, and then its sidecar."""
    folder, name = store / "parts" / layer, part_name(shard)
    with publish(folder / f"{name}.h5") as temporary:
        with contextlib.closing(PartWriter(temporary, shard.samples)) as writer:
            yield writer
            datasets, first, last = writer.finish()
        # The disk takes the file while the digests are worked out.
        with ThreadPoolExecutor(1) as pool:
            synced = pool.submit(sync, temporary)
            size, digest, digests = _digests(temporary, datasets)
            synced.result()
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
        datasets={of: dataset.model_copy(update={"xxh3": digests[of]}) for of, dataset in datasets.items()},
        first=first,
        last=last,
        rounding={of: lost for of, lost in rounding.items() if of in datasets},
    )
    sidecar.write(folder / f"{name}.json")


def _digests(path: Path, datasets: Mapping[str, Dataset]) -> tuple[int, str, dict[str, str]]:
    """Bytes and digest of a file, and the digest of each dataset in it, in one pass."""
    whole, of_dataset = xxhash.xxh3_128(), {name: xxhash.xxh3_128() for name in datasets}
    start = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HELD_BYTES):
            whole.update(block)
            view = memoryview(block)
            for name, dataset in datasets.items():
                offset = dataset.offset - start
                of_dataset[name].update(view[max(0, offset) : max(0, offset + dataset.bytes)])
            start += len(block)
    return start, whole.hexdigest(), {name: digest.hexdigest() for name, digest in of_dataset.items()}
