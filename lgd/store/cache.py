"""One shard + the frozen teacher -> one part. Caching resumes part by part.

`lgd cache-latents` and tools/cache_teacher_latents.py run `cache_latents`, which leaves a store (`lgd.store.latents`).
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lgd import distribute
from lgd.config import Config
from lgd.data.shards import Shard
from lgd.data.stream import Sample
from lgd.errors import DataError
from lgd.files import exclusive, exists, is_remote, list_folder, place
from lgd.progress import progress
from lgd.store.latents import Store, commit
from lgd.store.sidecar import is_complete, part_name
from lgd.store.supervision import Supervision, recipe_of, stored
from lgd.store.writer import part_writer

SHARDS_AT_ONCE = 2
"""Shards that a worker has in hand: while the rows of one are hashed and written, the next is decoded already."""

_OURS = {"store.json", "parts", "index", ".lock", ".owner.json"}


def cache_latents(config: Config, shards: Sequence[Shard], workers: int) -> tuple[Store, int]:
    """Fill the store of a run; returns it and the number of parts that had to be computed.

    Raises `DataError` while another process caches into the same local folder.
    """
    folder, recipe = place(config.latents.dir), recipe_of(config)
    if exists(folder / "store.json"):
        store = Store(folder, recipe)
        if not _missing(folder, recipe, shards):
            if {part.name for part in store.parts} == {part_name(shard) for shard in shards}:
                return store, 0
    else:
        # A killed `publish` leaves its temporary file.
        strangers = [name for name in list_folder(folder) if name not in _OURS and not name.endswith(".tmp")]
        if strangers:
            raise DataError(
                f"{folder} holds something else than a feature store ({strangers[0]}): name another folder as "
                "latents.dir"
            )
    with contextlib.nullcontext() if is_remote(folder) else exclusive(folder, "caching"):
        missing = _missing(folder, recipe, shards)
        _fill(config, recipe, missing, workers)
        sources = {
            "shards": sorted({str(shard.path.absolute().parent) for shard in shards}),
            "teacher": config.teacher.dir,
        }
        return commit(folder, recipe, shards, sources), len(missing)


def _missing(folder: Path, recipe: dict[str, Any], shards: Sequence[Shard]) -> list[Shard]:
    """The shards without a complete part, each tar once."""
    by_tar = {shard.sha256: shard for shard in shards}
    return [shard for shard in by_tar.values() if not is_complete(folder, shard, recipe)]


def _fill(config: Config, recipe: dict[str, Any], missing: Sequence[Shard], workers: int) -> None:
    """Compute parts, behind a bar with patches a second and the time left."""
    if not missing:
        return
    total = sum(shard.samples for shard in missing)
    with progress(total, "caching", "patches") as bar:
        here = bar.update if workers == 0 else None
        make = functools.partial(Cacher, config, recipe, here)
        done = distribute.map_with(make, missing, workers=workers, what="train.workers", at_once=SHARDS_AT_ONCE)
        for rows in done:
            # A worker is elsewhere: its patches are counted when its part is done.
            bar.update(0 if here else rows)


class Cacher:
    """Turns shards into parts; it may be called from several threads, which share its threads and its teacher."""

    def __init__(self, config: Config, recipe: dict[str, Any], tick: Callable[[int], Any] | None = None) -> None:
        """`tick(n)` is told of n patches more."""
        self.config, self.recipe, self.tick = config, recipe, tick or (lambda done: None)
        self.supervision = Supervision(config.teacher.dir, recipe)
        self._pool = ThreadPoolExecutor(config.data.threads, thread_name_prefix="lgd-prepare")
        self._turn = threading.Lock()
        self._counting, self._stopping = threading.Lock(), threading.Event()

    def __call__(self, shard: Shard) -> int:
        """Write the shard's part; returns its rows."""
        batch, make = self.config.latents.batch, self.supervision
        reader = make.reader([shard])
        prepare = functools.partial(make.prepare, reader)
        prepared = distribute.ahead(self._pool, prepare, range(shard.samples), count=batch)
        with part_writer(place(self.config.latents.dir), shard, self.recipe) as writer:
            while samples := list(itertools.islice(map(self._counted, prepared), batch)):
                writer.add(stored(self._rows(samples), samples, shard, self.recipe["dtype"], writer.rounding))
        reader.close()
        return shard.samples

    def _rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        if self.supervision.device == "cpu":
            # More threads than the pool's would only push each other's work out of the caches.
            return self._pool.submit(self.supervision.rows, samples).result()
        # One batch after the other; meanwhile the pool prepares the next ones.
        with self._turn:
            return self.supervision.rows(samples)

    def _counted(self, sample: Sample) -> Sample:
        if self._stopping.is_set():
            raise InterruptedError("caching was stopped")
        with self._counting:
            self.tick(1)
        return sample

    def stop(self) -> None:
        """End the calls in other threads at their next sample."""
        self._stopping.set()
