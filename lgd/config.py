"""A run as frozen dataclasses, which `lgd.config_files` reads; the docstring of a field is also its `--help`."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from lgd.base.errors import OnBad, require
from lgd.base.extensions import is_python
from lgd.base.plain_yaml import write_yaml

if TYPE_CHECKING:
    from pydantic import JsonValue

LEVEL_NAMES = ("0", "1+", "2+", "3+")

# These are facts of `train:`; a second place for them would let the two disagree.
_REFUSED_IN_DEEPSPEED = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
bf16 fp16 torch_autocast
""".split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a run lives, and its seed."""

    dir: str = "runs/run"
    """Folder of the run; the other folders default to places under it."""
    seed: int = 0
    """Seed of weights, sample order and augmentation."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"run.seed is {self.seed}: use 0 to {2**32 - 1}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The shards and how they are read."""

    shards: str | list[str] = ""
    """Shard folder or url (s3://, gs://, http://), or a list of them; default RUN/shards."""
    size: int = 256
    """Side of the model's input, in pixels; images are shrunk to it."""
    threads: int = 2
    """Threads that read and decode, in each worker."""
    lanes: int = 64
    """Shards that a batch is mixed from at a time: at least train.batch; the order of samples depends on it."""
    on_bad: OnBad = field(default_factory=OnBad)
    """Training stops at a sample that cannot be read, or `skip:N` leaves out up to N, each logged and counted."""
    augment: Literal["none", "d4", "d4+stain"] = "d4+stain"
    """Training augmentation that keeps a cached target valid: turns and flips, and jitter of stain and light."""
    stain_jitter: float = 0.1
    """Standard deviation of the factor on each stain's optical density under `d4+stain`."""
    light_jitter: float = 0.0
    """Standard deviation of the logarithm of the factor on each H&E's light under `d4+stain`: white to grey glass."""

    def __post_init__(self) -> None:
        require(self.size >= 32, f"data.size is {self.size}: use at least 32 pixels")
        require(self.threads >= 1, f"data.threads is {self.threads}: use at least 1")
        require(self.lanes >= 1, f"data.lanes is {self.lanes}: use at least 1")
        require(0 <= self.stain_jitter < 0.5, f"data.stain_jitter is {self.stain_jitter}: use 0 to 0.5")
        require(0 <= self.light_jitter <= 1, f"data.light_jitter is {self.light_jitter}: use 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The IHC encoder that is trained once and then frozen."""

    dir: str = ""
    """Folder of the trained teacher; default RUN/teacher."""
    encoder: str = "resnet10"
    """Backbone: a preset (resnet10, resnet18, resnet50, convnext-tiny); `hf:ORG/NAME` or a folder as transformers saves
    it, of which no code is run; or code outside LGD as `python:package.module:factory`, which is imported."""
    epochs: float = 20.0
    """Passes over the training split."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"teacher.epochs is {self.epochs}: use more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """The feature store and its index."""

    dir: str = ""
    """Folder of the feature store; default RUN/latents."""
    views: Literal[1, 8] = 1
    """Cached views of each IHC: itself, or all eight of the dihedral group D4."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored latents and targets."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher's forward pass; bf16 needs a GPU that has it."""
    map: int = 4
    """Side of the cached latent map; 0 caches pooled latents only."""
    nuclei_grid: int = 8
    """Side of the nuclei-density grid."""
    membrane_grid: int = 4
    """Side of the membrane-staining grid."""
    batch: int = 64
    """Patches in one forward pass of the teacher."""
    index: str = "auto"
    """`Flat`, or `IVFn` (n cells) before `,Flat`, `,SQfp16` or `,SQ8`; `auto` chooses by the number of rows."""
    gallery: list[str] = field(default_factory=lambda: ["train"])
    """Splits that queries search."""
    recall: float = 0.99
    """Recall@10 against exact search that an index must reach."""

    def __post_init__(self) -> None:
        for name in ("nuclei_grid", "membrane_grid", "batch"):
            require(getattr(self, name) >= 1, f"latents.{name} is {getattr(self, name)}: use at least 1")
        require(self.map >= 0, f"latents.map is {self.map}: use 0 for none, or the map's side")
        require(0 < self.recall <= 1, f"latents.recall is {self.recall}: use 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """The H&E network and its losses."""

    dir: str = ""
    """Folder of the trained student; default RUN/student."""
    method: str = "lgd"
    """LGD-Net, a baseline (an unknown name lists them), or a class outside LGD as `python:package.module:name`, whose
    module is imported."""
    encoder: str = "resnet10"
    """Backbone of the morphology stream; see teacher.encoder."""
    hallucination: Literal["own", "shared"] = "own"
    """The hallucination stream has its own encoder, started from the teacher's weights, or shares the trunk."""
    epochs: float = 20.0
    """Passes over the training split."""
    hallucination_loss: Literal["smooth-l1", "cosine"] = "smooth-l1"
    """Distance between hallucinated and cached latents, both normalised."""
    hallucination_weight: float = 1.0
    """Weight of the hallucination loss."""
    contrast_weight: float = 0.0
    """Weight of the contrastive hallucination loss (InfoNCE against latents of other levels); 0 leaves it out."""
    contrast_queue: int = 4096
    """Latents that a sample's own is compared with."""
    contrast_temperature: float = 0.07
    """Its temperature."""
    distil_weight: float = 0.0
    """Weight of the loss to the teacher's soft levels, for LGD-Net and label distillation; 0 leaves it out."""
    distil_temperature: float = 2.0
    """Temperature that softens them."""
    pairs: Literal["own", "shuffled", "within-level"] = "own"
    """A control, for LGD-Net: latents and membranes of another pair, of any level or of the same."""
    warmup: float = 0.1
    """Share of the steps over which the weights of both hallucination losses rise from 0."""
    nuclei_weight: float = 0.1
    """Weight of the nuclei-grid loss."""
    membrane_weight: float = 0.1
    """Weight of the membrane-grid loss."""

    def __post_init__(self) -> None:
        for name in ("hallucination", "contrast", "distil", "nuclei", "membrane"):
            weight = getattr(self, f"{name}_weight")
            require(weight >= 0, f"student.{name}_weight is {weight}: use 0 or more")
        for name in ("contrast_temperature", "distil_temperature", "contrast_queue", "epochs"):
            require(getattr(self, name) > 0, f"student.{name} is {getattr(self, name)}: use more than 0")
        require(0 <= self.warmup <= 1, f"student.warmup is {self.warmup}: use a share of the steps, 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """How both networks are trained."""

    workers: int = 1
    """Training workers under Ray, one a GPU or a CPU; 0 trains in this process without Ray."""
    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    """DeepSpeed, or its plain PyTorch twin; `auto` is DeepSpeed where it can be built."""
    batch: int = 32
    """Global batch, over all workers."""
    accumulate: int = 1
    """Micro-batches whose gradients are added in one step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0; it then falls as a cosine."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no limit."""
    compile: bool = False
    """Compile the network with torch.compile; the first steps take minutes. Needs a C++ compiler."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always saves one."""
    evaluate_every: int = 0
    """Steps between validations; 0 for once an epoch."""
    patience: int = 0
    """Validations without a better `metric` that end training, with the best network; 0: all steps, and the last."""
    metric: Literal["kappa", "macro_f1", "accuracy"] = "kappa"
    """Validation metric by which the best checkpoint is kept."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one with the best validation."""
    resume: str = "auto"
    """`auto` goes on from the newest complete checkpoint; `never` removes them and starts anew; a path goes on from
    that one, and removes later ones."""
    max_failures: int = 3
    """How often Ray restarts lost workers before the run fails; -1 for always."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, f"train.workers is {self.workers}: use 0 (no Ray) or more")
        for name in ("batch", "accumulate", "checkpoint_every", "keep"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}: use at least 1")
        for name in ("weight_decay", "clip", "evaluate_every", "patience"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}: use 0 or more")
        require(self.lr > 0, f"train.lr is {self.lr}: use more than 0")
        require(0 <= self.warmup <= 1, f"train.warmup is {self.warmup}: use a share of the steps, 0 to 1")
        parts = max(self.workers, 1) * self.accumulate
        require(
            self.batch % parts == 0,
            f"train.batch {self.batch} does not divide into train.workers {max(self.workers, 1)} x "
            f"train.accumulate {self.accumulate}: use a multiple of {parts}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The evaluation."""

    dir: str = ""
    """Folder of the report; default RUN/report."""
    split: str = "test"
    """Split that is scored."""
    also: list[str] = field(default_factory=list)
    """Folders of further students that the table compares."""
    bootstrap: int = 1000
    """Resamples of slides behind each 95 % interval."""
    queries: int = 8
    """Rows of the contact sheet."""
    robustness: bool = False
    """Score every network under changed stain, background, JPEG quality and blur too: 11 more passes over the split."""

    def __post_init__(self) -> None:
        require(self.bootstrap >= 1, f"report.bootstrap is {self.bootstrap}: use at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run, whole.

    Args:
        run: Folder and seed.
        data: The shards and how they are read.
        teacher: The IHC encoder.
        latents: The feature store and its index.
        student: The H&E network and its losses.
        train: How both networks are trained.
        report: The evaluation.
        deepspeed: Passed to DeepSpeed as it is, for example `zero_optimization: {stage: 2}`.

    Raises:
        ConfigError: A field is out of its range, or two do not fit; the message names them and the fix.
    """

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    latents: Latents = field(default_factory=Latents)
    student: Student = field(default_factory=Student)
    train: Train = field(default_factory=Train)
    report: Report = field(default_factory=Report)
    deepspeed: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in _REFUSED_IN_DEEPSPEED:
            remedy = "batch size, precision, clipping, optimizer and schedule are set in train: only; remove it there"
            require(key not in self.deepspeed, f"deepspeed.{key} is set: {remedy}")
        for name in ("run", "teacher", "student", "report"):
            folder = getattr(self, name).dir
            remedy = "nothing can be written there: use s3://, gs:// or a folder that all nodes share"
            require(not folder.startswith(("http://", "https://")), f"{name}.dir is {folder}, and {remedy}")
        ignored = "deepspeed: is set but train.engine is torch, which would ignore it; remove one of the two"
        require(not self.deepspeed or self.train.engine != "torch", ignored)

    @property
    def code(self) -> frozenset[str]:
        """The code outside LGD that the run names: it may be imported."""
        return frozenset(filter(is_python, (self.student.method, self.student.encoder, self.teacher.encoder)))

    @property
    def shard_dirs(self) -> list[str]:
        """The shard folders or urls, in the order of their addresses."""
        return self.data.shards if isinstance(self.data.shards, list) else [self.data.shards]

    def as_yaml(self) -> str:
        """The run as YAML that reads back as the same run."""
        return write_yaml(self._as_sections())

    def _as_sections(self) -> dict[str, dict[str, "JsonValue"]]:
        sections = asdict(self)
        sections["data"]["on_bad"] = str(self.data.on_bad)
        return sections

    def as_fields(self) -> dict[str, "JsonValue"]:
        """The value of each field by its dotted name."""
        sections = self._as_sections()
        deepspeed = sections.pop("deepspeed")
        fields = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
        return {**fields, "deepspeed": deepspeed}
