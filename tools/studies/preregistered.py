"""The study of docs/preregistration.md: from that page to its two endpoints.

python tools/studies/preregistered.py [--out DIR] [--long] [--development] [--dry-run]

The seeds are the first bytes of the page's SHA-256; with --development others, and two trainings, for a dry run.
What is finished is not done again. Leaves OUT/preregistered.md and preregistered.json.

Shapes: S trainings, R resamples.
"""

import argparse
import dataclasses
import functools
import hashlib
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.config import Config
from lgd.config_files import load_config
from lgd.io.files import write_bytes, write_json
from lgd.io.location import as_location
from lgd.metrics import Floats, Interval, interval
from lgd.models.methods import DISTILLATION, PROPOSED
from lgd.report.ablation import Job, answers, map_jobs, variants, work
from lgd.report.ablation_table import draw_runs
from lgd.report.questions import Question, answer_by_probes, read_questions, score_answers
from lgd.report.results import format_interval
from lgd.report.teacher_rows import TeachersOptions, list_rows, read_rows
from lgd.report.teachers import Compared, list_jobs, train_teachers
from lgd.report.transfer import Features, keep_features, map_features, read_features, read_latents
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store
from tools.studies.evidence import ROOT, run_all

logger = logging.getLogger("lgd.studies")

PAGE, CONFIG = ROOT / "docs" / "preregistration.md", ROOT / "configs" / "evidence.yaml"
TRAININGS, OF_DRY_RUN, JOBS = 5, 2, 2
GRIDS, PROBED = "without hallucination", 100
TISSUE = "--pairs 4800 --slides 400 --size 96 --test 0.3 --coupling 1"
LABELS = "--split keep:0.05 --labelled 3 --mpp 0.46"
EPOCHS = {"teacher.epochs": 8, "student.epochs": 8}
"""For time: five trainings of all arms in about 90 minutes, estimated from dry runs."""
WORLDS = {"more": "1", "null": "0.01"}
"""How strongly the H&E shows what the level does not say. At 0 that would range less too, in the IHC."""
KINDS = {"more": "label,stain", "null": "stain"}
"""The teachers of each world."""
TEACHERS = "label,stain,several,parts,pairs"
"""Those of the long form."""
OURS, BY_STAIN, BY_LABEL = f"{PROPOSED}, stain", f"{DISTILLATION}, stain", f"{DISTILLATION}, label"
ARMS = {
    BY_LABEL: "label distillation, label",
    BY_STAIN: "label distillation, stain",
    "grids": "grids",
    OURS: "LGD-Net",
    "ridge": "post-hoc ridge",
    "latents": "the teacher's true latents",
}
LEAST = {"labels": 0.05, "transfer": 0.03}
"""The smallest gains that count."""


class Seeds(NamedTuple):
    """All that is drawn."""

    worlds: dict[str, int]
    trainings: range


def find_seeds(page: bytes, development: bool) -> Seeds:
    """The seeds of a page: four bytes of its digest each, the first training's first."""
    digest = hashlib.sha256(b"development" if development else page).digest()
    first, *others = (int.from_bytes(digest[4 * at : 4 * at + 4]) % 2**31 for at in range(1 + len(WORLDS)))
    return Seeds(
        dict(zip(WORLDS, others, strict=True)), range(first, first + (OF_DRY_RUN if development else TRAININGS))
    )


def list_commands(out: Path, seeds: Seeds) -> list[list[str]]:
    """Draws the worlds and builds their shards."""
    commands = []
    for world, beyond in WORLDS.items():
        tissue, shards = f"{out}/{world}/tissue", f"{out}/{world}/shards"
        folders = ["--root", tissue, "--out", shards, "--slides", f"{tissue}/truth.csv"]
        commands += [
            ["lgd", "synth", tissue, *TISSUE.split(), "--beyond", beyond, "--seed", str(seeds.worlds[world])],
            ["lgd", "build-shards", "--layout", "bci", *folders, *LABELS.split()],
        ]
    return commands


def list_long(out: Path, seeds: Seeds) -> list[list[str]]:
    """Compares all teachers in each world; those of the study and their students are found again."""
    config = ["--config", str(CONFIG.relative_to(ROOT))]
    trainings = ["--seeds", str(len(seeds.trainings)), "--jobs", str(JOBS)]
    return [
        ["lgd", "teachers", *config, *list_fields(out / world, seeds), "--compare", TEACHERS, *trainings]
        for world in WORLDS
    ]


