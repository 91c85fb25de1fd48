"""What is trained: a model, how its batch is prepared, and its losses. One class a task, the same loop for all."""

from typing import Any, Protocol

import torch
from torch import nn

from lgd.config import Config
from lgd.io.digests import digest_of
from lgd.io.location import Location, as_location
from lgd.models.description import ModelConfig, TeacherRef
from lgd.models.export import read_student_config, read_teacher_config
from lgd.models.losses import Lesson, Terms, level_loss
from lgd.models.methods import find_method
from lgd.models.teacher import new_teacher
from lgd.shards.shard_set import ShardSet
from lgd.store.store import TEACHER, Store
from lgd.store.supervision import recipe_of
from lgd.stream.plan import ORDER


class Task(Protocol):
    """A network to train."""

    role: str
    """The image that it reads: he or ihc."""
    field: str
    """The configuration's name of `folder`."""
    folder: Location
    epochs: float
    store: Store | None

    def build(self) -> nn.Module:
        """The untrained network."""
        ...

    def inputs(self) -> dict[str, Any]:
        """What the result depends on, beside the shards, their rows in the store and `train:`; a finished network made
        of the same is reused.
        """
        ...

    def describe(self, model: Any, **facts: Any) -> ModelConfig:
        """What the folder of the trained network says of it, with the facts of its training."""
        ...

    def read_config(self) -> ModelConfig:
        """What the folder of a trained network says of it."""
        ...

    def losses(self, out: dict[str, torch.Tensor], batch: Lesson) -> Terms:
        """The loss terms of each sample."""
        ...

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a share of the steps, 0 to 1."""
        ...


class TeacherTask:
    """IHC -> level."""

    role = "ihc"
    field = "teacher.dir"
    store: Store | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = as_location(config.teacher.dir)
        self.epochs = config.teacher.epochs

    def build(self) -> nn.Module:
        return new_teacher(self.config.teacher.encoder)

    def inputs(self) -> dict[str, Any]:
        return {"encoder": self.config.teacher.encoder, "epochs": self.epochs}

    def describe(self, model: Any, **facts: Any) -> ModelConfig:
        config: ModelConfig = model.describe(**facts)
        return config

    def read_config(self) -> ModelConfig:
        return read_teacher_config(self.folder)

    def losses(self, out: dict[str, torch.Tensor], batch: Lesson) -> Terms:
        return {"level": level_loss(out["logits"], batch.level_B)}

    def weights(self, progress: float) -> dict[str, float]:
        return {"level": 1.0}


class StudentTask:
    """H&E -> level, and what its method teaches beside."""

    role = "he"
    field = "student.dir"

    def __init__(self, config: Config) -> None:
        """Raises `ConfigError` for a method that is not known, or that the fields of `student:` do not fit."""
        self.config = config
        self.folder = as_location(config.student.dir)
        self.epochs = config.student.epochs
        self.method = find_method(config.student.method)(config)
        self.store = Store(config.latents.dir, recipe_of(config)) if self.method.needs else None
        self.build, self.losses, self.weights = self.method.build, self.method.losses, self.method.weights

    def inputs(self) -> dict[str, Any]:
        inputs = self.method.inputs()
        if self.store is not None:
            inputs["teacher"] = read_teacher_config(self.config.teacher.dir).weights_sha256
        return inputs

    def describe(self, model: Any, **facts: Any) -> ModelConfig:
        teachers = []
        if self.store is not None:
            teacher = read_teacher_config(self.config.teacher.dir)
            teachers = [TeacherRef(name=TEACHER, weights_sha256=teacher.weights_sha256, licence=teacher.licence)]
        config: ModelConfig = model.describe(method=self.config.student.method, teachers=tuple(teachers), **facts)
        return config

    def read_config(self) -> ModelConfig:
        return read_student_config(self.folder)


def inputs_of(task: Task, config: Config, shards: ShardSet) -> dict[str, Any]:
    """All that a trained network depends on; where it runs (workers, threads, engine) is not part of it."""
    train = config.train
    without = {"workers", "engine", "compile", "resume", "checkpoint_every", "keep", "max_failures"}
    if not train.patience:
        without |= {"evaluate_every", "patience", "metric"}
    splits: dict[str, list[str]] = {}
    for shard in [*shards.of_split("train"), *shards.of_split("val")]:
        splits.setdefault(shard.split, []).append(shard.sha256)
    stored = {}
    if task.store is not None:
        # Not the whole store: what else it holds does not concern this network.
        stored = {"store": task.store.digest_of(shards.of_split("train"))}
    return {
        "task": task.inputs() | stored,
        "role": task.role,
        "seed": config.run.seed,
        "order": ORDER,
        "shards": {split: {"count": len(digests), "digest": digest_of(digests)} for split, digests in splits.items()},
        "data": {
            name: getattr(config.data, name) for name in ("size", "lanes", "augment", "stain_jitter", "light_jitter")
        },
        "train": {name: getattr(train, name) for name in train.__dataclass_fields__ if name not in without},
    }
