"""What the benchmarks of training share: a run over the inputs' shards with an untrained teacher and a filled store,
and the loop's step, driven by whatever steps a side brings.

Everything lies in the inputs' folder, and is made once for all of them.
"""

import functools
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lgd.base.target import find_target
from lgd.config import Config
from lgd.config_files import load_config
from lgd.models.encoder import build_encoder
from lgd.models.export import save_model
from lgd.models.teacher import Teacher
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.store.store import Rows
from lgd.stream.plan import Plan, World
from lgd.stream.reader import Reader
from lgd.train.batch import Batches, Skipped, Step, augment
from lgd.train.log import Log
from lgd.train.loop import Taken, take_step
from lgd.train.prepare import Learner, make_engine
from lgd.train.tasks import StudentTask, Task
from tools.bench.inputs import HER2, NOT_TRAINED, Inputs
from tools.bench.measure import Rate, Settings, cpu_seconds

logger = logging.getLogger(f"lgd.{__name__}")

HEAD = 3
"""Steps before the timed ones, in which the stream fills its queue."""
TAIL = 4
"""Steps behind them, more than the stream reads ahead, so that it reads until the last timed one."""
STEPS = 10_000
"""Steps that the schedule counts on; none takes so many."""
COMPARED = 6
"""Steps whose losses are compared: the learning rate has risen to a tenth of its peak by then."""
KEPT = 8
"""Steps that are kept in memory, and taken again and again."""
_LEAST_MS = 100


def prepare(settings: Settings, inputs: Inputs) -> Config:
    """A run whose shards, teacher and store are there; the full LGD-Net with both encoders of `--model`."""
    folder = inputs.folder / "training"
    first = inputs.shards[0]
    cuda = torch.cuda.is_available()
    options = {
        "run.dir": folder,
        "data.shards": Path(str(first.path)).parent,
        "data.size": settings.size,
        # One core computes, or drives the GPU.
        "data.threads": max(1, settings.workers - 1),
        "teacher.encoder": settings.model,
        "student.encoder": settings.model,
        "latents.batch": 16,
        "latents.precision": settings.precision if cuda else "fp32",
        "train.workers": 0,
        "train.engine": "torch",
        "train.batch": settings.train_batch,
        "train.precision": settings.precision,
        "train.warmup": 10 * COMPARED / STEPS,
    }
    config = load_config(overrides=[f"--{name}={value}" for name, value in options.items()])
    if not (folder / "teacher" / "config.json").exists():
        torch.manual_seed(0)
        # Untrained, it costs what a trained one costs.
        teacher = Teacher(build_encoder(settings.model), target=find_target("her2"))
        describe = functools.partial(teacher.describe, size=settings.size, **NOT_TRAINED)
        save_model(folder / "teacher", dict(teacher.state_dict()), describe)
    shards = ShardSet.open(config.shard_dirs).of_split("train")
    logger.info(f"[bench] caching the latents of {sum(shard.samples for shard in shards)} pairs")
    cache_latents(with_data(config, threads=settings.workers), shards, workers=0)
    return config


