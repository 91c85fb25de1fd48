"""What a run, shard folder, feature store, network or checkpoint is, in ten lines: `lgd info`."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from lgd.check import find_in_run, find_kind
from lgd.data.manifest import Manifest, Shape, Target
from lgd.errors import DataError
from lgd.models.description import ModelConfig, StudentConfig, TeacherConfig
from lgd.records import MissingDocument
from lgd.run_document import RunDocument, Stage
from lgd.store.document import StoreDocument

_METRICS = ("kappa", "macro_f1", "accuracy")
_STAGE_FACTS = ("steps", "engine", "workers", "rows", "factory", "recall_at_10", "split", "seeds")


def describe(folder: Path) -> dict[str, JsonValue]:
    """What lies in a folder or at a url, by what its documents say: kind, folder, and some facts.

    Whether that is so is for `lgd verify`. Raises `DataError` for a folder of something else, and for a document that
    is damaged or of another version.
    """
    kind = find_kind(folder)
    if kind == "shard folder":
        facts = _describe_shards(Manifest.read(folder / "manifest.json"))
    elif kind == "feature store":
        facts = _describe_store(folder, StoreDocument.read(folder / "store.json"))
    elif kind == "checkpoint":
        facts = _describe_checkpoint(folder)
    elif kind == "run":
        facts = _describe_run(folder)
    else:
        config = TeacherConfig if kind == "teacher" else StudentConfig
        facts = _describe_network(config.read(folder / "config.json"))
    return {"kind": kind, "folder": str(folder), **facts}


def as_lines(description: dict[str, JsonValue]) -> list[str]:
    """A description for a person, a line a fact."""
    kind, folder, *facts = description
    rows = {str(description[kind]): str(description[folder])}
    rows |= {name.replace("_", " "): _as_text(description[name]) for name in facts if name != "format"}
    width = max(map(len, rows))
    return [f"{name:{width}}  {text}" for name, text in rows.items()]


def _describe_shards(manifest: Manifest) -> dict[str, JsonValue]:
    labels, images = Counter[str](), manifest.extensions
    for split in manifest.splits.values():
        labels.update(split.labels)
    return {
        "format": manifest.FORMAT,
        "target": _describe_target(manifest.target),
        "patches": {name: split.samples for name, split in manifest.splits.items()},
        "labels": dict(labels),
        "sizes": _describe_shapes([shape for split in manifest.splits.values() for shape in split.shapes]),
        "images": f"H&E {images.he}, {f'IHC {images.ihc}' if images.ihc else 'no IHC'}",
        "source": f"{manifest.layout}, {manifest.sources.pairs} pairs, {manifest.sources.rejected} left out",
        "virtual": manifest.virtual,
        "digest": manifest.digest,
    }


def _describe_store(folder: Path, store: StoreDocument) -> dict[str, JsonValue]:
    from lgd.store.search import IndexDocument

    patches, facts = Counter[str](), dict[str, JsonValue]()
    for entry in store.entries:
        patches[entry.split] += entry.rows
    for name, layer in store.teachers.items():
        recipe, dim = layer.recipe, layer.datasets["pooled"].shape[-1]
        grid = f"a map of {recipe.map} x {recipe.map}, " if recipe.map else ""
        facts[f"latents_of_{name}"] = f"{dim} numbers, {grid}views: {recipe.views}, {recipe.dtype}"
        try:
            index = IndexDocument.read(folder / "index" / name / "index.json")
            facts[f"index_of_{name}"] = f"{index.factory} over {index.rows} latents, recall@10 {index.recall_at_10:.3f}"
        except MissingDocument:
            facts[f"index_of_{name}"] = "none yet: run lgd build-index"
    grids = {"nuclei_grid": store.patches.recipe.nuclei_grid, "membrane_grid": store.patches.recipe.membrane_grid}
    parts = len(store.entries)
    return {"format": store.FORMAT, "patches": dict(patches), "parts": parts, **facts, **grids, "digest": store.digest}


def _describe_network(config: ModelConfig) -> dict[str, JsonValue]:
    training, facts = config.training, dict[str, JsonValue](format=config.FORMAT)
    if isinstance(config, StudentConfig):
        taught = ", ".join(teacher.name for teacher in config.teachers)
        facts["method"] = f"{config.method}, taught by the latents of {taught}" if taught else config.method
    sizes = _describe_shapes(training.shapes)
    encoder = config.morphology if isinstance(config, StudentConfig) else config.encoder  # type: ignore[attr-defined]
    return facts | {
        "encoder": f"{encoder.name}, images of {config.size} px",
        "target": _describe_target(training.target),
        "trained_on": f"{sum(training.labels.values())} patches ({training.labelled} labelled) of {sizes}",
        "virtual": training.virtual,
        "training": f"{config.steps} steps, {config.epochs:g} epochs, {config.engine}, workers: {config.workers}",
        "validation": {name: config.validation[name] for name in _METRICS if name in config.validation},
        "licence": config.licence,
        "weights_sha256": config.weights_sha256,
    }


def _describe_checkpoint(folder: Path) -> dict[str, JsonValue]:
    from lgd.train.checkpoint import State

    state = State.read(folder / "state.json")
    return {
        "format": state.FORMAT,
        "step": state.step,
        "samples_taken": state.position,
        "skipped": len(state.skipped),
        "best_step": state.best.step or None,
        "best_score": state.best.score,
        "digest": state.digest,
    }


def _describe_run(folder: Path) -> dict[str, JsonValue]:
    """A line a stage that ended, and how to go on."""
    try:
        stages = RunDocument.read(folder / "run.json").stages
    except MissingDocument:
        return {"stages": None}
    facts: dict[str, JsonValue] = {name: "; ".join(map(_describe_stage, entries)) for name, entries in stages.items()}
    last = [entries[-1] for entries in stages.values()][-1].environment
    facts["made_by"] = f"lgd {last.lgd}, torch {last.torch}, on {last.device} of {last.host}"
    try:
        find_in_run(folder, "student")
    except DataError:
        return facts
    return facts | {"try_next": f"lgd predict --model {shlex.quote(str(folder))} IMAGE"}


def _describe_stage(stage: Stage) -> str:
    stated: dict[str, JsonValue] = stage.facts.as_json()
    shown = [f"{name} {stated[name]}" for name in _STAGE_FACTS if name in stated]
    return f"{stage.folder} ({', '.join(shown)})"


def _describe_target(target: Target) -> str:
    return f"{target.name} ({target.kind}) {', '.join(target.classes)}".rstrip()


def _describe_shapes(shapes: Sequence[Shape]) -> str:
    """The commonest size and scale, and how many others."""
    counts = Counter[str]()
    for one in shapes:
        scale = f"{one.mpp:g} um/px" if one.mpp else "scale unknown"
        counts[f"{one.width} x {one.height} px, {scale}"] += one.samples
    names = [name for name, _ in counts.most_common(1)]
    return "; ".join([*names, f"{len(counts) - 1} other sizes or scales"][: len(counts)]) or "unknown"


def _as_text(fact: JsonValue) -> str:
    """A fact on one line."""
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_as_text(value)}" for name, value in fact.items()) or "none"
    if isinstance(fact, bool) or fact is None:
        return {True: "yes", False: "no", None: "none"}[fact]
    return f"{fact:.3f}" if isinstance(fact, float) else str(fact)
