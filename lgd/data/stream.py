"""A plan's sample numbers in, decoded samples out.

Only the members that are asked for are read: a student's stream never touches the IHC's bytes. Threads read and
decode ahead; both release the GIL, so threads are enough.
"""

import collections
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lgd.data.plan import address
from lgd.data.shards import Shard, decode, read_member

MEMBERS = ("json", "he", "ihc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One patch pair, as far as it was asked for."""

    number: int
    shard: int
    row: int
    key: str
    level: int
    """0 to 3, or -1 where it is unknown."""
    meta: dict[str, Any]
    """The sample's KEY.json."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Role -> uint8 (height, width, 3), RGB."""


class Reader:
    """Reads samples of a list of shards by number, from any thread."""

    def __init__(self, shards: Sequence[Shard], roles: Sequence[str] = ("he",), size: int | None = None) -> None:
        """`roles`: images to decode; `size`: side to shrink them to, or None for native resolution."""
        self.shards = list(shards)
        self.sizes = [shard.samples for shard in self.shards]
        self.total = sum(self.sizes)
        self.roles = tuple(roles)
        self.size = size
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, tuple[int, np.ndarray]] = collections.OrderedDict()

    def _shard(self, number: int) -> tuple[int, np.ndarray]:
        """File descriptor and index of a shard; they stay open, since a split has few thousands at most."""
        with self._lock:
            if number not in self._open:
                shard = self.shards[number]
                self._open[number] = (os.open(shard.path, os.O_RDONLY), shard.index())
            return self._open[number]

    def read(self, number: int) -> Sample:
        """Read, check and decode one sample."""
        shards_n, rows_n = address(self.sizes, np.array([number]))
        shard, row = int(shards_n[0]), int(rows_n[0])
        descriptor, index = self._shard(shard)
        where = f"{self.shards[shard].path}, row {row}"
        meta = json.loads(read_member(descriptor, index[row, 0], f"{where}, json"))
        images: dict[str, np.ndarray] = {}
        for role in self.roles:
            what = f"{where}, {meta['key']}, {role}"
            content = read_member(descriptor, index[row, MEMBERS.index(role)], what)
            images |= self.decode(content, what, role)
        level = -1 if meta["level"] is None else int(meta["level"])
        return Sample(number=number, shard=shard, row=row, key=meta["key"], level=level, meta=meta, images=images)

    def decode(self, content: bytes, what: str, role: str) -> dict[str, np.ndarray]:
        """The images that one member gives, by name."""
        return {role: decode(content, what, self.size)}

    def close(self) -> None:
        """Close the shards' files."""
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()


def stream(reader: Reader, batches: Iterable[np.ndarray], *, threads: int, prefetch: int = 4) -> Iterator[list[Sample]]:
    """Yield the samples of each batch of numbers, in order; up to `prefetch` batches are read ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lgd-read")
    waiting: collections.deque[list[Future[Sample]]] = collections.deque()
    try:
        for numbers in batches:
            waiting.append([pool.submit(reader.read, int(number)) for number in numbers])
            if len(waiting) > prefetch:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(numbers_n: np.ndarray, batch: int) -> list[np.ndarray]:
    """Cut sample numbers into runs of `batch`; the last may be shorter."""
    return [numbers_n[start : start + batch] for start in range(0, len(numbers_n), batch)]
