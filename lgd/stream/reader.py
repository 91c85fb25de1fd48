"""A plan's sample numbers in, decoded samples out.

Only the members that are asked for are read: a student's stream never touches the IHC's bytes. Threads read and
decode ahead; both release the GIL, so threads are enough. They decode into one array a batch: stacking images
afterwards would copy every pixel again.
"""

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import BinaryIO, NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.base.target import Label
from lgd.base.threads import keep_ahead
from lgd.io.download_cache import has_room
from lgd.io.location import waits_for_network
from lgd.io.remote import drop_damaged, open_file
from lgd.shards.archive import SKIPPED, Shard, read_sample
from lgd.shards.image import Header, decode, header
from lgd.shards.manifest import PatchMeta
from lgd.stream.plan import offsets

Numbers = Sequence[int] | np.ndarray

OPEN_SHARDS = 256
"""Shards that a reader keeps open; a rank with more lanes than that opens them again and again."""

_RUN = 8
"""Samples that a thread reads at a time, at most: first all of their bytes, then all of their pixels."""

_FETCH_AHEAD = 4096
_FETCHES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One patch pair, as far as it was asked for."""

    number: int
    shard: int
    row: int
    meta: PatchMeta
    """The sample's KEY.json."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> uint8 (height, width, 3), RGB."""
    error: str = ""
    """Why the sample could not be read, where it was to be skipped; then meta is empty and images are black."""

    @property
    def key(self) -> str:
        """The sample's key."""
        return self.meta.key

    @property
    def label(self) -> Label | None:
        """Number of the class, or the value; None where it is unknown."""
        return self.meta.label


class Encoded(NamedTuple):
    """An image whose bytes were read and checked, not decoded yet."""

    role: str
    name: str
    """Names it in errors."""
    header: Header
    content: memoryview


class Samples(NamedTuple):
    """The samples of one batch."""

    rows: list[Sample]
    images: dict[str, np.ndarray]
    """Role -> uint8 (n, size, size, 3), of which the rows' images are views; empty at native size."""


_Begun = tuple[list[Future[list[Sample]]], dict[str, np.ndarray]]


class Reader:
    """Reads samples of a list of shards by number, from any thread."""

    def __init__(self, shards: Sequence[Shard], roles: Sequence[str] = ("he",), size: int | None = None) -> None:
        """`roles`: images to decode; `size`: side to shrink them to, or None for native resolution.

        Where a shard stores the H&E at that size too, the role `he` is read from there.
        """
        self.shards = shards = list(shards)
        self.sizes = [shard.samples for shard in self.shards]
        self.first = offsets(self.sizes)
        self.total = int(self.first[-1])
        self.roles = tuple(roles)
        for shard in self.shards:
            if lacking := [role for role in self.roles if role not in shard.extensions]:
                raise DataError(f"{shard.path} has no images of the role {lacking[0]}: its set was built without them")
        self.size = size
        self._members = [
            tuple("hes" if role == "he" and size and size == shard.he_size else role for role in self.roles)
            for shard in self.shards
        ]
        self._opening = [threading.Lock() for _ in self.shards]
        self._failures: dict[int, tuple[float, DataError]] = {}
        self._opened = functools.lru_cache(OPEN_SHARDS)(lambda shard: shards[shard].open())
        self._indexes: dict[int, np.ndarray] = {}

    def open(self, shard: int) -> tuple[BinaryIO, np.ndarray]:
        """A shard's file and index, kept open for the next sample; a remote one is fetched first, and the caller's."""
        # The first reader opens the shard, which may take a download; those who want others do not wait. The file of a
        # shard that is dropped is closed when the last thread that reads from it drops it.
        began = time.monotonic()
        with self._opening[shard]:
            # Who waited for another's try has its outcome: it may have taken a minute.
            when, failure = self._failures.get(shard, (0.0, None))
            if failure and when > began:
                raise failure
            try:
                return self._open_remote(shard) if waits_for_network(self.shards[shard].path) else self._opened(shard)
            except DataError as error:
                self._failures[shard] = (time.monotonic(), error)
                raise

    def _open_remote(self, shard: int) -> tuple[BinaryIO, np.ndarray]:
        """A remote shard's copy, which keeps its room in the cache for as long as it is open, and index."""
        at, index = self.shards[shard], self._indexes.get(shard)
        if index is not None:
            return open_file(at.path, at.sha256, at.bytes), index
        file, index = at.open()
        if len(self._indexes) >= OPEN_SHARDS:
            self._indexes.clear()
        self._indexes[shard] = index
        return file, index

    def read(self, number: int, out: dict[str, np.ndarray] | None = None, skip: bool = False) -> Sample:
        """Read, check and decode one sample, into the arrays of `out` where they are given.

        A sample that cannot be read raises `DataError`, or with `skip` comes back with its `error`. A shard that
        cannot be opened always raises.
        """
        return self.decode_sample(*self.read_bytes(number, skip), out, skip)

    def read_bytes(self, number: int, skip: bool = False) -> tuple[Sample, list[Encoded]]:
        """The first half of `read`: read and check one sample. It has no images yet; these are in the list."""
        shard = int(self.first.searchsorted(number, side="right")) - 1
        row = number - int(self.first[shard])
        opened = self.open(shard)
        try:
            meta, contents = self._read_members(shard, row, opened)
            images = []
            for member, content in contents.items():
                name = f"{self.shards[shard].path}, row {row}, {meta.key}, {member}"
                images.append(Encoded("he" if member == "hes" else member, name, header(content, name), content))
        except DataError as error:
            if not skip:
                raise
            return Sample(number=number, shard=shard, row=row, meta=SKIPPED, error=str(error)), []
        return Sample(number=number, shard=shard, row=row, meta=meta), images

    def decode_sample(
        self, sample: Sample, images: list[Encoded], out: dict[str, np.ndarray] | None = None, skip: bool = False
    ) -> Sample:
        """The second half of `read`: the sample with its images, from what `read_bytes` gave."""
        try:
            for image in images:
                sample.images.update(self.decode(image, out[image.role] if out else None))
        except DataError as error:
            if not skip:
                raise
            sample = replace(sample, meta=SKIPPED, images={}, error=str(error))
        if sample.error:
            sample.images.update(out or {})
            for black in sample.images.values():
                black[:] = 0
        return sample

    def _read_members(
        self, shard: int, row: int, opened: tuple[BinaryIO, np.ndarray]
    ) -> tuple[PatchMeta, dict[str, memoryview]]:
        """A sample of a shard that is open; where its copy was damaged in the cache, of the next one."""
        at, (file, index) = self.shards[shard], opened
        try:
            return read_sample(file, index, row, at, self._members[shard])
        except DataError:
            if not drop_damaged(at.path, at.sha256, file):
                raise
        finally:
            if waits_for_network(at.path):
                file.close()
        self._opened.cache_clear()
        self._indexes.clear()
        file, index = self.open(shard)
        with file:
            return read_sample(file, index, row, at, self._members[shard])

    def decode(self, image: Encoded, out: np.ndarray | None) -> dict[str, np.ndarray]:
        """The images that one member gives, by name."""
        return {image.role: decode(image.content, image.name, self.size, out, image.header)}

    def fetch(self, shard: int) -> None:
        """Copy a remote shard into the cache, where nothing that was used a moment ago has to go for it."""
        if waits_for_network(self.shards[shard].path) and has_room(self.shards[shard].bytes):
            self.open(shard)[0].close()

    def close(self) -> None:
        """Close the shards' files."""
        self._opened.cache_clear()


