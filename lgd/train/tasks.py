"""What is trained: a network, of what, and by which method. One class a task, the same loop for all."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import JsonValue

from lgd.base.errors import require
from lgd.base.target import Target
from lgd.config import WHERE_IT_RUNS, Config
from lgd.io.digests import digest_of
from lgd.io.location import as_location
from lgd.labels.predictions import find_measures
from lgd.models.description import LatentSizes, ModelConfig, StudentConfig, TeacherConfig, TeacherRef
from lgd.models.encoder import PRESETS, Encoder, build_encoder
from lgd.models.known import state_inputs, stated_in
from lgd.models.losses import Lesson, Terms, grid_losses
from lgd.models.method import choose_staining
from lgd.models.methods import Method, find_method
from lgd.models.student import GRIDS, Outputs, Student, TwoStreamStudent
from lgd.models.teacher import NO_SOFT_LABELS, TEACHERS, FrozenTeacher, Joint, RandomTeacher, Teacher
from lgd.shards.manifest import Values
from lgd.shards.shard_set import ShardSet
from lgd.store.probe import ProbeDocument, find_probe
from lgd.store.recipes import open_store, targets_of
from lgd.store.store import Store
from lgd.store.targets import TargetParts
from lgd.stream.plan import ORDER
from lgd.train.partners import compare_images

Network = Teacher | Student


class Task(ABC):
    """A network to train."""

    kind: ClassVar[Literal["teacher", "student"]]
    """Its section of the configuration."""
    role: ClassVar[str]
    """The image that it reads: he or ihc."""
    document: ClassVar[type[ModelConfig]]
    """What the folder of a trained network says of it."""

    def __init__(self, config: Config, shards: ShardSet) -> None:
        section = config.teacher if self.kind == "teacher" else config.student
        self.config, self.epochs = config, section.epochs
        self.roles: tuple[str, ...] = (self.role,)
        """The images that training reads."""
        self.trains = True
        """Whether there is anything to train: nothing of a frozen teacher."""
        self.folder = as_location(section.dir)
        self.target, self.values = shards.target, shards.summarise_values("train")
        # The label alone teaches, unless a task has another one.
        self.method = Method(config, self.target, self.values)
        self.store: Store | TargetParts | None = None
        self.gives_labels = True
        """Whether labels teach it: not a teacher that learns without them."""

    @property
    def metric(self) -> str:
        """By which validation chooses the best network."""
        asked = self.config.train.metric
        return find_measures(self.target).main if asked == "auto" else asked

    @abstractmethod
    def build(self) -> Network:
        """The untrained network."""

    @abstractmethod
    def inputs(self) -> dict[str, JsonValue]:
        """What the result depends on, beside the shards, their rows in the store and `train:`; a finished network made
        of the same is reused.
        """

    def find_probe(self, shards: ShardSet) -> ProbeDocument | None:
        """The probe that reads the teacher's labels off its latents, where the method needs one; None elsewhere."""
        return None

    def describe(self, model: Network, **facts: object) -> ModelConfig:
        """What the folder of the trained network says of it, with the facts of its training."""
        return model.describe(**facts)


class TeacherMethod(Method):
    """What a teacher learns: labels, the grids of the domain targets, and which two images belong together."""

    def __init__(self, config: Config, target: Target, values: Values | None = None) -> None:
        super().__init__(config, target, values)
        self.needs = tuple(dataset for name, dataset in GRIDS.items() if name in config.teacher.learns)
        self.compares = bool({"parts", "pairs"} & {*config.teacher.learns})

    def losses(self, out: Outputs, batch: Lesson) -> Terms:
        terms = (super().losses(out, batch) if "logits" in out else {}) | grid_losses(out, batch.stored)
        return terms | ({"joint": compare_images(out["joint"])} if "joint" in out else {})

    def weights(self, progress: float) -> dict[str, float]:
        # No weight was tuned.
        return dict.fromkeys(("level", "joint", *self.needs), 1.0)