def facts_of(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What every ratio of training depends on."""
    cuda = torch.cuda.is_available()
    return {
        "model": f"LGD-Net, both encoders {config.student.encoder}, from random weights",
        "input": inputs.described() | {"side": config.data.size},
        "batch": config.train.batch,
        "precision": config.train.precision,
        "augment": config.data.augment,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": {"computing": torch.get_num_threads(), "reading": config.data.threads},
        "load": list(os.getloadavg()),
    }


def with_data(config: Config, **fields: Any) -> Config:
    """The same run with other fields of `data:`."""
    return replace(config, data=replace(config.data, **fields))


class Streamed:
    """The steps of training: real shards, joined with the store."""

    def __init__(self, config: Config, task: StudentTask, world: World, roles: tuple[str, ...] = ("he",)) -> None:
        self.config, self.world = config, world
        shards = ShardSet.open(config.shard_dirs).of_split("train")
        self.reader = Reader(shards, roles, config.data.size)
        assert task.store is not None
        self.rows = Rows(task.store.parts_of(shards))
        self.plan = Plan(self.reader.sizes, seed=config.run.seed, lanes=config.data.lanes)

    def steps(self, count: int) -> Iterator[Step]:
        """The first steps of a run."""
        return Batches(self.config, self.reader, self.plan, self.world, self.rows).draw(0, count)

    def kept(self, count: int = KEPT) -> list[Step]:
        """The same, in the memory of the device."""
        return list(self.steps(count))


class Training:
    """The steps of training and their log, without validation and checkpoints, over the batches that it is given."""

    def __init__(
        self, config: Config, task: Task, world: World, model: torch.nn.Module, engine: str, name: str = ""
    ) -> None:
        """`name`: folder of the log, where it is not the engine's."""
        self.learner = Learner(
            task=task,
            engine=make_engine(engine, model.train(), config.train, config.deepspeed, world),
            steps=STEPS,
            skipped=Skipped(config.data),
        )
        self.done = 0
        self.log = Log(task.folder / (name or engine), 0, STEPS, config.train.batch, HER2) if world.rank == 0 else None
        if self.log:
            # It would stand between the lines of the rounds.
            self.log.bar.disable = True

    def losses(self, steps: Iterable[Step]) -> Iterator[float]:
        """Train; gives the loss of each step, when the next was begun."""
        began, before = time.perf_counter(), None
        for micro, _ in steps:
            waited = time.perf_counter() - began
            augmented = [augment(batch, self.learner.task.config) for batch in micro]
            taken = take_step(self.learner, self.done, augmented, stop=False)
            if before:
                yield self._read(before, waited)
            before = taken
            self.done += 1
            began = time.perf_counter()
        if before:
            yield self._read(before, 0.0)

    def _read(self, taken: Taken, waited: float) -> float:
        values, _ = taken()
        if self.log:
            self.log.step(self.done, values, waited)
        return values["loss"]

    def close(self) -> None:
        """Close the log."""
        if self.log:
            self.log.close()


def again(steps: list[Step], count: int) -> Iterator[Step]:
    """`count` of the steps, from the first one on, again and again."""
    return itertools.islice(itertools.cycle(steps), count)


def settle() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate_of(done: Iterable[Any], batch: int, count: int) -> Rate:
    """Samples a second over `count` steps after the first `HEAD`; all of `done` are taken, also those behind."""
    began = cpu = seconds = used = 0.0
    seen = 0
    for seen, _ in enumerate(done, 1):
        if seen == HEAD:
            settle()
            cpu, began = cpu_seconds(), time.perf_counter()
        elif seen == HEAD + count:
            settle()
            seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
    assert seen >= HEAD + count, f"{seen} steps do not reach {HEAD} + {count}"
    return Rate(count * batch, seconds, used)


def count_for(rate: Rate, settings: Settings) -> int:
    """Steps that fill the seconds of a round at a rate."""
    return max(2, round(rate.a_second * settings.seconds / settings.train_batch))


def ms_a_step(samples_a_second: float, batch: int) -> float:
    """How long a step takes; one that is too short to be measured is told."""
    ms = 1e3 * batch / samples_a_second
    if ms < _LEAST_MS:
        logger.info(f"[bench] a step takes {ms:.0f} ms, less than {_LEAST_MS}: measure with a larger --train-batch")
    return ms


def check_curves(ours: Iterable[float], theirs: Iterable[float], config: Config) -> float:
    """The largest relative difference of two loss curves; `AssertionError` beyond what arithmetic explains."""
    ours_n, theirs_n = np.array(list(ours)), np.array(list(theirs))
    # A GPU adds up in another order from run to run, and bf16 has 8 bits.
    rough = torch.cuda.is_available() or config.train.precision == "bf16"
    allowed = 1e-2 if rough else 1e-5
    found = float(np.abs(ours_n / theirs_n - 1).max())
    assert found <= allowed, f"the loss curves differ by {found:.2g}, more than {allowed:g}: {ours_n} and {theirs_n}"
    return found
