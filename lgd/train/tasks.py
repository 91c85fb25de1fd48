"""What is trained: a model, how its batch is prepared, and its losses. One class a task, the same loop for all."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lgd.config import Config
from lgd.data.augment import d4, d4_grid, draw, light_jitter, stain_jitter
from lgd.data.plan import ORDER
from lgd.data.shard_set import ShardSet
from lgd.files import digest_of, place
from lgd.models import losses
from lgd.models.description import ModelConfig, TeacherRef
from lgd.models.encoder import build_encoder
from lgd.models.export import read_student_config, read_teacher_config
from lgd.models.student import Student
from lgd.models.teacher import Teacher, load_teacher, new_teacher
from lgd.store.latents import TEACHER, Store
from lgd.store.supervision import recipe_of
from lgd.train.batch import Batch
from lgd.train.targets import Contrast

Terms = dict[str, torch.Tensor]
"""Loss term -> value of each sample (B,). `level` counts labelled samples only, all others count every sample."""


class Task(Protocol):
    """A network to train."""

    role: str
    """The image that it reads: he or ihc."""
    field: str
    """The configuration's name of `folder`."""
    folder: Path
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

    def losses(self, out: dict[str, torch.Tensor], batch: Batch) -> Terms:
        """The loss terms of each sample."""
        ...

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a share of the steps, 0 to 1."""
        ...


def augment(batch: Batch, role: str, config: Config) -> tuple[torch.Tensor, Batch]:
    """The turned and jittered images of a role, and the batch with grids and maps turned alike.

    With eight cached views the latents of the right view are in the batch already; with one, the map is turned,
    which is approximate since a network is not exactly equivariant.
    """
    image = d4(batch.images[role], batch.view_B)
    if config.data.augment == "d4+stain" and role == "he":
        u_B6 = draw(config.run.seed, batch.epoch_B, batch.number_B, "stain", 6)
        image = stain_jitter(image.float(), u_B6, config.data.stain_jitter)
        if config.data.light_jitter:
            u_B2 = draw(config.run.seed, batch.epoch_B, batch.number_B, "light", 2)
            image = light_jitter(image, u_B2, config.data.light_jitter)
    stored = dict(batch.stored)
    if config.latents.views == 1 and "map" in stored:
        stored["map"] = d4(stored["map"], batch.view_B)
    for name in ("nuclei", "membrane"):
        if name in stored:
            stored[name] = d4_grid(stored[name], batch.view_B)
    return image, replace(batch, stored=stored)


class TeacherTask:
    """IHC -> level."""

    role = "ihc"
    field = "teacher.dir"
    store = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = place(config.teacher.dir)
        self.epochs = config.teacher.epochs

    def build(self) -> nn.Module:
        return new_teacher(self.config.teacher.encoder)

    def inputs(self) -> dict[str, Any]:
        return {"encoder": self.config.teacher.encoder, "epochs": self.epochs}

    def describe(self, model: Any, **facts: Any) -> ModelConfig:
        return model.describe(**facts)

    def read_config(self) -> ModelConfig:
        return read_teacher_config(self.folder)

    def losses(self, out: dict[str, torch.Tensor], batch: Batch) -> Terms:
        return {"level": losses.level_loss(out["logits"], batch.level_B)}

    def weights(self, progress: float) -> dict[str, float]:
        return {"level": 1.0}


# Beside method, encoder and epochs: what the network of each method depends on.
_LGD = ("hallucination", "hallucination_loss", "hallucination_weight", "warmup", "nuclei_weight", "membrane_weight")
_CONTRAST = ("contrast_weight", "contrast_queue", "contrast_temperature")
_DISTIL = ("distil_weight", "distil_temperature")


class StudentTask:
    """H&E -> level, and for LGD-Net the teacher's latents and the domain grids, for distillation its soft levels."""

    role = "he"
    field = "student.dir"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = place(config.student.dir)
        self.epochs = config.student.epochs
        self.method = config.student.method
        # Distillation reads the teacher's levels off its stored latents.
        self.store = Store(config.latents.dir, recipe_of(config)) if self.method in ("lgd", "distil") else None
        self._teacher: Teacher | None = None

    def build(self) -> nn.Module:
        config = self.config
        hallucination, dim = None, 0
        if self.method != "he-only":
            teacher, _ = load_teacher(config.teacher.dir)
            dim = teacher.dim
            if config.student.hallucination == "own":
                # The baselines have the same network, and nothing of the teacher's weights.
                encoder = teacher.encoder if self.method == "lgd" else build_encoder(config.teacher.encoder)
                hallucination = encoder.requires_grad_(True)
        return Student(
            method=self.method,
            morphology=build_encoder(config.student.encoder),
            hallucination=hallucination,
            latent_dim=dim,
            latent_map=config.latents.map,
            nuclei_grid=config.latents.nuclei_grid,
            membrane_grid=config.latents.membrane_grid,
        )

    def inputs(self) -> dict[str, Any]:
        student = self.config.student
        names = ["method", "encoder", "epochs"]
        if self.method == "lgd":
            names += [*_LGD, *(_CONTRAST if student.contrast_weight else ())]
            names += _DISTIL if student.distil_weight else ()
            names += ["pairs"] if student.pairs != "own" else []
        elif self.method == "distil":
            names += ["hallucination", *_DISTIL]
        elif self.method == "two-stream":
            names += ["hallucination"]
        inputs: dict[str, Any] = {name: getattr(student, name) for name in names}
        if self.method == "two-stream":
            inputs["teacher_encoder"] = self.config.teacher.encoder
        if self.store is not None:
            inputs["teacher"] = read_teacher_config(self.config.teacher.dir).weights_sha256
        return inputs

    def describe(self, model: Any, **facts: Any) -> ModelConfig:
        teachers = []
        if self.store is not None:
            teacher = read_teacher_config(self.config.teacher.dir)
            teachers = [TeacherRef(name=TEACHER, weights_sha256=teacher.weights_sha256, licence=teacher.licence)]
        return model.describe(teachers=tuple(teachers), **facts)

    def read_config(self) -> ModelConfig:
        return read_student_config(self.folder)

    def losses(self, out: dict[str, torch.Tensor], batch: Batch) -> Terms:
        student, stored = self.config.student, batch.stored
        terms = {"level": losses.level_loss(out["logits"], batch.level_B)}
        if self.store is not None and student.distil_weight:
            taught_BK = self._levels_of(stored["pooled"])
            terms["distil"] = losses.distillation_loss(out["logits"], taught_BK, student.distil_temperature)
        if self.method != "lgd":
            return terms
        kind = student.hallucination_loss
        terms["hallucination"] = losses.hallucination_loss(out["pooled"], stored["pooled"], kind)
        if "map" in stored:
            terms["hallucination_map"] = losses.hallucination_loss(out["map"], stored["map"], kind)
        if batch.contrast is not None:
            allowed_BQ = self._others(batch.contrast, stored["pooled"])
            temperature, queue_QD = student.contrast_temperature, batch.contrast.pooled_QD
            terms["contrast"] = losses.contrast_loss(out["pooled"], stored["pooled"], queue_QD, allowed_BQ, temperature)
        terms["nuclei"] = losses.grid_loss(out["nuclei"], torch.log1p(stored["nuclei"]))
        terms["membrane"] = losses.grid_loss(out["membrane"], stored["membrane"])
        return terms

    def _others(self, contrast: Contrast, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Which latents of the queue are of another level, and not of the same sample, bool (B, Q).

        Where a level is unknown the teacher's stands for it.
        """
        level_B, level_Q = (
            torch.where(level >= 0, level, self._levels_of(pooled).argmax(dim=1))
            for level, pooled in ((contrast.level_B, pooled_BD), (contrast.level_Q, contrast.pooled_QD))
        )
        return (level_B[:, None] != level_Q) & (contrast.source_B[:, None] != contrast.number_Q)

    def _levels_of(self, pooled_nD: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (n, 4) of its stored latents."""
        if self._teacher is None:
            self._teacher = load_teacher(self.config.teacher.dir)[0].to(pooled_nD.device)
        return self._teacher.levels_of(pooled_nD)

    def weights(self, progress: float) -> dict[str, float]:
        student = self.config.student
        rising = min(1.0, progress / student.warmup) if student.warmup else 1.0
        hallucination = rising * student.hallucination_weight
        return {
            "level": 1.0,
            "distil": student.distil_weight,
            "hallucination": hallucination,
            "hallucination_map": 0.5 * hallucination,
            "contrast": rising * student.contrast_weight,
            "nuclei": student.nuclei_weight,
            "membrane": student.membrane_weight,
        }


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
