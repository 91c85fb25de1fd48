"""The one visible loop: teacher, student and baselines are all trained by `train`.

Leaves in the task's folder: `config.json` and `model.safetensors` (the network), `checkpoints/`, `tensorboard/`,
and `log.jsonl` with one line a step.
"""

import contextlib
import math
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lgd
from lgd.config import Config, DataError
from lgd.data.plan import Plan, World
from lgd.data.shards import Shard, open_shards
from lgd.data.stream import Reader
from lgd.files import read_json, sha256
from lgd.metrics import fit_temperature
from lgd.models.export import save_model
from lgd.store.latents import Rows
from lgd.train import checkpoint
from lgd.train.batch import Batch, Skipped, Step, training_batches
from lgd.train.engine import Engine, choose, make_engine
from lgd.train.log import Log
from lgd.train.passes import centre_latents, validate
from lgd.train.tasks import StudentTask, Task, TeacherTask, augment, inputs_digest

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

TASKS: dict[str, Any] = {"teacher": TeacherTask, "student": StudentTask}


def split_shards(config: Config, split: str) -> list[Shard]:
    """The shards of a split, over all shard folders of a run, in the order of their addresses."""
    return [shard for folder in config.shard_dirs for shard in open_shards(folder)[1] if shard.split == split]


def is_finished(task: Task, config: Config, shards: list[Shard]) -> bool:
    """Whether the task's folder holds the network that this run would train."""
    path, weights = task.folder / "config.json", task.folder / "model.safetensors"
    if not path.is_file() or not weights.is_file():
        return False
    made = read_json(path)
    return made.get("inputs") == inputs_digest(task, config, shards) and made["weights_sha256"] == sha256(weights)


def worker(argument: dict[str, Any]) -> None:
    """What each training process runs: `argument` has `config`, `task` (teacher or student) and `engine`."""
    config: Config = argument["config"]
    world = join_world()
    torch.manual_seed(config.run.seed)
    with signals_restored():
        train(config, TASKS[argument["task"]](config), world, argument["engine"])


def join_world() -> World:
    """This process among the others: those of Ray Train, of torchrun, or none."""
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            # DeepSpeed wants a group even alone.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("RANK", "0")
            os.environ.setdefault("LOCAL_RANK", "0")
            os.environ.setdefault("WORLD_SIZE", "1")
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def train(config: Config, task: Task, world: World, engine_name: str) -> None:
    """Train a task to its end, from its newest checkpoint if there is one, and export the network."""
    settings, first = config.train, world.rank == 0
    shards = split_shards(config, "train")
    if settings.batch % (world.size * settings.accumulate):
        raise DataError(
            f"train.batch {settings.batch} does not divide into {world.size} workers x train.accumulate "
            f"{settings.accumulate}: use a multiple of {world.size * settings.accumulate}"
        )
    reader = Reader(shards, (task.role,), config.data.size)
    rows = Rows(task.store.parts_of(shards)) if task.store else None
    plan = Plan(reader.sizes, seed=config.run.seed, lanes=config.data.lanes)
    steps = max(1, math.ceil(task.epochs * plan.total / settings.batch))
    every = settings.evaluate_every or math.ceil(plan.total / settings.batch)
    held_out = split_shards(config, "val")
    inputs = inputs_digest(task, config, [*shards, *held_out])

    engine = make_engine(engine_name, task.build().train(), settings, config.deepspeed, world)
    saved = checkpoint.find(task.folder / "checkpoints", settings.resume, inputs)
    start = saved.step if saved else 0
    if saved:
        engine.load(saved.weights, saved.moments, saved.step)
    log = Log(task.folder, start, steps, settings.batch) if first else None
    if log and 1.5 * config.data.lanes < min(settings.batch, len(shards)):
        log.tell(
            f"data.lanes {config.data.lanes} is far below train.batch {settings.batch}: batches are mixed less than by "
            "a full shuffle; lanes near the batch, in a multiple of the workers, mix them fully"
        )
    stop = stop_flag()
    batches = training_batches(
        reader,
        plan,
        rows,
        start=saved.position if saved else 0,
        steps=steps - start,
        batch=settings.batch,
        accumulate=settings.accumulate,
        world=world,
        threads=config.data.threads,
        turn=config.data.augment != "none",
        skip=config.data.skips > 0,
    )
    skipped = Skipped(config.data, saved.skipped if saved else [])
    for step, (micro, position), waited in timed(start, batches):
        terms = backward(engine, task, micro, config, step / steps, world)
        bad = skipped.new(micro)
        sums, any_bad, stopping = agree(terms, len(bad) > 0, stop.is_set(), world)
        if any_bad:
            skipped.add(bad, world)
        if not math.isfinite(sums["loss"]):
            if log:
                log.close()
            raise DataError(
                f"the loss is {sums['loss']} at step {step + 1}, in a batch with {', '.join(micro[0].keys[:4])}: "
                "lower train.lr; checkpoints before this step are kept"
            )
        rate = learning_rate(step, steps, settings.lr, settings.warmup)
        norm = engine.step(rate)
        done = step + 1
        if log:
            log.step(done, sums | {"lr": rate, "grad_norm": norm, "skipped": len(skipped.numbers)}, waited)
        if done % every == 0 and done < steps and held_out:
            scores = validate(engine, task, held_out, config, world)[2]
            if log:
                log.validation(done, scores)
        if done % settings.checkpoint_every == 0 or done == steps or stopping:
            facts = {"step": done, "position": position, "inputs": inputs, "skipped": sorted(skipped.numbers)}
            save(engine, task, facts, settings.keep, first)
        if stopping and done < steps:
            if log:
                log.close()
            raise Stopped(f"stopped after step {done} of {steps}; the same command goes on from there")
    if isinstance(task, TeacherTask):
        centre_latents(engine, shards, config, world)
    facts = {"inputs": inputs, "steps": steps, "epochs": task.epochs, "skipped": len(skipped.numbers)}
    export(engine, task, config, world, held_out, facts, log)
    reader.close()


