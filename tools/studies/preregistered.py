"""The study of docs/preregistration.md: from that page to its two endpoints.

python tools/studies/preregistered.py [--out DIR] [--development] [--dry-run]

The seeds are the first bytes of the page's SHA-256; with --development others, and two trainings, for a dry run.
What is finished is not done again. Leaves OUT/preregistered.md and preregistered.json.

Shapes: S trainings, R resamples.
"""

import argparse
import dataclasses
import functools
import hashlib
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
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, Interval, interval
from lgd.models.methods import PROPOSED
from lgd.report.ablation import Job, answers, map_jobs, variants, work
from lgd.report.ablation_table import draw_runs
from lgd.report.embeddings import ridge
from lgd.report.probed import pooled_latents
from lgd.report.questions import Question, answer_by_probes, read_questions, score_answers
from lgd.report.results import format_interval
from lgd.report.teacher_rows import TeachersOptions, list_rows, read_rows
from lgd.report.teachers import Compared
from lgd.report.transfer import Features, keep_features, read_features
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store
from tools.studies.evidence import ROOT, run_all

PAGE = ROOT / "docs" / "preregistration.md"
TRAININGS, OF_DRY_RUN = 5, 2
GRIDS, PROBED = "without hallucination", 100
TISSUE = "--pairs 4800 --slides 400 --size 96 --test 0.3 --coupling 1"
LABELS = "--split keep:0.05 --labelled 3 --mpp 0.46"
WORLDS = {"more": "1", "null": "0"}
"""How strongly the H&E shows what the level does not say."""
LEAST = {"labels": 0.05, "transfer": 0.03}
"""The smallest gains that count."""
ASKED = "h_score_within_level"


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


def list_commands(out: Path, seeds: Seeds, config: Sequence[str]) -> list[list[str]]:
    """What is done by the project's own commands, world by world."""
    commands = []
    for world, beyond in WORLDS.items():
        at = out / world
        drawn = ["--beyond", beyond, "--seed", str(seeds.worlds[world])]
        folders = ["--root", f"{at}/tissue", "--out", f"{at}/shards", "--slides", f"{at}/tissue/truth.csv"]
        kinds = "label,stain" if world == "more" else "stain"
        asked = ["--compare", kinds, "--seeds", str(len(seeds.trainings)), "--jobs", "2"]
        commands += [
            ["lgd", "synth", f"{at}/tissue", *TISSUE.split(), *drawn],
            ["lgd", "build-shards", "--layout", "bci", *folders, *LABELS.split()],
            ["lgd", "teachers", *config, *make_fields(at, seeds), *asked],
        ]
    return commands


def make_fields(at: Path, seeds: Seeds) -> list[str]:
    """The fields of a world's run."""
    return ["--run.dir", f"{at}/run", "--run.seed", str(seeds.trainings.start), "--data.shards", f"[{at}/shards]"]


def read_within(path: Path) -> Question:
    """The H-score of each patch, less the mean of its level."""
    score, level = (
        next(one for one in read_questions(as_location(str(path))) if one.name == name) for name in ("h_score", "level")
    )
    keys = [*score.answers]
    score_n, level_n = score.find(keys), level.find(keys)
    for one in np.unique(level_n):
        score_n[level_n == one] -= score_n[level_n == one].mean()
    return Question(ASKED, dict(zip(keys, score_n.tolist(), strict=True)))


class World(NamedTuple):
    """What the networks of a world said, by arm: a training after the other."""

    said: dict[str, list[Predictions]]
    known: dict[str, list[Floats]]
    """R^2 of the question, and after it that of each resample."""
    groups: int


