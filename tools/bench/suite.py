"""`lgd bench [NAME]`: the benchmarks by name, one document, one table.

A benchmark is a function `(settings, inputs) -> Outcome`, `run` of its module unless it is named; the docstrings
say what it compares.
"""

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lgd.errors import ConfigError
from tools.bench.inputs import Inputs
from tools.bench.measure import Settings, machine, pinned, versions

FORMAT = "lgd-bench/1"
BENCHMARKS = {
    "loader": "tools.bench.loader",
    "loader-peers": "tools.bench.peers",
    "decode": "tools.bench.decode",
    "store-plan": "tools.bench.store:plan",
    "store-random": "tools.bench.store:random",
    "store-write": "tools.bench.write",
    "cache": "tools.bench.cache",
    "memory": "tools.bench.memory",
    "query": "tools.bench.query",
    "engine": "tools.bench.engine",
    "cached-step": "tools.bench.cached:step",
    "cached-vs-recompute": "tools.bench.cached:recompute",
    "scale": "tools.bench.scale",
    "efficiency": "tools.bench.efficiency",
}


def bench(name: str, settings: Settings) -> dict[str, Any]:
    """Run one benchmark, or all for an empty name, and give the JSON document.

    What a benchmark needs and makes lies in a temporary folder, which is removed. Raises `ConfigError` with the list
    of names for another one, and `DataError` for images that cannot be used.
    """
    if name and name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    document: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(settings) | {"threads": settings.workers},
        "benchmarks": [],
    }
    with tempfile.TemporaryDirectory(prefix="lgd-bench-") as folder, pinned():
        inputs = Inputs(settings, Path(folder))
        for one in [name] if name else BENCHMARKS:
            module, _, function = BENCHMARKS[one].partition(":")
            outcome = getattr(importlib.import_module(module), function or "run")(settings, inputs)
            ratios = [ratio.as_json() for ratio in outcome.ratios]
            document["benchmarks"].append({"name": one, "ratios": ratios, "facts": outcome.facts})
    return document


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
