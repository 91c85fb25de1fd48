"""The finished network in a task's folder: how it gets there, and that it is replaced only where that was asked for."""

import contextlib
import functools
import math
import platform
from typing import Any

import torch
import torch.distributed as dist

import lgd
from lgd.errors import DataError
from lgd.files import digest_of, exists, format_diff
from lgd.metrics import fit_temperature
from lgd.models.description import ModelConfig, describe_training
from lgd.models.export import save_model
from lgd.train import checkpoint
from lgd.train.passes import validate
from lgd.train.prepare import Prepared
from lgd.train.tasks import Task
from lgd.urls import RemoteError


def export(run: Prepared, step: int) -> None:
    """Score the validation split, fit the temperature on it, and publish the network as it is after `step`."""
    learner, log = run.learner, run.log
    config, world, engine = learner.config, learner.world, learner.engine
    temperature = 1.0
    scores: dict[str, float] = {}
    if held_out := run.shards.of_split("val"):
        logits, levels, scores = validate(engine, learner.task, held_out, config, world)
        if len(levels):
            temperature = fit_temperature(levels, logits)
        if log:
            log.validation(step, scores, logits, levels)
    weights, _ = engine.state()
    if log:
        describe = functools.partial(
            learner.task.describe,
            engine.model,
            size=config.data.size,
            training=describe_training(run.shards),
            licence=None,
            temperature=temperature,
            validation={name: value for name, value in scores.items() if math.isfinite(value)},
            inputs=digest_of(run.inputs),
            steps=learner.steps,
            epochs=learner.task.epochs,
            skipped=len(learner.skipped.numbers),
            engine=engine.name,
            workers=world.size,
            versions={"lgd": lgd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        save_model(learner.task.folder, weights, describe)
        log.summary()
    dist.barrier()


def read_finished(task: Task) -> ModelConfig | None:
    """What is said of the network in a task's folder; None where there is none, or nothing that can be read."""
    try:
        return task.read_config()
    except RemoteError:
        raise
    except DataError:
        return None


def refuse_finished(task: Task, inputs: dict[str, Any], is_same: bool, overwrite: bool | None) -> None:
    """Raise `DataError`, with the difference and the remedy, for a finished network that training would replace.

    `is_same` says that it is whole and of these very inputs; `overwrite` allows to replace it, None stands for a
    command that has no such option.
    """
    if overwrite or not exists(task.folder / "config.json") or not exists(task.folder / "model.safetensors"):
        return
    kind, made = task.field.partition(".")[0], read_finished(task)
    remedy = f"give --overwrite to replace it, or name another folder as {task.field}"
    if overwrite is None:
        remedy = f"remove {task.folder}, or name another folder as run.dir"
    if made is None:
        raise DataError(f"{task.folder} holds what cannot be read as a {kind}: {remedy}")
    if is_same:
        raise DataError(f"{task.folder} holds the {kind} of this very run, finished: {remedy}")
    # Of the same inputs it is damaged.
    if made.inputs != digest_of(inputs):
        difference = _format_diff(task, made.inputs, inputs)
        raise DataError(f"{task.folder} holds a finished {kind} of other inputs:", *difference, remedy)


def keeps_others(task: Task, inputs: dict[str, Any]) -> bool:
    """Whether the checkpoints in the folder are those of its finished network, which is of other inputs."""
    made = read_finished(task)
    return made is not None and made.inputs != digest_of(inputs) and _inputs_of(task, made.inputs) is not None


def _inputs_of(task: Task, digest: str) -> dict[str, Any] | None:
    """The inputs of this digest, as the newest checkpoint of their training tells them."""
    for path in checkpoint.complete(task.folder / "checkpoints")[-1:]:
        with contextlib.suppress(DataError):
            inputs = checkpoint.State.read(path / "state.json").inputs
            return inputs if digest_of(inputs) == digest else None
    return None


def _format_diff(task: Task, digest: str, inputs: dict[str, Any]) -> list[str]:
    made = _inputs_of(task, digest)
    if made is None:
        return [f"  its checkpoints, which would tell the difference, are not in {task.folder / 'checkpoints'}"]
    return format_diff(made, inputs, "in the folder")
