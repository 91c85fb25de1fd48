"""`lgd teachers`: teachers of a second stain compared, by what they know and by what students make of it.

    RUN/teachers/NAME/seed-0/             a teacher, as of `lgd train-teacher`
    RUN/teachers/NAME/fewer-0/            the same of fewer labels, where labels teach it
    RUN/teachers/NAME/distil-0/, lgd-0/   label distillation by this teacher, and LGD-Net
    RUN/teachers/teachers.json, .md       the table

The run's store holds the latents of each teacher and seed by a name of its own. What is done is found again.

Shapes: m training patches, n scored ones, D numbers of a latent, K of a soft label, F of a feature.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lgd.base.labels import as_labels
from lgd.config import Config
from lgd.io.files import write_bytes
from lgd.io.location import as_location
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, interval
from lgd.models.methods import DISTILLATION, METHODS, PROPOSED
from lgd.report.ablation import Job, answers, map_jobs, read_soft_labels, score_teacher, variants, work
from lgd.report.ablation_table import LGD_NET, draw_runs
from lgd.report.caveats import ONE_TRAINING, caveats_of
from lgd.report.embeddings import explained_by_labels, ridge
from lgd.report.neighbours import unit
from lgd.report.probed import score_by_probe
from lgd.report.results import state_target
from lgd.report.retrieval import Network, measure_retrieval
from lgd.report.teacher_rows import (
    Fewer,
    Row,
    TeachersOptions,
    count_slides,
    describe_command,
    list_rows,
    open_fewer,
    read_rows,
)
from lgd.report.teachers_table import Judged, TeachersDocument, format_teachers
from lgd.report.transfer import Patches, keep_features, read_features
from lgd.scoring.predict import TEACHER_ROW, load_scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store import cache
from lgd.store.probe import make_probe
from lgd.store.store import Store
from lgd.train.launch import train_under

logger = logging.getLogger(__name__)


class Compared(NamedTuple):
    """What all teachers are compared on."""

    config: Config
    shards: ShardSet
    scored: list[Shard]
    training: Patches
    scored_patches: Patches
    fewer: Fewer | None
    options: TeachersOptions

    def make_job(self, row: Row, seed: int, what: str) -> Job:
        """The training of `what` of a teacher: `teacher`, `fewer`, or a student of its latents."""
        run = row.runs[seed]
        at = f"{self.config.run.dir}/teachers/{row.folder}/{what}-{seed}"
        if what == "fewer":
            # Grids of a store are those of its patches.
            latents = dataclasses.replace(run.latents, dir=f"{self.config.run.dir}/teachers/fewer")
            run = dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, dir=at), latents=latents)
        elif what != "teacher":
            run = variants(run, full=False)[METHODS[what].title]
            run = dataclasses.replace(run, student=dataclasses.replace(run.student, dir=at))
        if self.options.jobs:
            run = dataclasses.replace(run, train=dataclasses.replace(run.train, workers=0))
        return Job(f"{row.title}, {what}", seed, run)


def compare_teachers(config: Config, shards: ShardSet, options: TeachersOptions) -> str:
    """Train, cache, score and compare; what is done is found again. Returns the table.

    Raises `ConfigError` for a teacher that cannot be, and `DataError` for shards that do not fit.
    """
    shards = shards.with_ihc("teachers")
    rows = list_rows(config, shards, options)
    scored = shards.require_split(config.report.split, "report.split")
    training, labels = read_rows(shards.of_split("train"))
    fewer = open_fewer(options.fewer, shards, training) if options.fewer else None
    compared = Compared(config, shards, scored, training, read_rows(scored)[0], fewer, options)
    train_teachers(compared, rows)
    _train_students(compared, rows)
    if fewer:
        _train_of_fewer(compared, fewer, rows)
    first = compared.make_job(rows[0], 0, PROPOSED)
    like = answers(first.run.student.dir, "student", scored, first.run, LGD_NET)
    table = TeachersDocument(
        seeds=options.seeds,
        resamples=config.report.bootstrap,
        metric=like.measures.main,
        patches=int(like.known.sum()),
        groups=len(set(like.groups)),
        labelled=count_slides(shards, training, as_labels(shards.target, labels)),
        labelled_fewer=fewer.slides if fewer else None,
        teachers={row.name: _judge(compared, row) for row in rows},
        caveats=(*([ONE_TRAINING] if options.seeds == 1 else []), *caveats_of(shards, like)),
        command=describe_command(config, options),
        shards=shards.digests,
        target=state_target(like.target),
    )
    folder = as_location(config.run.dir) / "teachers"
    table.write(folder / "teachers.json")
    text = format_teachers(table)
    write_bytes(folder / "teachers.md", text.encode())
    return text


def train_teachers(compared: Compared, rows: Sequence[Row]) -> None:
    """Train the teachers, and cache their latents."""
    config, shards = compared.config, compared.shards
    teachers = {job.run.teacher.dir: job for job in list_jobs(compared, rows, "teacher")}
    if any(row.learns_grids for row in rows):
        cache.fill_targets(config, shards.shards, config.train.workers)
    _run(compared, functools.partial(_train_teacher, shards), [*teachers.values()])
    for job in teachers.values():
        _, computed, _ = cache.cache_latents(job.run, shards.shards, config.train.workers)
        logger.info("[teachers] %s, seed %d: %d parts of latents computed", job.name, job.number, computed)


def list_jobs(compared: Compared, rows: Sequence[Row], *what: str) -> list[Job]:
    """The trainings of `what` of teachers, seed by seed."""
    seeds = range(compared.options.seeds)
    return [compared.make_job(row, seed, one) for row in rows for seed in seeds for one in what]


def _train_students(compared: Compared, rows: Sequence[Row]) -> None:
    students = list_jobs(compared, rows, DISTILLATION, PROPOSED)
    _run(compared, functools.partial(work, compared.shards, compared.scored), students)
    _run(compared, functools.partial(_see, compared.training, compared.scored_patches), students[::2])


def _train_of_fewer(compared: Compared, fewer: Fewer, rows: Sequence[Row]) -> None:
    """Train those again that labels teach."""
    again = list_jobs(compared, [row for row in rows if row.learns_labels], "fewer")
    if any(row.learns_labels and row.learns_grids for row in rows):
        cache.fill_targets(again[0].run, fewer.shards.shards, compared.config.train.workers)
    _run(compared, functools.partial(_train_teacher, fewer.shards), again)


def _run(compared: Compared, worker: functools.partial[tuple[Job, bool]], jobs: Sequence[Job]) -> None:
    for job, done in map_jobs(worker, jobs, compared.config, compared.options.jobs):
        logger.info("[teachers] %s, seed %d: %s", job.name, job.number, "done" if done else "reused, nothing changed")


def _train_teacher(shards: ShardSet, job: Job) -> tuple[Job, bool]:
    return job, train_under(job.run, "teacher", shards=shards)


def _see(training: Patches, scored: Patches, job: Job) -> tuple[Job, bool]:
    return keep_features(training, scored, job), True


class Latents(NamedTuple):
    """What is measured of a teacher's latents, by the names of `Judged`."""

    explained: float
    tells: float
    tells_beyond: float
    rank: float
    own_rank: float | None
    hubs: float | None
    weights: str


