"""What lies in a folder or at a url: what its documents say (`lgd info`), and all that is wrong (`lgd verify`)."""

import contextlib
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Literal, cast

from pydantic import JsonValue

from lgd.base.errors import ConfigError, DataError
from lgd.config_files import find_in_run, is_run, load_config
from lgd.io.documents import MissingDocument
from lgd.io.files import exists, peek_kind
from lgd.io.location import Location, as_location
from lgd.models.description import ModelConfig, StudentConfig, TeacherConfig, read_kind
from lgd.retrieval import search
from lgd.retrieval.index_files import IndexDocument
from lgd.runs.folder import RunDocument, Stage, read_stages
from lgd.shards.manifest import Manifest, Shape
from lgd.shards.verify import verify
from lgd.store import probe
from lgd.store.document import StoreDocument, TeacherRecipe
from lgd.store.store import Store

Kind = Literal["shard folder", "feature store", "checkpoint", "teacher", "student", "run"]

_DOCUMENTS: dict[str, Kind] = {
    "store.json": "feature store",
    "manifest.json": "shard folder",
    "state.json": "checkpoint",
}
_STAGE_FACTS = ("steps", "engine", "workers", "rows", "factory", "recall_at_10", "split", "seeds")


def find_kind(folder: Location) -> Kind:
    """What lies in a folder or at a url, by the document that each kind has.

    Raises `DataError` for a folder of something else, and for what is no folder.
    """
    for name, kind in _DOCUMENTS.items():
        if exists(folder / name):
            return kind
    if is_run(folder):
        return "run"
    if exists(folder / "config.json"):
        return "teacher" if read_kind(folder / "config.json") is TeacherConfig else "student"
    if (lies := peek_kind(folder, "folder")) != "folder":
        raise DataError(f"{folder} is a file: name the folder that it lies in" if lies else f"{folder} does not exist")
    raise DataError(
        f"{folder} is no shard folder (manifest.json), no feature store (store.json), no checkpoint (state.json), no "
        "trained network (config.json) and no run (run.json)"
    )


def check(
    folder: Location, reencode: int = 0, teacher: str = "", code: Collection[str] = ()
) -> tuple[Kind, list[str], list[str]]:
    """What lies in `folder`, its every problem, and what else to say.

    `reencode`: rows of a store (or of a run's) whose teacher and targets are run again; `teacher`: where it is, if not
    where it was; `code`: what networks may run of code outside LGD. Raises `DataError` for a folder of something else,
    and `ConfigError` for `reencode` of anything but a store or a run.
    """
    kind = find_kind(folder)
    if reencode and kind not in ("feature store", "run"):
        raise ConfigError(f"--reencode is for feature stores, and {folder} is a {kind}")
    if kind == "feature store":
        return kind, *_check_store(folder, reencode, teacher, code)
    if kind == "run":
        return kind, *_check_run(folder, reencode, teacher, code)
    if kind == "shard folder":
        return kind, verify(folder), []
    if kind == "checkpoint":
        from lgd.train.checkpoint import problems

        return kind, problems(folder), []
    return kind, _check_network(folder, kind, code), []


def _check_store(folder: Location, reencode: int, teacher: str, code: Collection[str]) -> tuple[list[str], list[str]]:
    document, notes = StoreDocument.read(folder / "store.json"), list[str]()
    stores = [Store(folder, teachers=(name,)) for name in document.teachers]
    problems = stores[0].verify()
    for store in stores:
        problems += probe.find_problems(store)
        if exists(search.index_folder(store) / "index.json"):
            problems += search.problems(store)
    if problems or not reencode:
        return problems, []
    from lgd.store.supervision import reencode as run_again

    # A folder that is named is that of one teacher.
    named = TeacherConfig.read_folder(teacher).weights_sha256 if teacher and len(stores) > 1 else ""
    for store in stores:
        own = teacher if named in ("", store.recipe.teacher.weights_sha256) else ""
        found, more = run_again(store, reencode, own, code=code)
        problems, notes = problems + found, notes + more
    return problems, notes


def _check_network(folder: Location, kind: Kind, code: Collection[str]) -> list[str]:
    """Problems of a teacher or a student, which is built and given its weights, and of its checkpoints."""
    from lgd.models.loading import load_student
    from lgd.models.teacher import load_teacher
    from lgd.train import checkpoint

    load: Callable[[Location, Collection[str]], object] = load_teacher if kind == "teacher" else load_student
    problems = []
    try:
        load(folder, code)
    except DataError as error:
        problems.append(str(error))
    for path in checkpoint.complete(folder / "checkpoints"):
        problems += checkpoint.problems(path)
    return problems


