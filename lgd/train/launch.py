"""Where training runs: in this process, in torchrun's, or in Ray's workers; and how it is asked to end."""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator

import torch
from pydantic import JsonValue

from lgd.base.errors import DataError
from lgd.base.process_state import stop_signals
from lgd.base.target import KNOWN, UNKNOWN
from lgd.config import Config
from lgd.io.digests import digest_of, format_diff, may_have_sha256
from lgd.io.files import exists, read_bytes, remove, remove_folder, write_bytes
from lgd.io.folders import refuse_foreign
from lgd.io.location import RemoteError, as_location
from lgd.io.locks import LOCK, exclusive
from lgd.models.availability import Section, report_encoders
from lgd.models.description import ModelConfig, describe_training
from lgd.ray_jobs.training import launch
from lgd.shards.repeats import open_disjoint
from lgd.shards.shard_set import ShardSet
from lgd.train import checkpoint
from lgd.train.deepspeed_engine import deepspeed_problem
from lgd.train.finished import centre_latents, export, fit_query_map
from lgd.train.loop import fit
from lgd.train.prepare import Prepared, check_early_stopping, refuse_engine
from lgd.train.tasks import TASKS, Task, inputs_of
from lgd.train.world import join_world, take_from_rank_0

logger = logging.getLogger(__name__)

_OWN = {"config.json", "model.safetensors", "checkpoints", "tensorboard", "log.jsonl", "README.md", LOCK}
"""What lies in the folder of what was trained; README.md is the model card (`lgd.report.card`)."""


def check_labels(task: Task, shards: ShardSet) -> None:
    """Log the classes that training never sees; `DataError` where it sees one label, or none and has nothing else."""
    count, word = shards.count_labels("train"), task.target.label_word
    seen = [name for name in task.target.counted if count[name]]
    values = shards.summarise_values("train")
    if values is not None and values.std == 0:
        raise DataError(
            f"all {count[KNOWN]} values of the split `train` are {values.mean:g}: nothing can be distinguished; add "
            "shards of other values"
        )
    if len(seen) == 1 and values is None:
        raise DataError(
            f"all {count[seen[0]]} patches of the split `train` that have a {word} are of {word} {seen[0]}: nothing "
            f"can be distinguished; add shards of other {word}s"
        )
    unlabelled = task.store is not None or task.method.compares
    if not seen and (not unlabelled or task.kind == "teacher"):
        remedy = "; leave label out of teacher.learns" if task.kind == "teacher" and unlabelled else " only"
        raise DataError(f"no patch of the split `train` has a {word}, and this network learns from {word}s{remedy}")
    if not seen:
        logger.warning(
            "no patch of the split `train` has a label: the network learns to hallucinate latents and gives no label"
        )
    if seen and (absent := [name for name in task.target.counted if not count[name]]):
        logger.warning(
            "the split `train` has no patch of %s %s: the network can never predict it", word, ", ".join(absent)
        )


def check_scales(shards: ShardSet) -> None:
    """Raise `DataError` for labelled training patches of unknown scale, unless it was said that nobody knows it."""
    for opened in shards.folders:
        manifest, split = opened.manifest, opened.manifest.splits.get("train")
        if split is None or manifest.options.mpp == "unknown" or split.labels[UNKNOWN] == split.samples:
            continue
        if unknown := sum(shape.samples for shape in split.shapes if shape.mpp is None):
            raise DataError(
                f"{unknown} of {split.samples} training patches of {opened.folder} have no scale, and a network that "
                "is taught labels on them could never say whether a patch has the scale that it knows: build the set "
                "again with --mpp X (micrometres per pixel), or with --mpp unknown"
            )


def train_under(config: Config, task: str, overwrite: bool | None = None, shards: ShardSet | None = None) -> bool:
    """Train a task where `train.workers` says; returns False when the finished network could be reused.

    `overwrite` allows to replace a finished network; None stands for a command that has no such option. `shards` are
    those of the run, opened here where they are not given. Raises `DataError` where a network would be replaced
    otherwise, and while another process trains in the same local folder.
    """
    shards = shards or open_disjoint(config.shard_dirs)
    if TASKS[task].role == "ihc":
        shards = shards.with_ihc("the teacher")
    built, resume = TASKS[task](config, shards), config.train.resume
    if not shards.of_split("train"):
        raise DataError(f"{', '.join(map(str, config.shard_dirs))}: no split `train`; build shards with one (--split)")
    if built.gives_labels:
        check_labels(built, shards)
        check_scales(shards)
    check_early_stopping(built, shards)
    inputs = inputs_of(built, shards)
    anew = resume == "never" or (resume != "auto" and overwrite)

    def decide() -> bool:
        # Another process may have done it meanwhile.
        if not anew and is_finished(built, inputs):
            return False
        refuse_foreign(built.folder, _OWN, f"name another folder as {task}.dir")
        refuse_finished(built, inputs, overwrite)
        if config.train.workers == 0 and built.trains:
            # Before anything is removed; other workers may be on other machines, and choose for themselves.
            refuse_engine(config.train.engine, deepspeed_problem())
        choose_checkpoints(built, inputs, bool(overwrite))
        return True

    # Under torchrun one process stands for all: on other nodes the folder may look older.
    first = os.environ.get("RANK", "0") == "0"
    take = take_from_rank_0 if config.train.workers == 0 else (lambda decide: decide())
    if first and not anew and is_finished(built, inputs):
        return take(lambda: False)
    if first:
        # A student's that cannot be had would be noticed after the teacher's hours.
        sections: tuple[Section, ...] = ("teacher", "student") if task == "teacher" else ("student",)
        report_encoders(config, sections, describe_training(shards).shapes)
    # Once, here, and not in the workers, which Ray may restart: those must go on from their own checkpoints.
    with exclusive(built.folder, "training") if first else contextlib.nullcontext():
        if not take(decide):
            return False
        launch(
            functools.partial(worker, config, shards, task),
            workers=config.train.workers,
            threads=config.data.threads,
            max_failures=config.train.max_failures,
            storage=as_location(config.run.dir) / "ray",
            # Folders of one name may be trained in at a time, as those of a seed.
            name=f"{built.folder.name}-{digest_of(str(built.folder))[:8]}",
        )
    return True


