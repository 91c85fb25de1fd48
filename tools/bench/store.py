"""`store-plan`, `store-random`: reading rows in plan order and at random, against numpy.memmap on the same bytes.

A is `Rows.read`, B the fastest of some plain ways over `numpy.memmap` of the same files.
Both read pooled latents, maps, both target grids and the keys of 256 rows at a time, from a warm page cache.

`store-first-row`: what must be read, digests and keys included, before the pooled latents of all rows are there,
against these latents alone.
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lgd.base.target import find_target
from lgd.config_sections import Data
from lgd.shards.archive import Shard
from lgd.store.commit import commit
from lgd.store.document import Recipe, TargetsRecipe, TeacherRecipe
from lgd.store.parts import Part
from lgd.store.store import TEACHER, Rows, Store
from lgd.store.writer import shard_writer
from lgd.stream.plan import Plan, offsets
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Ratio, Settings, alternate, timed

logger = logging.getLogger(f"lgd.{__name__}")

DATASETS = ("pooled", "map", "nuclei", "membrane")
"""What its rows hold."""
RECIPE = Recipe(
    targets=TargetsRecipe(nuclei_grid=8, membrane_grid=4, dtype="float16", settings={}),
    teacher=TeacherRecipe(
        source="trained",
        weights_sha256="0" * 64,
        encoder={},
        pool="mean",
        size=256,
        mpp=None,
        resize="none",
        precision="fp32",
        views=1,
        map=4,
        dtype="float16",
    ),
)
"""Of rows that no teacher made."""
BATCH = 256
"""Rows that are read at a time."""
PART = 512
"""Rows of a part that is read."""

Address = tuple[list[int], list[int], list[str | None]]
"""Parts, rows and keys of a batch."""
Read = Callable[[Address], dict[str, np.ndarray]]


def shard_of(folder: Path, number: int, rows: int, split: str = "train") -> Shard:
    """A shard of a part that is made without one."""
    name = f"{split}-{number:06d}"
    return Shard(
        path=folder / f"{name}.tar",
        name=name,
        split=split,
        samples=rows,
        bytes=1,
        sha256=f"{number:064x}",
        idx_sha256="",
        extensions={},
        keeps_files=True,
        target=find_target("her2"),
    )


def random_rows(first: int, rows: int, rng: np.random.Generator, dim: int = 512) -> dict[str, np.ndarray]:
    """Rows of noise as caching stores them; with `dim` 512 a row takes 17.6 kB, nearly all of it the map."""

    def some(*shape: int) -> np.ndarray:
        return rng.random((rows, *shape), np.float32).astype(np.float16)

    return {
        "pooled": some(1, dim),
        "map": some(1, dim, 4, 4),
        "nuclei": some(8, 8),
        "membrane": some(4, 4, 3),
        "label": rng.integers(0, 4, rows).astype(np.float32),
        "slide": np.array([f"slide-{number // 1000:05d}".encode() for number in range(first, first + rows)]),
        "key": np.array([f"patch-{number:09d}".encode() for number in range(first, first + rows)]),
    }


def write_store(folder: Path, rows: int) -> Store:
    """A store of so many rows in parts of 512."""
    rng, shards = np.random.default_rng(0), []
    for number, first in enumerate(range(0, rows, PART)):
        shard = shard_of(folder, number, min(PART, rows - first))
        with shard_writer(folder, shard, RECIPE) as writer:
            writer.add(random_rows(first, shard.samples, rng))
        shards.append(shard)
    return commit(folder, RECIPE, shards)


class Mapped:
    """Plain numpy over the files of a store: what one would write by hand who knows the offsets."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in (*DATASETS, "key")}
        for part in parts:
            for layer, file in part.files.items():
                # Slices of a numpy.memmap are slow to make; those of a plain array over it are not.
                whole: Any = np.memmap(str(file.path), mode="r")
                for name, entry in file.sidecar().datasets.items():
                    if name in self.columns and (name, layer) != ("key", TEACHER):
                        column = np.ndarray(entry.shape, entry.dtype, whole, entry.offset)
                        self.columns[name].append(column[:, 0] if name in ("pooled", "map") else column)

    def loop(self, address: Address) -> dict[str, np.ndarray]:
        """Rows copied one by one."""
        found = {}
        for name, column in self.columns.items():
            out = found[name] = np.empty((len(address[0]), *column[0].shape[1:]), column[0].dtype)
            for place, (part, row) in enumerate(zip(*address[:2], strict=True)):
                out[place] = column[part][row]
        return found

    def stack(self, address: Address) -> dict[str, np.ndarray]:
        """Rows stacked."""
        places = list(zip(*address[:2], strict=True))
        return {name: np.stack([column[part][row] for part, row in places]) for name, column in self.columns.items()}

    def concatenate(self, address: Address) -> dict[str, np.ndarray]:
        """Slices of one row joined."""
        places = list(zip(*address[:2], strict=True))
        return {
            name: np.concatenate([column[part][row : row + 1] for part, row in places])
            for name, column in self.columns.items()
        }

    def by_part(self, address: Address) -> dict[str, np.ndarray]:
        """All rows of a part at once."""
        part_n, row_n = np.array(address[0]), np.array(address[1])
        order_n = np.argsort(part_n, kind="stable")
        runs = np.split(order_n, np.flatnonzero(np.diff(part_n[order_n])) + 1)
        found = {}
        for name, column in self.columns.items():
            out = found[name] = np.empty((len(part_n), *column[0].shape[1:]), column[0].dtype)
            for run in runs:
                out[run] = column[part_n[run[0]]][row_n[run]]
        return found

    def ways(self) -> dict[str, Read]:
        """The ways by name."""
        ways: tuple[Read, ...] = (self.loop, self.stack, self.concatenate, self.by_part)
        return {way.__name__: way for way in ways}


