"""The folder of a run: what was asked for, and what came of it.

    RUN/config.yaml   the run as its first finished stage had it; never overwritten, so that `--config RUN/config.yaml`
                      means the same run for ever
    RUN/run.json      for each stage what it was given, in which fields it differs from config.yaml, where it ran, on
                      which shards, and what it made (`lgd-run/1`)

Stages may end at the same time: run.json is changed under a lock, for which others wait. A url has no locks, so there
two stages that end in the same second may leave the record of one.
"""

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue

from lgd.base.environment import Environment
from lgd.base.errors import ConfigError, DataError, Stopped
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.base.text import escape_text
from lgd.config import WHERE_IT_RUNS, Config
from lgd.config_files import Given, load_config
from lgd.io.documents import Document, MissingDocument
from lgd.io.files import exists, write_bytes
from lgd.io.location import Location, as_location
from lgd.io.locks import hold_lock
from lgd.metrics import Interval
from lgd.shards.shard_set import ShardSet

_CONFIG, _RUN = "config.yaml", "run.json"
_MOST, _LONGEST = 3, 300
"""Fields that a note names, and makers that an error does."""

_TRAINING = (
    *("run.seed", "data.shards", "data.size", "data.lanes", "data.on_bad", "data.augment"),
    *("data.stain_jitter", "data.light_jitter", "deepspeed", "train."),
)
_USED = {
    "train-teacher": (*_TRAINING, "teacher."),
    "cache-latents": ("data.shards", "data.size", "teacher.dir", "latents."),
    "import-latents": (
        "data.shards",
        "latents.dir",
        "latents.dtype",
        "latents.nuclei_grid",
        "latents.membrane_grid",
        "latents.staining",
    ),
    "build-index": (
        "run.seed",
        "latents.dir",
        "latents.index",
        "latents.gallery",
        "latents.recall",
        "latents.components",
        "latents.bias",
    ),
    "train": (*_TRAINING, "teacher.dir", "latents.dir", "student."),
}
"""What the fields begin with on which the result of a stage depends."""
_UNUSED = {*(f"train.{name}" for name in WHERE_IT_RUNS), "latents.batch"}
"""But not on these."""
_EARLIER = {
    "cache-latents": ("train-teacher",),
    "build-index": ("cache-latents", "import-latents"),
    "train": ("train-teacher", "cache-latents", "import-latents"),
    "evaluate": ("train-teacher", "cache-latents", "import-latents", "build-index", "train"),
}
_FOLDERS = {
    "train-teacher": "teacher.dir",
    "cache-latents": "latents.dir",
    "import-latents": "latents.dir",
    "build-index": "latents.dir",
    "train": "student.dir",
}
"""Stage -> the field that names what it makes."""


Number = Annotated[float, Field(allow_inf_nan=False)]


class Trained(Record):
    """What training a teacher or a student came to."""

    weights_sha256: Sha256
    inputs: Sha256
    steps: Count
    engine: Line
    workers: Count
    validation: dict[Line, Number]


class Cached(Record):
    """What filling the feature store came to."""

    digest: Sha256
    rows: Count


class Indexed(Record):
    """What building the index came to."""

    factory: Line
    rows: Count
    recall_at_10: Number
    digest: Sha256


class Evaluated(Record):
    """What an evaluation came to: metrics by the models' names."""

    split: Line
    by_patch: dict[Line, dict[Line, Interval]]


class Ablated(Record):
    """What `lgd ablate` was asked for."""

    seeds: Count
    full: bool
    split: Line


class Judged(Record):
    """What `lgd teachers` was asked for."""

    teachers: Many[Line]
    seeds: Count
    split: Line


Facts = Trained | Cached | Indexed | Evaluated | Ablated | Judged


class Stage(Record):
    """A stage that ended well."""

    folder: Line
    """What it made; a later stage of this name that makes the same takes this one's place."""
    verb: Line
    """The verb that was called; empty where Python called."""
    given: dict[Line, JsonValue]
    """Fields of the command line, and its `config` files."""
    differing: dict[Line, JsonValue]
    """Fields that are not as in config.yaml."""
    environment: Environment
    shards: dict[Line, Sha256]
    """Digests of the shard folders' manifests."""
    facts: Facts


class RunDocument(Document):
    """run.json: the stages by their names, of each name the newest last."""

    FORMAT: ClassVar = "lgd-run/1"
    ABSENT: ClassVar = "finish a stage of the run first"
    REMEDY: ClassVar = "move it elsewhere to keep what it says, and the next stage begins another"

    stages: dict[Line, Many[Stage]]


def record(config: Config, shards: ShardSet, stage: str, facts: Facts, folder: str, given: Given | None = None) -> None:
    """Write config.yaml if there is none, and add to run.json what a stage made in `folder`."""
    at, given, here = as_location(config.run.dir), given or Given(), Environment.here()
    with hold_lock(at / f".{_RUN}.lock", "recording a stage"):
        if not exists(at / _CONFIG):
            write_bytes(at / _CONFIG, config.as_yaml().encode())
        entry = Stage(
            folder=folder,
            verb=given.verb,
            given=dict(given.fields),
            differing=_differing(config),
            environment=here,
            shards=dict(zip(config.shard_dirs, shards.digests, strict=True)),
            facts=facts,
        )
        stages, fields = read_stages(at), _kept_fields(config)
        others = tuple(
            one for one in stages.get(stage, ()) if one.folder != folder or not _has_teacher(one, stage, fields, config)
        )
        RunDocument(stages=stages | {stage: (*others, entry)}).write(at / _RUN)


