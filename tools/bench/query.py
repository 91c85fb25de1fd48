"""`query`: what a search costs beside bare FAISS, and what recall is left at 20 times the speed of exact search.

The store is real, its latents are drawn like those of a trained teacher. Of 720 virtual patches on 180 slides (the
demo's, at 96 pixels) four fifths of the variance lay between levels, 8 % between the slides of a level, 12 % within
slides, and the variance of the k-th principal axis fell as k^-1.95. So here: a mean of each level, one of each slide
and a patch's own part, each Gaussian over 512 axes with a variance of k^-2; 200 patches a slide, in float16. Queries
are of other slides than the gallery, and all are compared as a run compares them, whitened. A query is searched by one
thread; batches of 1,000 and building have all.
"""

import functools
import logging
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lgd.config_sections import Latents
from lgd.retrieval.factory import UnitVectors, choose_factory, measure_recall, nearest, unit
from lgd.retrieval.index import build_index
from lgd.retrieval.index_files import IndexDocument, cells_of, code_bytes
from lgd.retrieval.search import Searcher, import_faiss, index_folder
from lgd.shards.archive import Shard
from lgd.store.commit import commit
from lgd.store.store import Store
from lgd.store.writer import shard_writer
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Ratio, Settings
from tools.bench.memory import private_bytes
from tools.bench.store import RECIPE, shard_of

logger = logging.getLogger(f"lgd.{__name__}")

DIM = 512
COMPONENTS = Latents().components
MARK, RECALL, SPEED = 1.05, 0.99, 20
_PART = 50_000
_SLIDE = 200
_QUERIES = 1000
_TIMED, _SLOW = 200, 30
"""Queries that are timed alone; fewer of those that take long."""
_MEMORY = 24 * 2**30
"""Bytes of memory of the machine that `extrapolation` is for."""
_SPREAD = (1 / np.arange(1, DIM + 1)).astype(np.float32)
_LEVEL, _OF_SLIDE, _OF_PATCH = 0.8**0.5, 0.08**0.5, 0.12**0.5
"""Standard deviations of the parts."""


