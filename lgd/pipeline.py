"""The stages in order: the data-flow diagram of a run.

    synth -> shards -> teacher -> latents -> index -> student -> report

Each stage takes the run's `Config`, reuses what is still valid and says so on standard error.
"""

import contextlib
import dataclasses
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lgd.config import Config
from lgd.data.overlap import refuse_overlaps
from lgd.data.shards import Shard, ShardOptions, build, open_shards
from lgd.data.synth import SynthOptions, synthesise
from lgd.distribute import disconnect
from lgd.errors import ConfigError, DataError
from lgd.files import is_remote, list_folder, place, read_bytes, upload_folder
from lgd.locks import exclusive
from lgd.models.description import ModelConfig
from lgd.options import Given
from lgd.run_document import Ablated, Cached, Environment, Evaluated, Indexed, Trained
from lgd.run_folder import command, note_changes, record
from lgd.text import escape_text

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stage(name: str) -> Iterator[dict[str, str]]:
    """Log how a stage ended (`told["done"]`) and how long it took."""
    told = {"done": "done"}
    began = time.monotonic()
    yield told
    logger.info("[%s] %s  (%.1f s)", name, told["done"], time.monotonic() - began)


def begin(name: str, verb: str, config: Config) -> None:
    """Log on which fields this stage and earlier ones of its run disagree; refuse a run that cannot be recorded."""
    if note := note_changes(config, verb):
        logger.warning("[%s] %s", name, note)


def all_shards(config: Config) -> list[Shard]:
    """The shards of a run, over all its folders."""
    return [shard for folder in config.shard_dirs for shard in open_shards(folder)[1]]


def train_teacher(config: Config, given: Given | None = None, overwrite: bool | None = None) -> None:
    """Train the IHC encoder, or reuse the one of the same shards and settings (`overwrite`: see `train_under`)."""
    from lgd.models.export import read_teacher_config
    from lgd.train.launch import train_under

    begin("teacher", "train-teacher", config)
    with stage("teacher") as told:
        folder, trained = config.teacher.dir, train_under(config, "teacher", overwrite)
        told["done"] = f"trained: {folder}" if trained else f"reused, nothing changed: {folder}"
    record(config, "train-teacher", _facts(read_teacher_config(folder)), folder, given)


def cache_latents(config: Config, given: Given | None = None, prune: bool = False) -> None:
    """Fill the feature store: every part that is missing; `prune` removes those of other shards."""
    from lgd.store.cache import cache_latents as fill

    begin("latents", "cache-latents", config)
    with stage("latents") as told:
        refuse_overlaps(config.shard_dirs)
        store, computed, pruned = fill(config, all_shards(config), config.train.workers, prune)
        did = [f"{computed} of {len(store.parts)} parts computed"] if computed else []
        did += [f"{pruned} parts of other shards removed"] if pruned else []
        told["done"] = f"{', '.join(did) or 'reused, nothing changed'}, {store.rows} rows: {store.folder}"
    record(config, "cache-latents", Cached(digest=store.digest, rows=store.rows), config.latents.dir, given)


def build_index(config: Config, given: Given | None = None) -> None:
    """Build the FAISS index of the store."""
    from lgd.store import index
    from lgd.store.latents import Store

    begin("index", "build-index", config)
    with stage("index") as told:
        store, latents = Store(config.latents.dir), config.latents
        made, new = index.build_index(
            store,
            all_shards(config),
            latents.index,
            latents.gallery,
            latents.recall,
            config.run.seed,
            config.train.workers,
        )
        told["done"] = (
            f"{'built' if new else 'reused, nothing changed'}: {made.factory} over {made.rows} latents, "
            f"recall@10 {made.recall_at_10:.3f}: {made.why}"
        )
    facts = Indexed(factory=made.factory, rows=made.rows, recall_at_10=made.recall_at_10, digest=made.digest)
    record(config, "build-index", facts, config.latents.dir, given)


