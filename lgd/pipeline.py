"""The stages in order: the data-flow diagram of a run.

    synth -> shards -> teacher -> latents -> index -> student -> report

Each stage takes the run's `Config`, reuses what is still valid and says so on standard error.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from lgd.base.environment import Environment
from lgd.base.errors import ConfigError, DataError
from lgd.base.target import DEFAULT_TARGET, find_target
from lgd.config import Config
from lgd.config_files import Given, locate_field
from lgd.io.location import as_location, require_local
from lgd.io.locks import exclusive
from lgd.models.methods import BASELINE, find_method
from lgd.ray_jobs.cluster import restore_connection
from lgd.report import card, evaluation, report
from lgd.retrieval import index
from lgd.retrieval.bias import Bank, open_bank
from lgd.retrieval.queries import check_pair
from lgd.retrieval.search import require_faiss
from lgd.runs.folder import Cached, Evaluated, Facts, Indexed, Trained, command, note_changes, record
from lgd.scoring.predict import load_scorer
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.repeats import open_disjoint
from lgd.shards.shard_set import ShardSet
from lgd.store import cache, importing
from lgd.store.store import Store
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.train.launch import train_under
from lgd.train.tasks import TASKS

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Outcome:
    """How a stage ended, which it fills in."""

    done: str = "done"
    facts: Facts | None = None
    """For run.json; each stage that is recorded sets them."""


@contextlib.contextmanager
def log_outcome(name: str) -> Iterator[Outcome]:
    """Log how a stage ended and how long it took."""
    outcome, began = Outcome(), time.monotonic()
    yield outcome
    logger.info("[%s] %s  (%.1f s)", name, outcome.done, time.monotonic() - began)


@contextlib.contextmanager
def stage(
    name: str, verb: str, config: Config, folder: str, given: Given | None, shards: ShardSet | None
) -> Iterator[tuple[ShardSet, Outcome]]:
    """Open the shards, where that was not done before, and log and record what a stage makes of them in `folder`.

    Logs on which fields this stage and earlier ones of its run disagree. Refuses a run whose method is not known, and
    one that cannot be recorded.
    """
    try:
        # Before any shard is opened; its target says nothing of the fields.
        find_method(config.student.method)(config, find_target(DEFAULT_TARGET))
    except ConfigError as error:
        raise ConfigError(f"{locate_field(given, 'student.method')}{error}") from error
    if note := note_changes(config, verb):
        logger.warning("[%s] %s", name, note)
    with log_outcome(name) as outcome:
        opened = shards or open_disjoint(config.shard_dirs)
        yield opened, outcome
    assert outcome.facts is not None
    record(config, opened, verb, outcome.facts, folder, given)


def _train(
    task: str, config: Config, given: Given | None = None, overwrite: bool | None = None, shards: ShardSet | None = None
) -> None:
    name, verb = (config.student.method, "train") if task == "student" else (task, "train-teacher")
    folder = getattr(config, task).dir
    with stage(name, verb, config, folder, given, shards) as (opened, outcome):
        trained_on = opened
        if task == "teacher" and TASKS[task](config, opened).store:
            trained_on = opened.with_ihc("the teacher")
            # It learns what the store will hold anyway.
            cache.fill_targets(config, trained_on.shards, config.train.workers)
        trained = train_under(config, task, overwrite, trained_on)
        made = TASKS[task].document.read_folder(folder)
        did = "trained" if made.steps else "taken as it is, and centred"
        outcome.done = f"{did}: {folder}" if trained else f"reused, nothing changed: {folder}"
        outcome.facts = Trained(**{field: getattr(made, field) for field in Trained.model_fields})
    if task == "student":
        card.write_card(config, opened)


train_teacher = functools.partial(_train, "teacher")
"""Train the IHC encoder, or reuse the one of the same shards and settings (`overwrite`: see `train_under`)."""
train_student = functools.partial(_train, "student")
"""Train the student, or reuse the one of the same shards, teacher, store and settings (`overwrite`: likewise)."""


def cache_latents(
    config: Config, given: Given | None = None, prune: bool = False, shards: ShardSet | None = None
) -> None:
    """Fill the feature store: every part that is missing; `prune` removes those of other shards."""
    with stage("latents", "cache-latents", config, config.latents.dir, given, shards) as (opened, outcome):
        paired = opened.with_ihc("caching").shards
        store, computed, pruned = cache.cache_latents(config, paired, config.train.workers, prune)
        did = [f"{computed} of {len(store.parts)} parts computed"] if computed else []
        did += [f"{pruned} parts of other shards removed"] if pruned else []
        outcome.done = f"{', '.join(did) or 'reused, nothing changed'}, {store.rows} rows: {store.folder}"
        outcome.facts = Cached(digest=store.digest, rows=store.rows)


def import_latents(
    config: Config, options: importing.ImportOptions, given: Given | None = None, shards: ShardSet | None = None
) -> None:
    """Put features that other tools computed into the feature store, as the latents of the run's teacher."""
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, source="imported"))
    with stage("latents", "import-latents", config, config.latents.dir, given, shards) as (opened, outcome):
        store, written = importing.import_latents(config, options, opened.shards, config.train.workers)
        did = f"{written} of {len(store.parts)} parts imported" if written else "reused, nothing changed"
        outcome.done = f"{did}, {store.rows} rows: {store.folder}"
        outcome.facts = Cached(digest=store.digest, rows=store.rows)


def make_latents(config: Config, given: Given | None, shards: ShardSet) -> None:
    """The teacher and its latents; imported ones must be there."""
    if config.teacher.source == "imported":
        Store(config.latents.dir, teachers=(config.teacher.name,))
        return
    train_teacher(config, given, shards=shards)
    cache_latents(config, given, shards=shards)