class TeacherTask(Task):
    """IHC -> label, grids of the domain targets, or both; or latents of a pretrained encoder as it is."""

    kind, role, document = "teacher", "ihc", TeacherConfig

    def __init__(self, config: Config, shards: ShardSet) -> None:
        """Raises `ConfigError` for a frozen teacher that nobody has trained, and for an imported one."""
        super().__init__(config, shards)
        require(
            config.teacher.source != "imported",
            "teacher.source is imported: there is no network to train; lgd import-latents puts its latents there",
        )
        source, learns = config.teacher.source, config.teacher.learns
        self.trains = source == Teacher.source
        self.gives_labels = self.trains and "label" in learns
        staining = choose_staining(config, self.target)
        for name, shows in (("membranes", "membranes"), ("positive", "nuclei")):
            require(
                name not in learns or staining == shows,
                f"teacher.learns is {', '.join(learns)}, and the second stain shows {staining}: set latents.staining "
                f"to {shows}, or leave {name} out",
            )
        require(
            not {"parts", "pairs"} <= {*learns},
            f"teacher.learns is {', '.join(learns)}: an image is compared with one other, so keep parts or pairs",
        )
        if self.trains:
            self.method = TeacherMethod(config, self.target, self.values)
            if self.method.needs:
                self.store = TargetParts(as_location(config.latents.dir), targets_of(config, self.target))
            if "pairs" in learns:
                self.roles = (self.role, "he")
        else:
            self.epochs = 0.0
            require(
                learns == ["label"],
                f"teacher.learns is {', '.join(learns)}, and a {source} teacher (teacher.source) learns nothing: omit "
                "it, or set [label]",
            )
            preset = config.teacher.encoder in PRESETS
            require(
                preset or source == FrozenTeacher.source,
                f"teacher.source is random and teacher.encoder is {config.teacher.encoder}: only a preset "
                f"({', '.join(PRESETS)}) begins with random weights",
            )
            require(
                not preset or source != FrozenTeacher.source,
                f"teacher.source is frozen and teacher.encoder is {config.teacher.encoder}, whose weights are random: "
                "name a pretrained encoder, or set teacher.source to trained, or to random for a control",
            )

    def build(self) -> Network:
        config, latents = self.config.teacher, self.config.latents
        sides = {"nuclei": latents.nuclei_grid, **dict.fromkeys(("membrane", "positive"), latents.membrane_grid)}

        def make_encoder() -> Encoder:
            return build_encoder(config.encoder, stated_in(self.config, "teacher"))

        teacher = TEACHERS[config.source](
            make_encoder(),
            config.learns,
            {name: sides[name] for name in self.method.needs},
            target=self.target,
            ordinal="corn" if self.config.train.ordinal == "corn" and self.target.is_ordered else None,
        )
        if self.method.compares:
            teacher.joint = Joint(teacher.dim, make_encoder() if "pairs" in config.learns else None)
        return teacher

    def inputs(self) -> dict[str, JsonValue]:
        teacher = self.config.teacher
        own: dict[str, JsonValue] = {"encoder": teacher.encoder}
        own |= {"epochs": self.epochs} if self.trains else {"source": teacher.source}
        own |= {"seed": self.config.run.seed} if teacher.source == RandomTeacher.source else {}
        own |= {"learns": [*sorted({*teacher.learns})]} if self.store or self.method.compares else {}
        return own | state_inputs(self.config, "teacher")