def read_stages(folder: str | Location) -> dict[str, tuple[Stage, ...]]:
    """The stages of a run that have ended, by their names; none where there is no run.json yet."""
    try:
        return RunDocument.read(as_location(folder) / _RUN).stages
    except MissingDocument:
        return {}


def find_training(config: Config, weights_sha256: str) -> tuple[Stage, dict[str, JsonValue]] | None:
    """The stage of this run that trained a student, and the fields as it had them; None of a student of another run."""
    for stage in reversed(read_stages(config.run.dir).get("train", ())):
        if isinstance(stage.facts, Trained) and stage.facts.weights_sha256 == weights_sha256:
            return stage, _kept_fields(config) | stage.differing
    return None


def _kept_fields(config: Config) -> dict[str, JsonValue]:
    """The fields of config.yaml, or of `config` where there is none yet."""
    path = as_location(config.run.dir) / _CONFIG
    if not exists(path):
        return config.as_fields()
    try:
        return load_config(str(path)).as_fields()
    except ConfigError as error:
        raise ConfigError(f"{error}; it is what this run's earlier stages had: correct it or move it away") from error


def _differing(config: Config) -> dict[str, JsonValue]:
    kept = _kept_fields(config)
    return {name: value for name, value in config.as_fields().items() if value != kept[name]}


def note_changes(config: Config, stage: str) -> str:
    """A note on the fields that earlier stages used with another value, or nothing.

    Raises `DataError` or `ConfigError` for a run.json or config.yaml that cannot be read: better now than after hours.
    """
    stages, kept, now = read_stages(config.run.dir), _kept_fields(config), config.as_fields()
    changes: dict[str, str] = {}
    for earlier in _EARLIER.get(stage, ()):
        folder = _FOLDERS[earlier]
        entries = [one for one in stages.get(earlier, ()) if _has_teacher(one, earlier, kept, config)]
        own = [entry for entry in entries if entry.folder == now[folder]]
        # Of what was made elsewhere only that is of interest.
        used = [name for name in now if name.startswith(_USED[earlier]) and name not in _UNUSED]
        names = used if own else [folder]
        for entry in (own or entries)[-1:]:
            before = kept | entry.differing
            for name in names:
                if now[name] != before[name]:
                    is_now, was = (escape_text(_as_text(fields[name]), _LONGEST) for fields in (now, before))
                    changes.setdefault(name, f"{name} is {is_now} and was {was} for {earlier}")
    if not changes:
        return ""
    shown = [*changes.values()][:_MOST] + ([f"and {len(changes) - _MOST} more"] if len(changes) > _MOST else [])
    return f"note: {', '.join(shown)}; run.json has each stage's values"


def _has_teacher(entry: Stage, stage: str, kept: dict[str, JsonValue], config: Config) -> bool:
    """Whether an entry is of the run's own teacher, where a store holds the latents of several."""
    before = kept | entry.differing
    return stage not in ("cache-latents", "import-latents") or before["teacher.name"] == config.teacher.name


@contextlib.contextmanager
def explain_overrides(config: Config | None) -> Iterator[None]:
    """Add to a `DataError` about a folder of the run which options made what lies there, or made it elsewhere."""
    try:
        yield
    except DataError as error:
        hints = list(_hints(config, str(error))) if config and not isinstance(error, Stopped) else []
        if not hints:
            raise
        *lines, last = map(str, error.args or (error,))
        raise type(error)(*lines, f"{last} ({'; '.join(hints)})") from error


def _hints(config: Config, message: str) -> Iterator[str]:
    try:
        stages = read_stages(config.run.dir)
    except DataError:
        return
    for stage, field in _FOLDERS.items():
        folder = str(config.as_fields()[field])
        if folder not in message:
            continue
        section = field.partition(".")[0]
        for entry in stages.get(stage, ())[-_MOST:]:
            typed = {name: value for name, value in entry.given.items() if name.startswith(f"{section}.")}
            command = f"`lgd {entry.verb or stage}{_as_options(typed)}` of this run"
            if entry.folder != folder:
                yield f"{command} made one in {entry.folder}: give --{field} {shlex.quote(entry.folder)}"
            elif typed:
                yield f"{command} made what it holds"


def command(config: Config, verb: str, only: Sequence[str] = ()) -> str:
    """The command line that gives a verb this very run, or of it the fields `only`."""
    differing = {name: value for name, value in _differing(config).items() if not only or name in only}
    path = str(as_location(config.run.dir) / _CONFIG)
    return f"lgd {verb} --config {shlex.quote(path)}{_as_options(differing)}"


def _as_options(fields: dict[str, JsonValue]) -> str:
    return "".join(f" --{name} {shlex.quote(_as_text(value))}" for name, value in fields.items())


def _as_text(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
