"""How a student is trained: a class a method, and the one registry that holds them.

A method says what it needs from the feature store, which network it trains and from which weights, its losses, and its
name in a table. A baseline is added here and nowhere else. One in another package is named
`python:package.module:name`, in `student.method`:

    class Consistent(Method):
        title = "consistent"

        def losses(self, out, batch):
            return super().losses(out, batch) | {"spread": out["features"].float().var(dim=1)}

        def weights(self, progress):
            return {"level": 1.0, "spread": 0.1 * progress}
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import JsonValue

from lgd.base.errors import ConfigError, require
from lgd.base.extensions import FORM, is_python, load_object
from lgd.config import Config
from lgd.models import losses
from lgd.models.description import LatentSizes
from lgd.models.encoder import PRESETS, Encoder, build_encoder
from lgd.models.known import state_inputs, stated_in
from lgd.models.losses import Lesson, Negatives, Terms
from lgd.models.student import HallucinatingStudent, Outputs, Student, TwoStreamStudent
from lgd.models.teacher import Probe, Teacher, load_teacher


class Method:
    """A way to train a student; this one teaches the level only."""

    title: ClassVar[str]
    """Its row in a table."""
    network: ClassVar[type[Student]] = Student
    """What is trained."""
    needs: tuple[str, ...] = ()
    """The datasets of the feature store that teach it; where none does, samples of unknown level are left out."""
    retrieves_by: ClassVar[Literal["latents", "features"] | None] = None
    """By what a report measures its retrieval. A network that gives latents (`pooled`) can be queried."""
    pairs: str = "own"
    """Whose latents and membranes teach a sample: see `student.pairs`."""
    queue: int = 0
    """Latents in the queue of `Lesson.negatives`; 0 for none."""
    controls: ClassVar[Mapping[str, Mapping[str, float | str]]] = {}
    """Further rows of `lgd ablate --full`: which fields of `student:` differ from its own row."""
    uses_levels: bool = False
    """Whether the teacher's levels teach it: those of its head, or of a probe where no label taught it."""

    def __init__(self, config: Config) -> None:
        """Raises `ConfigError` for fields that do not fit the method."""
        self.config = config
        self.latents: Mapping[str, LatentSizes] = {}
        """Those of the store that teach it, by teacher; empty where none do."""
        self.teacher_dir = config.teacher.dir
        """Of the teacher whose head gives soft levels, that of the first latents."""
        self.levels: Teacher | Probe | None = None
        """What gives soft levels: the task gives a probe where no label taught that teacher."""
        imported = config.teacher.source == "imported"
        preset = config.teacher.encoder in PRESETS and not imported
        self.own_stream = preset if config.student.hallucination == "auto" else config.student.hallucination == "own"
        """Whether the second stream has an encoder of its own."""
        require(
            preset or not self.own_stream,
            "student.hallucination is own, and "
            + ("teacher.source is imported" if imported else f"teacher.encoder is {config.teacher.encoder}")
            + f": only a preset ({', '.join(PRESETS)}) is copied into the student; set student.hallucination to shared",
        )

    @classmethod
    def row_fields(cls, config: Config) -> Mapping[str, float | str]:
        """The fields of `student:` in its row of `lgd ablate`, beside the method, where those of the run do not do."""
        return {}

    def build(self) -> Student:
        """The untrained network."""
        config, hallucination, latents = self.config, None, self.latents
        if issubclass(self.network, TwoStreamStudent) and (self.own_stream or not latents):
            teacher, _ = load_teacher(config.teacher.dir, config.code)
            latents = latents or {config.teacher.name: LatentSizes(dim=teacher.dim, map=config.latents.map)}
            if self.own_stream:
                hallucination = self.start_hallucination(teacher).requires_grad_(True)
        return self.network(
            morphology=build_encoder(config.student.encoder, stated_in(config, "student")),
            hallucination=hallucination,
            latents=latents,
            nuclei_grid=config.latents.nuclei_grid,
            membrane_grid=config.latents.membrane_grid,
        )

    def start_hallucination(self, teacher: Teacher) -> Encoder:
        """The second stream's own encoder: the teacher's architecture, and nothing of its weights."""
        return build_encoder(self.config.teacher.encoder, stated_in(self.config, "teacher"))

    def fields(self) -> tuple[str, ...]:
        """The fields of `student:`, beside method, encoder and epochs, that its result depends on."""
        return ()

    def inputs(self) -> dict[str, JsonValue]:
        """What its result depends on, beside teacher, store, shards and the section `train:`."""
        student = self.config.student
        inputs = {name: getattr(student, name) for name in ("method", "encoder", "epochs", *self.fields())}
        if "hallucination" in inputs:
            inputs["hallucination"] = "own" if self.own_stream else "shared"
        return inputs | state_inputs(self.config, "student")

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        """The loss terms of each sample."""
        return {"level": losses.level_loss(out["logits"], batch.level_B)}

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a share of the steps, 0 to 1."""
        return {"level": 1.0}

    def soft_levels(self, pooled_nD: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (n, 4) of its stored latents."""
        if self.levels is None:
            self.levels = load_teacher(self.teacher_dir, self.config.code)[0].to(pooled_nD.device)
        return self.levels.levels_of(pooled_nD)


