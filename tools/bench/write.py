"""`store-write`: writing parts, checksummed and flushed, against a raw write of the same bytes.

A is `part_writer`, which takes rows in batches, lays them out by column, and hashes, flushes, renames and describes
the part. B writes the bytes of such a part from memory to one file, in one call, and flushes it. Both have as many
parts in hand as caching has.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lgd.io.files import sync
from lgd.shards.archive import Shard
from lgd.store.cache import SHARDS_AT_ONCE
from lgd.store.document import PATCHES, TEACHER, part_name
from lgd.store.writer import shard_writer
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Settings, alternate, timed
from tools.bench.store import RECIPE, random_rows, shard_of

_ADDED = 64
"""Rows that the writer is given at a time."""
_PARTS = 8
"""Parts that are written in a round."""


def _added(rows: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a part, batch by batch."""
    rng = np.random.default_rng(0)
    for first in range(0, rows, _ADDED):
        yield random_rows(first, min(_ADDED, rows - first), rng)


def alone(path: Path, content: bytes) -> dict[str, float]:
    """Milliseconds of what a part needs, one after the other: where the time of a round goes. The least of three."""
    steps: dict[str, Callable[[], Any]] = {
        "write": lambda: path.write_bytes(content),
        "flush": lambda: sync(path),
        "sha256": lambda: hashlib.sha256(content),
    }
    found = dict.fromkeys(steps, float("inf"))
    for _ in range(3):
        path.unlink(missing_ok=True)
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            found[name] = min(found[name], 1e3 * (time.perf_counter() - began))
    path.unlink()
    return found


def _write_raw(paths: Sequence[Path], contents: Sequence[bytes]) -> None:
    for path, content in zip(paths, contents, strict=True):
        with path.open("wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())


def _write_all(write: Callable[[Any], None], files: Sequence[Any], size: int) -> Rate:
    """The rate of writing all parts, of `size` bytes each, as many at once as caching has in hand."""

    def work() -> int:
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            list(pool.map(write, files))
        return len(files) * size

    return timed(work)


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Bytes a second by those of a raw write and fsync."""
    folder = inputs.folder / "written"
    folder.mkdir()
    row = sum(array.nbytes for array in random_rows(0, 1, np.random.default_rng(0)).values())
    batches = list(_added(max(1, round(settings.part_mb * 1e6 / row))))
    rows = sum(len(batch["key"]) for batch in batches)
    shards = [shard_of(folder, number, rows) for number in range(_PARTS)]
    layers = (PATCHES, TEACHER)
    parts = [[folder / "parts" / layer / f"{part_name(shard)}.h5" for layer in layers] for shard in shards]
    raws = [[folder / f"raw-{number}-{layer}" for layer in layers] for number in range(_PARTS)]
    written, copied = list(itertools.chain.from_iterable(parts)), list(itertools.chain.from_iterable(raws))

    def write_part(shard: Shard) -> None:
        with shard_writer(folder, shard, RECIPE) as writer:
            for batch in batches:
                writer.add(batch)

    def ours() -> Rate:
        return _write_all(write_part, shards, size)

    def bare() -> Rate:
        return _write_all(lambda paths: _write_raw(paths, contents), raws, size)

    def removed(side: Callable[[], Rate], files: Sequence[Path]) -> Rate:
        # Memory that has long been free costs a virtual machine's host faults, up to three times the time of a raw
        # write: both sides find memory that was freed just now.
        bare()
        for raw in copied:
            raw.unlink()
        rate = side()
        for file in files:
            file.unlink()
        return rate

    size = 0
    ours()
    contents = [path.read_bytes() for path in parts[0]]
    size = sum(map(len, contents))
    bare()
    assert all(raw.stat().st_size == part.stat().st_size for raw, part in zip(copied, written, strict=True))
    ratio = alternate(
        "store-write",
        f"parts of {size / 1e6:.0f} MB a shard, {SHARDS_AT_ONCE} in hand, hashed and flushed / raw write + fsync",
        0.85,
        lambda: removed(ours, [*written, *(part.with_suffix(".json") for part in written)]),
        lambda: removed(bare, copied),
        settings.rounds,
    )
    facts = {
        "parts_a_round": _PARTS,
        "rows_a_part": rows,
        "bytes_a_part": size,
        "ms_a_part_alone": alone(copied[0], b"".join(contents)),
    }
    return Outcome(ratios=[ratio], facts=facts)
