"""Comparisons of methods and of teachers, over several trainings: what `lgd ablate` and `lgd teachers` do.

Each makes the stages before it, reuses what is still valid, and is recorded in the run as a stage is.
"""

import logging

from lgd.config import Config
from lgd.config_files import Given
from lgd.io.locks import exclusive
from lgd.pipeline import log_outcome, make_latents, stage, train_teacher
from lgd.ray_jobs.cluster import restore_connection
from lgd.report import ablation, leave_out, teachers, transfer
from lgd.report.ablation_table import format_ablation
from lgd.report.teacher_rows import TeachersOptions
from lgd.runs.folder import Ablated, Judged
from lgd.shards.repeats import open_disjoint
from lgd.store import cache
from lgd.store.probe import ensure_probe
from lgd.store.store import Store

logger = logging.getLogger(__name__)


@restore_connection()
def ablate(config: Config, options: ablation.AblateOptions, given: Given | None = None) -> str:
    """The table of LGD-Net, its controls and its parts (`lgd.report.ablation`), after the teacher and the store."""
    shards, folder = open_disjoint(config.shard_dirs), f"{config.run.dir}/ablation"
    # Before the hours of training.
    folds = leave_out.make_folds(config, shards) if options.leave_out else []
    inquiry = transfer.open_inquiry(config, shards, options.transfer) if options.transfer else None
    make_latents(config, given, shards)
    doing = exclusive(folder, "comparing methods")
    with doing, stage("ablate", "ablate", config, folder, given, shards) as (_, outcome):
        asked = ablation.describe_command(config, options)
        whole = ablation.ablate(config, shards, options, asked)
        table, outcome.done = format_ablation(whole.document), f"written: {folder}/ablation.md"
        if folds:
            try:
                parts = [_ablate_without(fold, options, asked, given) for fold in folds]
            finally:
                if config.teacher.source != "trained":
                    ensure_probe(Store(config.latents.dir, teachers=(config.teacher.name,)), shards.of_split("train"))
            table = leave_out.compare_seen(config, shards, whole, folds, parts)
            outcome.done = f"written: {folder}/ablation.md and leave-out.md"
        if inquiry:
            table += "\n" + transfer.compare_transfer(config, shards, options, inquiry, whole.document)
        outcome.facts = Ablated(seeds=options.seeds, full=options.full, split=config.report.split)
    return table


def _ablate_without(
    fold: leave_out.Fold, options: ablation.AblateOptions, asked: str, given: Given | None
) -> ablation.Ablation:
    """The comparison of a fold, after what it has of teacher, latents and probe."""
    config, shards, latents = fold.config, fold.shards, fold.config.latents.dir
    logger.info("[ablate] without the center %s:", fold.center)
    if config.teacher.source == "trained":
        train_teacher(config, given, shards=shards)
        with log_outcome("latents") as outcome:
            # Also of what is scored, for the rows of the teacher.
            paired = [shard for shard in (*shards.shards, *fold.scored) if "ihc" in shard.roles]
            store, computed, _ = cache.cache_latents(config, paired, config.train.workers)
            outcome.done = f"{computed} of {len(store.parts)} parts computed, {store.rows} rows: {latents}"
    else:
        ensure_probe(Store(latents, teachers=(config.teacher.name,)), shards.of_split("train"))
    return ablation.ablate(config, shards, options, asked, fold.scored)


@restore_connection()
def compare_teachers(config: Config, options: TeachersOptions, given: Given | None = None) -> str:
    """The table of teachers and of what students make of them (`lgd.report.teachers`)."""
    shards, folder = open_disjoint(config.shard_dirs), f"{config.run.dir}/teachers"
    doing = exclusive(folder, "comparing teachers")
    with doing, stage("teachers", "teachers", config, folder, given, shards) as (_, outcome):
        table = teachers.compare_teachers(config, shards, options)
        outcome.done = f"written: {folder}/teachers.md"
        outcome.facts = Judged(teachers=tuple(options.names), seeds=options.seeds, split=config.report.split)
    return table
