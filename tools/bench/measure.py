"""How the benchmarks measure: two sides in turn, A B A B, threads pinned alike, medians and spread.

A ratio within one run survives what a rate does not: another machine, a noisy hour. What is written down of it is
every round's two numbers, so that a reader can judge the noise.
"""

import contextlib
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lgd.base.environment import version_of
from lgd.base.errors import require

logger = logging.getLogger(f"lgd.{__name__}")

PACKAGES = (
    *("lgd", "numpy", "torch", "deepspeed", "simplejpeg", "pillow", "webdataset", "litdata"),
    *("faiss-cpu", "faiss-gpu"),
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the benchmarks are asked for."""

    images: str = ""
    """Folder of patches in BCI's layout (HE/SPLIT, IHC/SPLIT); by default 1024 px virtual tissue is drawn."""
    size: int = 256
    """Side of the model's input, in pixels."""
    batch: int = 32
    """Samples in a batch."""
    threads: int = 0
    """Threads of ours, and worker processes of a peer; 0 for one a core."""
    seconds: float = 2.5
    """How long each side of a round is timed, about."""
    rounds: int = 7
    """Rounds of A and B."""
    teacher: str = ""
    """Folder of a trained teacher for `decode`; by default one is trained on virtual tissue."""
    side: int = 1024
    """Side of the virtual patches, in pixels."""
    pairs: int = 256
    """Pairs in the shard set that is streamed: copies of the images."""
    patches: int = 208
    """IHC patches whose latents `decode` compares."""
    stream: float = 60.0
    """Seconds for which `memory` streams."""
    lessons: int = 640
    """Virtual patches on which the teacher of `decode` is trained."""
    epochs: int = 12
    """Passes over them."""
    plan_shards: int = 100_000
    """Shards, of 10,000 samples each, of the plan that `memory` builds."""
    opened: int = 800
    """Parts, of 512 rows each, that `memory` opens."""
    stored: int = 40_000
    """Rows of the store that `store-plan` and `store-random` read: 0.7 GB."""
    cached: int = 48
    """Patches that `cache` counts in a round; eight times as many tiles."""
    part_mb: float = 100.0
    """Megabytes of a part that `store-write` writes."""
    rows: int = 100_000
    """Latents that `query` searches."""
    model: str = "resnet10"
    """Encoder of teacher and student in the benchmarks of training; as `student.encoder` of a run."""
    train_batch: int = 8
    """Samples of a worker in a step of training: so many that it lasts at least 100 ms."""
    slide: int = 12_000
    """Side of the slide that `slide` scores, in pixels."""
    serve_ms: float = 200.0
    """Least milliseconds that a batch of the network behind `serve` takes: its input is enlarged until then."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of a step of training."""

    def __post_init__(self) -> None:
        for name in ("size", "batch", "rounds", "rows", "train_batch"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: use at least 1")
        require(self.threads >= 0, f"--threads {self.threads}: use 0 (one a core) or more")
        require(self.seconds > 0 and self.stream > 0, "--seconds and --stream: use more than 0")

    @property
    def workers(self) -> int:
        """The threads, with the default filled in."""
        return self.threads or len(os.sched_getaffinity(0))


class Rate(NamedTuple):
    """What one side did in one round."""

    samples: int
    seconds: float
    cpu: float
    """Seconds of CPU, of this process and its children."""

    @property
    def a_second(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU a sample."""
        return 1e3 * self.cpu / self.samples


Side = Callable[[], Rate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """One number and its mark."""

    name: str
    compared: str
    """What A and B are."""
    value: float | None
    """None where it could not be measured; `missing` says why."""
    mark: float
    at_most: bool = False
    """Whether the mark is a ceiling."""
    unit: str = ""
    """Empty for a ratio."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Rounds, medians and spread."""
    missing: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the mark is reached; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value <= self.mark if self.at_most else self.value >= self.mark

    def as_json(self) -> dict[str, Any]:
        """The ratio as a JSON object."""
        return {
            "name": self.name,
            "compared": self.compared,
            "value": self.value,
            "mark": self.mark,
            "to_reach": "at most" if self.at_most else "at least",
            "unit": self.unit,
            "reached": self.reached,
            "missing": self.missing,
            **self.detail,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one benchmark found."""

    ratios: list[Ratio]
    facts: dict[str, Any]
    """Input, settings that matter, and what else was seen."""


def alternate(name: str, compared: str, mark: float, a: Side, b: Side, rounds: int) -> Ratio:
    """The median over rounds of A's rate by B's, measured in turn; each round is told. Warm both up before."""
    return compare(name, compared, mark, lambda: (a(), b()), rounds)


def taking_turns(a: Callable[[], Any], b: Callable[[], Any], samples: int, turns: int) -> tuple[Rate, Rate]:
    """The rates of two functions, of so many samples a call each, which take turns.

    What disturbs the machine for longer than a call then meets both. Only where nothing goes on beside a call.
    """
    used = ([0.0, 0.0], [0.0, 0.0])
    for _ in range(turns):
        for call, sums in zip((a, b), used, strict=True):
            cpu, began = cpu_seconds(), time.perf_counter()
            call()
            sums[0] += time.perf_counter() - began
            sums[1] += cpu_seconds() - cpu
    (a_s, a_cpu), (b_s, b_cpu) = used
    return Rate(turns * samples, a_s, a_cpu), Rate(turns * samples, b_s, b_cpu)


def compare(
    name: str,
    compared: str,
    mark: float,
    measure: Callable[[], tuple[Rate, Rate]],
    rounds: int,
) -> Ratio:
    """The median over rounds of A's rate by B's, as `measure` gives them; each round is told."""
    measured = []
    for number in range(rounds):
        one, other = measure()
        measured.append((one, other))
        rates = " / ".join(f"{rate.a_second:.{0 if rate.a_second >= 10 else 3}f}" for rate in (one, other))
        told = f"{rates} a second = {one.a_second / other.a_second:.3f}"
        logger.info(f"[bench] {name}, round {number + 1} of {rounds}: {told}")
    ratios = [one.a_second / other.a_second for one, other in measured]
    detail = {
        "rounds": [
            {
                "a": one.a_second,
                "b": other.a_second,
                "ratio": ratio,
                "samples": [one.samples, other.samples],
                "cpu_ms_a_sample": [one.cpu_ms, other.cpu_ms],
            }
            for (one, other), ratio in zip(measured, ratios, strict=True)
        ],
        "median_a": statistics.median(one.a_second for one, _ in measured),
        "median_b": statistics.median(other.a_second for _, other in measured),
        "ratio_of_cpu": statistics.median(other.cpu_ms / one.cpu_ms for one, other in measured),
        "spread": [min(ratios), max(ratios)],
    }
    return Ratio(name=name, compared=compared, value=statistics.median(ratios), mark=mark, detail=detail)


def cpu_seconds() -> float:
    """CPU time that this process and its living descendants have used; beside a rate it tells work from waiting."""
    used = time.process_time()
    for process in _list_descendants(os.getpid()):
        with contextlib.suppress(OSError):
            # User and system time, in ticks, stand 12 fields behind the name, which is in brackets.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _list_descendants(process: int) -> Iterator[int]:
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                yield child
                yield from _list_descendants(child)


def timed(function: Callable[[], int]) -> Rate:
    """The rate of a function that returns how many samples it did, in this process."""
    cpu, began = cpu_seconds(), time.perf_counter()
    samples = function()
    return Rate(samples, time.perf_counter() - began, cpu_seconds() - cpu)


def steady(batches: Iterable[Any], batch: int, head: int, count: int) -> Rate:
    """The rate from the arrival of batch `head` to that of batch `head + count`.

    All batches before are the warm-up, which starts workers and fills queues. Those behind are taken untimed: there
    must be some, so that the work goes on until the last timed one, and all must be taken, so that nothing goes on
    in the background of the other side's round.
    """
    began = cpu = seconds = used = 0.0
    seen = 0
    for seen, _ in enumerate(batches, 1):
        if seen == head:
            cpu, began = cpu_seconds(), time.perf_counter()
        elif seen == head + count:
            seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
    assert seen > head + count, f"{seen} batches do not reach beyond {head} + {count}"
    return Rate(count * batch, seconds, used)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """One thread a computation, here and in what is started from here: both sides get their threads by their number."""
    import torch

    before = {name: os.environ.get(name) for name in _THREADS}
    threads = torch.get_num_threads()
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def machine() -> dict[str, Any]:
    """The machine: what a rate, though not a ratio, depends on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as stream:
        model = next((line.split(":")[1].strip() for line in stream if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "load": list(os.getloadavg()),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of what is measured; None for what is not installed."""
    return {"python": platform.python_version(), **{package: version_of(package) for package in packages}}