def draw(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Some latents of slides of their own: `pooled` float16 (n, 1, D), `level`, `key` and `slide`."""
    levels, random = _LEVEL * np.random.default_rng(0).standard_normal((4, DIM)), np.random.default_rng([1, seed])
    slide = np.arange(rows) // _SLIDE
    level_of = random.integers(0, 4, slide[-1] + 1)
    slides = levels[level_of] + _OF_SLIDE * random.standard_normal((len(level_of), DIM))
    pooled = random.standard_normal((rows, DIM), np.float32)
    pooled *= _OF_PATCH
    pooled += slides[slide]
    pooled *= _SPREAD
    return {
        "pooled": pooled[:, None].astype(np.float16),
        "label": level_of[slide].astype(np.float32),
        "key": np.array([f"{seed:05d}-{number:06d}" for number in range(rows)], "S12"),
        "slide": np.array([f"{seed:05d}-{number:04d}" for number in range(slide[-1] + 1)], "S10")[slide],
    }


def make_store(folder: Path, rows: int) -> tuple[Store, list[Shard]]:
    """A store of so many latents in train, and 1,000 in val, and what stands for its shards."""
    sizes = [min(_PART, rows - start) for start in range(0, rows, _PART)]
    shards = []
    for number, size in enumerate([*sizes, _QUERIES]):
        shard = shard_of(folder, number, size, "train" if number < len(sizes) else "val")
        with shard_writer(folder, shard, RECIPE) as writer:
            writer.add(draw(size, number))
        shards.append(shard)
    return commit(folder, RECIPE, shards), shards


def milliseconds(search: Callable[[np.ndarray], Any], queries_nD: np.ndarray) -> np.ndarray:
    """How long each query takes alone, (n,)."""
    found = []
    for number in range(len(queries_nD)):
        query = queries_nD[number : number + 1]
        began = time.perf_counter()
        search(query)
        found.append(1e3 * (time.perf_counter() - began))
    return np.array(found)


def _p(times_n: np.ndarray) -> dict[str, float]:
    return {"p50_ms": float(np.percentile(times_n, 50)), "p99_ms": float(np.percentile(times_n, 99))}


def compare(searcher: Searcher, queries_nD: np.ndarray, vectors_nk: np.ndarray, rounds: int) -> Ratio:
    """p50 of our search by that of FAISS, in the same index, query by query in turn.

    FAISS is given the vectors, whitened already.
    """
    measured = []
    for number in range(-1, rounds):
        times_n2 = [
            (
                milliseconds(lambda query: searcher.search(query, 10), query_D[None])[0],
                milliseconds(lambda query: searcher.index.search(query, 10), vector_k[None])[0],
            )
            for query_D, vector_k in zip(queries_nD, vectors_nk, strict=True)
        ]
        a, b = np.median(times_n2, axis=0).tolist()
        if number >= 0:
            # The first round warms up.
            measured.append({"a": a, "b": b, "ratio": a / b})
            logger.info(f"[bench] query, round {number + 1} of {rounds}: p50 {a:.4f} / {b:.4f} ms = {a / b:.3f}")
    ratios = [one["ratio"] for one in measured]
    return Ratio(
        name="query",
        compared="p50 of Searcher.search / of FAISS's search in the same index",
        value=statistics.median(ratios),
        mark=MARK,
        at_most=True,
        detail={"rounds": measured, "unit_of_rounds": "ms", "spread": [min(ratios), max(ratios)]},
    )


def trade(
    index: Any, exact_ms: float, measure: Callable[[np.ndarray], float], queries_nD: np.ndarray
) -> list[dict[str, float]]:
    """Recall@10, which `measure` gives of the answers, and p50 of an IVF index by its probes, until it is too slow."""
    found: list[dict[str, float]] = []
    probes = 1
    while probes <= index.nlist:
        index.nprobe = probes
        p50 = float(np.median(milliseconds(lambda query: index.search(query, 10), queries_nD[:_TIMED])))
        recall = measure(index.search(queries_nD, 10)[1])
        found.append({"nprobe": probes, "p50_ms": p50, "times_exact": exact_ms / p50, "recall_at_10": recall})
        if p50 > exact_ms / SPEED * 2:
            break
        probes += max(1, probes // 2)
    return found


def at_speed(found: Sequence[dict[str, float]], exact_ms: float, rows: int) -> Ratio:
    """The best recall of those that are 20 times as fast as exact search."""
    fast = [one["recall_at_10"] for one in found if one["times_exact"] >= SPEED]
    missing = f"an exact search of {rows} latents takes {exact_ms:.3f} ms: no index is {SPEED} times as fast"
    return Ratio(
        name="query: recall",
        compared=f"recall@10 of the IVF index at {SPEED} times the speed of exact search, one query at a time",
        value=max(fast) if fast else None,
        mark=RECALL,
        missing="" if fast else missing,
        detail={"exact_p50_ms": exact_ms, "by_probes": found},
    )


def extrapolation(document: IndexDocument, table_bytes: int) -> dict[str, Any]:
    """Bytes, memory and hours for 1e3 to 1e9 rows, by the rates that were measured."""
    rows, cells = document.rows, max(1, cells_of(document.factory))
    train, add = document.seconds["train"], document.seconds["add"]
    found = []
    for power in range(3, 10):
        more = 10**power
        factory, _ = choose_factory(more, COMPONENTS, _MEMORY)
        their = cells_of(factory)
        code = code_bytes(factory, COMPONENTS)
        index = more * (code + (8 if their else 0)) + 4 * COMPONENTS * their
        seconds = (train * (their / cells) ** 2 + add * more / rows * their / cells) if their else 0.0
        found.append(
            {
                "rows": more,
                "factory": factory,
                "vectors_bytes": more * DIM * 2,
                "index_bytes": index,
                "table_bytes": more * table_bytes,
                "build_memory_bytes": index + 2 * 100_000 * (code + 8),
                "query_memory_bytes": index + more * table_bytes,
                "build_hours": seconds / 3600,
            }
        )
    return {
        "rows": found,
        "machine": f"{_MEMORY / 2**30:.0f} GiB of memory, the cores of this one",
        "rules": {
            "factory": "lgd.retrieval.factory.choose_factory",
            "vectors_bytes": "rows x 512 x 2: the pooled latents in the parts",
            "index_bytes": "rows x (bytes of a code, and 8 of its position in a cell) + cells x 4 x latents.components",
            "table_bytes": "rows x bytes of a row of keys.npy",
            "build_memory_bytes": "the index, and two groups of 100,000 rows that are merged into it",
            "query_memory_bytes": "index and table, both mapped: the system may drop what no query touches",
            "build_hours": "train x (cells / measured cells)^2 + add x rows x cells / measured rows and cells; exact: "
            "0. Measured below 1e5 rows, overheads are taken for rates",
        },
    }


def _filters(
    searcher: Searcher, exact: Any, latents: UnitVectors, queries_nD: np.ndarray, vectors_nk: np.ndarray
) -> dict[str, Any]:
    """Latency and recall@10 where only a level, or only a slide, may be found."""
    faiss, order_n = import_faiss(), _order(searcher)
    found = {}
    slide = searcher.table["slide"][0]
    for name, allowed in (("a level", searcher.table["label"] == 1), ("a slide", searcher.table["slide"] == slide)):
        k = min(10, int(allowed.sum()))
        if k == 0:
            continue
        of_rows = np.zeros(len(allowed), bool)
        of_rows[order_n] = allowed
        selector = faiss.IDSelectorBitmap(np.packbits(of_rows, bitorder="little"))
        few_nD = queries_nD[:_SLOW]
        truth_nk = exact.search(vectors_nk[:_SLOW], k, params=faiss.SearchParameters(sel=selector))[1]
        found_nk = order_n[searcher.search(few_nD, k, allowed)[1]]
        recall = measure_recall(latents, vectors_nk[:_SLOW], truth_nk, found_nk)
        times_n = milliseconds(functools.partial(searcher.search, k=k, allowed=allowed), few_nD)
        found[name] = {"allowed": int(allowed.sum()), "recall_at_10": recall, **_p(times_n)}
    return found


def _order(searcher: Searcher) -> np.ndarray:
    """The row of the gallery at each position of the index."""
    order_n: np.ndarray = searcher.table["part"].astype(np.int64) * _PART + searcher.table["row"]
    return order_n


def _built(store: Store, shards: Sequence[Shard], factory: str) -> tuple[Searcher, dict[str, Any]]:
    """An index, opened, and what that took."""
    began = time.perf_counter()
    document, _ = build_index(store, shards, factory, ["train"], RECALL, seed=0, components=COMPONENTS)
    built = time.perf_counter() - began
    private, began = private_bytes(), time.perf_counter()
    searcher = Searcher(store)
    opened = time.perf_counter() - began
    facts = {
        "factory": document.factory,
        "why": document.why,
        "nprobe": document.nprobe,
        "build_seconds": document.seconds | {"all, with recall and digests": built},
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "recall_at_10_when_built": document.recall_at_10,
        "open_seconds": opened,
        "open_private_bytes": private_bytes() - private,
        "index_bytes": document.faiss.bytes,
        "table_bytes": document.table.bytes,
    }
    logger.info(f"[bench] {document.factory}: built in {built:.1f} s, opened in {opened:.3f} s")
    return searcher, facts


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Our p50 by that of FAISS, and recall@10 at 20 times the speed of exact search."""
    faiss, rows = import_faiss(), settings.rows
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(settings.workers)
        began = time.perf_counter()
        store, shards = make_store(inputs.folder / "query", rows)
        logger.info(f"[bench] {rows} latents drawn in {time.perf_counter() - began:.1f} s")
        return _measured(store, shards, settings)
    finally:
        faiss.omp_set_num_threads(threads)


def _measured(store: Store, shards: Sequence[Shard], settings: Settings) -> Outcome:
    faiss, rows = import_faiss(), settings.rows
    queries_nD = draw(_QUERIES, 10**5 - 1)["pooled"][:, 0].astype(np.float32)
    searcher, facts = _built(store, shards, "auto")
    latents = UnitVectors([part for part in store.parts if part.split == "train"], searcher.whitening)
    assert searcher.whitening is not None
    vectors_nk = unit(searcher.whitening.apply(queries_nD))
    truth_nk = nearest(latents, vectors_nk, 10)
    began = time.perf_counter()
    found_nk = searcher.search(queries_nD, 10)[1]
    facts["queries_a_second_in_batches_of_1000"] = _QUERIES / (time.perf_counter() - began)
    facts["recall_at_10"] = measure_recall(latents, vectors_nk, truth_nk, _order(searcher)[found_nk])
    exact = faiss.IndexFlatIP(latents.dim)
    for _, vectors_nD in latents.blocks():
        exact.add(vectors_nD)

    faiss.omp_set_num_threads(1)
    ratio = compare(searcher, queries_nD[:_TIMED], vectors_nk[:_TIMED], settings.rounds)
    facts["one_query"] = _p(milliseconds(lambda query: searcher.search(query, 10), queries_nD))
    facts["one_query_of"] = _filters(searcher, exact, latents, queries_nD, vectors_nk)
    exact_ms = float(np.median(milliseconds(lambda query: exact.search(query, 10), vectors_nk[:_SLOW])))

    ivf, ivf_facts = searcher, None
    if cells_of(facts["factory"]) == 0:
        faiss.omp_set_num_threads(settings.workers)
        ivf, ivf_facts = _built(store, shards, f"IVF{min(rows, round(4 * rows**0.5))},SQfp16")
        faiss.omp_set_num_threads(1)
    bare = faiss.read_index(str(index_folder(store) / f"{ivf.document.faiss.xxh3}.faiss"))
    order_n = _order(ivf)
    found = trade(
        bare, exact_ms, lambda found_nk: measure_recall(latents, vectors_nk, truth_nk, order_n[found_nk]), vectors_nk
    )
    for one in found:
        recall, times = one["recall_at_10"], one["times_exact"]
        logger.info(f"[bench] nprobe {one['nprobe']}: recall {recall:.4f}, {times:.1f} times exact")
    return Outcome(
        ratios=[ratio, at_speed(found, exact_ms, rows)],
        facts={
            "input": f"{rows} drawn latents of {DIM} dimensions, {_SLIDE} a slide; {_QUERIES} queries of other slides",
            "load": "see machine.load: rates and latencies suffer where others share the cores",
            "chosen": facts,
            "ivf": ivf_facts,
            "extrapolation": extrapolation(ivf.document, ivf.table.dtype.itemsize),
        },
    )