def _judge(compared: Compared, row: Row) -> Judged:
    """What one teacher knows, and what students make of it."""
    scores: dict[str, list[Predictions]] = {name: [] for name in ("teacher", "fewer", DISTILLATION, PROPOSED)}
    found = []
    for seed, run in enumerate(row.runs):
        store = Store(run.latents.dir, teachers=(run.teacher.name,))
        jobs = {what: compared.make_job(row, seed, what) for what in (DISTILLATION, PROPOSED)}
        for what, job in jobs.items():
            scores[what].append(answers(job.run.student.dir, "student", compared.scored, job.run, job.name))
        like, kept = scores[PROPOSED][seed], as_location(f"{run.teacher.dir}.npz")
        said, labels, _ = score_teacher(run, store, compared.shards, compared.scored, like, kept)
        scores["teacher"].append(said)
        if compared.fewer:
            scores["fewer"].append(_score_fewer(compared, compared.fewer, row, seed, store, like))
        soft = read_soft_labels(run, store, labels, compared.shards, compared.scored)
        found.append(_measure_latents(compared, run, jobs, soft, store, like))
        logger.info("[teachers] %s, seed %d: measured", row.title, seed)
    metric, resamples, first = like.measures.main, compared.config.report.bootstrap, compared.config.run.seed
    drawn = {name: draw_runs(runs, metric, resamples, first) for name, runs in scores.items() if runs}
    groups = like.labelled_groups
    return Judged(
        title=row.title,
        encoder=row.runs[0].teacher.encoder,
        learns=tuple(row.runs[0].teacher.learns) if row.runs[0].teacher.source == "trained" else (),
        teacher=interval(drawn["teacher"], groups),
        fewer=interval(drawn["fewer"], groups) if "fewer" in drawn else None,
        distil=interval(drawn[DISTILLATION], groups),
        lgd=interval(drawn[PROPOSED], groups),
        gain=interval(drawn[PROPOSED] - drawn[DISTILLATION], groups),
        **{name: tuple(getattr(one, name) for one in found) for name in Latents._fields},
    )


