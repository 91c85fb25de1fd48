"""`scale`: what one run of two workers reaches of two runs of one worker each, side by side.

Two processes, without Ray, each with one thread that computes and its threads that read. A: they are the two workers
of one run, whose global batch is twice a worker's. B: each trains for itself, with the same batch a worker. All stream
from the same shards and store. With GPUs it takes two of them.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from lgd.bench.inputs import Inputs
from lgd.bench.measure import Outcome, Rate, Ratio, Settings, alternate
from lgd.bench.training import (
    COMPARED,
    HEAD,
    TAIL,
    Streamed,
    Training,
    check_curves,
    count_for,
    facts_of,
    ms_a_step,
    prepare,
    rate_of,
)
from lgd.config import Config
from lgd.data.plan import World
from lgd.train.tasks import StudentTask

MARK = 0.95
WORKERS = 2


class Workers:
    """Two training processes that do what they are asked to, both at once."""

    def __init__(self, config: Config, rendezvous: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.batch = config.train.batch
        pipes = [context.Pipe() for _ in range(WORKERS)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, config, rendezvous, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            # Closed here, so that the end of a process ends its pipe.
            theirs.close()

    def ask(self, *question: Any) -> list[Any]:
        """What each of them answers; `EOFError` when one died, which has told why."""
        for pipe in self.pipes:
            pipe.send(question)
        return [pipe.recv() for pipe in self.pipes]

    def one_run(self, count: int) -> Rate:
        """Samples a second of one run over `count` steps."""
        rates = [Rate(*found) for found in self.ask("one run", count)]
        samples = WORKERS * count * self.batch
        return Rate(samples, max(rate.seconds for rate in rates), sum(rate.cpu for rate in rates))

    def side_by_side(self, count: int) -> Rate:
        """The sum of the samples a second of two runs, over `count` steps each."""
        rates = [Rate(*found) for found in self.ask("side by side", count)]
        samples = WORKERS * count * self.batch
        return Rate(samples, samples / sum(rate.a_second for rate in rates), sum(rate.cpu for rate in rates))

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            pipe.close()
            process.join(60)


def serve(rank: int, config: Config, rendezvous: Path, pipe: Any) -> None:
    """What each process runs: answers until the pipe is closed."""
    torch.set_num_threads(1)
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend(), init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    runs = Runs(rank, config, device)
    with contextlib.suppress(EOFError):
        while question := pipe.recv():
            pipe.send(runs.answer(*question))
    runs.close()
    dist.destroy_process_group()


class Runs:
    """The runs of one process: its share of the one run, and its own."""

    def __init__(self, rank: int, config: Config, device: str) -> None:
        torch.manual_seed(config.run.seed)
        self.rank, self.config, self.task = rank, config, StudentTask(config)
        self.model = self.task.build()
        self.both = replace(config, train=replace(config.train, batch=WORKERS * config.train.batch))
        self.among, self.alone = World(rank, WORKERS, device), World(0, 1, device)
        self.sides = {"one run": self._side(self.both, self.among, "one")}
        self.sides["side by side"] = self._side(config, self.alone, f"own-{rank}")

    def _side(self, config: Config, world: World, name: str) -> tuple[Training, Streamed]:
        training = Training(config, self.task, world, copy.deepcopy(self.model), "torch", name)
        return training, Streamed(config, self.task, world)

    def answer(self, question: str, count: int = 0) -> Any:
        """The curves of the one run, of both workers and of a worker that has both shares, or a side's rate."""
        if question == "curves":
            return self._curve(self.among), self._curve(self.alone) if self.rank == 0 else []
        training, streamed = self.sides[question]
        dist.barrier()
        return tuple(rate_of(training.losses(streamed.steps(HEAD + count + TAIL)), self.config.train.batch, count))

    def _curve(self, world: World) -> list[float]:
        training, streamed = self._side(self.both, world, f"curve-{world.size}")
        losses = list(training.losses(streamed.steps(COMPARED)))
        training.close()
        streamed.reader.close()
        return losses

    def close(self) -> None:
        """Close logs and files."""
        for training, streamed in self.sides.values():
            training.close()
            streamed.reader.close()


def backend() -> str:
    """What the processes talk through."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def run(settings: Settings, inputs: Inputs, tell: Callable[[str], Any]) -> Outcome:
    """Samples a second of one run with two workers by the sum of two runs of one worker."""
    compared = "one run of 2 workers / 2 runs of 1 worker each, side by side"
    if torch.cuda.is_available() and torch.cuda.device_count() < WORKERS:
        missing = "one GPU: with GPUs it takes two"
        return Outcome(
            ratios=[Ratio(name="scale", compared=compared, value=None, mark=MARK, missing=missing)],
            facts={"gpus": torch.cuda.device_count()},
        )
    config = prepare(settings, inputs, tell)
    # Both share the cores.
    config = replace(config, data=replace(config.data, threads=max(1, settings.workers // WORKERS - 1)))
    with tempfile.TemporaryDirectory(dir=inputs.folder) as folder:
        workers = Workers(config, Path(folder) / "rendezvous")
        try:
            one_run_n, alone_n = workers.ask("curves")[0]
            differ = check_curves(one_run_n, alone_n, config)
            count = count_for(workers.side_by_side(2), settings)
            ratio = alternate(
                "scale",
                compared,
                MARK,
                lambda: workers.one_run(count),
                lambda: workers.side_by_side(count),
                settings.rounds,
                tell,
            )
        finally:
            workers.close()
    facts = facts_of(config, inputs) | {
        "batch": f"{config.train.batch} a worker",
        "backend": backend(),
        "ms_a_step": ms_a_step(ratio.detail["median_b"], WORKERS * config.train.batch, tell),
        "steps_a_round": count,
        "curves_differ": differ,
    }
    return Outcome(ratios=[ratio], facts=facts)