def train_student(config: Config, given: Given | None = None, overwrite: bool | None = None) -> None:
    """Train the student, or reuse the one of the same shards, teacher, store and settings.

    `overwrite`: see `train_under`.
    """
    from lgd.models.export import read_student_config
    from lgd.train.launch import train_under

    begin(config.student.method, "train", config)
    with stage(config.student.method) as told:
        folder, trained = config.student.dir, train_under(config, "student", overwrite)
        told["done"] = f"trained: {folder}" if trained else f"reused, nothing changed: {folder}"
    record(config, "train", _facts(read_student_config(folder)), folder, given)


def _facts(made: ModelConfig) -> Trained:
    return Trained(**{name: getattr(made, name) for name in Trained.model_fields})


def evaluate(config: Config, given: Given | None = None) -> str:
    """Score student, rivals and teacher on the held-out split and write the report; returns its table."""
    import numpy as np

    from lgd.evaluate import compare, report, robustness
    from lgd.evaluate.caveats import ONE_TRAINING, UNTAUGHT, caveats_of
    from lgd.evaluate.colour import colour_only
    from lgd.evaluate.predict import load_scorer, score_shards
    from lgd.store.latents import Store

    begin("report", "evaluate", config)
    # Locked before the scoring, which can take hours.
    with stage("report") as told, exclusive(config.report.dir, "evaluating"):
        refuse_overlaps(config.shard_dirs)
        shards = [shard for shard in all_shards(config) if shard.split == config.report.split]
        if not shards:
            splits = sorted({shard.split for shard in all_shards(config)})
            raise DataError(f"report.split {config.report.split!r} has no patches; the shards have {', '.join(splits)}")
        scorers = [load_scorer(folder) for folder in (config.student.dir, *config.report.also)]
        # Asked before the scoring, which can take hours.
        store = Store(config.latents.dir) if scorers[0].method == "lgd" else None
        sheet = store is not None and config.report.queries > 0 and _searchable(store)
        scorers.append(load_scorer(config.teacher.dir, "teacher"))
        found = [
            score_shards(one, shards, threads=config.data.threads, vectors=compare.vectors_of(one)) for one in scorers
        ]
        scored = [predictions for predictions, _ in found]
        scorer, first = scorers[0], [ONE_TRAINING]
        if not scorer.config.training.labelled:
            # Its levels are none, so there is nothing to compare either.
            scored = [dataclasses.replace(one, level=np.full_like(one.level, -1)) for one in scored]
            first = [UNTAUGHT]
        student = scored[0]
        measured, queries, shifted = None, [], None
        if store is not None:
            measured = compare.measure_run(config, store, all_shards(config), scorers, found)
            queries = compare.sheet_rows(config, store, shards, found[0]) if sheet else []
        if config.report.robustness:
            shifted = robustness.measure(config, scorers, scored, shards)
        if colour := colour_only(all_shards(config), config.report.split, config.data.threads):
            scored.insert(-1, colour)
        manifests = [open_shards(folder)[0] for folder in config.shard_dirs]
        document = report.write_report(
            place(config.report.dir),
            scored,
            measured,
            queries,
            [*first, *caveats_of(manifests, student, any(manifest.virtual for manifest in manifests))],
            {
                "command": command(config, "evaluate"),
                "split": config.report.split,
                "shards": [manifest.digest for manifest in manifests],
                "student": scorer.config.weights_sha256,
                "seed": config.run.seed,
                **Environment.here().as_json(),
            },
            config.report.bootstrap,
            config.run.seed,
            shifted,
        )
        _show(config)
        told["done"] = f"written: {config.report.dir}"
    headline = {model["name"]: model["by_patch"]["metrics"] for model in document["models"]}
    facts = Evaluated.from_json({"split": config.report.split, "by_patch": headline})
    record(config, "evaluate", facts, config.report.dir, given)
    return report.table(scored, config.report.bootstrap, config.run.seed)


