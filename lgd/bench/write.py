"""`store-write`: writing parts, checksummed and flushed, against a raw write of the same bytes.

A is `part_writer`, which takes rows in batches, lays them out by column, and hashes, flushes, renames and describes
the part. B writes the bytes of such a part from memory to one file, in one call, and flushes it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lgd.bench.inputs import Inputs
from lgd.bench.measure import Outcome, Rate, Ratio, Settings, alternate, timed
from lgd.bench.store import random_rows, shard_of
from lgd.store.sidecar import part_name
from lgd.store.writer import part_writer

_ADDED = 64
"""Rows that the writer is given at a time."""
_PARTS = 4
"""Parts that are written in a round."""


def _added(rows: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a part, batch by batch."""
    rng = np.random.default_rng(0)
    for first in range(0, rows, _ADDED):
        yield random_rows(first, min(_ADDED, rows - first), rng)


def writing(settings: Settings, folder: Path, tell: Callable[[str], Any]) -> tuple[Ratio, dict[str, Any]]:
    """The ratio of writing, and its facts."""
    folder.mkdir()
    row = sum(array.nbytes for array in random_rows(0, 1, np.random.default_rng(0)).values())
    batches = list(_added(max(1, round(settings.part_mb * 1e6 / row))))
    rows = sum(len(batch["key"]) for batch in batches)
    shards = [shard_of(folder, number, rows) for number in range(_PARTS)]
    parts = [folder / "parts" / f"{part_name(shard)}.h5" for shard in shards]
    raws = [folder / f"raw-{number}" for number in range(_PARTS)]

    def ours() -> Rate:
        def work() -> int:
            for shard in shards:
                with part_writer(folder, shard, {}) as writer:
                    for batch in batches:
                        writer.add(batch)
            return _PARTS * len(content)

        return timed(work)

    def bare() -> Rate:
        def work() -> int:
            for raw in raws:
                with open(raw, "wb", buffering=0) as file:
                    file.write(content)
                    os.fsync(file.fileno())
            return _PARTS * len(content)

        return timed(work)

    def removed(side: Callable[[], Rate], files: Sequence[Path]) -> Rate:
        rate = side()
        for file in files:
            file.unlink()
        return rate

    content = b""
    ours()
    content = parts[0].read_bytes()
    bare()
    assert all(raw.stat().st_size == part.stat().st_size for raw, part in zip(raws, parts, strict=True))
    ratio = alternate(
        "store-write",
        f"parts of {len(content) / 1e6:.0f} MB, hashed and flushed / raw write + fsync",
        0.85,
        lambda: removed(ours, [*parts, *(part.with_suffix(".json") for part in parts)]),
        lambda: removed(bare, raws),
        settings.rounds,
        tell,
    )
    return ratio, {"parts_a_round": _PARTS, "rows_a_part": rows, "bytes_a_part": len(content)}


def run(settings: Settings, inputs: Inputs, tell: Callable[[str], Any]) -> Outcome:
    """Bytes a second by those of a raw write and fsync."""
    ratio, facts = writing(settings, inputs.folder / "written", tell)
    return Outcome(ratios=[ratio], facts=facts)
