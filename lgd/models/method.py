"""What a method of training a student is: `Method`, from which each of `lgd.models.methods` is derived."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import JsonValue

from lgd.base.errors import require
from lgd.base.target import Target
from lgd.config import Config
from lgd.config_sections import Staining
from lgd.models import losses
from lgd.models.description import LatentSizes
from lgd.models.encoder import PRESETS, Encoder, build_encoder
from lgd.models.heads import scale_of
from lgd.models.known import state_inputs, stated_in
from lgd.models.losses import Lesson, Negatives, Terms
from lgd.models.student import HallucinatingStudent, Outputs, Student, TwoStreamStudent
from lgd.models.teacher import Probe, Teacher, load_teacher
from lgd.shards.manifest import Values

FAR = 0.5
"""Standard deviations of the training values by which two values are different labels, for the contrast."""

DISTIL = ("distil_weight", "distil_temperature")
WEIGHED_BY_ALIGNMENT = ("hallucination", "hallucination_map", "contrast", "membrane", "positive")
"""The loss terms whose targets the second image gives; nuclei are measured on the H&E itself."""


class Method:
    """A way to train a student; this one teaches the label only."""

    title: ClassVar[str]
    """Its row in a table."""
    network: ClassVar[type[Student]] = Student
    """What is trained."""
    needs: tuple[str, ...] = ()
    """The datasets of the feature store that teach it; where none does, samples of unknown label are left out."""
    retrieves_by: ClassVar[Literal["latents", "features"] | None] = None
    """By what a report measures its retrieval. A network that gives latents (`pooled`) can be queried."""
    pairs: str = "own"
    """Whose latents and membranes teach a sample: see `student.pairs`."""
    queue: int = 0
    """Latents in the queue of `Lesson.negatives`; 0 for none."""
    controls: ClassVar[Mapping[str, Mapping[str, float | str]]] = {}
    """Further rows of `lgd ablate --full`: which fields of `student:` differ from its own row."""
    uses_soft_labels: bool = False
    """Whether the teacher's labels teach it: those of its head, or of a probe where no label taught it."""

    def __init__(self, config: Config, target: Target, values: Values | None = None) -> None:
        """`target`: what labels are of, and `values` those of the training split, where they are such.

        Raises `ConfigError` for fields that do not fit the method.
        """
        self.config, self.target, self.values = config, target, values
        self.latents: Mapping[str, LatentSizes] = {}
        """Those of the store that teach it, by teacher; empty where none do."""
        self.teacher_dir = config.teacher.dir
        """Of the teacher whose head gives soft labels, that of the first latents."""
        self.labeller: Teacher | Probe | None = None
        """What gives soft labels: the task gives a probe where no label taught that teacher."""
        self.labeller_values = values
        """Those that its outputs are relative to."""
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
            staining=None if (staining := choose_staining(config, self.target)) == "membranes" else staining,
            target=self.target,
            ordinal="corn" if config.train.ordinal == "corn" and self.target.is_ordered else None,
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
        return {"level": losses.label_loss(out["logits"], batch.label_B)}

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at a share of the steps, 0 to 1."""
        return {"level": 1.0}

    def soft_labels(self, pooled_nD: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (n, K) of its stored latents; of a number values, as those of a lesson."""
        if self.labeller is None:
            teacher, described = load_teacher(self.teacher_dir, self.config.code)
            self.labeller, self.labeller_values = teacher.to(pooled_nD.device), described.training.values
        logits_nK = self.labeller.logits_of(pooled_nD)
        if not self.target.is_number:
            return logits_nK
        assert self.values is not None and self.labeller_values is not None, "a teacher of a number was taught values"
        value_n1 = self.labeller_values.mean + scale_of(self.labeller_values) * logits_nK
        return (value_n1 - self.values.mean) / scale_of(self.values)

    def weigh_pairs(self, batch: Lesson) -> torch.Tensor | None:
        """How much the second image of each pair teaches, (B,), by its alignment; None where all teach in full."""
        full = self.config.student.full_alignment
        if not full or batch.alignment_B is None:
            return None
        return losses.weigh_alignment(batch.alignment_B, full)

    def differ(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Whether labels are different ones, which broadcast: other classes, or values far apart."""
        return (one - other).abs() > FAR if self.target.is_number else one != other


class LgdNet(Method):
    """The fused network, taught the teacher's latents and the domain grids, and where asked its labels."""

    title = "LGD-Net"
    network = HallucinatingStudent
    needs = ("pooled", "map", "nuclei", "membrane", "positive")
    retrieves_by = "latents"
    controls: ClassVar[Mapping[str, Mapping[str, float | str]]] = {
        "without hallucination": {"hallucination_weight": 0.0, "contrast_weight": 0.0},
        "without contrast": {"contrast_weight": 0.0},
        "without soft levels": {"distil_weight": 0.0},
        "without nuclei": {"nuclei_weight": 0.0},
        "without membranes": {"membrane_weight": 0.0},
        "without weights by alignment": {"full_alignment": 0.0},
        "one trunk": {"hallucination": "shared"},
        "pairs shuffled": {"pairs": "shuffled"},
        "shuffled within a level": {"pairs": "within-level"},
    }

    def __init__(self, config: Config, target: Target, values: Values | None = None) -> None:
        super().__init__(config, target, values)
        student = config.student
        self.pairs = student.pairs
        self.queue = student.contrast_queue if student.contrast_weight else 0
        # Where a label is unknown the contrast takes the teacher's.
        self.uses_soft_labels = bool(student.distil_weight or student.contrast_weight)

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
            *(DISTIL if student.distil_weight else ()),
            *(("pairs",) if student.pairs != "own" else ()),
            *(("full_alignment",) if student.full_alignment else ()),
        )

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        student, stored = self.config.student, batch.stored
        terms = super().losses(out, batch)
        if student.distil_weight:
            soft_BK = self.soft_labels(stored["pooled"])
            terms["distil"] = losses.distillation_loss(out["logits"], soft_BK, student.distil_temperature)
        kind = student.hallucination_loss
        terms["hallucination"] = _mean_over_teachers(out, stored, "pooled", kind)
        if any(name.startswith("map") for name in stored):
            terms["hallucination_map"] = _mean_over_teachers(out, stored, "map", kind)
        if batch.negatives is not None:
            mask_BQ = self.negative_mask(batch.negatives, stored["pooled"])
            temperature, queue_QD = student.contrast_temperature, batch.negatives.pooled_QD
            terms["contrast"] = losses.contrast_loss(out["pooled"], stored["pooled"], queue_QD, mask_BQ, temperature)
        terms |= losses.grid_losses(out, stored)
        weight_B = self.weigh_pairs(batch)
        if weight_B is None:
            return terms
        return {name: one * weight_B if name in WEIGHED_BY_ALIGNMENT else one for name, one in terms.items()}

    def negative_mask(self, negatives: Negatives, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Which latents of the queue are of another label (unknown, that of the teacher) and sample, bool (B, Q)."""

        def complete(label_n: torch.Tensor, pooled_nD: torch.Tensor) -> torch.Tensor:
            soft_nK = self.soft_labels(pooled_nD)
            soft_n = soft_nK[:, 0] if self.target.is_number else soft_nK.argmax(dim=1)
            return torch.where(losses.find_known(label_n), label_n, soft_n)

        label_B, label_Q = (
            complete(negatives.label_B, pooled_BD),
            complete(negatives.label_Q, negatives.pooled_QD),
        )
        return self.differ(label_B[:, None], label_Q) & (negatives.source_B[:, None] != negatives.number_Q)

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
            "positive": student.membrane_weight,
        }


def _mean_over_teachers(out: Outputs, stored: Mapping[str, torch.Tensor], dataset: str, kind: str) -> torch.Tensor:
    """The hallucination loss of pooled latents or maps, (B,), each teacher that has them weighing alike."""
    terms = []
    for name, latent in stored.items():
        if name.partition("@")[0] == dataset:
            # A pooled latent of CLS token and mean is twice as wide as the map, whose mean its second half is.
            terms.append(losses.hallucination_loss(out[name][:, -latent.shape[1] :], latent, kind))
    return torch.stack(terms).mean(dim=0)


def choose_staining(config: Config, target: Target) -> Staining:
    """What the second stain shows, for domain targets."""
    asked = config.latents.staining
    return (target.stains or "none") if asked == "auto" else asked
