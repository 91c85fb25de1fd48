"""`scale`: what one run of two workers reaches of two runs of one worker each, side by side.

Two processes, without Ray, each with one thread that computes and its threads that read. A: they are the two workers
of one run, whose global batch is twice a worker's. B: each trains for itself, with the same batch a worker. All stream
from the same shards and store. With GPUs it takes two of them. A worker's batch is four times `--train-batch`, by
default 32 as in configs/bci.yaml: the shorter a step, the more of it goes into waiting.

The fact `lockstep` is what B would reach of itself if at each step both waited for the slower: what waiting alone
costs, less what the readers do meanwhile.
"""

import contextlib
import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from lgd.config import Config
from lgd.shards.shard_set import ShardSet
from lgd.stream.plan import World
from lgd.train.tasks import StudentTask
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Ratio, Settings, compare, cpu_seconds
from tools.bench.training import (
    COMPARED,
    HEAD,
    STEPS,
    Streamed,
    Training,
    check_curves,
    count_for,
    facts_of,
    ms_a_step,
    prepare,
    settle,
)

MARK = 0.95
WORKERS = 2
TURN = 3
"""Steps until the other side has its turn."""


class Workers:
    """Two training processes that do what they are asked to, both at once."""

    def __init__(self, config: Config, rendezvous: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.batch = config.train.batch
        self.lockstep: list[float] = []
        """For each measurement, the time of the two runs by that in lockstep."""
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

    def measure(self, turns: int) -> tuple[Rate, Rate]:
        """Samples a second of the one run, and the sum of those of the two, which take turns of `TURN` steps.

        Both stream alike, so what one reads ahead in the other's turn is no advantage.
        """
        samples, cpu = TURN * turns * self.batch, [0.0, 0.0]
        together, alone_W, lockstep = 0.0, [0.0] * WORKERS, 0.0
        for _ in range(turns):
            one_run, own = self.ask("one run", TURN), self.ask("side by side", TURN)
            together += max(sum(seconds) for seconds, _ in one_run)
            for worker, (seconds, _) in enumerate(own):
                alone_W[worker] += sum(seconds)
            lockstep += sum(map(max, *(seconds for seconds, _ in own)))
            for side, answers in enumerate((one_run, own)):
                cpu[side] += sum(used for _, used in answers)
        # As if each had its mean time: the sum of the two rates.
        apart = WORKERS / sum(1 / seconds for seconds in alone_W)
        self.lockstep.append(apart / lockstep)
        return Rate(WORKERS * samples, together, cpu[0]), Rate(WORKERS * samples, apart, cpu[1])

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
        self.rank, self.config, self.task = rank, config, StudentTask(config, ShardSet.open(config.shard_dirs))
        self.model = self.task.build()
        self.both = replace(config, train=replace(config.train, batch=WORKERS * config.train.batch))
        self.among, self.alone = World(rank, WORKERS, device), World(0, 1, device)
        self.opened = [
            self._side(self.both, self.among, "one"),
            self._side(config, self.alone, f"own-{rank}"),
        ]
        one_run, own = (training.losses(streamed.steps(STEPS)) for training, streamed in self.opened)
        self.sides = {"one run": one_run, "side by side": own}

    def _side(self, config: Config, world: World, name: str) -> tuple[Training, Streamed]:
        training = Training(config, self.task, world, copy.deepcopy(self.model), "torch", name)
        return training, Streamed(config, self.task, world)

    def answer(self, question: str, count: int = 0) -> Any:
        """The curves of the one run, of both workers and of a worker that has both shares; or the seconds of each of
        a side's next steps, and the seconds of CPU in all.
        """
        if question == "curves":
            return self._curve(self.among), self._curve(self.alone) if self.rank == 0 else []
        dist.barrier()
        cpu, seconds = cpu_seconds(), []
        for _ in range(count):
            began = time.perf_counter()
            next(self.sides[question])
            settle()
            seconds.append(time.perf_counter() - began)
        return seconds, cpu_seconds() - cpu

    def _curve(self, world: World) -> list[float]:
        training, streamed = self._side(self.both, world, f"curve-{world.size}")
        losses = list(training.losses(streamed.steps(COMPARED)))
        training.close()
        streamed.reader.close()
        return losses

    def close(self) -> None:
        """Close logs and files."""
        # Ends their streams.
        self.sides.clear()
        for training, streamed in self.opened:
            training.close()
            streamed.reader.close()


def backend() -> str:
    """What the processes talk through."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Samples a second of one run with two workers by the sum of two runs of one worker."""
    compared = "one run of 2 workers / 2 runs of 1 worker each, side by side"
    if torch.cuda.is_available() and torch.cuda.device_count() < WORKERS:
        missing = "one GPU: with GPUs it takes two"
        return Outcome(
            ratios=[Ratio(name="scale", compared=compared, value=None, mark=MARK, missing=missing)],
            facts={"gpus": torch.cuda.device_count()},
        )
    config = prepare(settings, inputs)
    # Both share the cores.
    config = replace(
        config,
        data=replace(config.data, threads=max(1, settings.workers // WORKERS - 1)),
        train=replace(config.train, batch=4 * config.train.batch),
    )
    with tempfile.TemporaryDirectory(dir=inputs.folder) as folder:
        workers = Workers(config, Path(folder) / "rendezvous")
        try:
            one_run_n, alone_n = workers.ask("curves")[0]
            differ = check_curves(one_run_n, alone_n, config)
            # The first turns fill the queues.
            workers.measure(HEAD)
            turns = max(1, count_for(workers.measure(HEAD)[1], settings) // (WORKERS * TURN))
            workers.lockstep.clear()
            ratio = compare("scale", compared, MARK, lambda: workers.measure(turns), settings.rounds)
        finally:
            workers.close()
    facts = facts_of(config, inputs) | {
        "batch": f"{config.train.batch} a worker",
        "backend": backend(),
        "ms_a_step": ms_a_step(ratio.detail["median_b"], WORKERS * config.train.batch),
        "steps_a_round": turns * TURN,
        "lockstep": statistics.median(workers.lockstep),
        "curves_differ": differ,
    }
    return Outcome(ratios=[ratio], facts=facts)
