"""`memory`: what the stream keeps of what it has streamed, what open parts of a store take, and a very large plan.

Private memory (USS) is read while tiny samples run through `Batches`; its slope after the warm-up is scaled
to a million samples. The parts of a store of tiny rows are opened and read, all of them, in a process of its own;
what it then has written to more is scaled to a million rows in parts of 512. The pages of the parts' own files are
told apart: they are page cache, which the kernel takes back.
"""

import gc
import logging
import multiprocessing
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lgd.config import Config
from lgd.config_sections import Data, Train
from lgd.shards.archive import Shard
from lgd.shards.builder import build
from lgd.shards.image import encode
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.store.commit import commit
from lgd.store.store import Rows, Store
from lgd.store.writer import shard_writer
from lgd.stream.plan import Plan, World, rank_positions
from lgd.stream.reader import Reader
from lgd.train.batch import Batches
from tools.bench.inputs import HER2, Inputs
from tools.bench.measure import Outcome, Ratio, Settings
from tools.bench.store import PART, RECIPE, random_rows, shard_of

logger = logging.getLogger(f"lgd.{__name__}")

MARK = 50.0
_ROLLUP = Path("/proc/self/smaps_rollup")
_SIDE = 32
_PAIRS, _SHARD = 1024, 32
_BATCH = 256
_WARM = 0.25
"""Share of the time that counts as warm-up."""


def private_bytes(kinds: tuple[str, ...] = ("Private_Clean", "Private_Dirty")) -> int:
    """Memory that only this process has (USS); of `Private_Clean` alone the kernel has another copy in a file."""
    lines = _ROLLUP.read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def opened(folder: Path, parts: int) -> dict[str, Any]:
    """What a store of so many parts of tiny rows takes when all are open and rows of all have been read."""
    for name, count in (("warm", 4), ("store", parts)):
        rng, shards = np.random.default_rng(0), [shard_of(folder / name, number, PART) for number in range(count)]
        for number, shard in enumerate(shards):
            with shard_writer(folder / name, shard, RECIPE) as writer:
                writer.add(random_rows(number * PART, PART, rng, dim=8))
        commit(folder / name, RECIPE, shards)
    # Here memory that something else has freed would be taken again and not be seen.
    more = run_alone(_taken, folder)
    return {
        "parts": parts,
        "rows_a_part": PART,
        "bytes_a_part": more["Private_Dirty"] / parts,
        "page_cache_bytes_a_part": more["Private_Clean"] / parts,
        # Bytes a row are megabytes a million.
        "mb_a_million_rows": more["Private_Dirty"] / (parts * PART),
    }


def _taken(folder: Path) -> dict[str, int]:
    """Private bytes, by kind, that opening and reading the store in `folder` takes; a small one is used before."""

    def read(name: str) -> tuple[Store, Rows]:
        store = Store(folder / name)
        rows = Rows(store.parts)
        for number in range(len(store.parts)):
            rows.read([number] * 16, range(16), [None] * 16)
        gc.collect()
        return store, rows

    def private() -> dict[str, int]:
        return {kind: private_bytes((kind,)) for kind in ("Private_Dirty", "Private_Clean")}

    kept = [read("warm")]
    before = private()
    kept.append(read("store"))
    return {kind: bytes_ - before[kind] for kind, bytes_ in private().items()}


def tiny_shards(folder: Path) -> list[Shard]:
    """A shard set of tiny noise, many times quicker to stream than patches."""
    rng = np.random.default_rng(0)
    root = folder / "tiny"
    for role in ("HE", "IHC"):
        (root / role / "train").mkdir(parents=True)
    for number in range(_PAIRS):
        for role in ("HE", "IHC"):
            content = encode(rng.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8), "jpg")
            name = f"{number:05d}_train_{HER2.classes[number % 4]}.png"
            (root / role / "train" / name).write_bytes(content)
    build(ShardOptions(layout="bci", root=str(root), out=str(folder / "tiny-shards"), shard_size=_SHARD))
    return list(ShardFolder.open(folder / "tiny-shards").shards)


def readings(shards: list[Shard], seconds: float, threads: int) -> np.ndarray:
    """Stream for so long; float64 (n, 2): samples streamed so far, and private bytes then."""
    reader = Reader(shards, ("he",), _SIDE)
    plan = Plan(reader.sizes, seed=0, lanes=Data().lanes)
    found: list[tuple[int, int]] = []
    config = Config(data=Data(threads=threads, augment="none"), train=Train(batch=_BATCH))
    steps = Batches(config, reader, plan, World()).draw(0, steps=10**9)
    began = told = time.monotonic()
    for step in steps:
        now = time.monotonic()
        if now - told > seconds / 200:
            found.append((step.position, private_bytes()))
            told = now
        if now - began > seconds and len(found) >= 16:
            break
    steps.close()  # type: ignore[attr-defined]
    reader.close()
    return np.array(found, float)


