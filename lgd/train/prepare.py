"""What a training needs before its first step: shards, order, network, engine."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from lgd.base.errors import ConfigError, DataError
from lgd.base.target import KNOWN, UNKNOWN
from lgd.config_sections import Train
from lgd.io.digests import format_diff
from lgd.labels.predictions import find_measures
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Rows
from lgd.stream.plan import Plan, World
from lgd.stream.reader import Reader
from lgd.train.batch import Batches, Skipped, gather
from lgd.train.deepspeed_engine import DeepSpeedEngine, deepspeed_problem
from lgd.train.engine import Engine, StillEngine, TorchEngine
from lgd.train.log import Log
from lgd.train.partners import add_partner
from lgd.train.targets import Queue, Targets
from lgd.train.tasks import Task, inputs_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A network with all that one step changes it by (`lgd.train.loop.take_step`)."""

    task: Task
    engine: Engine
    steps: int
    """Those of the whole training: the schedules of learning rate and weights count on them."""
    skipped: Skipped


def check_early_stopping(task: Task, shards: ShardSet) -> None:
    """Raise `DataError` where `train.patience` waits for a metric that cannot change."""
    train = task.config.train
    if not (train.patience and task.trains):
        return
    remedy = "add shards to that split (lgd build-shards --split), or set train.patience to 0"
    if not shards.of_split("val"):
        raise DataError(f"train.patience needs a validation split, and the shards have no split `val`: {remedy}")
    if not task.gives_labels:
        if task.store is None:
            learns = ", ".join(task.config.teacher.learns)
            raise DataError(
                f"train.patience waits for a better teacher, and of one that learns {learns} nothing is measured on "
                "the split `val`: set it to 0"
            )
        return
    word, measures = task.target.label_word, find_measures(task.target)
    if task.metric not in measures.choices:
        raise DataError(
            f"train.metric is {task.metric}, and the {word}s are {task.target.describe_labels()}: use auto, or "
            f"{', '.join(measures.choices)}"
        )
    taught, scored = (
        {name: count for name, count in shards.count_labels(split).items() if count and name != UNKNOWN}
        for split in ("train", "val")
    )
    why = ""
    if not scored:
        why = f"no patch there has a {word}"
    elif task.target.is_number:
        values = shards.summarise_values("val")
        if values and values.std == 0 and task.metric in ("pearson", "ccc"):
            why = f"all {scored[KNOWN]} values there are {values.mean:g}"
    elif len(scored) == 1:
        why = f"all {sum(scored.values())} patches there that have a {word} are of {word} {', '.join(scored)}"
    elif not scored.keys() & taught.keys():
        why = f"its {word}s ({', '.join(scored)}) are none of those in the split `train`"
    if why:
        raise DataError(f"train.patience waits for a better {task.metric} on the split `val`, and {why}: {remedy}")


def choose_engine(asked: str, world: World, extra: Mapping[str, object]) -> str:
    """The engine's name for `train.engine`; `auto` is DeepSpeed where it can run on every rank, each of which asks.

    `extra` is the configuration's `deepspeed:` section, which `make_engine` refuses for another engine.
    """
    if asked == "torch":
        return "torch"
    problems = gather([deepspeed_problem()], world)
    problem = next((f"{one} (of rank {rank})" if rank else one for rank, one in enumerate(problems) if one), None)
    refuse_engine(asked, problem)
    if problem and world.rank == 0 and not extra:
        logger.warning("%s: training uses the torch engine", problem)
    return "torch" if problem else "deepspeed"


def refuse_engine(asked: str, problem: str | None) -> None:
    """Raise `DataError` where DeepSpeed is asked for and has a problem."""
    if problem and asked == "deepspeed":
        raise DataError(f"train.engine is deepspeed, but {problem}; or set train.engine to torch")


def make_engine(name: str, model: nn.Module, train: Train, extra: Mapping[str, object], world: World) -> Engine:
    """The engine around a model. `extra` is the configuration's `deepspeed:` section."""
    if name == StillEngine.name:
        return StillEngine(model, world)
    if name == "torch":
        if extra:
            raise ConfigError("deepspeed: is set, but this run uses the torch engine: remove it, or install DeepSpeed")
        return TorchEngine(model, train, world)
    return DeepSpeedEngine(model, train, extra, world)