def addresses(numbers_n: np.ndarray, parts: Sequence[Part]) -> list[Address]:
    """Part, row and key of sample numbers, in whole batches."""
    first_P1 = offsets([part.rows for part in parts])
    keys = [part.array("key") for part in parts]
    found = []
    for start in range(0, len(numbers_n) - min(BATCH, len(numbers_n)) + 1, BATCH):
        batch_n = numbers_n[start : start + BATCH]
        part_n = first_P1.searchsorted(batch_n, "right") - 1
        part, row = part_n.tolist(), (batch_n - first_P1[part_n]).tolist()
        found.append((part, row, [keys[p][r].decode() for p, r in zip(part, row, strict=True)]))
    return found


def rate(read: Read, batches: Sequence[Address], count: int) -> Rate:
    """The rate of reading `count` batches, which are taken in turn."""

    def work() -> int:
        return sum(len(read(address)["pooled"]) for address in itertools.islice(itertools.cycle(batches), count))

    return timed(work)


def fastest(ways: dict[str, Read], batches: Sequence[Address]) -> dict[str, float]:
    """Rows a second of each way, the best of three passes that are taken in turn."""
    best = dict.fromkeys(ways, 0.0)
    for _, (name, way) in itertools.product(range(3), ways.items()):
        best[name] = max(best[name], rate(way, batches, len(batches)).a_second)
    return best


def compare(ours: Read, theirs: Read, batches: Sequence[Address]) -> int:
    """Compare all that both sides read, bit for bit; returns how many rows these are."""
    for address in batches:
        found, wanted = ours(address), theirs(address)
        assert found.keys() == wanted.keys() - {"key"}
        assert all(found[name].shape == wanted[name].shape for name in found)
        assert all(found[name].tobytes() == wanted[name].tobytes() for name in found), "the sides read other rows"
        # Ours compares the keys itself.
        assert [key.decode() for key in wanted["key"]] == address[2]
    return sum(len(address[0]) for address in batches)


def first_use(store: Store) -> dict[str, Any]:
    """What the digests of a store's parts cost when they are opened."""
    parts = Store(store.folder).parts
    names = frozenset(("key", *DATASETS))
    # torch is imported with the first part.
    parts[0].mapped(names)
    began = time.perf_counter()
    for part in parts[1:]:
        part.mapped(names)
    seconds = time.perf_counter() - began
    size = sum(file.path.stat().st_size for part in parts[1:] for file in part.files.values())
    return {"ms_a_part": 1e3 * seconds / max(1, len(parts) - 1), "mb_a_second": size / 1e6 / seconds}


def flat_rate(folder: Path, store: Store, numbers_n: np.ndarray) -> float:
    """Rows a second by fancy indexing of one file of all rows, a layout that we do not have, for rows at random."""
    fields = [name for name in DATASETS if name in store.parts[0].layout]
    columns = []
    for name in (*fields, "key"):
        path = folder / f"flat-{name}.bin"
        with path.open("wb") as file:
            for part in store.parts:
                file.write(part.array(name).tobytes())
        one = store.parts[0].array(name)
        columns.append(np.asarray(np.memmap(path, one.dtype, "r", shape=(store.rows, *one.shape[1:]))))
    batches = [numbers_n[start : start + BATCH] for start in range(0, len(numbers_n), BATCH)]
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        for batch_n in batches:
            for column in columns:
                column[batch_n]
        best = max(best, len(numbers_n) / (time.perf_counter() - began))
    return best


