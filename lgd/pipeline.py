"""The stages in order: the data-flow diagram of a run.

    synth -> shards -> teacher -> latents -> index -> student -> report

Each stage takes the run's `Config`, reuses what is still valid and says so on standard error.
"""

import contextlib
import dataclasses
import io
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lgd
from lgd.config import Config
from lgd.data.overlap import refuse_overlaps
from lgd.data.shards import Shard, ShardOptions, build, open_shards
from lgd.data.synth import SynthOptions, synthesise
from lgd.distribute import disconnect
from lgd.doctor import version_of
from lgd.errors import ConfigError, DataError
from lgd.files import (
    exists,
    is_remote,
    list_folder,
    place,
    read_bytes,
    read_json,
    upload_folder,
    write_bytes,
    write_json,
)
from lgd.text import escape_text, print_lines


def say(stage: str, message: str) -> None:
    """One line of progress on standard error."""
    print_lines(f"[{stage}] {message}", file=sys.stderr)


@contextlib.contextmanager
def stage(name: str) -> Iterator[dict[str, str]]:
    """Tell how a stage ended (`told["done"]`) and how long it took."""
    told = {"done": "done"}
    began = time.monotonic()
    yield told
    say(name, f"{told['done']}  ({time.monotonic() - began:.1f} s)")


def record(config: Config, name: str, facts: dict[str, Any]) -> None:
    """Write `config.yaml`, and add what a stage did to `run.json`."""
    folder = place(config.run.dir)
    write_bytes(folder / "config.yaml", config.as_yaml().encode())
    path = folder / "run.json"
    document = read_json(path) if exists(path) else {}
    shards = {str(each): open_shards(each)[0].digest for each in config.shard_dirs}
    write_json(path, document | {"environment": environment(), "shards": shards, name: facts})


def environment() -> dict[str, Any]:
    """Versions, commit, host and device of this run."""
    import torch

    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(lgd.__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "lgd": lgd.__version__,
        "commit": commit,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "deepspeed", "ray", "webdataset", "h5py", "transformers")},
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def all_shards(config: Config) -> list[Shard]:
    """The shards of a run, over all its folders."""
    return [shard for folder in config.shard_dirs for shard in open_shards(folder)[1]]


def train_teacher(config: Config) -> None:
    """Train the IHC encoder, or reuse the one of the same shards and settings."""
    from lgd.train.launch import train_under

    with stage("teacher") as told:
        folder = config.teacher.dir
        told["done"] = f"trained: {folder}" if train_under(config, "teacher") else f"reused, nothing changed: {folder}"
    record(config, "teacher", _facts(place(folder)))


def cache_latents(config: Config, prune: bool = False) -> None:
    """Fill the feature store: every part that is missing; `prune` removes those of other shards."""
    from lgd.store.cache import cache_latents as fill

    with stage("latents") as told:
        refuse_overlaps(config.shard_dirs)
        store, computed, pruned = fill(config, all_shards(config), config.train.workers, prune)
        did = [f"{computed} of {len(store.parts)} parts computed"] if computed else []
        did += [f"{pruned} parts of other shards removed"] if pruned else []
        told["done"] = f"{', '.join(did) or 'reused, nothing changed'}, {store.rows} rows: {store.folder}"
    record(config, "latents", {"digest": store.digest, "rows": store.rows})


def build_index(config: Config) -> None:
    """Build the FAISS index of the store."""
    from lgd.store import index
    from lgd.store.latents import Store

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
    record(
        config,
        "index",
        {"factory": made.factory, "rows": made.rows, "recall_at_10": made.recall_at_10, "digest": made.digest},
    )


def train_student(config: Config, run: Config | None = None) -> None:
    """Train the student, or reuse the one of the same shards, teacher, store and settings.

    A baseline is trained as another student of the same `run`, which keeps its own `config.yaml`.
    """
    from lgd.train.launch import train_under

    with stage(config.student.method) as told:
        folder = config.student.dir
        told["done"] = f"trained: {folder}" if train_under(config, "student") else f"reused, nothing changed: {folder}"
    record(run or config, place(folder).name, _facts(place(folder)))


def _facts(folder: Path) -> dict[str, Any]:
    made = read_json(folder / "config.json")
    return {name: made[name] for name in ("weights_sha256", "inputs", "steps", "engine", "workers", "validation")}


def evaluate(config: Config) -> str:
    """Score student, rivals and teacher on the held-out split and write the report; returns its table."""
    import numpy as np

    from lgd.evaluate import compare, report, robustness
    from lgd.evaluate.caveats import ONE_TRAINING, UNTAUGHT, caveats_of
    from lgd.evaluate.colour import colour_only
    from lgd.evaluate.predict import load_scorer, score_shards
    from lgd.store.latents import Store

    with stage("report") as told:
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
            measured = compare.measure_run(config, store, all_shards(config), scorers, found, say)
            queries = compare.sheet_rows(config, store, shards, found[0]) if sheet else []
        if config.report.robustness:
            shifted = robustness.measure(config, scorers, scored, shards, say)
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
                "command": f"lgd evaluate --config {shlex.quote(f'{config.run.dir}/config.yaml')}",
                "split": config.report.split,
                "shards": [manifest.digest for manifest in manifests],
                "student": scorer.config.weights_sha256,
                "seed": config.run.seed,
                **environment(),
            },
            config.report.bootstrap,
            config.run.seed,
            shifted,
        )
        _show(config)
        told["done"] = f"written: {config.report.dir}"
    headline = {model["name"]: model["by_patch"]["metrics"] for model in document["models"]}
    record(config, "report", {"folder": config.report.dir, "split": config.report.split, "by_patch": headline})
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
        say("report", f"the contact sheet is left out: {problem}")
        return False
    read_document(store)
    return True


def ablate(config: Config, options: Any) -> str:
    """The table of LGD-Net, its controls and its parts (`lgd.ablate`), after the teacher and the store."""
    from lgd import ablate as harness

    try:
        train_teacher(config)
        cache_latents(config)
        with stage("ablate") as told:
            table = harness.ablate(config, options, say)
            told["done"] = f"written: {config.run.dir}/ablation/ablation.md"
    finally:
        disconnect()
    return table


def run(config: Config) -> str:
    """Every stage from the teacher on, and the baseline in the same harness; returns the report's table."""
    from lgd.store.search import require_faiss

    # Before the hours of the stages that come before the index.
    require_faiss()
    try:
        train_teacher(config)
        cache_latents(config)
        build_index(config)
        train_student(config)
        baseline = dataclasses.replace(
            config,
            student=dataclasses.replace(config.student, method="he-only", dir=f"{config.run.dir}/he-only"),
        )
        train_student(baseline, run=config)
    finally:
        disconnect()
    also = [*config.report.also, baseline.student.dir]
    return evaluate(dataclasses.replace(config, report=dataclasses.replace(config.report, also=also)))


def tissue_dir(config: Config) -> Path:
    """Where the demo draws its virtual tissue."""
    return Path(config.run.dir) / "tissue"


def demo(config: Config, pairs: int, size: int) -> str:
    """Virtual tissue, shards, and then `run`; returns the report's table."""
    from lgd.store.search import require_faiss

    require_faiss()
    if is_remote(config.run.dir):
        raise ConfigError(f"--run.dir {config.run.dir}: the demo draws its tissue there: name a local folder")
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
    return run(config)