def list_fields(at: Path, seeds: Seeds) -> list[str]:
    """Those of a world's run, but for its file."""
    fields = {"run.dir": at / "run", "run.seed": seeds.trainings.start, "data.shards": f"[{at}/shards]"} | EPOCHS
    return [f"--{name}={value}" for name, value in fields.items()]


def read_within(path: Path) -> Question:
    """The H-score of each patch, less the mean of its level."""
    score, level = (
        next(one for one in read_questions(as_location(str(path))) if one.name == name) for name in ("h_score", "level")
    )
    keys = [*score.answers]
    score_n, level_n = score.find(keys), level.find(keys)
    for one in np.unique(level_n):
        score_n[level_n == one] -= score_n[level_n == one].mean()
    return Question("h_score_within_level", dict(zip(keys, score_n.tolist(), strict=True)))


class World(NamedTuple):
    """How well each arm answers: for each training the value, and after it that of each resample, (S, 1 + R)."""

    kappa: dict[str, Floats]
    r2: dict[str, Floats]
    """Of the H-score within a level."""
    groups: int


def train_world(at: Path, config: Config, kinds: str, trainings: int) -> World:
    """Train the teachers of these kinds and all their students, or find them again, and ask them."""
    shards = ShardSet.open(config.shard_dirs).with_ihc("teachers")
    options = TeachersOptions(compare=kinds, seeds=trainings, jobs=JOBS)
    rows = {row.name: row for row in list_rows(config, shards, options)}
    scored = shards.require_split(config.report.split, "report.split")
    training, tested = read_rows(shards.of_split("train"))[0], read_rows(scored)[0]
    compared = Compared(config, shards, scored, training, tested, None, options)
    train_teachers(compared, [*rows.values()])
    made = {f"{DISTILLATION}, {name}": list_jobs(compared, [row], DISTILLATION) for name, row in rows.items()}
    made[OURS] = list_jobs(compared, [rows["stain"]], PROPOSED)
    made["grids"] = [_without_latents(job) for job in made[OURS]]
    jobs = [job for some in made.values() for job in some]
    for job, done in map_jobs(functools.partial(work, shards, scored), jobs, config, JOBS):
        logger.info("[preregistered] %s, seed %d: %s", job.name, job.number, "done" if done else "reused")
    for _ in map_jobs(functools.partial(keep_features, training, tested), jobs, config, JOBS):
        pass
    resamples, seed = config.report.bootstrap, config.run.seed
    kappa = {
        arm: draw_runs(
            [answers(job.run.student.dir, "student", scored, job.run, arm) for job in some], "kappa", resamples, seed
        )
        for arm, some in made.items()
    }
    known = {arm: [read_features(job) for job in some] for arm, some in made.items()}
    stores = (Store(job.run.latents.dir, teachers=(job.run.teacher.name,)) for job in made[OURS])
    latents = [read_latents(store, training, tested) for store in stores]
    known["ridge"] = [
        map_features(features, to, training.groups) for features, to in zip(known[BY_STAIN], latents, strict=True)
    ]
    known["latents"] = latents
    question = read_within(at / "tissue" / "questions.csv")
    answer_m1, answer_t = question.find(training.keys)[:, None], question.find(tested.keys)

    def score(features: Features) -> Floats:
        said_Ut = answer_by_probes(*features, answer_m1, PROBED, seed)[:, :, 0]
        return score_answers(said_Ut, answer_t, tested.groups, None, resamples, seed)["r2"]

    r2 = {arm: np.stack([score(features) for features in some]) for arm, some in known.items()}
    return World(kappa, r2, len({*tested.groups}))


def _without_latents(job: Job) -> Job:
    """The same student, by the same teacher, without the loss of its latents."""
    student = variants(job.run, full=True)[GRIDS].student
    at = job.run.student.dir.replace(f"/{PROPOSED}-", "/grids-")
    return job._replace(name="grids", run=dataclasses.replace(job.run, student=dataclasses.replace(student, dir=at)))


class Endpoint(NamedTuple):
    """A difference of two arms, as intervals of both levels that Holm's order may ask for."""

    title: str
    at_95: Interval
    at_97: Interval

    def holds(self, least: float, strict: bool) -> bool:
        """Whether it excludes 0 in favour, and reaches the smallest gain that counts."""
        asked = self.at_97 if strict else self.at_95
        return asked.low is not None and asked.low > 0 and asked.value is not None and asked.value >= least


def _compare(title: str, after_SR: Floats, before_SR: Floats, groups: int) -> Endpoint:
    drawn_SR = after_SR - before_SR
    return Endpoint(title, interval(drawn_SR, groups), interval(drawn_SR, groups, 0.975))