class HeOnly(Method):
    """The morphology stream alone."""

    title = "H&E-only"
    retrieves_by = "features"


class TwoStream(Method):
    """The fused network, both encoders from the same start, taught the level only."""

    title = "two streams"
    network = TwoStreamStudent

    def fields(self) -> tuple[str, ...]:
        return ("hallucination",)

    def inputs(self) -> dict[str, JsonValue]:
        stated = {f"teacher_{name}": value for name, value in state_inputs(self.config, "teacher").items()}
        return super().inputs() | {"teacher_encoder": self.config.teacher.encoder} | stated


_DISTIL = ("distil_weight", "distil_temperature")


class Distil(Method):
    """The same network, also taught the levels that the teacher gives, and no latents (label-only distillation)."""

    title = "label distillation"
    network = TwoStreamStudent
    # The teacher's levels are read off its stored latents.
    needs = ("pooled",)
    uses_levels = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        require(
            config.student.distil_weight > 0,
            f"student.method is {config.student.method} and student.distil_weight is 0: nothing would be distilled; "
            "set it to 1",
        )

    @classmethod
    def row_fields(cls, config: Config) -> Mapping[str, float | str]:
        return {"distil_weight": config.student.distil_weight or 1.0}

    def fields(self) -> tuple[str, ...]:
        return ("hallucination", *_DISTIL)

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        soft_BK = self.soft_levels(batch.stored["pooled"])
        distilled_B = losses.distillation_loss(out["logits"], soft_BK, self.config.student.distil_temperature)
        return super().losses(out, batch) | {"distil": distilled_B}

    def weights(self, progress: float) -> dict[str, float]:
        return super().weights(progress) | {"distil": self.config.student.distil_weight}


