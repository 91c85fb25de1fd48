"""A run, whole: its sections (`lgd.config_sections`) and what they say together; `lgd.config_files` reads it."""

import re
from dataclasses import asdict, dataclass, field, fields

from pydantic import JsonValue

from lgd.base.arguments import check_bounds
from lgd.base.errors import require
from lgd.base.extensions import is_python
from lgd.base.plain_yaml import write_yaml
from lgd.config_sections import Data, Latents, Report, Run, Student, Teacher, Train

WHERE_IT_RUNS = frozenset("workers engine compile resume checkpoint_every keep max_failures".split())
"""The fields of `train:` on which no result depends."""

# These are facts of `train:`; a second place for them would let the two disagree.
_REFUSED_IN_DEEPSPEED = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
bf16 fp16 torch_autocast
""".split()


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
        for section in fields(self)[:-1]:
            check_bounds(getattr(self, section.name), f"{section.name}.")
        train = self.train
        parts = max(train.workers, 1) * train.accumulate
        require(
            train.batch % parts == 0,
            f"train.batch {train.batch} does not divide into train.workers {max(train.workers, 1)} x "
            f"train.accumulate {train.accumulate}: use a multiple of {parts}",
        )
        for key in _REFUSED_IN_DEEPSPEED:
            remedy = "batch size, precision, clipping, optimizer and schedule are set in train: only; remove it there"
            require(key not in self.deepspeed, f"deepspeed.{key} is set: {remedy}")
        for name in (self.teacher.name, *self.student.teachers):
            remedy = "use up to 64 letters, digits and _, and not patches, which names the domain targets"
            fits = re.fullmatch("[A-Za-z0-9_]{1,64}", name) and name != "patches"
            require(bool(fits), f"teacher.name, or one of student.teachers, is {name!r:.80}: {remedy}")
        twice = sorted({name for name in self.student.teachers if self.student.teachers.count(name) > 1})
        require(not twice, f"student.teachers names {', '.join(twice)} twice: name each teacher once")
        for name, one in (("teacher", self.teacher), ("student", self.student)):
            both = f"give both {name}.mean and {name}.std, three numbers each: one alone says nothing"
            require((one.mean is None) == (one.std is None), both)
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
    def taught_by(self) -> tuple[str, ...]:
        """Names of the latents that teach the student."""
        return tuple(self.student.teachers) or (self.teacher.name,)

    @property
    def shard_dirs(self) -> list[str]:
        """The shard folders or urls, in the order of their addresses."""
        return self.data.shards if isinstance(self.data.shards, list) else [self.data.shards]

    def as_yaml(self) -> str:
        """The run as YAML that reads back as the same run."""
        return write_yaml(self._as_sections())

    def _as_sections(self) -> dict[str, dict[str, JsonValue]]:
        sections = asdict(self)
        sections["data"]["on_bad"] = str(self.data.on_bad)
        return sections

    def as_fields(self) -> dict[str, JsonValue]:
        """The value of each field by its dotted name."""
        sections = self._as_sections()
        deepspeed = sections.pop("deepspeed")
        values = {f"{section}.{name}": value for section, those in sections.items() for name, value in those.items()}
        return {**values, "deepspeed": deepspeed}