def compare_arms(worlds: Mapping[str, World]) -> dict[str, list[Endpoint]]:
    """The differences of each endpoint, and under `null` those of the null world."""

    def transfer(world: World) -> list[Endpoint]:
        others = (BY_STAIN, "grids", "ridge")
        return [
            _compare(f"{ARMS[OURS]} minus {ARMS[arm]}", world.r2[OURS], world.r2[arm], world.groups) for arm in others
        ]

    more = worlds["more"]
    labels = _compare(
        f"{ARMS[BY_STAIN]} minus {ARMS[BY_LABEL]}", more.kappa[BY_STAIN], more.kappa[BY_LABEL], more.groups
    )
    return {"labels": [labels], "transfer": transfer(more), "null": transfer(worlds["null"])}


def judge(found: Mapping[str, Sequence[Endpoint]]) -> dict[str, bool]:
    """Which endpoints hold, by Holm over the two."""

    def holds(name: str, strict: bool) -> bool:
        return all(one.holds(LEAST[name], strict) for one in found[name])

    null = [(one.at_95.low, one.at_95.high) for one in found["null"]]
    believed = all(low is not None and high is not None and low <= 0 <= high for low, high in null)
    first = {"labels": holds("labels", True), "transfer": holds("transfer", True) and believed}
    second = {"labels": holds("labels", False), "transfer": holds("transfer", False) and believed}
    return second if any(first.values()) else first


def format_study(
    seeds: Seeds, worlds: Mapping[str, World], found: Mapping[str, Sequence[Endpoint]], held: Mapping[str, bool]
) -> list[str]:
    """The tables in Markdown."""
    titles = {"labels": "kappa", "transfer": "R² within a level", "null": "R² within a level, null world"}
    rows = [
        [titles[name], one.title, format_interval(one.at_95, "+.3f"), format_interval(one.at_97, "+.3f")]
        for name, some in found.items()
        for one in some
    ]
    more, null = worlds.values()
    arms = [
        [title, *(_format_arm(at.get(arm), more.groups) for at in (more.kappa, more.r2, null.r2))]
        for arm, title in ARMS.items()
    ]
    said = [f"{name}: {'holds' if is_held else 'does not hold'}" for name, is_held in held.items()]
    return [
        "# The preregistered study\n",
        *list_items([f"seeds of the tissues {seeds.worlds}, of the trainings {[*seeds.trainings]}", *said]),
        "",
        *markdown_table(["", "difference", "95 %", "97.5 %"], rows),
        "",
        *markdown_table(["arm (95 %)", titles["labels"], titles["transfer"], titles["null"]], arms),
    ]


def _format_arm(drawn_SR: Floats | None, groups: int) -> str:
    return "" if drawn_SR is None else format_interval(interval(drawn_SR, groups), ".3f")


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    parser = Parser(
        "python tools/studies/preregistered.py", "Run the study of docs/preregistration.md, in the checkout."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs/preregistered", metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument("--long", action="store_true", help="compare all teachers in both worlds after it: hours")
    parser.add_argument("--development", action="store_true", help="other seeds and two trainings, for a dry run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args)
    out, page = ROOT / asked.out, PAGE.read_bytes()
    seeds = find_seeds(page, asked.development)
    commands = list_commands(out, seeds)
    more = list_long(out, seeds) if asked.long else []
    if asked.dry_run:
        print_lines(*map(shlex.join, commands + more))
        return 0
    if status := run_all(commands):
        return status
    worlds = {
        world: train_world(
            out / world, load_config(CONFIG, list_fields(out / world, seeds)), kinds, len(seeds.trainings)
        )
        for world, kinds in KINDS.items()
    }
    found = compare_arms(worlds)
    held = judge(found)
    command = shlex.join(["python", "tools/studies/preregistered.py", *args])
    text = "\n".join([*format_study(seeds, worlds, found, held), code_block(command), ""])
    document = {"page": hashlib.sha256(page).hexdigest(), "development": asked.development, "holds": held}
    document |= {
        name: [one._asdict() | {"at_95": one.at_95.as_json(), "at_97": one.at_97.as_json()} for one in some]
        for name, some in found.items()
    }
    write_json(out / "preregistered.json", document)
    write_bytes(out / "preregistered.md", text.encode())
    print_lines(*text.split("\n"))
    return run_all(more)


if __name__ == "__main__":
    sys.exit(run_command("preregistered", run, sys.argv[1:]))