def _check_run(folder: Location, reencode: int, teacher: str, code: Collection[str]) -> tuple[list[str], list[str]]:
    """Problems of everything that a run's stages made, and of what they were made of."""
    problems, notes = [], []
    config = load_config(folder / "config.yaml")
    stages = RunDocument.read(folder / "run.json").stages
    made = [
        stage.folder
        for name in ("train-teacher", "cache-latents", "import-latents", "train")
        for stage in stages.get(name, ())
    ]
    for path in map(as_location, dict.fromkeys([*config.shard_dirs, *made])):
        try:
            kind, found, more = check(path, reencode if exists(path / "store.json") else 0, teacher, code)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += found
        notes += [*more, f"{kind} {path}: {f'{len(found)} problem(s)' if found else 'no problems'}"]
    return problems, notes


def describe(folder: Location) -> dict[str, JsonValue]:
    """What lies in a folder or at a url, by what its documents say: kind, folder, and some facts.

    Whether that is so is for `lgd verify`. Raises `DataError` for a folder of something else, and for a document that
    is damaged or of another version.
    """
    kind = find_kind(folder)
    return {"kind": kind, "folder": str(folder), **_DESCRIBE[kind](folder)}


def as_lines(description: dict[str, JsonValue]) -> list[str]:
    """A description for a person, a line a fact."""
    kind, folder, *facts = description
    rows = {str(description[kind]): str(description[folder])}
    rows |= {name.replace("_", " "): _as_text(description[name]) for name in facts if name != "format"}
    return [f"{name:{max(map(len, rows))}}  {text}" for name, text in rows.items()]


def _describe_shards(folder: Location) -> dict[str, JsonValue]:
    manifest = Manifest.read(folder / "manifest.json")
    labels, images, side = Counter[str](), manifest.extensions, manifest.options.he_size
    small, unit = f" (and at {side} x {side} px)" if side else "", "pairs" if images.ihc else "H&E patches"
    for split in manifest.splits.values():
        labels.update(split.labels)
    return {
        "format": manifest.FORMAT,
        "target": manifest.target.name,
        "patches": {name: split.samples for name, split in manifest.splits.items()},
        "labels": dict(labels),
        "sizes": _describe_shapes([shape for split in manifest.splits.values() for shape in split.shapes]),
        "images": f"H&E {images.he}{small}, {f'IHC {images.ihc}' if images.ihc else 'no IHC'}",
        "source": f"{manifest.layout}, {manifest.sources.pairs} {unit}, {manifest.sources.rejected} left out",
        "tissue": "virtual" if manifest.virtual else "not drawn by lgd synth",
        "digest": manifest.digest,
    }


def _describe_store(folder: Location) -> dict[str, JsonValue]:
    store = StoreDocument.read(folder / "store.json")
    patches = Counter[str]()
    for entry in store.entries:
        patches[entry.split] += entry.rows
    facts: dict[str, JsonValue] = {"format": store.FORMAT, "patches": dict(patches), "parts": len(store.entries)}
    for name, layer in store.teachers.items():
        recipe, dim = layer.recipe, layer.datasets["pooled"].shape[-1]
        grid = f"a map of {recipe.map} x {recipe.map}, " if recipe.map else ""
        facts[f"latents_of_{name}"] = f"{dim} numbers, {grid}views: {recipe.views}, {recipe.dtype}"
        if recipe.source == "imported":
            facts[f"source_of_{name}"] = _describe_import(recipe)
        try:
            index = IndexDocument.read(folder / "index" / name / "index.json")
            of = f", bias {index.bias.sharpness:g} of student {index.bias.student[:12]}" if index.bias else ""
            facts[f"index_of_{name}"] = (
                f"{index.factory} over {index.rows} latents, recall@10 {index.recall_at_10:.3f}{of}"
            )
        except MissingDocument:
            facts[f"index_of_{name}"] = "none yet: run lgd build-index"
        with contextlib.suppress(MissingDocument):
            facts[f"probe_of_{name}"] = probe.ProbeDocument.read(folder / "probe" / f"{name}.json").describe()
    return facts | {"digest": store.digest}