class Stopped(DataError):
    """Training was asked to end and saved a checkpoint."""


def backward(
    engine: Engine, task: Task, micro: list[Batch], config: Config, progress: float, world: World
) -> dict[str, torch.Tensor]:
    """Forward and backward of all micro-batches; returns this rank's sum of each term over the global count."""
    counts = torch.tensor(
        [[int((batch.level_B >= 0).sum()), int(batch.valid_B.sum())] for batch in micro], device=world.device
    ).sum(dim=0)
    if world.size > 1:
        dist.all_reduce(counts)
    labelled, valid = counts.clamp(min=1).tolist()
    weights = task.weights(progress)
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro):
        image, batch = augment(batch.to(world.device), task.role, config)
        values = task.losses(engine.forward(image), batch)
        terms = {
            name: (value * batch.valid_B).sum() / (labelled if name == "level" else valid)
            for name, value in values.items()
        }
        terms["loss"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        engine.backward(terms["loss"], last=number == len(micro) - 1)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
    return sums


def agree(terms: dict[str, torch.Tensor], bad: bool, stop: bool, world: World) -> tuple[dict[str, float], bool, bool]:
    """The global value of each term, and whether any rank met new bad samples, or was asked to stop."""
    values = torch.stack([*terms.values(), *torch.tensor([float(bad), float(stop)], device=world.device)])
    if world.size > 1:
        dist.all_reduce(values)
    *numbers, any_bad, stopping = values.tolist()
    return dict(zip(terms, numbers, strict=True)), any_bad > 0, stopping > 0


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


def stop_flag() -> threading.Event:
    """Set by SIGTERM or Ctrl-C; every rank reads it at each step."""
    flag = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: flag.set())
    return flag


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Undo what `stop_flag` did, so that Ctrl-C ends the stages after training again."""
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def save(engine: Engine, task: Task, facts: dict[str, Any], keep: int, first: bool) -> None:
    """One checkpoint with these facts of it; all ranks give their share, rank 0 writes."""
    weights, moments = engine.state()
    if first:
        done = checkpoint.Checkpoint(**facts, weights=weights, moments=moments)
        checkpoint.save(task.folder / "checkpoints", done, keep)
    dist.barrier()


def export(
    engine: Engine,
    task: Task,
    config: Config,
    world: World,
    held_out: list[Shard],
    facts: dict[str, Any],
    log: Log | None,
) -> None:
    """Score the validation split, fit the temperature on it, and publish the network."""
    temperature = 1.0
    scores: dict[str, float] = {}
    if held_out:
        logits, levels, scores = validate(engine, task, held_out, config, world)
        if len(levels):
            temperature = fit_temperature(levels, logits)
    weights, _ = engine.state()
    if log:
        log.validation(facts["steps"], scores)
        log.close()
        described = engine.model.describe()
        save_model(
            task.folder,
            weights,
            {
                **described,
                "size": config.data.size,
                "temperature": temperature,
                "validation": {name: value for name, value in scores.items() if math.isfinite(value)},
                **facts,
                "teacher_sha256": task.inputs().get("teacher"),
                "engine": engine.name,
                "workers": world.size,
                "versions": {"lgd": lgd.__version__, "torch": torch.__version__, "python": platform.python_version()},
            },
        )
    dist.barrier()


def refuse_strangers(task: Task) -> None:
    """Raise `DataError` when the task's folder holds what training did not write."""
    ours = {"config.json", "model.safetensors", "checkpoints", "tensorboard", "log.jsonl"}
    there = {path.name for path in task.folder.iterdir()} if task.folder.is_dir() else set()
    # A killed `publish` leaves its temporary file.
    strangers = sorted(name for name in there - ours if not (name.startswith(".") and name.endswith(".tmp")))
    if strangers:
        raise DataError(
            f"{task.folder} already holds something else ({', '.join(strangers[:3])}): name another folder as "
            f"{task.field}"
        )


def train_under(config: Config, task: str) -> bool:
    """Train a task where `train.workers` says; returns False when the finished network could be reused."""
    from lgd.distribute import launch

    built = TASKS[task](config)
    shards = split_shards(config, "train")
    if not shards:
        raise DataError(f"{', '.join(map(str, config.shard_dirs))}: no split `train`; build shards with one (--split)")
    shards += split_shards(config, "val")
    if config.train.resume == "auto" and is_finished(built, config, shards):
        return False
    refuse_strangers(built)
    engine = choose(config.train.engine)
    if config.train.resume == "never":
        # Once, here: a worker that Ray restarts must go on from its own checkpoints.
        shutil.rmtree(built.folder / "checkpoints", ignore_errors=True)
        config = replace(config, train=replace(config.train, resume="auto"))
    launch(
        worker,
        {"config": config, "task": task, "engine": engine},
        workers=config.train.workers,
        max_failures=config.train.max_failures,
        storage=Path(config.run.dir) / "ray",
        name=built.folder.name,
    )
    return True