def read_world(at: Path, config: Config, trainings: int) -> World:
    """Train what `lgd teachers` did not, and ask all arms."""
    shards = ShardSet.open(config.shard_dirs).with_ihc("teachers")
    options = TeachersOptions(compare="label,stain" if at.name == "more" else "stain", seeds=trainings, jobs=2)
    rows = {row.name: row for row in list_rows(config, shards, options)}
    scored = shards.require_split(config.report.split, "report.split")
    training, tested = read_rows(shards.of_split("train"))[0], read_rows(scored)[0]
    compared = Compared(config, shards, scored, training, tested, None, options)
    made = {
        f"{what}, {name}": [compared.make_job(row, seed, what) for seed in range(trainings)]
        for name, row in rows.items()
        for what in ("distil", PROPOSED)
    }
    made["grids"] = [_without_latents(job) for job in made[f"{PROPOSED}, stain"]]
    for _ in map_jobs(functools.partial(work, shards, scored), made["grids"], config, 2):
        pass
    of_stain = [*made["grids"], *made[f"{PROPOSED}, stain"], *made["distil, stain"]]
    for _ in map_jobs(functools.partial(keep_features, training, tested), of_stain, config, 2):
        pass
    said = {
        arm: [answers(job.run.student.dir, "student", scored, job.run, arm) for job in jobs]
        for arm, jobs in made.items()
    }
    known = {arm: [read_features(job) for job in made[arm]] for arm in ("grids", f"{PROPOSED}, stain", "distil, stain")}
    known["ridge"] = [
        _map_features(features, job, shards, training.groups)
        for features, job in zip(known["distil, stain"], made["distil, stain"], strict=True)
    ]
    question, resamples = read_within(at / "tissue" / "questions.csv"), config.report.bootstrap
    answer_m1, answer_t = question.find(training.keys)[:, None], question.find(tested.keys)
    scores = {
        arm: [
            score_answers(
                answer_by_probes(*features, answer_m1, PROBED, config.run.seed)[:, :, 0],
                answer_t,
                tested.groups,
                None,
                resamples,
                config.run.seed,
            )["r2"]
            for features in some
        ]
        for arm, some in known.items()
    }
    return World(said, scores, len({*tested.groups}))


def _without_latents(job: Job) -> Job:
    """The same student, by the same teacher, without the loss of its latents."""
    student = variants(job.run, full=True)[GRIDS].student
    at = job.run.student.dir.replace(f"/{PROPOSED}-", "/grids-")
    return job._replace(name="grids", run=dataclasses.replace(job.run, student=dataclasses.replace(student, dir=at)))


def _map_features(features: Features, job: Job, shards: ShardSet, groups: Sequence[str]) -> Features:
    """The latents that a ridge regression over all training pairs reads off the features."""
    store = Store(job.run.latents.dir, teachers=(job.run.teacher.name,))
    latents_mD = pooled_latents(store, shards.of_split("train"))
    said_nD, _ = ridge(features.train_mF, latents_mD, groups, np.concatenate(features))
    return Features(*np.split(said_nD, [len(groups)]))


class Endpoint(NamedTuple):
    """A difference of two arms, as intervals of both levels that Holm's order may ask for."""

    title: str
    at_95: Interval
    at_97: Interval

    def holds(self, least: float, strict: bool) -> bool:
        """Whether it excludes 0 in favour, and reaches the smallest gain that counts."""
        asked = self.at_97 if strict else self.at_95
        return asked.low is not None and asked.low > 0 and asked.value is not None and asked.value >= least


def _compare(title: str, after: Sequence[Floats], before: Sequence[Floats], groups: int) -> Endpoint:
    drawn_SR = np.stack(after) - np.stack(before)
    return Endpoint(title, interval(drawn_SR, groups), interval(drawn_SR, groups, 0.975))


