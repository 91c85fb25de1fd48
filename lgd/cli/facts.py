"""What the documents of a folder or a url say, in a few lines (`lgd info`)."""

import contextlib
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from pydantic import JsonValue

from lgd.base.errors import DataError
from lgd.base.target import Target
from lgd.cli.contents import Kind, find_kind
from lgd.config_files import find_in_run
from lgd.io.documents import MissingDocument
from lgd.io.location import Location
from lgd.models.description import ModelConfig, StudentConfig, TeacherConfig, read_kind
from lgd.retrieval.index_files import IndexDocument
from lgd.runs.folder import Stage, read_stages
from lgd.shards.manifest import Manifest, Shape, Values
from lgd.store import probe
from lgd.store.document import StoreDocument, TeacherRecipe

_STAGE_FACTS = ("steps", "engine", "workers", "rows", "factory", "recall_at_10", "split", "seeds")


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
    known = {name: split.values for name, split in manifest.splits.items() if split.values}
    values: dict[str, JsonValue] = {name: _describe_values(manifest.target, one) for name, one in known.items()}
    return {
        "format": manifest.FORMAT,
        "target": _describe_target(manifest.target),
        "patches": {name: split.samples for name, split in manifest.splits.items()},
        "labels": dict(labels),
        **({"values": values} if values else {}),
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
    facts: dict[str, JsonValue] = {"format": store.FORMAT, "target": _describe_target(store.target)}
    facts |= {"patches": dict(patches), "parts": len(store.entries)}
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


def _describe_target(target: Target) -> str:
    if target.is_number:
        return f"{target.name}: {target.describe_labels()}{f', in {target.unit}' if target.unit else ''}"
    return f"{target.name} ({target.kind}: {target.describe_labels()})"


def _describe_values(target: Target, values: Values) -> str:
    mean, least, most = map(target.format_label, (values.mean, values.least, values.most))
    return f"mean {mean}, {least} to {most}"


def _describe_import(recipe: TeacherRecipe) -> str:
    """What is known of imported latents, and what is not."""
    stated = recipe.encoder
    tool = " ".join(str(one) for one in (stated.get("tool"), stated.get("version")) if one)
    unknown = ["weights", *(name for name in ("pool", "size", "precision") if getattr(recipe, name) is None)]
    terms = stated.get("licence") or "not known"
    return f"{stated.get('name')}, {stated.get('files')} files of {tool}; unknown: {', '.join(unknown)}; terms: {terms}"


def _describe_network(folder: Location) -> dict[str, JsonValue]:
    config = read_kind(folder / "config.json").read(folder / "config.json")
    training, target, sizes = config.training, config.training.target, _describe_shapes(config.training.shapes)
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
        "target": _describe_target(target) if training.labelled else f"none: no {target.name} label taught it",
        **({"values": _describe_values(target, training.values)} if training.values else {}),
        "trained_on": f"{sum(training.labels.values())} patches ({training.labelled} labelled) of {sizes}",
        "tissue": "virtual" if training.virtual else "not drawn by lgd synth",
        "training": _describe_training(config),
        "validation": dict(config.validation),
        "licence": "; ".join([*([config.licence] if config.licence else []), *terms]) or None,
        "weights_sha256": config.weights_sha256,
    }


def _describe_training(config: ModelConfig) -> str:
    if isinstance(config, TeacherConfig) and config.source != "trained":
        what = "a pretrained encoder as it is" if config.source == "frozen" else "random weights, a control"
        return f"none: {what}, pooled by {config.pool}"
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
