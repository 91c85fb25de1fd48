"""`lgd ablate`: LGD-Net, its controls and its parts in one harness, under equal budget, over several seeds.

    RUN/ablation/VARIANT/seed-0/           a network and its log, as of `lgd train`
    RUN/ablation/VARIANT/seed-0.npz        what it says about the report's split
    RUN/ablation/teacher.npz               what the teacher says, or its probe
    RUN/ablation/colour-only.npz           what stain and background alone say
    RUN/ablation/ablation.json, .md        the table

All share one teacher, one store and as many samples; they differ in `student:` and in the seed. What is done is found
again, so that the same command goes on where it stopped.
"""

import dataclasses
import functools
import io
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from lgd.base.errors import DataError, require
from lgd.base.target import Target
from lgd.config import Config
from lgd.io.files import exists, publish, read_bytes, write_bytes
from lgd.io.location import Location, as_location
from lgd.labels.predictions import Predictions
from lgd.models.description import StudentConfig, TeacherConfig
from lgd.models.methods import METHODS, PROPOSED, find_method
from lgd.models.teacher import Probe, Teacher, load_teacher
from lgd.ray_jobs.mapping import map_with
from lgd.report.ablation_table import LGD_NET, UPPER_BOUNDS, AblationDocument, compare_rows, format_ablation
from lgd.report.caveats import ONE_TRAINING, caveats_of, probe_caveat
from lgd.report.colour import COLOUR, colour_only, read_training_colours
from lgd.report.embeddings import explained_by_labels
from lgd.report.probed import pooled_latents, score_by_probe
from lgd.report.results import state_target
from lgd.runs.folder import command
from lgd.scoring.predict import TEACHER_ROW, load_scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.probe import find_probe
from lgd.store.store import Store
from lgd.train.launch import train_under

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SINGLE_RUN_ROWS = {**dict.fromkeys(UPPER_BOUNDS, "teacher.npz"), COLOUR: "colour-only.npz"}
"""The rows of one training, whatever the number of seeds, and where their answers are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AblateOptions:
    """What `lgd ablate` is asked for."""

    seeds: int = 5
    """Trainings of each variant; their seeds are run.seed and those after it."""
    full: bool = False
    """Also LGD-Net with each of its parts off, and with shuffled pairs."""
    leave_out: Literal["", "center"] = ""
    """`center`: also train without each center in turn, and score its patches; build one shard folder a center, by
    `build-shards --center`, and name all in `data.shards`."""
    transfer: str = ""
    """CSV of what training never asked: `key`, and a column of numbers a question. Small probes of each method's frozen
    features answer it; virtual tissue has one, questions.csv."""
    jobs: int = 0
    """Networks that are trained at a time, each in a process of its own under Ray, with a GPU or a CPU; 0 trains one
    after the other, each with train.workers."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"--seeds {self.seeds}: use at least 1")
        require(self.jobs >= 0, f"--jobs {self.jobs}: use 0 or more")
        require(not (self.transfer and self.leave_out), "--transfer and --leave-out: ask for one at a time")


def variants(config: Config, full: bool) -> dict[str, Config]:
    """The run of each row of the table: each method, also the run's own, and with `full` their controls.

    Left out are those that are LGD-Net itself, as where no contrast is on.
    """
    proposed = dataclasses.replace(config.student, method=PROPOSED, dir="")
    made: dict[str, Config] = {}
    methods = {name: find_method(name) for name in dict.fromkeys([*METHODS, config.student.method])}
    titles = [kind.title for kind in methods.values()]
    require(
        len({*titles}) == len(titles), f"two methods are called {titles[-1]!r:.80}: give {[*methods][-1]} another title"
    )
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        (kind.title, method, kind.row_fields(config)) for method, kind in methods.items()
    ]
    if full:
        rows += [(row, method, fields) for method, kind in methods.items() for row, fields in kind.controls.items()]
    for name, method, fields in rows:
        student = dataclasses.replace(proposed, method=method, **fields)
        if name == LGD_NET or student != proposed:
            made[name] = dataclasses.replace(config, student=student)
    return made