def slope(readings_n2: np.ndarray) -> tuple[float, float]:
    """Bytes a sample by least squares, and its standard error.

    Successive readings are alike, so the error is taken from the slopes of eight stretches, not from the residuals.
    """
    samples_n, bytes_n = readings_n2.T
    fitted = float(np.polyfit(samples_n, bytes_n, 1)[0])
    # Means of stretches forget the sawtooth of what is read ahead.
    stretches = np.array([part.mean(axis=0) for part in np.array_split(readings_n2, 8)])
    x, y = stretches.T
    line = np.polyfit(x, y, 1)
    left = y - np.polyval(line, x)
    error = float(np.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))
    return fitted, error


def plan_at_scale(shards: int, samples: int, batch: int = 1024) -> dict[str, Any]:
    """Seconds and bytes of the plan of `shards` shards of `samples` samples, begun in the middle of an epoch.

    To be run in a process of its own (`run_alone`), which has no other thread.
    """
    # Before Python 3.12.9 and 3.13.2, `tracemalloc.stop` beside a thread that allocates without the GIL, as zlib's
    # functions do, ends the process with a segmentation fault.
    assert threading.active_count() == 1, "tracemalloc is not safe beside other threads"
    sizes = [samples] * shards
    found: dict[str, Any] = {"samples": shards * samples, "shards": shards, "lanes": Data().lanes, "batch": batch}
    for world in (World(), World(rank=31, size=64)):
        # A second time under the tracer, which slows what it watches.
        seconds = _begun(sizes, batch, world)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        kept = _begun(sizes, batch, world)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found[f"rank {world.rank} of {world.size}"] = {
            **{name: value for name, value in seconds.items() if name != "plan"},
            "bytes": now - before,
            "peak_bytes": peak - before,
        }
        del kept
    return found


def _begun(sizes: Sequence[int], batch: int, world: World) -> dict[str, Any]:
    began = time.perf_counter()
    plan = Plan(sizes, seed=0, lanes=Data().lanes)
    built = time.perf_counter()
    middle = plan.total // 2 + 12345
    plan.samples(rank_positions(middle, batch, 1, world)[0])
    first = time.perf_counter()
    for number in range(1, 101):
        plan.samples(rank_positions(middle + number * batch, batch, 1, world)[0])
    further = time.perf_counter()
    return {
        "seconds_to_build": built - began,
        "seconds_to_first_batch": first - built,
        "ms_a_further_batch": 10 * (further - first),
        "plan": plan,
    }


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Megabytes by which private memory grows in a million samples, and by a million rows."""
    rows: dict[str, Any] = {}
    if _ROLLUP.exists():
        logger.info(f"[bench] opening a store of {settings.opened} parts")
        rows = opened(inputs.folder / "tiny-store", settings.opened)
    plan = run_alone(plan_at_scale, settings.plan_shards, 10_000)
    ours = plan["rank 0 of 1"]
    logger.info(
        f"[bench] plan of {plan['samples']:.0e} samples: {ours['seconds_to_build']:.3f} s, first batch after "
        f"{ours['seconds_to_first_batch']:.3f} s, {ours['bytes'] / 1e6:.1f} MB"
    )
    texts = {
        "memory": "private memory's growth after warm-up, per 1e6 samples streamed",
        "memory: rows opened": f"private memory without page cache, per 1e6 rows opened in parts of {PART}",
    }
    if not _ROLLUP.exists():
        ratios = [
            Ratio(name=name, compared=text, value=None, mark=MARK, at_most=True, missing=f"needs Linux: no {_ROLLUP}")
            for name, text in texts.items()
        ]
        return Outcome(ratios=ratios, facts={"plan": plan})
    found = readings(tiny_shards(inputs.folder), settings.stream, settings.workers)
    warm = found[found[:, 0] >= found[0, 0] + _WARM * (found[-1, 0] - found[0, 0])]
    # Bytes a sample are megabytes a million; what is left of a line without a slope is rounding.
    value, error = (round(number, 6) for number in slope(warm))
    facts = {
        "pixels": _SIDE,
        "samples_in_set": _PAIRS,
        "batch": _BATCH,
        "samples_streamed": int(found[-1, 0]),
        "samples_measured": int(warm[-1, 0] - warm[0, 0]),
        "readings": len(warm),
        "mb_before": warm[0, 1] / 1e6,
        "mb_after": warm[-1, 1] / 1e6,
        "standard_error": error,
        "rows_opened": rows,
        "plan": plan,
    }
    spread = {"spread": [value - 2 * error, value + 2 * error]}
    values: dict[str, tuple[float, dict[str, Any]]] = {
        "memory": (value, spread),
        "memory: rows opened": (rows["mb_a_million_rows"], {}),
    }
    ratios = [
        Ratio(name=name, compared=texts[name], value=number, mark=MARK, at_most=True, unit="MB", detail=detail)
        for name, (number, detail) in values.items()
    ]
    return Outcome(ratios=ratios, facts=facts)
