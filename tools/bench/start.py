"""`start`: how soon `lgd train` takes its first step under Ray, beside a bare TorchTrainer of as many workers.

Both start as a command does: a new process, a local Ray, its workers. The bare trainer's workers import the libraries
that ours need, and meet once. Ours runs once before several rounds, so that the files of all of them are in memory.

Run as a module with the path of a file, it is the bare trainer, which makes that file when its workers have met.
"""

import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lgd.base.errors import DataError
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Settings, alternate, cpu_seconds

WORKERS = 2
MARK = 1.2
_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("torch", "transformers", "deepspeed")
_LONGEST = 900
"""Seconds after which a start counts as failed; the first one may compile DeepSpeed's extension."""


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Seconds to the first step by seconds to the first meeting of workers that do nothing."""
    shards = Path(str(inputs.shards[0].path)).parent
    options = {
        "data.shards": shards,
        "data.size": settings.size,
        "student.method": "he-only",
        "student.encoder": settings.model,
        "train.workers": WORKERS,
        "train.batch": WORKERS * settings.train_batch,
    }

    def bare() -> Rate:
        with tempfile.TemporaryDirectory(dir=inputs.folder) as folder:
            return _time_start(["tools.bench.start", f"{folder}/met"], Path(folder) / "met")

    def ours() -> Rate:
        with tempfile.TemporaryDirectory(dir=inputs.folder) as folder:
            command = ["lgd", "train", f"--run.dir={folder}", *(f"--{name}={value}" for name, value in options.items())]
            return _time_start(command, Path(folder) / "student" / "log.jsonl")

    # The median of one round shows that it runs, and no more.
    if settings.rounds > 1:
        ours()
    compared = f"`lgd train` to its first step / a bare TorchTrainer that imports {', '.join(_LIBRARIES)}"
    ratio = alternate("start", compared, MARK, bare, ours, settings.rounds)
    facts = {"workers": WORKERS, "bare_s": 1 / ratio.detail["median_a"], "lgd_s": 1 / ratio.detail["median_b"]}
    return Outcome(ratios=[replace(ratio, at_most=True)], facts=facts)


def _time_start(command: list[str], first: Path) -> Rate:
    """How long a module takes until it has written to the file `first`; it is asked to stop then."""
    # A cluster that runs already has its processes.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryFile("w+") as output:
        cpu, began = cpu_seconds(), time.perf_counter()
        command = [sys.executable, "-m", *command]
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=output, stderr=output)
        try:
            while not first.exists() or not first.stat().st_size:
                if process.poll() is not None or time.perf_counter() > began + _LONGEST:
                    output.seek(0)
                    raise DataError(f"{shlex.join(command)}: no first step", *output.read().splitlines()[-5:])
                time.sleep(0.02)
            return Rate(1, time.perf_counter() - began, cpu_seconds() - cpu)
        finally:
            process.terminate()
            process.wait()


def _meet(config: dict[str, str]) -> None:
    """What a worker of the bare trainer does."""
    import torch.distributed as dist

    for name in _LIBRARIES:
        importlib.import_module(name)
    dist.barrier()
    if dist.get_rank() == 0:
        Path(config["met"]).write_text("met")


def _train_bare(met: str) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    storage = RunConfig(storage_path=str(Path(met).parent))
    TorchTrainer(
        _meet, train_loop_config={"met": met}, scaling_config=ScalingConfig(num_workers=WORKERS), run_config=storage
    ).fit()


if __name__ == "__main__":
    _train_bare(sys.argv[1])
