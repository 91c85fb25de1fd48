"""What a model card is written from: the student's folder, what its run recorded, its store, its shards, a report."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import JsonValue

from lgd.base.environment import Environment
from lgd.base.errors import DataError
from lgd.base.target import UNKNOWN, Target
from lgd.config import WHERE_IT_RUNS, Config
from lgd.io.location import as_location
from lgd.models.description import StudentConfig, TeacherConfig, TeacherRef
from lgd.models.encoder import PRESETS
from lgd.models.methods import find_method
from lgd.models.spec import EncoderSpec
from lgd.report.results import Results
from lgd.runs.folder import command, find_training
from lgd.shards.shard_set import ShardSet
from lgd.store.document import SourcesDocument, StoreDocument

_SETTINGS = ("run.seed", "data.", "student.", "train.")
_NO_SETTINGS = {
    *(f"train.{name}" for name in WHERE_IT_RUNS),
    *("data.shards", "data.threads", "student.dir", "student.encoder", "student.method", "student.teachers"),
}
"""Of these some say where something lies, and others stand elsewhere."""


class TeacherFacts(NamedTuple):
    """A teacher whose latents taught the student; None is what is not known here."""

    ref: TeacherRef
    source: str | None
    encoder: str | None
    learnt: Sequence[str] | None
    """What taught it; nothing where it was not trained here."""

    @property
    def is_own(self) -> bool:
        """Whether its weights were random before it was trained."""
        return self.encoder in PRESETS


class Part(NamedTuple):
    """What the student was made of that may come with terms."""

    name: str
    encoder: str
    licence: str | None
    is_own: bool
    """Whether its weights were random before training, so that nobody else has terms for them."""


class SplitFacts(NamedTuple):
    """What a split of the training shards holds."""

    name: str
    patches: int
    labelled: int
    groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """All that a card says."""

    config: StudentConfig
    teachers: Sequence[TeacherFacts]
    splits: Sequence[SplitFacts]
    """None where the shards at hand are not those of the training."""
    slides_known: bool
    """Whether a group of these is a slide, and not a source patch."""
    sites: Mapping[str, Mapping[str, int]]
    """Center and scanner -> training patches of each; empty where nobody looked."""
    settings: Mapping[str, JsonValue]
    """The fields of the training; empty where the run did not record it."""
    environment: Environment | None
    """Where it was trained."""
    commands: Mapping[str, str]
    """The verb -> the command line, in which RUN stands for the run's folder."""
    results: Results | None

    @property
    def target(self) -> Target:
        """What is predicted."""
        return self.config.training.target

    @property
    def title(self) -> str:
        """The method."""
        return find_method(self.config.method).title

    @property
    def group_word(self) -> str:
        """What a group is, in the plural."""
        return "slides" if self.slides_known else "source patches"

    def list_parts(self) -> list[Part]:
        """The student's encoders and its teachers."""
        config = self.config
        named = {"the student's encoder": config.morphology, "its second encoder": config.hallucination}
        parts = [
            Part(name, name_encoder(spec), spec.licence, spec.name in PRESETS) for name, spec in named.items() if spec
        ]
        return parts + [
            Part(f"the teacher {one.ref.name}", one.encoder or "not known here", one.ref.licence, one.is_own)
            for one in self.teachers
        ]


def name_encoder(spec: EncoderSpec | str) -> str:
    """An encoder's name; of a folder its last part, as where it lay concerns nobody else."""
    name = spec if isinstance(spec, str) else spec.name
    return f"a local folder, {name.rstrip('/').rpartition('/')[2]}" if name.startswith("/") else name


def gather_facts(config: Config, shards: ShardSet, results: Results | None) -> CardFacts:
    """What is known of a run's student; `DataError` where its folder cannot be read."""
    student = StudentConfig.read_folder(config.student.dir)
    trained, own = find_training(config, student.weights_sha256), shards.digests == student.training.shards
    fields = trained[1] if trained else {}
    commands = {"train": command(config, "train"), "evaluate": command(config, "evaluate")}
    if results is not None and (stated := results.provenance.get("command")):
        commands["evaluate"] = str(stated)
    return CardFacts(
        config=student,
        teachers=[_find_teacher(config, ref) for ref in student.teachers],
        splits=_count_splits(shards) if own else (),
        slides_known=not any(one.may_leak for one in shards.manifests),
        sites=results.training_sites or {} if results and own else {},
        settings={
            name: value
            for name, value in fields.items()
            if name.startswith(_SETTINGS) and name not in _NO_SETTINGS and value not in (None, {}, [])
        },
        environment=trained[0].environment if trained else None,
        # The card goes further than the paths of this machine do.
        commands={verb: line.replace(f"{config.run.dir}/", "RUN/") for verb, line in commands.items()},
        results=results,
    )


def _count_splits(shards: ShardSet) -> list[SplitFacts]:
    found = []
    for name in dict.fromkeys(name for manifest in shards.manifests for name in manifest.splits):
        counts = shards.count_labels(name)
        total = sum(counts.values())
        found.append(SplitFacts(name, total, total - counts[UNKNOWN], shards.count_groups(name)))
    return found


def _find_teacher(config: Config, ref: TeacherRef) -> TeacherFacts:
    """What the store, and the teacher's folder where it is still there, say of a teacher."""
    source = encoder = None
    learnt: Sequence[str] | None = None
    folder = as_location(config.latents.dir)
    with contextlib.suppress(DataError, OSError):
        layer = StoreDocument.read(folder / "store.json").teachers.get(ref.name)
        if layer is not None and layer.recipe.weights_sha256 == ref.weights_sha256:
            source, encoder = layer.recipe.source, name_encoder(str(layer.recipe.encoder.get("name")))
            learnt = () if source != "trained" else None
            trained_in = SourcesDocument.read(folder / "sources.json").teachers[ref.name]
            if source == "trained":
                described = TeacherConfig.read_folder(trained_in)
                learnt = described.learns if described.weights_sha256 == ref.weights_sha256 else None
    return TeacherFacts(ref, source, encoder, learnt)


def make_tag(name: str) -> str | None:
    """A target's name as a tag of the hub; None for one that is no word."""
    tag = name.lower().replace(" ", "-")
    return tag if re.fullmatch("[a-z0-9][a-z0-9-]{0,40}", tag) else None
