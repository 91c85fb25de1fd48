"""The one visible loop: teacher, student and baselines are all trained by `train`.

Leaves in the task's folder: `config.json` and `model.safetensors` (the network), `checkpoints/`, `tensorboard/`,
and `log.jsonl` with one line a step.
"""

import functools
import hashlib
import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

import lgd
from lgd.config import Config
from lgd.data.plan import Plan, World
from lgd.data.shards import Shard, open_shards
from lgd.data.stream import Reader
from lgd.errors import DataError, Stopped
from lgd.files import digest_of
from lgd.metrics import fit_temperature
from lgd.models.description import describe_training
from lgd.models.export import save_model
from lgd.train import checkpoint
from lgd.train.batch import Batch, Skipped, Step, training_batches
from lgd.train.engine import Engine, deepspeed_problem, make_engine
from lgd.train.log import Log
from lgd.train.passes import centre_latents, validate
from lgd.train.targets import Queue, Targets
from lgd.train.tasks import StudentTask, Task, TeacherTask, augment, inputs_of

logger = logging.getLogger(__name__)

TASKS: dict[str, Any] = {"teacher": TeacherTask, "student": StudentTask}


def split_shards(config: Config, split: str) -> list[Shard]:
    """The shards of a split, over all shard folders of a run, in the order of their addresses."""
    return [shard for folder in config.shard_dirs for shard in open_shards(folder)[1] if shard.split == split]


def train(config: Config, task: Task, world: World, engine_name: str, stop: threading.Event) -> None:
    """Train a task to its end, from its newest checkpoint if there is one, and export the network.

    `stop` asks to save a checkpoint and to end; every rank reads it at each step.
    """
    training = Training(config, task, world, engine_name, stop)
    try:
        training.run()
    finally:
        training.close()