class Job(NamedTuple):
    """A network to train and to score."""

    name: str
    number: int
    run: Config


def describe_command(config: Config, options: AblateOptions) -> str:
    """The command line of a comparison."""
    left_out = f" --leave-out {options.leave_out}" if options.leave_out else ""
    asked = f" --transfer {shlex.quote(options.transfer)}" if options.transfer else ""
    return f"{command(config, 'ablate')} --seeds {options.seeds}" + " --full" * options.full + left_out + asked


def jobs_of(config: Config, options: AblateOptions) -> Iterator[Job]:
    """A seed after the other, so that a table of fewer seeds is there early."""
    for number in range(options.seeds):
        for name, run in variants(config, options.full).items():
            at = as_location(config.run.dir) / "ablation" / slug(name) / f"seed-{number}"
            one = dataclasses.replace(
                run,
                run=dataclasses.replace(run.run, seed=config.run.seed + number),
                student=dataclasses.replace(run.student, dir=str(at)),
                # The samples of a step are the same for any number of workers.
                train=dataclasses.replace(run.train, workers=0) if options.jobs else run.train,
            )
            yield Job(name, number, one)


def work(shards: ShardSet, scored: Sequence[Shard], job: Job) -> tuple[Job, bool]:
    """Train and score a network; returns False where it could be reused."""
    trained = train_under(job.run, "student", shards=shards)
    answers(job.run.student.dir, "student", scored, job.run, job.name)
    return job, trained


def map_jobs(worker: Callable[[Job], Result], jobs: Sequence[Job], config: Config, at_a_time: int) -> Iterator[Result]:
    """What `worker` gives for each network, so many `at_a_time`, or 0 for one after the other in this process."""
    return map_with(
        lambda: worker,
        jobs,
        workers=at_a_time,
        option_name="--jobs",
        threads=config.data.threads,
        name=lambda job: f"{job.name}, seed {job.number}",
    )


class Ablation(NamedTuple):
    """Methods, compared."""

    document: AblationDocument
    rows: dict[str, list[Predictions]]
    """What each row says of the scored patches, a training after the other."""


def ablate(
    config: Config, shards: ShardSet, options: AblateOptions, asked: str, scored: Sequence[Shard] = ()
) -> Ablation:
    """Train, score and compare. The teacher and the store must be there; `asked` is the command line of it.

    `scored` are the shards of another set, in place of the report's split. Raises `DataError` where no patch of these
    is labelled.
    """
    training = shards.of_split("train") if scored or config.report.split != "train" else []
    scored = scored or shards.require_split(config.report.split, "report.split")
    folder = as_location(config.run.dir) / "ablation"
    jobs = list(jobs_of(config, options))
    for job, trained in map_jobs(functools.partial(work, shards, scored), jobs, config, options.jobs):
        done = "trained" if trained else "reused, nothing changed"
        logger.info("[ablate] %s, seed %d: %s", job.name, job.number, done)
    rows: dict[str, list[Predictions]] = {}
    colours = read_training_colours(training, config.data.threads)
    if colour := colour_only(colours, scored, shards.target, config.data.threads):
        _keep(folder / SINGLE_RUN_ROWS[COLOUR], colour, "")
        rows[COLOUR] = [colour]
    for job in jobs:
        rows.setdefault(job.name, []).append(answers(job.run.student.dir, "student", scored, job.run, job.name))
    ours, store = rows[LGD_NET][0], Store(config.latents.dir, teachers=(config.teacher.name,))
    if not ours.known.any():
        word = ours.target.label_word
        raise DataError(f"report.split {config.report.split!r} has no patch with a {word}: nothing can be compared")
    teacher, labels, notes = score_teacher(config, store, shards, scored, ours, folder / "teacher.npz")
    rows[teacher.name] = [teacher]
    compared, gap_closed = compare_rows(rows, config.report.bootstrap, config.run.seed)
    table = AblationDocument(
        seeds=options.seeds,
        resamples=config.report.bootstrap,
        patches=int(ours.known.sum()),
        groups=len(set(ours.groups)),
        rows=compared,
        gap_closed=gap_closed,
        caveats=(*([ONE_TRAINING] if options.seeds == 1 else []), *notes, *caveats_of(shards, ours)),
        explained_by_levels=explained_by_labels(*read_soft_labels(config, store, labels, shards, scored)),
        command=asked,
        shards=shards.digests,
        teacher=store.recipe.teacher.weights_sha256,
        target=state_target(ours.target),
    )
    table.write(folder / "ablation.json")
    write_bytes(folder / "ablation.md", format_ablation(table).encode())
    return Ablation(table, rows)


