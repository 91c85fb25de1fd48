"""The finished network in a task's folder: how it gets there, and that it is replaced only where that was asked for."""

import contextlib
import functools
import math
import platform
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import lgd
from lgd.base.errors import DataError
from lgd.io.digests import digest_of, format_diff
from lgd.io.files import exists
from lgd.io.location import RemoteError
from lgd.metrics import Floats, Ints
from lgd.models.description import ModelConfig, describe_training
from lgd.models.export import save_model
from lgd.train import checkpoint
from lgd.train.passes import validate
from lgd.train.prepare import Prepared
from lgd.train.tasks import Task


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
    """The inputs of this digest, as the newest checkpoint of their training states them."""
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


def fit_temperature(level_n: Ints, logits_n4: Floats) -> float:
    """The T in 0.1 to 10 for which softmax(logits / T) has the least NLL (Guo et al. 2017).

    Fit it on the validation split only. Patches of level -1 are left out. Raises `DataError` where none is
    left, or a logit is not finite.
    """
    known = level_n >= 0
    level, logits = level_n[known], np.asarray(logits_n4, dtype=np.float64)[known]
    if not len(level):
        raise DataError("no patch of the validation split has a level: the temperature cannot be fitted on it")
    if not np.isfinite(logits).all():
        raise DataError("a logit of the validation split is not finite: the training diverged, lower train.lr")
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(level)), level].mean())

    # Where every patch is right the loss falls for ever as T goes to 0: hence the bounds.
    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(10), np.log(10)), method="bounded").x))