def _show(config: Config) -> None:
    """Put the report's pictures, retrievals among them, beside the student's curves in TensorBoard."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    report, student = place(config.report.dir), place(config.student.dir)
    with tempfile.TemporaryDirectory(prefix="lgd-") as there:
        folder = Path(there) if is_remote(student) else student / "tensorboard"
        with SummaryWriter(folder) as board:
            for name in sorted(name for name in list_folder(report) if name.endswith(".png")):
                image = np.asarray(Image.open(io.BytesIO(read_bytes(report / name))).convert("RGB"))
                board.add_image(f"report/{escape_text(name.removesuffix('.png'))}", image, dataformats="HWC")
        if is_remote(student):
            upload_folder(folder, student / "tensorboard")


def _searchable(store: Any) -> bool:
    """Whether the index of a store can be searched: without FAISS it cannot, which is told; without an index it raises
    `DataError`.
    """
    from lgd.store.search import faiss_problem, read_document

    problem = faiss_problem()
    if problem:
        logger.warning("[report] the contact sheet is left out: %s", problem)
        return False
    read_document(store)
    return True


def ablate(config: Config, options: Any, given: Given | None = None) -> str:
    """The table of LGD-Net, its controls and its parts (`lgd.ablate`), after the teacher and the store."""
    from lgd import ablate as harness

    try:
        train_teacher(config, given)
        cache_latents(config, given)
        with stage("ablate") as told, exclusive(place(config.run.dir) / "ablation", "comparing methods"):
            table = harness.ablate(config, options)
            told["done"] = f"written: {config.run.dir}/ablation/ablation.md"
        facts = Ablated(seeds=options.seeds, full=options.full, split=config.report.split)
        record(config, "ablate", facts, f"{config.run.dir}/ablation", given)
    finally:
        disconnect()
    return table


def run(config: Config, given: Given | None = None) -> str:
    """Every stage from the teacher on, and the baseline in the same harness; returns the report's table."""
    from lgd.store.search import require_faiss

    # Before the hours of the stages that come before the index.
    require_faiss()
    baseline = f"{config.run.dir}/he-only"
    also = [*config.report.also, *([] if baseline in config.report.also else [baseline])]
    config = dataclasses.replace(config, report=dataclasses.replace(config.report, also=also))
    try:
        train_teacher(config, given)
        cache_latents(config, given)
        build_index(config, given)
        train_student(config, given)
        he_only = dataclasses.replace(config.student, method="he-only", dir=baseline)
        train_student(dataclasses.replace(config, student=he_only), given)
    finally:
        disconnect()
    return evaluate(config, given)


def tissue_dir(config: Config) -> Path:
    """Where the demo draws its virtual tissue."""
    return Path(config.run.dir) / "tissue"


def demo(config: Config, pairs: int, size: int, given: Given | None = None) -> str:
    """Virtual tissue, shards, and then `run`; returns the report's table."""
    from lgd.store.search import require_faiss

    require_faiss()
    if is_remote(config.run.dir):
        raise ConfigError(f"--run.dir {config.run.dir}: the demo draws its tissue there: name a local folder")
    if len(config.shard_dirs) > 1:
        raise ConfigError(f"--data.shards names {len(config.shard_dirs)} folders, and the demo builds one: name one")
    tissue, (shards,) = tissue_dir(config), config.shard_dirs
    with stage("synth") as told:
        # Many slides of few patches: what is learnt must hold on other slides, and intervals are over slides.
        slides, seed = max(8, pairs // 4), config.run.seed
        made = synthesise(SynthOptions(out=str(tissue), pairs=pairs, size=size, slides=slides, coupling=0.9, seed=seed))
        told["done"] = f"{'reused, nothing changed' if made.get('reused') else f'{pairs} pairs drawn'}: {tissue}"
    with stage("shards") as told:
        _, built = build(
            ShardOptions(
                layout="bci",
                root=str(tissue),
                out=str(shards),
                slides=str(tissue / "truth.csv"),
                split="group:0.6,0.1,0.3",
                shard_size=64,
                mpp=0.46,
            )
        )
        told["done"] = f"{'built' if built else 'reused, nothing changed'}: {shards}"
    return run(config, given)