def _score_fewer(compared: Compared, fewer: Fewer, row: Row, seed: int, store: Store, like: Predictions) -> Predictions:
    """What a teacher of fewer labels says: one that learns labels was trained anew, of others a probe is fitted."""
    if row.learns_labels:
        run = compared.make_job(row, seed, "fewer").run
        return answers(run.teacher.dir, "teacher", compared.scored, run, TEACHER_ROW)
    probe = make_probe(store, compared.shards.of_split("train"), fewer.label_m)
    return score_by_probe(store, probe, compared.shards, compared.scored, like)


def _measure_latents(
    compared: Compared,
    run: Config,
    jobs: dict[str, Job],
    soft: tuple[Floats, Floats, Floats, Floats],
    store: Store,
    like: Predictions,
) -> Latents:
    from sklearn.linear_model import LinearRegression

    train_mD, train_mK, latents_nD, soft_nK = soft
    linear = LinearRegression().fit(train_mK, unit(train_mD))
    beyond_mD, beyond_nD = (
        unit(one) - linear.predict(labels) for one, labels in ((train_mD, train_mK), (latents_nD, soft_nK))
    )
    features, groups = read_features(jobs[DISTILLATION]), compared.training.groups
    scorer, training = load_scorer(jobs[PROPOSED].run.student.dir, code=run.code), compared.shards.of_split("train")
    _, vectors = score_shards(scorer, compared.scored, threads=run.data.threads)
    retrieval = measure_retrieval(
        run, store, training, compared.scored, Network(scorer, like, vectors), [], compared.shards
    )
    asked = retrieval.embeddings[0] if retrieval else None
    return Latents(
        explained=explained_by_labels(*soft),
        tells=_explain(features.train_mF, unit(train_mD), groups, features.scored_tF, unit(latents_nD)),
        tells_beyond=_explain(features.train_mF, beyond_mD, groups, features.scored_tF, beyond_nD),
        rank=effective_rank(train_mD),
        own_rank=asked.own_pair.median_rank if asked and asked.own_pair else None,
        hubs=asked.hubs.first_answers.value if asked and asked.hubs else None,
        weights=store.recipe.teacher.weights_sha256,
    )


def _explain(x_mF: Floats, y_mD: Floats, groups: Sequence[str], x_nF: Floats, y_nD: Floats) -> float:
    """R^2 of a ridge regression from x to y on the scored patches, fitted on the training patches."""
    said_nD, _ = ridge(x_mF, y_mD, groups, x_nF)
    return float(1 - ((y_nD - said_nD) ** 2).sum() / ((y_nD - y_mD.mean(0)) ** 2).sum())


def effective_rank(latents_mD: Floats) -> float:
    """The exponential of the entropy of the shares of the principal components (Roy and Vetterli 2007)."""
    share_D = np.linalg.eigvalsh(np.cov(latents_mD, rowvar=False)).clip(min=0)
    share_D = share_D[share_D > 0] / share_D.sum()
    return float(np.exp(-(share_D * np.log(share_D)).sum()))