class StudentTask(Task):
    """H&E -> label, and what its method teaches beside."""

    kind, role, document = "student", "he", StudentConfig

    def __init__(self, config: Config, shards: ShardSet) -> None:
        """Raises `ConfigError` for a method that is not known, or that the fields of `student:` do not fit."""
        super().__init__(config, shards)
        self.method = find_method(config.student.method)(config, self.target, self.values)
        has_network = config.teacher.source != "imported" or not issubclass(self.method.network, TwoStreamStudent)
        if not self.method.needs and has_network:
            return
        store = open_store(config, self.target)
        # A method that is not taught by latents still has an adaptor of their size.
        self.store: Store | None = store if self.method.needs else None
        self.method.latents = {
            name: LatentSizes(dim=layer.datasets["pooled"].shape[-1], map=layer.recipe.map)
            for name in store.teachers
            for layer in [store.document.teachers[name]]
        }
        if store.teacher != config.teacher.name:
            self.method.teacher_dir = store.sources.teachers[store.teacher]

    def build(self) -> Network:
        return self.method.build()

    def inputs(self) -> dict[str, JsonValue]:
        inputs, teachers = self.method.inputs(), [one.weights_sha256 for one in self.list_teachers()]
        if teachers:
            inputs["teacher"] = teachers[0] if len(teachers) == 1 else [*teachers]
        return inputs

    def list_teachers(self) -> list[TeacherRef]:
        """The teachers whose latents teach it."""
        if self.store is None:
            return []
        return [
            TeacherRef(name=name, weights_sha256=layer.recipe.weights_sha256, licence=layer.licence)
            for name in self.store.teachers
            for layer in [self.store.document.teachers[name]]
        ]

    def find_probe(self, shards: ShardSet) -> ProbeDocument | None:
        """Raises `ConfigError` where no label taught the teacher and too few are there to fit a probe on."""
        if self.store is None or not self.method.uses_soft_labels:
            return None
        trained = self.store.recipe.teacher.source == Teacher.source
        if trained and TeacherConfig.read_folder(self.method.teacher_dir).gives_labels:
            return None
        probe = find_probe(self.store, shards.of_split("train"))
        require(probe is not None, NO_SOFT_LABELS.format(self.target.label_word))
        return probe

    def describe(self, model: Network, **facts: object) -> ModelConfig:
        assert isinstance(model, Student)
        facts |= {"teachers": tuple(self.list_teachers()), "untaught": self.list_untaught(model)}
        return model.describe(method=self.config.student.method, **facts)

    def list_untaught(self, model: Student) -> tuple[str, ...] | None:
        """The grids that a network predicts though nothing taught them; None where there is no such grid."""
        weights, stored = self.method.weights(1.0), () if self.store is None else self.store.datasets(model.grids)
        return tuple(name for name in model.grids if name not in stored or not weights.get(name)) or None


TASKS: dict[str, type[Task]] = {"teacher": TeacherTask, "student": StudentTask}


def inputs_of(task: Task, shards: ShardSet) -> dict[str, JsonValue]:
    """All that a trained network depends on; where it runs (workers, threads, engine) is not part of it."""
    config, train = task.config, task.config.train
    without = WHERE_IT_RUNS | (set() if train.patience else {"evaluate_every", "patience", "metric"})
    # Fields that networks of before did not have.
    without |= set() if train.ordinal == "corn" and task.target.is_ordered else {"ordinal"}
    splits: dict[str, list[str]] = {}
    for shard in [*shards.of_split("train"), *shards.of_split("val")]:
        splits.setdefault(shard.split, []).append(shard.sha256)
    inputs = task.inputs()
    if not task.trains:
        # Its weights are given, and its centre is that of the training split.
        digests: JsonValue = {"count": len(splits["train"]), "digest": digest_of(splits["train"])}
        return {"task": inputs, "role": task.role, "shards": {"train": digests}, "data": {"size": config.data.size}}
    if task.store is not None:
        # Not the whole store: what else it holds does not concern this network.
        inputs["store"] = task.store.digest_of(shards.of_split("train"))
    if probe := task.find_probe(shards):
        inputs["probe"] = probe.digest
    chosen = {name: getattr(train, name) for name in train.__dataclass_fields__ if name not in without}
    if "metric" in chosen:
        chosen["metric"] = task.metric
    return {
        "task": inputs,
        "role": task.role,
        "seed": config.run.seed,
        "order": ORDER,
        "shards": {split: {"count": len(digests), "digest": digest_of(digests)} for split, digests in splits.items()},
        "data": {
            name: getattr(config.data, name) for name in ("size", "lanes", "augment", "stain_jitter", "light_jitter")
        },
        "train": chosen,
    }