def _describe_import(recipe: TeacherRecipe) -> str:
    """What is known of imported latents, and what is not."""
    stated = recipe.encoder
    tool = " ".join(str(one) for one in (stated.get("tool"), stated.get("version")) if one)
    unknown = ["weights", *(name for name in ("pool", "size", "precision") if getattr(recipe, name) is None)]
    terms = stated.get("licence") or "not known"
    return f"{stated.get('name')}, {stated.get('files')} files of {tool}; unknown: {', '.join(unknown)}; terms: {terms}"


def _describe_network(folder: Location) -> dict[str, JsonValue]:
    config = read_kind(folder / "config.json").read(folder / "config.json")
    training, sizes = config.training, _describe_shapes(config.training.shapes)
    facts: dict[str, JsonValue] = {"format": config.FORMAT}
    teachers = config.teachers if isinstance(config, StudentConfig) else ()
    terms = [f"of the teacher {one.name}: {one.licence}" for one in teachers if one.licence]
    if isinstance(config, StudentConfig):
        names = " and ".join(one.name for one in config.teachers)
        facts["method"] = f"{config.method}, taught by the latents of {names}" if names else config.method
    else:
        facts["learnt"] = ", ".join(cast(TeacherConfig, config).learns) or None
    encoder = config.morphology if isinstance(config, StudentConfig) else cast(TeacherConfig, config).encoder
    return facts | {
        "encoder": f"{encoder.name}, images of {config.size} px",
        "target": training.target.name if training.labelled else f"none: no {training.target.name} label taught it",
        "trained_on": f"{sum(training.labels.values())} patches ({training.labelled} labelled) of {sizes}",
        "tissue": "virtual" if training.virtual else "not drawn by lgd synth",
        "training": _describe_training(config),
        "validation": dict(config.validation),
        "licence": "; ".join([*([config.licence] if config.licence else []), *terms]) or None,
        "weights_sha256": config.weights_sha256,
    }


def _describe_training(config: ModelConfig) -> str:
    if isinstance(config, TeacherConfig) and config.source == "frozen":
        return f"none: a pretrained encoder as it is, pooled by {config.pool}"
    return f"{config.steps} steps, {config.epochs:g} epochs, {config.engine}, workers: {config.workers}"


def _describe_checkpoint(folder: Location) -> dict[str, JsonValue]:
    from lgd.train.checkpoint import State

    state = State.read(folder / "state.json")
    return {"format": state.FORMAT, **state.model_dump(mode="json", include={"step", "position", "skipped", "best"})}


def _describe_run(folder: Location) -> dict[str, JsonValue]:
    """A line a stage that ended, and how to go on."""
    stages = read_stages(folder)
    facts: dict[str, JsonValue] = {name: "; ".join(map(_describe_stage, entries)) for name, entries in stages.items()}
    for last in [entry.environment for entries in stages.values() for entry in entries][-1:]:
        facts["made_by"] = f"lgd {last.lgd}, torch {last.torch}, on {last.device} of {last.host}"
    with contextlib.suppress(DataError):
        student = StudentConfig.read_folder(find_in_run(folder, "student"))
        verb = "predict" if student.training.labelled else "query"
        facts["try_next"] = f"lgd {verb} --model {shlex.quote(str(folder))} IMAGE"
    return facts or {"stages": None}


def _describe_stage(stage: Stage) -> str:
    stated: dict[str, JsonValue] = stage.facts.as_json()
    facts = [f"{name} {stated[name]}" for name in _STAGE_FACTS if name in stated]
    return f"{stage.folder} ({', '.join(facts)})"


def _describe_shapes(shapes: Sequence[Shape]) -> str:
    """The commonest size and scale, and whether there are others."""
    counts = Counter[str]()
    for one in shapes:
        counts[f"{one.width} x {one.height} px, {f'{one.mpp:g} um/px' if one.mpp else 'scale unknown'}"] += one.samples
    name = max(counts, key=lambda name: counts[name], default="unknown size")
    return f"{name}, and {len(counts) - 1} more" if len(counts) > 1 else name


def _as_text(fact: JsonValue) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_as_text(value)}" for name, value in fact.items()) or "none"
    return "none" if fact in (None, []) else f"{fact:.3f}" if isinstance(fact, float) else str(fact)


_DESCRIBE: dict[Kind, Callable[[Location], dict[str, JsonValue]]] = {
    "shard folder": _describe_shards,
    "feature store": _describe_store,
    "teacher": _describe_network,
    "student": _describe_network,
    "checkpoint": _describe_checkpoint,
    "run": _describe_run,
}