def build_index(config: Config, given: Given | None = None, shards: ShardSet | None = None) -> None:
    """Build the FAISS index of the latents of the run's teacher, and of others that teach its student.

    With `latents.bias` after the student, from which the bias is learnt.
    """
    shards = shards or open_disjoint(config.shard_dirs)
    for teacher in reversed(dict.fromkeys([config.teacher.name, *config.taught_by])):
        _build_index(config, teacher, given, shards)


def _build_index(config: Config, teacher: str, given: Given | None, shards: ShardSet) -> None:
    latents = config.latents
    with stage("index", "build-index", config, latents.dir, given, shards) as (opened, outcome):
        store, seed, workers = Store(latents.dir, teachers=(teacher,)), config.run.seed, config.train.workers
        asked = (latents.index, latents.gallery, latents.recall, seed, workers, latents.components)
        # Queries by H&E are of the student's teachers alone.
        bank = _open_bank(config, store, opened) if latents.bias and teacher in config.taught_by else None
        made, new = index.build_index(store, store.with_latents(opened.shards), *asked, bank)
        outcome.done = (
            f"{'built' if new else 'reused, nothing changed'}: {made.factory} over {made.rows} latents of {teacher}, "
            f"{'with a bias against hubs, ' if bank else ''}recall@10 {made.recall_at_10:.3f}: {made.why}"
        )
        outcome.facts = Indexed(
            factory=made.factory, rows=made.rows, recall_at_10=made.recall_at_10, digest=made.digest
        )


def _open_bank(config: Config, store: Store, shards: ShardSet) -> Bank:
    try:
        scorer = load_scorer(config.student.dir, code=config.code)
        of = check_pair(scorer, store)
    except DataError as error:
        raise DataError(
            f"latents.bias is {config.latents.bias:g}, which is learnt from what the student makes of H&E: {error} (or "
            "set latents.bias to 0; after lgd train, run lgd build-index)"
        ) from error
    return open_bank(scorer, of, shards, config.latents.bias, config.data.threads)


def evaluate(
    config: Config, given: Given | None = None, code: Collection[str] = (), shards: ShardSet | None = None
) -> str:
    """Score student, rivals and teacher on the held-out split and write the report; returns its table.

    `code` is what they may run of code outside LGD, beside what the run names.
    """
    folder = config.report.dir
    # Before the scoring, which can take hours.
    doing = exclusive(folder, "evaluating")
    with doing, stage("report", "evaluate", config, folder, given, shards) as (opened, outcome):
        provenance = {"command": command(config, "evaluate"), **Environment.here().as_json()}
        results, scored, pictured = evaluation.evaluate(config, opened, provenance, {*code, *config.code})
        report.write_report(as_location(folder), results, scored, pictured)
        report.try_showing_pictures(as_location(folder), as_location(config.student.dir))
        outcome.done = f"written: {folder}"
        headline = {model.name: model.by_patch.metrics for model in results.models}
        outcome.facts = Evaluated(split=config.report.split, by_patch=headline)
    card.write_card(config, opened, results)
    return report.format_scores(results)


def run(config: Config, given: Given | None = None) -> str:
    """Every stage from the teacher on, and the baseline in the same harness; returns the report's table."""
    # Before the hours of the stages that come before the index.
    require_faiss()
    baseline = f"{config.run.dir}/{BASELINE}"
    also = [*config.report.also, *([] if baseline in config.report.also else [baseline])]
    config = dataclasses.replace(config, report=dataclasses.replace(config.report, also=also))
    shards = open_disjoint(config.shard_dirs)
    with restore_connection():
        make_latents(config, given, shards)
        # A bias of the index is learnt from the student; without one, an index that cannot be built is known early.
        stages = (train_student, build_index) if config.latents.bias else (build_index, train_student)
        for one in stages:
            one(config, given, shards=shards)
        student = dataclasses.replace(config.student, method=BASELINE, dir=baseline)
        train_student(dataclasses.replace(config, student=student), given, shards=shards)
    return evaluate(config, given, shards=shards)


def tissue_dir(config: Config) -> Path:
    """Where the demo draws its virtual tissue."""
    return Path(config.run.dir) / "tissue"


def demo(config: Config, pairs: int, size: int, given: Given | None = None) -> str:
    """Virtual tissue, shards, and then `run`; returns the report's table."""
    require_faiss()
    require_local(config.run.dir, f"--run.dir {config.run.dir}: the demo draws its tissue there: name a local folder")
    if len(config.shard_dirs) > 1:
        raise ConfigError(f"--data.shards names {len(config.shard_dirs)} folders, and the demo builds one: name one")
    tissue, (folder,) = tissue_dir(config), config.shard_dirs
    with log_outcome("synth") as outcome:
        # Many slides of few patches: what is learnt must hold on other slides, and intervals are over slides.
        slides, seed = max(8, pairs // 4), config.run.seed
        made = synthesise(SynthOptions(out=str(tissue), pairs=pairs, size=size, slides=slides, coupling=0.9, seed=seed))
        outcome.done = f"{'reused, nothing changed' if made.get('reused') else f'{pairs} pairs drawn'}: {tissue}"
    with log_outcome("shards") as outcome:
        truth, split = str(tissue / "truth.csv"), "group:0.6,0.1,0.3"
        _, built = build(
            ShardOptions(
                layout="bci", root=str(tissue), out=str(folder), slides=truth, split=split, shard_size=64, mpp=0.46
            )
        )
        outcome.done = f"{'built' if built else 'reused, nothing changed'}: {folder}"
    return run(config, given)