def compare_arms(worlds: Mapping[str, World], resamples: int, seed: int) -> dict[str, list[Endpoint]]:
    """The differences of each endpoint, and under `null` those of the null world."""
    more, ours = worlds["more"], f"{PROPOSED}, stain"
    kappa = {arm: [*draw_runs(more.said[arm], "kappa", resamples, seed)] for arm in ("distil, stain", "distil, label")}
    after, before = kappa.values()
    labels = _compare("label distillation: stain minus label", after, before, more.groups)

    def transfer(world: World) -> list[Endpoint]:
        titles = {"distil, stain": "label distillation", "grids": "grids", "ridge": "post-hoc ridge"}
        return [
            _compare(f"LGD-Net minus {title}", world.known[ours], world.known[arm], world.groups)
            for arm, title in titles.items()
        ]

    return {"labels": [labels], "transfer": transfer(more), "null": transfer(worlds["null"])}


def judge(found: Mapping[str, Sequence[Endpoint]]) -> dict[str, bool]:
    """Which endpoints hold, by Holm over the two."""

    def holds(name: str, strict: bool) -> bool:
        return all(one.holds(LEAST[name], strict) for one in found[name])

    believed = all((one.at_95.low or 0) <= 0 <= (one.at_95.high or 0) for one in found["null"])
    first = {"labels": holds("labels", True), "transfer": holds("transfer", True) and believed}
    second = {"labels": holds("labels", False), "transfer": holds("transfer", False) and believed}
    return second if any(first.values()) else first


def format_study(seeds: Seeds, found: Mapping[str, Sequence[Endpoint]], held: Mapping[str, bool], command: str) -> str:
    """The table in Markdown."""
    titles = {"labels": "kappa", "transfer": "R² within a level", "null": "R² within a level, null world"}
    rows = [
        [titles[name], one.title, format_interval(one.at_95, "+.3f"), format_interval(one.at_97, "+.3f")]
        for name, some in found.items()
        for one in some
    ]
    said = [f"{name}: {'holds' if is_held else 'does not hold'}" for name, is_held in held.items()]
    lines = [
        "# The preregistered study\n",
        *list_items([f"seeds: of the tissues {seeds.worlds}, of the trainings {[*seeds.trainings]}", *said]),
        "",
        *markdown_table(["", "difference", "95 %", "97.5 %"], rows),
        code_block(command),
    ]
    return "\n".join([*lines, ""])


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    parser = Parser(
        "python tools/studies/preregistered.py", "Run the study of docs/preregistration.md, in the checkout."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs/preregistered", metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument("--development", action="store_true", help="other seeds and two trainings, for a dry run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args)
    out, page = ROOT / asked.out, PAGE.read_bytes()
    seeds = find_seeds(page, asked.development)
    commands = list_commands(out, seeds, ["--config", "configs/evidence.yaml"])
    if asked.dry_run:
        print_lines(*map(shlex.join, commands))
        return 0
    if status := run_all(commands):
        return status
    configs = {
        world: load_config(ROOT / "configs" / "evidence.yaml", make_overrides(out / world, seeds)) for world in WORLDS
    }
    worlds = {world: read_world(out / world, config, len(seeds.trainings)) for world, config in configs.items()}
    found = compare_arms(worlds, configs["more"].report.bootstrap, seeds.trainings.start)
    held = judge(found)
    command = shlex.join(["python", "tools/studies/preregistered.py", *args])
    text = format_study(seeds, found, held, command)
    document = {"page": hashlib.sha256(page).hexdigest(), "development": asked.development, "holds": held}
    document |= {
        name: [one._asdict() | {"at_95": one.at_95.as_json(), "at_97": one.at_97.as_json()} for one in some]
        for name, some in found.items()
    }
    write_json(out / "preregistered.json", document)
    write_bytes(out / "preregistered.md", text.encode())
    print_lines(*text.split("\n"))
    return 0


def make_overrides(at: Path, seeds: Seeds) -> list[str]:
    """`make_fields`, as `load_config` takes them."""
    fields = make_fields(at, seeds)
    return [f"{name}={value}" for name, value in zip(fields[::2], fields[1::2], strict=True)]


if __name__ == "__main__":
    sys.exit(run_command("preregistered", run, sys.argv[1:]))