def choose_checkpoints(task: Task, inputs: dict[str, JsonValue], overwrite: bool) -> None:
    """Leave in the task's folder the checkpoints that training goes on from, by `train.resume`."""
    folder, resume = task.folder / "checkpoints", task.config.train.resume
    made = read_finished(task) if overwrite else None
    # Those of a finished network of other inputs, which is replaced.
    others = made is not None and made.inputs != digest_of(inputs) and read_inputs(task, made.inputs) is not None
    if resume not in ("auto", "never"):
        checkpoint.adopt(folder, as_location(resume), inputs, alone=others)
        # The steps before it are those of the training that made it, here or in another folder.
        log, made_log = task.folder / "log.jsonl", as_location(resume).parent.parent / "log.jsonl"
        if exists(made_log):
            write_bytes(log, read_bytes(made_log))
        else:
            remove(log)
    elif others or resume == "never":
        remove_folder(folder)


def read_finished(task: Task) -> ModelConfig | None:
    """What is said of the network in a task's folder; None where there is none, or nothing that can be read."""
    try:
        return task.document.read_folder(task.folder)
    except RemoteError:
        raise
    except DataError:
        return None


def is_finished(task: Task, inputs: dict[str, JsonValue]) -> bool:
    """Whether the task's folder holds the network of these inputs, whole."""
    path, weights = task.folder / "config.json", task.folder / "model.safetensors"
    made = read_finished(task) if exists(path) and exists(weights) else None
    return made is not None and made.inputs == digest_of(inputs) and may_have_sha256(weights, made.weights_sha256)


def refuse_finished(task: Task, inputs: dict[str, JsonValue], overwrite: bool | None) -> None:
    """Raise `DataError`, with the difference and the remedy, for a finished network that training would replace.

    `overwrite` allows to replace it, None stands for a command that has no such option.
    """
    if overwrite or not exists(task.folder / "config.json") or not exists(task.folder / "model.safetensors"):
        return
    made, holds = read_finished(task), f"{task.folder} holds"
    remedy = f"give --overwrite to replace it, or name another folder as {task.kind}.dir"
    if overwrite is None:
        remedy = f"remove {task.folder}, or name another folder as run.dir"
    if made is None:
        raise DataError(f"{holds} what cannot be read as a {task.kind}: {remedy}")
    if is_finished(task, inputs):
        raise DataError(f"{holds} the {task.kind} of this very run, finished: {remedy}")
    # Of the same inputs it is damaged.
    if made.inputs != digest_of(inputs):
        before, checkpoints = read_inputs(task, made.inputs), task.folder / "checkpoints"
        lost = [f"  its checkpoints, which would show the difference, are not in {checkpoints}"]
        difference = lost if before is None else format_diff(before, inputs, "in the folder")
        raise DataError(f"{holds} a finished {task.kind} of other inputs:", *difference, remedy)


def read_inputs(task: Task, digest: str) -> dict[str, JsonValue] | None:
    """The inputs of this digest, as the newest checkpoint of their training states them."""
    for path in checkpoint.complete(task.folder / "checkpoints")[-1:]:
        with contextlib.suppress(DataError):
            inputs = checkpoint.State.read(path / "state.json").inputs
            return inputs if digest_of(inputs) == digest else None
    return None


def worker(config: Config, shards: ShardSet, task: str, stop: str | None) -> None:
    """What each training process runs: train a task to its end, from its newest checkpoint if there is one, and export
    the network. `stop` is the file that asks to end.
    """
    with join_world() as world:
        torch.manual_seed(config.run.seed)
        # One rank is enough: at each step all agree on whether any of them was asked to stop.
        with (
            stop_flag(stop if world.rank == 0 else None) as flag,
            contextlib.closing(Prepared(shards, TASKS[task](config, shards), world)) as run,
        ):
            best = fit(run, flag)
            if task == "teacher":
                centre_latents(run.learner, shards.of_split("train"))
            else:
                fit_query_map(run.learner, shards.of_split("train"))
            export(run, best.step if config.train.patience and best.step else run.learner.steps)


@contextlib.contextmanager
def stop_flag(path: str | None) -> Iterator[threading.Event]:
    """Set by SIGTERM, by Ctrl-C, and soon after the driver of a Ray job made the file `path`.

    The signals mean what they meant before once the block ends, so that Ctrl-C ends the stages after training.
    """
    flag, ended = threading.Event(), threading.Event()

    def watch(path: str) -> None:
        # Each look costs a shared disk or a store a request.
        while not ended.wait(0.5):
            with contextlib.suppress(OSError, DataError):
                if exists(path):
                    flag.set()
                    return

    if path is not None:
        threading.Thread(target=watch, args=(path,), daemon=True).start()
    with stop_signals(lambda *_: flag.set()):
        try:
            yield flag
        finally:
            ended.set()