class Training:
    """The run of a task in one of its processes."""

    def __init__(self, config: Config, task: Task, world: World, engine_name: str, stop: threading.Event) -> None:
        settings = config.train
        if settings.batch % (world.size * settings.accumulate):
            raise DataError(
                f"train.batch {settings.batch} does not divide into {world.size} workers x train.accumulate "
                f"{settings.accumulate}: use a multiple of {world.size * settings.accumulate}"
            )
        self.config, self.task, self.world, self.stop = config, task, world, stop
        self.shards, self.held_out = split_shards(config, "train"), split_shards(config, "val")
        if settings.patience and not self.held_out:
            raise DataError("train.patience needs a validation split, and the shards have no split `val`")
        self.inputs = inputs_of(task, config, [*self.shards, *self.held_out])
        self.reader = Reader(self.shards, (task.role,), config.data.size)
        self.plan = Plan(self.reader.sizes, seed=config.run.seed, lanes=config.data.lanes)
        self.steps = max(1, math.ceil(task.epochs * self.plan.total / settings.batch))
        self.every = settings.evaluate_every or math.ceil(self.plan.total / settings.batch)

        self.engine = make_engine(engine_name, task.build().train(), settings, config.deepspeed, world)
        saved = checkpoint.find(task.folder / "checkpoints", self.inputs)
        self.start, self.position = (saved.step, saved.position) if saved else (0, 0)
        self.best = saved.best if saved else checkpoint.Best()
        self.skipped = Skipped(config.data, saved.skipped if saved else [])
        if saved:
            self.engine.load(saved.weights, saved.moments, saved.step)
        if world.rank == 0:
            # A kill can come after the last save, and before what it makes superfluous is removed.
            checkpoint.prune(task.folder / "checkpoints", self.best, settings.keep)
        self.log = Log(task.folder, self.start, self.steps, settings.batch) if world.rank == 0 else None
        lanes, lacking = config.data.lanes, deepspeed_problem()
        if self.log and lacking and settings.engine == "auto":
            logger.warning("%s: %s: training uses the torch engine", self.log.name, lacking)
        if self.log and 1.5 * lanes < min(settings.batch, len(self.shards)):
            logger.warning(
                f"{self.log.name}: data.lanes {lanes} is far below train.batch {settings.batch}: batches are mixed "
                "less than by a full shuffle; lanes near the batch, in a multiple of the workers, mix them fully"
            )

    def run(self) -> None:
        """All steps that are left, and the export."""
        for step, (micro, position), waited in timed(self.start, self._batches()):
            self.position = position
            _, stopping = self.step(step, micro, waited)
            if self._after(step + 1, stopping):
                break
        if self.config.train.patience and self.best.step:
            best = checkpoint.load_best(self.task.folder / "checkpoints", self.best, self.inputs)
            self.engine.load(best.weights, best.moments, best.step)
        if isinstance(self.task, TeacherTask):
            centre_latents(self.engine, self.shards, self.config, self.world)
        self._export()

    def _batches(self) -> Iterator[Step]:
        config, student, targets, queue = self.config, self.config.student, None, None
        turn = config.data.augment != "none"
        if self.task.store:
            parts = self.task.store.parts_of(self.shards)
            targets = Targets(parts, student.pairs if student.method == "lgd" else "own", config.run.seed)
            if student.method == "lgd" and student.contrast_weight:
                # Of one stored view the latents are not turned with the image.
                queue = Queue(targets, self.plan, student.contrast_queue, turn)
        return training_batches(
            self.reader,
            self.plan,
            targets,
            start=self.position,
            steps=0 if self._enough() else self.steps - self.start,
            batch=config.train.batch,
            accumulate=config.train.accumulate,
            world=self.world,
            threads=config.data.threads,
            turn=turn,
            skip=config.data.skips > 0,
            queue=queue,
        )

    def _enough(self) -> bool:
        """Whether validation has not become better for `train.patience` times."""
        return 0 < self.config.train.patience <= self.best.stale

    def step(self, step: int, micro: list[Batch], waited: float) -> tuple[float, bool]:
        """One update; the global loss before it, and whether any rank was asked to stop."""
        settings, world = self.config.train, self.world
        # Dropout and the like are drawn alike after a restart.
        torch.manual_seed(step_seed(self.config.run.seed, step, world.rank))
        bad = self.skipped.new(micro)
        sums, (any_bad, stopping) = backward(
            self.engine, self.task, micro, self.config, step / self.steps, world, [len(bad) > 0, self.stop.is_set()]
        )
        if any_bad:
            self.skipped.add(bad, world)
        if not math.isfinite(sums["loss"]):
            keys = not_finite(self.engine, self.task, micro, self.config, world)
            self._refuse(f"the loss is {sums['loss']} at step {step + 1}, {keys}")
        rate = learning_rate(step, self.steps, settings.lr, settings.warmup)
        norm = self.engine.step(rate)
        if not math.isfinite(norm):
            self._refuse(f"the gradient's norm is {norm} at step {step + 1}, in a batch with {told_keys(micro)}")
        if self.log:
            counts = {"lr": rate, "grad_norm": norm, "skipped": len(self.skipped.numbers)}
            self.log.step(step + 1, sums | counts, waited)
        return sums["loss"], stopping

    def _refuse(self, problem: str) -> None:
        raise DataError(f"{problem}: lower train.lr, or look at these patches; checkpoints before this step are kept")

    def _after(self, done: int, stopping: bool) -> bool:
        """Validate and save when it is time; whether training ends here."""
        settings, improved = self.config.train, False
        # The last step is validated when the network is exported.
        if self.held_out and done % self.every == 0 and (done < self.steps or settings.patience):
            logits, levels, scores = validate(self.engine, self.task, self.held_out, self.config, self.world)
            improved = self.best.better(done, scores.get(settings.metric, math.nan))
            if self.log:
                self.log.validation(done, scores, logits, levels)
        enough = self._enough()
        if improved or stopping or enough or done == self.steps or done % settings.checkpoint_every == 0:
            self._save(done)
        if stopping and done < self.steps and not enough:
            raise Stopped(f"stopped after step {done} of {self.steps}; the same command goes on from there")
        return enough

    def _save(self, step: int) -> None:
        """One checkpoint: all ranks give their share, rank 0 writes."""
        weights, moments = self.engine.state()
        if self.log:
            # First, so that the log of a run that goes on from here has no gap.
            self.log.publish()
            made = checkpoint.Checkpoint(
                step=step,
                position=self.position,
                inputs=self.inputs,
                skipped=sorted(self.skipped.numbers),
                best=self.best,
                weights=weights,
                moments=moments,
            )
            checkpoint.save(self.task.folder / "checkpoints", made, self.config.train.keep)
        dist.barrier()

    def _export(self) -> None:
        """Score the validation split, fit the temperature on it, and publish the network."""
        temperature = 1.0
        scores: dict[str, float] = {}
        if self.held_out:
            logits, levels, scores = validate(self.engine, self.task, self.held_out, self.config, self.world)
            if len(levels):
                temperature = fit_temperature(levels, logits)
            if self.log:
                step = self.best.step if self.config.train.patience else self.steps
                self.log.validation(step, scores, logits, levels)
        weights, _ = self.engine.state()
        if self.log:
            describe = functools.partial(
                self.task.describe,
                self.engine.model,
                size=self.config.data.size,
                training=describe_training([open_shards(folder)[0] for folder in self.config.shard_dirs]),
                licence=None,
                temperature=temperature,
                validation={name: value for name, value in scores.items() if math.isfinite(value)},
                inputs=digest_of(self.inputs),
                steps=self.steps,
                epochs=self.task.epochs,
                skipped=len(self.skipped.numbers),
                engine=self.engine.name,
                workers=self.world.size,
                versions={"lgd": lgd.__version__, "torch": torch.__version__, "python": platform.python_version()},
            )
            save_model(self.task.folder, weights, describe)
            self.log.summary()
        dist.barrier()

    def close(self) -> None:
        """Close files; what was logged so far is on the disk."""
        if self.log:
            self.log.close()
        self.reader.close()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's random draws on a rank."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little") >> 1