class LgdNet(Method):
    """The fused network, taught the teacher's latents and the domain grids, and where asked its levels."""

    title = "LGD-Net"
    network = HallucinatingStudent
    needs = ("pooled", "map", "nuclei", "membrane")
    retrieves_by = "latents"
    controls: ClassVar[Mapping[str, Mapping[str, float | str]]] = {
        "without hallucination": {"hallucination_weight": 0.0, "contrast_weight": 0.0},
        "without contrast": {"contrast_weight": 0.0},
        "without soft levels": {"distil_weight": 0.0},
        "without nuclei": {"nuclei_weight": 0.0},
        "without membranes": {"membrane_weight": 0.0},
        "one trunk": {"hallucination": "shared"},
        "pairs shuffled": {"pairs": "shuffled"},
        "shuffled within a level": {"pairs": "within-level"},
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        student = config.student
        self.pairs = student.pairs
        self.queue = student.contrast_queue if student.contrast_weight else 0
        # Where a level is unknown the contrast takes the teacher's.
        self.uses_levels = bool(student.distil_weight or student.contrast_weight)

    def start_hallucination(self, teacher: Teacher) -> Encoder:
        return teacher.encoder

    def inputs(self) -> dict[str, JsonValue]:
        # Networks of before had no map for queries.
        return super().inputs() | {"query_map": "ridge/1"}

    def fields(self) -> tuple[str, ...]:
        student = self.config.student
        return (
            *("hallucination", "hallucination_loss", "hallucination_weight", "warmup"),
            *("nuclei_weight", "membrane_weight"),
            *(("contrast_weight", "contrast_queue", "contrast_temperature") if student.contrast_weight else ()),
            *(_DISTIL if student.distil_weight else ()),
            *(("pairs",) if student.pairs != "own" else ()),
        )

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        student, stored = self.config.student, batch.stored
        terms = super().losses(out, batch)
        if student.distil_weight:
            soft_BK = self.soft_levels(stored["pooled"])
            terms["distil"] = losses.distillation_loss(out["logits"], soft_BK, student.distil_temperature)
        kind = student.hallucination_loss
        terms["hallucination"] = _mean_over_teachers(out, stored, "pooled", kind)
        if any(name.startswith("map") for name in stored):
            terms["hallucination_map"] = _mean_over_teachers(out, stored, "map", kind)
        if batch.negatives is not None:
            mask_BQ = self.negative_mask(batch.negatives, stored["pooled"])
            temperature, queue_QD = student.contrast_temperature, batch.negatives.pooled_QD
            terms["contrast"] = losses.contrast_loss(out["pooled"], stored["pooled"], queue_QD, mask_BQ, temperature)
        return terms | losses.grid_losses(out, stored)

    def negative_mask(self, negatives: Negatives, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Which latents of the queue are of another level (unknown, that of the teacher) and sample, bool (B, Q)."""
        level_B, level_Q = (
            torch.where(level >= 0, level, self.soft_levels(pooled).argmax(dim=1))
            for level, pooled in ((negatives.level_B, pooled_BD), (negatives.level_Q, negatives.pooled_QD))
        )
        return (level_B[:, None] != level_Q) & (negatives.source_B[:, None] != negatives.number_Q)

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


def _mean_over_teachers(out: Outputs, stored: Mapping[str, torch.Tensor], dataset: str, kind: str) -> torch.Tensor:
    """The hallucination loss of pooled latents or maps, (B,), each teacher that has them weighing alike."""
    terms = []
    for name, latent in stored.items():
        if name.partition("@")[0] == dataset:
            # A pooled latent of CLS token and mean is twice as wide as the map, whose mean its second half is.
            terms.append(losses.hallucination_loss(out[name][:, -latent.shape[1] :], latent, kind))
    return torch.stack(terms).mean(dim=0)


METHODS: dict[str, type[Method]] = {"he-only": HeOnly, "two-stream": TwoStream, "distil": Distil, "lgd": LgdNet}
"""The methods by their names in `student.method`, in the order of a table."""
BASELINE, PROPOSED = "he-only", "lgd"
"""What each run is compared with, and what all of a comparison are."""


def find_method(name: str) -> type[Method]:
    """The method of a name, which is imported where it is outside LGD; `ConfigError` for an unknown one."""
    if not is_python(name):
        if name not in METHODS:
            raise ConfigError(f"student.method is {name!r:.120}: use one of {', '.join(METHODS)}, or {FORM}")
        return METHODS[name]
    method = load_object(name, "student.method")
    if isinstance(method, type) and issubclass(method, Method) and isinstance(getattr(method, "title", None), str):
        return method
    raise ConfigError(
        f"student.method is {name}, which is no method: derive it from lgd.models.methods.Method, with a `title`"
    )
