"""The benchmarks by name: one document, one table, and a forecast of how long they take.

A benchmark is a function `(settings, inputs) -> Outcome`; the docstrings say what it compares.
"""

import importlib
import logging
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lgd.base.errors import require
from lgd.base.text import escape_text
from tools.bench.inputs import Inputs
from tools.bench.measure import Settings, machine, pinned, versions

logger = logging.getLogger(f"lgd.{__name__}")

FORMAT = "lgd-bench/1"


class Benchmark(NamedTuple):
    """Where a benchmark is, and how long it takes."""

    module: str
    minutes: float
    """With the default options, alone, on 2 cores of an AMD EPYC that had other work beside it."""
    function: str = "run"
    estimated: bool = False
    """Whether the minutes follow from settings and from what its steps take, and no run was timed."""


# Timed whole: store-plan, query, engine, cached-step. Two rounds were timed of the others, and taken for seven.
BENCHMARKS = {
    "loader": Benchmark("loader", 2),
    "loader-small": Benchmark("loader", 2, "run_small"),
    "loader-peers": Benchmark("peers", 6),
    "decode": Benchmark("decode", 12, estimated=True),
    "store-plan": Benchmark("store", 1, "plan"),
    "store-random": Benchmark("store", 1, "random"),
    "store-first-row": Benchmark("store", 0.1, "first_row"),
    "store-write": Benchmark("write", 2),
    "targets": Benchmark("targets", 1),
    "cache": Benchmark("cache", 8),
    "memory": Benchmark("memory", 3, estimated=True),
    "query": Benchmark("query", 2),
    "slide": Benchmark("slide", 5, estimated=True),
    "engine": Benchmark("engine", 4),
    "cached-step": Benchmark("cached", 3, "step"),
    "cached-vs-recompute": Benchmark("cached", 8, "recompute", estimated=True),
    "start": Benchmark("start", 11, estimated=True),
    "serve": Benchmark("serve", 4, estimated=True),
    "scale": Benchmark("scale", 4, estimated=True),
    "efficiency": Benchmark("efficiency", 5, estimated=True),
}


def bench(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run some benchmarks, or all for no names, and give the JSON document.

    What they need and make lies in a temporary folder, which is removed. Before the first and after each a forecast is
    logged. Raises `ConfigError` with the list of names for another one, and `DataError` for images that cannot be used.
    """
    unknown = [escape_text(name, 60) for name in names if name not in BENCHMARKS]
    require(not unknown, f"there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    left = list(dict.fromkeys(names)) or list(BENCHMARKS)
    document: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(settings) | {"threads": settings.workers},
        "benchmarks": [],
    }
    logger.info(f"[bench] about {forecast(left)}, with the default options on 2 cores of an AMD EPYC")
    with tempfile.TemporaryDirectory(prefix="lgd-bench-") as folder, pinned():
        inputs = Inputs(settings, Path(folder))
        while left:
            name, began = left.pop(0), time.monotonic()
            module = importlib.import_module(f"tools.bench.{BENCHMARKS[name].module}")
            outcome = getattr(module, BENCHMARKS[name].function)(settings, inputs)
            ratios = [ratio.as_json() for ratio in outcome.ratios]
            seconds = round(time.monotonic() - began, 1)
            document["benchmarks"].append({"name": name, "seconds": seconds, "ratios": ratios, "facts": outcome.facts})
            logger.info(f"[bench] {name} took {seconds / 60:.1f} min; left: {forecast(left) if left else 'nothing'}")
    return document


def forecast(names: Iterable[str]) -> str:
    """How long some benchmarks take together, and each: "5 min (loader 2, decode 3)"."""
    minutes = {name: BENCHMARKS[name].minutes for name in names}
    each = ", ".join(f"{name} {minutes[name]:g}" for name in minutes)
    return f"{sum(minutes.values()):g} min ({each})"


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of a document: a row a ratio."""
    return [_row(ratio) for benchmark in document["benchmarks"] for ratio in benchmark["ratios"]]


def _row(ratio: dict[str, Any]) -> dict[str, Any]:
    said = {True: "yes", False: "MISSED", None: "not measured"}[ratio["reached"]]
    value = ratio["value"]
    low, high = ratio.get("spread", (None, None))
    unit = f" {ratio['unit']}" if ratio["unit"] else ""
    return {
        "name": ratio["name"],
        "ratio": "-" if value is None else f"{value:.4g}{unit}",
        "spread": "-" if low is None else f"{low:.3g} to {high:.3g}",
        "to reach": f"{ratio['to_reach']} {ratio['mark']:g}{unit}",
        "reached": said,
        "compared": ratio["missing"] or ratio["compared"],
    }


def summary(document: dict[str, Any]) -> str:
    """One sentence: how many marks were reached."""
    ratios: Sequence[dict[str, Any]] = [ratio for one in document["benchmarks"] for ratio in one["ratios"]]
    reached = sum(ratio["reached"] is True for ratio in ratios)
    missed = [ratio["name"] for ratio in ratios if ratio["reached"] is False]
    unmeasured = [ratio["name"] for ratio in ratios if ratio["reached"] is None]
    told = f"{reached} of {len(ratios)} marks reached"
    if missed:
        told += f"; missed: {', '.join(missed)}"
    if unmeasured:
        told += f"; not measured: {', '.join(unmeasured)}"
    return told
