"""CORN against cross-entropy as the way to teach an ordinal, on virtual tissue that settings are chosen on.

python tools/studies/ordinal.py [--out DIR] [--seeds N] [--dry-run]

On tissue of the seeds 901 and 902 the commands train a teacher in each way, and with it H&E-only and LGD-Net, N times
each, with as many samples, learning rate and steps in both ways. A teacher's soft levels are part of LGD-Net, so that
its rows compare the whole chain. All run at the top of the checkout; what is finished is not done again.

The rule, written before any of these networks was trained: the default of `train.ordinal` becomes the way with the
higher quadratic kappa of H&E-only and LGD-Net together, if the 95 % interval of the difference excludes 0; else it
stays cross-entropy, which is simpler and needs no other networks to be trained again.

Shapes: S trainings, R resamples.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser, typed
from lgd.base.markup import markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.labels.predictions import Predictions, check_same
from lgd.metrics import Floats, interval
from lgd.models.methods import BASELINE, METHODS, PROPOSED
from lgd.report.ablation_table import draw_runs
from lgd.report.results import format_interval
from lgd.scoring.predict import TEACHER_ROW, load_scorer, score_shards
from lgd.shards.repeats import open_disjoint
from tools.studies.evidence import LABELS, run_all

TISSUES = ("901", "902")
TISSUE = "--pairs 4800 --slides 400 --size 96 --test 0.3 --coupling 1.0"
"""As large as that of the other studies: of 768 steps on 1,024 patches H&E-only learns nothing in either way."""
USUAL, OTHER = "cross-entropy", "corn"
STUDENTS = (BASELINE, PROPOSED)
BOTH = "both students"
METRICS = {
    "kappa": "kappa (quadratic)",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "within_one": "within one",
    "ece": "ECE",
    "brier": "Brier",
}
_RESAMPLES = 1000

Answers = Mapping[str, Sequence[Predictions]]
"""By row of the table: one a training."""


def list_commands(out: str, seeds: int) -> list[list[str]]:
    """The commands: arguments of `lgd`, after its name."""
    commands = []
    for tissue in TISSUES:
        drawn, shards = f"{out}/tissue-{tissue}", f"{out}/shards-{tissue}"
        folders = ["--root", drawn, "--out", shards, "--slides", f"{drawn}/truth.csv"]
        commands += [
            ["lgd", "synth", drawn, *TISSUE.split(), "--seed", tissue],
            ["lgd", "build-shards", "--layout", "bci", *folders, *LABELS.split()],
        ]
    # A training of each kind after the other, so that a table of fewer is there early.
    for seed in range(seeds):
        for tissue in TISSUES:
            for way in (USUAL, OTHER):
                run = f"{out}/{tissue}-{way}"
                given = ["--config", "configs/evidence.yaml", "--run.dir", run, "--train.ordinal", way]
                # Both teachers' latents lie in one store, whose domain targets are measured once.
                given += ["--data.shards", f"[{out}/shards-{tissue}]", "--latents.dir", f"{out}/latents-{tissue}"]
                given += ["--teacher.name", way.replace("-", "_"), "--teacher.dir", f"{run}/teacher"]
                if not seed:
                    commands += [["lgd", verb, *given] for verb in ("train-teacher", "cache-latents")]
                for method in STUDENTS:
                    student = ["--student.method", method, "--student.dir", f"{run}/{method}-{seed}"]
                    commands.append(["lgd", "train", *given, *student, "--run.seed", str(seed + 1)])
    return commands


def read_answers(out: str, way: str, seeds: int) -> Answers:
    """What the networks that were taught in a way say of the test slides of all tissues together."""
    folders = {TEACHER_ROW: ["teacher"]}
    folders |= {METHODS[method].title: [f"{method}-{seed}" for seed in range(seeds)] for method in STUDENTS}
    splits = {tissue: open_disjoint([f"{out}/shards-{tissue}"]).of_split("test") for tissue in TISSUES}

    def score(folder: str) -> Predictions:
        kind = "teacher" if folder == "teacher" else "student"
        return join(
            {
                tissue: score_shards(load_scorer(f"{out}/{tissue}-{way}/{folder}", kind), split, threads=1)[0]
                for tissue, split in splits.items()
            }
        )

    return {name: [score(folder) for folder in some] for name, some in folders.items()}


def join(parts: Mapping[str, Predictions]) -> Predictions:
    """The answers to several tissues, by their names, as to one: each slide is a slide of its tissue."""
    first, *_ = parts.values()
    return dataclasses.replace(
        first,
        keys=[f"{name} {key}" for name, part in parts.items() for key in part.keys],
        groups=[f"{name} {group}" for name, part in parts.items() for group in part.groups],
        label=np.concatenate([part.label for part in parts.values()]),
        output=np.concatenate([part.output for part in parts.values()]),
        # No metric here asks for them.
        places=None,
        sites={},
    )


def compare_ways(usual: Answers, other: Answers) -> list[list[str]]:
    """Rows of the table: a metric of each network in both ways, and the difference, paired by slide and by training."""
    rows = []
    for metric, title in METRICS.items():
        drawn: dict[str, tuple[Floats, Floats]] = {}
        for name, runs in usual.items():
            for one in (*runs, *other[name]):
                check_same(runs[0], one)
            usual_SR, other_SR = (draw_runs(some[name], metric, _RESAMPLES, 0) for some in (usual, other))
            drawn[name] = usual_SR, other_SR
        students = [drawn[METHODS[method].title] for method in STUDENTS]
        # The two students of a seed count as one training.
        mean_SR: list[Floats] = [np.mean(some, axis=0) for some in zip(*students, strict=True)]
        drawn[BOTH] = mean_SR[0], mean_SR[1]
        groups = usual[TEACHER_ROW][0].labelled_groups
        for name, (usual_SR, other_SR) in drawn.items():
            cells = [format_interval(interval(one_SR, groups)) for one_SR in (usual_SR, other_SR)]
            rows.append([title, name, *cells, format_interval(interval(other_SR - usual_SR, groups), "+.3f")])
    return rows


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    parser = Parser("python tools/studies/ordinal.py", "CORN against cross-entropy, in the checkout.")
    parser.add_argument("--out", default="runs/ordinal", metavar="DIR", help="its folder (default: %(default)s)")
    parser.add_argument("--seeds", default=3, type=typed(int), metavar="N", help="trainings of each (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args)
    commands = list_commands(asked.out, asked.seeds)
    if asked.dry_run:
        print_lines(*map(shlex.join, commands))
        return 0
    if status := run_all(commands):
        return status
    usual, other = (read_answers(asked.out, way, asked.seeds) for way in (USUAL, OTHER))
    head = ["", "network", USUAL, OTHER, f"{OTHER} minus {USUAL}"]
    print_lines(*markdown_table(head, compare_ways(usual, other)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("ordinal", run, sys.argv[1:]))