def score_teacher(
    config: Config, store: Store, shards: ShardSet, scored: Sequence[Shard], like: Predictions, kept: Location
) -> tuple[Predictions, Teacher | Probe, list[str]]:
    """What the teacher, or the probe of its latents, says of the patches of `like`; what reads labels; and caveats."""
    described = None if config.teacher.source == "imported" else TeacherConfig.read_folder(config.teacher.dir)
    if described and described.gives_labels:
        teacher, _ = load_teacher(config.teacher.dir, config.code)
        return answers(config.teacher.dir, "teacher", scored, config, TEACHER_ROW, kept), teacher, []
    probe = find_probe(store, shards.of_split("train"))
    assert probe is not None, "a method that is taught labels was trained"
    found = score_by_probe(store, probe, shards, scored, like)
    _keep(kept, found, "")
    return found, probe.network(), [probe_caveat(probe, described, like.target)]


def read_soft_labels(
    config: Config, store: Store, labels: Teacher | Probe, shards: ShardSet, scored: Sequence[Shard]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The teacher's latents and its soft labels, or values, of the training patches, and those of the scored ones."""
    temperature, is_number = config.student.distil_temperature, shards.target.is_number

    def both(some: Sequence[Shard]) -> tuple[np.ndarray, np.ndarray]:
        latents_nD = pooled_latents(store, some)
        logits_nK = labels.logits_of(torch.from_numpy(latents_nD).float())
        # R^2 is the same for values in any unit.
        soft_nK = logits_nK if is_number else (logits_nK / temperature).softmax(dim=1)
        return latents_nD, soft_nK.double().numpy()

    return *both(shards.of_split("train")), *both(scored)


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def answers(
    folder: str, kind: str, shards: Sequence[Shard], config: Config, name: str, at: Location | None = None
) -> Predictions:
    """What a trained network says about the shards: as it was kept beside its folder, unless it is another by now."""
    at = at or as_location(f"{folder}.npz")
    weights = (StudentConfig if kind == "student" else TeacherConfig).read_folder(folder).weights_sha256
    stamp = f"{weights} {' '.join(shard.sha256 for shard in shards)}"
    if exists(at):
        kept, kept_stamp = read_kept(at, name, shards[0].target)
        if kept_stamp == stamp:
            return kept
    found, _ = score_shards(load_scorer(folder, kind, config.code), shards, threads=config.data.threads)
    found = dataclasses.replace(found, name=name)
    _keep(at, found, stamp)
    return found


def _keep(at: Location, found: Predictions, stamp: str) -> None:
    with publish(at) as temporary, temporary.open("wb") as file:
        level, probability = found.label, found.output
        np.savez(file, stamp=stamp, keys=found.keys, groups=found.groups, level=level, probability=probability)


def read_kept(at: Location, name: str, target: Target) -> tuple[Predictions, str]:
    """What `answers` kept of a row, and the stamp of the network and the shards that it is of."""
    with np.load(io.BytesIO(read_bytes(at))) as kept:
        keys, groups = kept["keys"].tolist(), kept["groups"].tolist()
        label, output = kept["level"], kept["probability"]
        found = Predictions(target=target, name=name, keys=keys, groups=groups, label=label, output=output)
        return found, str(kept["stamp"])
