"""The sections of a run's configuration as frozen dataclasses; the docstring of a field is also its `--help`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from lgd.base.errors import OnBad

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pool = Literal["cls", "mean", "cls+mean"]
Source = Literal["trained", "frozen", "random", "imported"]
Learns = Literal["label", "membranes", "nuclei", "positive", "parts", "pairs"]
Staining = Literal["membranes", "nuclei", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a run lives, and its seed."""

    dir: str = "runs/run"
    """Folder of the run; the other folders default to places under it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, sample order and augmentation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The shards and how they are read."""

    shards: str | list[str] = ""
    """Shard folder or url (s3://, gs://, http://), or a list of them; default RUN/shards."""
    size: Annotated[int, Field(ge=32)] = 256
    """Side of the model's input, in pixels; images are shrunk to it."""
    threads: Positive = 2
    """Threads that read and decode, in each worker."""
    lanes: Positive = 64
    """Shards that a batch is mixed from at a time: at least train.batch; the order of samples depends on it."""
    on_bad: OnBad = field(default_factory=OnBad)
    """Training stops at a sample that cannot be read, or `skip:N` leaves out up to N, each logged and counted."""
    augment: Literal["none", "d4", "d4+stain"] = "d4+stain"
    """Training augmentation that keeps a cached target valid: turns and flips, and jitter of stain and light."""
    stain_jitter: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Standard deviation of the factor on each stain's optical density under `d4+stain`."""
    light_jitter: Share = 0.0
    """Standard deviation of the logarithm of the factor on each H&E's light under `d4+stain`: white to grey glass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The IHC encoder that is trained once and then frozen, or is taken as it is."""

    name: str = "teacher"
    """Name of its latents in the store, which may hold those of several teachers."""
    dir: str = ""
    """Folder of the teacher; default RUN/teacher, or RUN/teacher-NAME of one with a name of its own."""
    source: Source = "trained"
    """`trained` here, on what it `learns`; `frozen`: a pretrained encoder as it is, which needs no labels; `random`: a
    preset that nobody trains, as a control; `imported`: features of another tool, which `lgd import-latents` puts into
    the store."""
    learns: Annotated[list[Learns], Field(min_length=1)] = field(default_factory=lambda: ["label"])
    """What a trained teacher learns: `label`, and without any label grids of the store: `membranes`, or `positive`
    where the stain is nuclear, and `nuclei`, the density of all; or without anything measured which two images belong
    together: `parts`, an IHC and a part of it, or `pairs`, an IHC and its H&E. Of several the losses are added up."""
    encoder: str = "resnet10"
    """Backbone: a preset (resnet10, resnet18, resnet50, convnext-tiny); `hf:ORG/NAME`, `timm:NAME`,
    `timm:hf-hub:ORG/NAME`, or a folder as transformers or timm saves it, of which no code is run; or code outside LGD
    as `python:package.module:factory`, which is imported."""
    pool: Pool | None = None
    """How an image becomes one latent: cls, mean, or cls+mean; by default cls where the encoder has a CLS token."""
    mean: list[float] | None = None
    """Mean of the encoder's images, by channel of RGB in 0 to 1, before what its files say; give std too."""
    std: list[float] | None = None
    """Their standard deviation."""
    mpp: float | None = None
    """Micrometres a pixel of the images that the encoder was made for."""
    arguments: dict[str, object] = field(default_factory=dict)
    """Arguments of timm's constructor, such as `{init_values: 1e-5}`, before what its files say."""
    epochs: AboveZero = 20.0
    """Passes over the training split."""


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
    map: NotNegative = 4
    """Side of the cached latent map; 0 caches pooled latents only."""
    nuclei_grid: Positive = 8
    """Side of the nuclei-density grid."""
    membrane_grid: Positive = 4
    """Side of the grid of the second stain, on membranes or in nuclei."""
    staining: Literal["auto", "membranes", "nuclei", "none"] = "auto"
    """What the second stain shows: membranes (HER2), or nuclei that are positive (ER, PR, Ki67); `none` measures
    neither, and `auto` is what the labels' target says, see docs/targets.md."""
    batch: Positive = 64
    """Patches that a worker has in hand while it caches. The teacher sees 4 at a time, 64 on a GPU: no stored number
    depends on it."""
    index: str = "auto"
    """`Flat`, or `IVFn` (n cells) before `,Flat`, `,SQfp16` or `,SQ8`; `auto` chooses by the number of rows."""
    gallery: list[str] = field(default_factory=lambda: ["train"])
    """Splits that queries search."""
    components: NotNegative = 32
    """Principal components of the latents, scaled alike, that queries compare; 0 compares latents as they are."""
    bias: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How strongly IHCs that answer too many H&Es (hubs) are pushed down the answers, learnt from what the trained
    student makes of held-out H&E; 3 is usual, 20 where components is 0; 0 leaves it out."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Recall@10 against exact search that an index must reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """The H&E network and its losses."""

    dir: str = ""
    """Folder of the trained student; default RUN/student."""
    method: str = "lgd"
    """LGD-Net, a baseline (an unknown name lists them), or a class outside LGD as `python:package.module:name`, whose
    module is imported."""
    teachers: list[str] = field(default_factory=list)
    """Names of the latents in the store that teach it, first those that queries compare; default: those of the run's
    teacher alone."""
    encoder: str = "resnet10"
    """Backbone of the morphology stream; see teacher.encoder."""
    pool: Pool | None = None
    """How it pools; see teacher.pool."""
    mean: list[float] | None = None
    """See teacher.mean."""
    std: list[float] | None = None
    """See teacher.std."""
    arguments: dict[str, object] = field(default_factory=dict)
    """See teacher.arguments."""
    hallucination: Literal["auto", "own", "shared"] = "auto"
    """The hallucination stream has its own encoder, started from the teacher's weights, which must be a preset, or it
    shares the trunk; `auto` is own for a preset."""
    epochs: AboveZero = 20.0
    """Passes over the training split."""
    hallucination_loss: Literal["smooth-l1", "cosine"] = "smooth-l1"
    """Distance between hallucinated and cached latents, both normalised."""
    hallucination_weight: Amount = 1.0
    """Weight of the hallucination loss."""
    contrast_weight: Amount = 0.0
    """Weight of the contrastive hallucination loss (InfoNCE against latents of other levels); 0 leaves it out."""
    contrast_queue: Positive = 4096
    """Latents that a sample's own is compared with."""
    contrast_temperature: AboveZero = 0.07
    """Its temperature."""
    distil_weight: Amount = 0.0
    """Weight of the loss to the teacher's soft levels, for LGD-Net and label distillation; 0 leaves it out."""
    distil_temperature: AboveZero = 2.0
    """Temperature that softens them."""
    pairs: Literal["own", "shuffled", "within-level"] = "own"
    """A control, for LGD-Net: latents and staining of another pair, of any level or of the same."""
    warmup: Share = 0.1
    """Share of the steps over which the weights of both hallucination losses rise from 0."""
    nuclei_weight: Amount = 0.1
    """Weight of the nuclei-grid loss."""
    membrane_weight: Amount = 0.1
    """Weight of the loss of the second stain's grid, of membranes or positive nuclei."""
    full_alignment: Amount = 0.0
    """Alignment (z) from which a pair's second image teaches in full; below it teaches less, at 0 nothing, while the
    label always does. Pairs of unknown alignment teach in full; 0 turns this off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """How both networks are trained."""

    workers: NotNegative = 1
    """Training workers under Ray, one a GPU or a CPU; 0 trains in this process without Ray."""
    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    """DeepSpeed, or its plain PyTorch twin; `auto` is DeepSpeed where it can be built."""
    batch: Positive = 32
    """Global batch, over all workers."""
    accumulate: Positive = 1
    """Micro-batches whose gradients are added in one step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass."""
    lr: AboveZero = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Amount = 0.05
    """Decoupled weight decay."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises from 0; it then falls as a cosine."""
    clip: Amount = 1.0
    """Largest norm of the gradient; 0 for no limit."""
    compile: bool = False
    """Compile the network with torch.compile; the first steps take minutes. Needs a C++ compiler."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints; the last step always saves one."""
    evaluate_every: NotNegative = 0
    """Steps between validations; 0 for once an epoch."""
    patience: NotNegative = 0
    """Validations without a better `metric` that end training, with the best network; 0: all steps, and the last."""
    metric: Literal["auto", "kappa", "macro_f1", "accuracy", "mae", "rmse", "pearson", "ccc"] = "auto"
    """Validation metric by which the best checkpoint is kept; `auto` is kappa, and of numbers the mean absolute error
    (mae), of which others are the root mean square (rmse), Pearson's r and concordance (ccc)."""
    ordinal: Literal["cross-entropy", "corn"] = "cross-entropy"
    """How the classes of an ordinal, such as HER2's levels, are taught: each by itself, or each step between two
    (CORN)."""
    keep: Positive = 2
    """Newest checkpoints that are kept, beside the one with the best validation."""
    resume: str = "auto"
    """`auto` goes on from the newest complete checkpoint; `never` removes them and starts anew; a path goes on from
    that one, and removes later ones."""
    max_failures: int = 3
    """How often Ray restarts lost workers before the run fails; -1 for always."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The evaluation."""

    dir: str = ""
    """Folder of the report; default RUN/report."""
    split: str = "test"
    """Split that is scored."""
    also: list[str] = field(default_factory=list)
    """Folders of further students that the table compares."""
    bootstrap: Positive = 1000
    """Resamples of slides behind each 95 % interval."""
    queries: int = 8
    """Rows of the contact sheet."""
    robustness: bool = False
    """Score every network under changed stain, background, JPEG quality and blur too: 11 more passes over the split."""