def _threaded(read: Read, batches: Sequence[Address], threads: int) -> float:
    """Rows a second of several threads that read batches in turn."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        rows = sum(len(found["pooled"]) for found in pool.map(read, batches))
    return rows / (time.perf_counter() - began)


def _stored(settings: Settings, inputs: Inputs) -> Store:
    """The store that rows are read of, opened anew."""
    folder = inputs.folder / "rows"
    if not (folder / "store.json").exists():
        logger.info(f"[bench] writing a store of {settings.stored} rows")
        write_store(folder, settings.stored)
    return Store(folder)


def measured(
    name: str, mark: float, numbers_of: Callable[[Store], np.ndarray], settings: Settings, inputs: Inputs
) -> Outcome:
    """One ratio of reading rows in some order, and its facts."""
    store = _stored(settings, inputs)
    opened = first_use(store)
    rows, mapped = Rows(store.parts), Mapped(store.parts)
    numbers_n = numbers_of(store)
    batches = addresses(numbers_n, store.parts)

    def ours(address: Address) -> dict[str, np.ndarray]:
        return rows.read(*address)

    compared = compare(ours, mapped.loop, batches)
    found = fastest(mapped.ways(), batches)
    way = max(found, key=lambda name: found[name])
    bare = mapped.ways()[way]
    count = max(2, round(found[way] * settings.seconds / BATCH))
    ratio = alternate(
        name,
        f"rows of {len(store.parts)} parts in {name.removeprefix('store-')} order / numpy.memmap, {way}",
        mark,
        lambda: rate(ours, batches, count),
        lambda: rate(bare, batches, count),
        settings.rounds,
    )
    facts = {
        "rows": store.rows,
        "parts": len(store.parts),
        "batch": BATCH,
        "bytes_a_row": sum(column[0][0].nbytes for column in mapped.columns.values()),
        "first_use": opened,
        "rows_compared": compared,
        "rows_a_second_of_bare_ways": found,
        "rows_a_second_of_a_flat_file": flat_rate(inputs.folder, store, numbers_n),
        f"rows_a_second_of_{settings.workers}_threads": _threaded(ours, batches, settings.workers),
    }
    return Outcome(ratios=[ratio], facts=facts)


def plan(settings: Settings, inputs: Inputs) -> Outcome:
    """Rows a second in the order of training's plan by those of numpy.memmap."""

    def numbers_of(store: Store) -> np.ndarray:
        plan = Plan([part.rows for part in store.parts], seed=0, lanes=Data().lanes)
        return plan.samples(np.arange(plan.total))[1]

    return measured("store-plan", 0.97, numbers_of, settings, inputs)


def random(settings: Settings, inputs: Inputs) -> Outcome:
    """Rows a second of random batches by those of numpy.memmap."""

    def numbers_of(store: Store) -> np.ndarray:
        return np.random.default_rng(0).integers(0, store.rows, store.rows)

    return measured("store-random", 0.9, numbers_of, settings, inputs)


def first_row(settings: Settings, inputs: Inputs) -> Outcome:
    """Bytes that are read for the pooled latents of all rows by the bytes of these latents."""
    store = _stored(settings, inputs)
    rows, pooled = Rows(store.parts, ("pooled",)), 0
    for number, part in enumerate(store.parts):
        keys = [key.decode() for key in part.array("key")]
        pooled += rows.read([number] * part.rows, range(part.rows), keys)["pooled"].nbytes
    # A dataset is read whole, for its digest; what was not asked for is not in the maps.
    read = sum(array.nbytes for part in store.parts for array in part.mapped(frozenset()).arrays.values())
    stored = sum(file.path.stat().st_size for part in store.parts for file in part.files.values())
    ratio = Ratio(
        name="store-first-row",
        compared="bytes read for the pooled latents of all rows / bytes of these latents",
        value=read / pooled,
        mark=1.1,
        at_most=True,
    )
    return Outcome(ratios=[ratio], facts={"rows": store.rows, "read": read, "pooled": pooled, "stored": stored})