def stream(
    reader: Reader, batches: Iterable[Numbers], *, threads: int, prefetch: int = 3, skip: bool = False
) -> Iterator[Samples]:
    """Yield the samples of each batch of numbers, in order; up to `prefetch` batches are read ahead.

    `skip`: a sample that cannot be read comes with its `error` instead of raising it.
    """
    if any(waits_for_network(shard.path) for shard in reader.shards):
        batches = _fetched_ahead(reader, batches)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lgd-read")

    def read(numbers: Numbers, images: dict[str, np.ndarray]) -> list[Sample]:
        # Decoding an image takes a core's caches: on a Xeon, reading and checking a sample took 0.33 ms between two
        # decodings of 5 ms, and takes 0.22 after seven others.
        encoded = [reader.read_bytes(int(number), skip) for number in numbers]
        return [
            reader.decode_sample(*one, {role: image[place] for role, image in images.items()}, skip)
            for place, one in enumerate(encoded)
        ]

    def begin(numbers: Numbers) -> _Begun:
        images: dict[str, np.ndarray] = {}
        if reader.size is not None:
            shape = (len(numbers), reader.size, reader.size, 3)
            images = {role: np.empty(shape, np.uint8) for role in reader.roles}
        # Every thread has a part of each batch, however small that is.
        length = max(1, min(_RUN, len(numbers) // threads))
        runs = [slice(start, start + length) for start in range(0, len(numbers), length)]
        return [pool.submit(read, numbers[run], {role: images[role][run] for role in images}) for run in runs], images

    def finish(begun: _Begun) -> Samples:
        return Samples([row for future in begun[0] for row in future.result()], begun[1])

    try:
        # By `map`, which keeps no batch that was given.
        yield from map(finish, keep_ahead(map(begin, batches), prefetch))
    finally:
        # Nobody waits: garbage collection may close an abandoned stream in any thread, also in one of the pool, or in
        # one that holds a lock which the pool's threads want. They own the arrays that they still write to.
        pool.shutdown(wait=False, cancel_futures=True)


def _fetched_ahead(reader: Reader, batches: Iterable[Numbers]) -> Iterator[Numbers]:
    """Pass batches of numbers on; the shards of those up to `_FETCH_AHEAD` samples later are being fetched."""
    pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="lgd-fetch")

    @functools.lru_cache(OPEN_SHARDS)
    def fetch(shard: int) -> None:
        # What fails here fails again, and is reported, where the sample is read.
        pool.submit(reader.fetch, shard)

    def begin(numbers: Numbers) -> Numbers:
        for shard in np.unique(reader.first.searchsorted(numbers, side="right") - 1).tolist():
            fetch(shard)
        return numbers

    try:
        yield from keep_ahead(map(begin, batches), _FETCH_AHEAD, len)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_batches(numbers: Sequence[int], batch: int) -> list[Sequence[int]]:
    """Cut sample numbers into runs of `batch`; the last may be shorter."""
    return [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