def told_keys(micro: list[Batch]) -> str:
    """The first keys of a step."""
    return ", ".join([key for batch in micro for key in batch.keys][:4])


def not_finite(engine: Engine, task: Task, micro: list[Batch], config: Config, world: World) -> str:
    """Which samples of all ranks have a loss that is no finite number; every rank calls this."""
    keys = []
    with torch.no_grad():
        for batch in micro:
            image, moved = augment(batch.to(world.device), task.role, config)
            values = torch.stack(list(task.losses(engine.forward(image), moved).values()))
            wrong_B = (~torch.isfinite(values)).any(dim=0) & moved.valid_B
            keys += [key for key, wrong in zip(batch.keys, wrong_B.tolist(), strict=True) if wrong]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, keys[:4])
    found = [key for one in everyone for key in one]
    return f"by {', '.join(found[:4])}" if found else f"in a batch with {told_keys(micro)}"


def backward(
    engine: Engine,
    task: Task,
    micro: list[Batch],
    config: Config,
    progress: float,
    world: World,
    asked: Sequence[bool],
) -> tuple[dict[str, float], list[bool]]:
    """Forward and backward of all micro-batches; the global value of each term, and what of `asked` any rank asks.

    The ranks talk while they compute, counts beside the first forward pass and values beside the last backward pass:
    each time that all wait for the slowest costs, for it is another one each time.
    """
    counts = torch.tensor(
        [[int((batch.level_B >= 0).sum()), int(batch.valid_B.sum())] for batch in micro], device=world.device
    ).sum(dim=0)
    counting = _add_up(counts, world)
    weights = task.weights(progress)
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro):
        # Without a store there are levels only: what an unlabelled patch would cost is spared, its loss is 0.
        batch = batch.labelled() if task.store is None else batch
        image, batch = augment(batch.to(world.device), task.role, config)
        values = task.losses(engine.forward(image), batch)
        if number == 0:
            counting()
            labelled, valid = counts.clamp(min=1)
        terms = {
            name: (value * batch.valid_B).sum() / (labelled if name == "level" else valid)
            for name, value in values.items()
        }
        terms["loss"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
        last = number == len(micro) - 1
        if last:
            told = torch.stack([*sums.values(), *torch.tensor(asked, dtype=torch.float32, device=world.device)])
            telling = _add_up(told, world)
        engine.backward(terms["loss"], last=last)
    telling()
    numbers = told.tolist()
    return dict(zip(sums, numbers, strict=False)), [number > 0 for number in numbers[len(sums) :]]


def _add_up(values: torch.Tensor, world: World) -> Callable[[], Any]:
    """Begin to sum `values` over the ranks, in place; what is returned waits for that."""
    if world.size == 1:
        return lambda: None
    return dist.all_reduce(values, async_op=True).wait


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return 0.5 * peak * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def timed(start: int, batches: Iterator[Step]) -> Iterator[tuple[int, Step, float]]:
    """Number the steps, and measure the seconds that each waited for its data."""
    step = start
    while True:
        began = time.perf_counter()
        taken = next(batches, None)
        if taken is None:
            return
        yield step, taken, time.perf_counter() - began
        step += 1