class Prepared:
    """A training in one of its processes: what it reads, its network and engine, and its log."""

    def __init__(self, shards: ShardSet, task: Task, world: World) -> None:
        """Raises `DataError` for a batch that the workers do not divide, for early stopping that never looks, and where
        a rank has other inputs.
        """
        config, settings = task.config, task.config.train
        if settings.batch % (world.size * settings.accumulate):
            raise DataError(
                f"train.batch {settings.batch} does not divide into {world.size} workers x train.accumulate "
                f"{settings.accumulate}: use a multiple of {world.size * settings.accumulate}"
            )
        self.shards, self.inputs = shards, inputs_of(task, shards)
        first, *others = gather([self.inputs], world)
        for rank, inputs in enumerate(others, 1):
            if inputs != first:
                remedy = "Name shards, latents and teacher where all nodes find the same"
                difference = format_diff(first, inputs, "on rank 0", f"on rank {rank}")
                raise DataError(f"rank {rank} trains on other inputs than rank 0:", *difference, remedy)
        engine = choose_engine(settings.engine, world, config.deepspeed) if task.trains else StillEngine.name
        self.reader = Reader(shards.of_split("train"), task.roles, config.data.size)
        plan = Plan(self.reader.sizes, seed=config.run.seed, lanes=config.data.lanes)
        self.learner = Learner(
            task=task,
            engine=make_engine(engine, task.build().train(), settings, config.deepspeed, world),
            steps=max(1, math.ceil(task.epochs * plan.total / settings.batch)) if task.trains else 0,
            skipped=Skipped(config.data),
        )
        rows, queue, method = None, None, task.method
        if probe := task.find_probe(shards):
            method.labeller, method.labeller_values = probe.network().to(world.device), probe.values
        if task.store:
            parts = task.store.parts_of(self.reader.shards)
            datasets = task.store.datasets(method.needs)
            rows = Rows(parts, datasets)
            if method.pairs != "own" or method.queue:
                # The latents of other samples teach too, as partners or as negatives.
                rows = targets = Targets(parts, method.pairs, config.run.seed, datasets)
                # Of one stored view the latents are not turned with the image.
                turn = config.data.augment != "none"
                queue = Queue(targets, plan, method.queue, turn, task.values) if method.queue else None
        partner = add_partner if method.compares else None
        self.batches = Batches(config, self.reader, plan, world, rows, queue, task.values, partner)
        self.every = settings.evaluate_every or math.ceil(plan.total / settings.batch)
        """Steps between validations."""
        if settings.patience and self.every > self.learner.steps > 0:
            raise DataError(
                f"train.patience looks every {self.every} steps, and the whole training has {self.learner.steps}: set "
                "train.evaluate_every to fewer, or train.patience to 0"
            )
        self.log: Log | None = None
        """Of rank 0, once it is open."""

    def open_log(self, start: int) -> None:
        """Open the log of rank 0, of the steps after `start`, and note what may be unexpected."""
        task = self.learner.task
        if self.learner.engine.world.rank:
            return
        settings, lanes = task.config.train, task.config.data.lanes
        self.log = Log(task.folder, start, self.learner.steps, settings.batch, task.target)
        if 1.5 * lanes < min(settings.batch, len(self.shards.of_split("train"))):
            logger.warning(
                f"{self.log.name}: data.lanes {lanes} is far below train.batch {settings.batch}: batches are mixed "
                "less than by a full shuffle; lanes near the batch, in a multiple of the workers, mix them fully"
            )
        if (full := task.config.student.full_alignment) and task.kind == "student" and self.batches.store:
            _, first_n = self.batches.plan.samples(np.arange(min(settings.batch, self.reader.total)))
            first = (self.reader.read_bytes(number, skip=True)[0].meta for number in first_n.tolist())
            if all(meta.alignment is None for meta in first):
                logger.warning(
                    f"{self.log.name}: student.full_alignment is {full:g}, and none of the first {len(first_n)} pairs "
                    "has an alignment, so that they teach in full: build shards that have it (--layout slides, or a "
                    "column alignment of --layout csv)"
                )

    def close(self) -> None:
        """Close files; what was logged so far is on the disk."""
        if self.log:
            self.log.close()
        self.reader.close()
