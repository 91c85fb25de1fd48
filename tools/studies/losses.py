"""Losses of the hallucination against today's (docs/evidence.md), on virtual tissue that settings are chosen on.

python tools/studies/losses.py [--out DIR] [--seeds N] [--arms NAME ...] [--dry-run]

Draws tissue under DIR, trains a teacher of membranes and one of levels, and N students an arm, which differ in fields
of `student:` alone, and prints the table with their paired differences to the first arm. What is finished is not done
again; `--arms` trains only those, and prints nothing.

The rule, written before any of these students was trained: an arm is kept if the 95 % interval of its difference to the
first one excludes 0 in favour on one endpoint at least, and against it on none.

Shapes: S trainings, R resamples, G groups, n patches, D latents.
"""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser, typed
from lgd.base.device import exact_float32
from lgd.base.markup import markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.config import Config
from lgd.config_files import load_config
from lgd.io.location import as_location
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, draws, interval
from lgd.report.ablation_table import draw_runs
from lgd.report.embeddings import own_ranks
from lgd.report.probed import pooled_latents
from lgd.report.questions import answer_by_probes, read_questions, score_answers
from lgd.report.results import format_interval
from lgd.retrieval.factory import fit_on_parts
from lgd.scoring.predict import Scorer, load_scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.repeats import open_disjoint
from lgd.store.store import Store
from lgd.stream.reader import Reader, in_batches, stream
from lgd.train.launch import train_under
from tools.studies.evidence import LABELS, run_all

logger = logging.getLogger("lgd.studies")

ROOT = Path(__file__).resolve().parents[2]
TISSUE = "--seed 9201 --beyond 1 --coupling 1 --pairs 1600 --slides 200 --size 96 --test 0.3"
ARMS = {
    "today": "",
    "standardised": "hallucination_loss=standardised",
    "standardised, 0.3": "hallucination_loss=standardised hallucination_weight=0.3",
    "whitened": "hallucination_loss=whitened",
    "whitened, 0.3": "hallucination_loss=whitened hallucination_weight=0.3",
    "tolerance of a place": "tolerance=1",
    "InfoNCE, 0.1": "contrast_weight=0.1 contrast_queue=1024",
    "two teachers": "teachers=[membranes,levels]",
}
"""The fields of `student:` by which each differs."""
LABELLED = 100
"""Patches that a probe is fitted on."""
_RESAMPLES = 1000


class Trained(NamedTuple):
    """What one student says of the test split: its levels, its probes' answers, and the ranks of the own IHCs."""

    predictions: Predictions
    said_UtQ: Floats
    rank_n: Floats
    head_rank_n: Floats


def list_commands(out: str) -> list[list[str]]:
    """The commands of `lgd` before the students."""
    drawn, shards = f"{out}/tissue", f"{out}/shards"
    folders = ["--root", drawn, "--out", shards, "--slides", f"{drawn}/truth.csv"]
    given = ["--config", "configs/evidence.yaml", "--run.dir", out, "--data.shards", f"[{shards}]"]
    teachers = [["--teacher.name", "membranes", "--teacher.learns", "[membranes]"], ["--teacher.name", "levels"]]
    return [
        ["lgd", "synth", drawn, *TISSUE.split()],
        ["lgd", "build-shards", "--layout", "bci", *folders, *LABELS.split()],
        *(["lgd", verb, *given, *teacher] for teacher in teachers for verb in ("train-teacher", "cache-latents")),
    ]


def configure(out: str, arm: str, seed: int) -> Config:
    """The run of one student."""
    folder = f"{out}/students/{'-'.join(arm.replace(',', '').split())}-{seed}"
    given = {"run.dir": out, "data.shards": f"[{out}/shards]", "student.dir": folder, "teacher.name": "membranes"}
    fields = [f"student.{field}" for field in ARMS[arm].split()]
    options = [*(f"{name}={value}" for name, value in given.items()), "teacher.learns=[membranes]", *fields]
    config = load_config(str(ROOT / "configs" / "evidence.yaml"), [f"--{option}" for option in options])
    return replace(config, run=replace(config.run, seed=1 + seed))


def score_one(config: Config) -> Trained:
    """What a trained student says of the test split."""
    shards, store = open_disjoint(config.shard_dirs), Store(config.latents.dir, teachers=("membranes",))
    scorer, splits = load_scorer(config.student.dir), [shards.of_split("train"), shards.of_split("test")]
    predictions, test = score_shards(scorer, splits[1], threads=1)
    keys = [key.decode() for part in store.parts_of(splits[0]) for key in part.array("key")]
    questions = read_questions(as_location(f"{config.run.dir}/tissue/questions.csv"))
    answer_mQ = np.stack([one.find(keys) for one in questions], axis=1)
    train_mF, test_tF = (read_streams(scorer, split) for split in splits)
    said_UtQ = answer_by_probes(train_mF, test_tF, answer_mQ, LABELLED, 0)
    whitening = fit_on_parts(store.parts_of(splits[0]), config.latents.components)
    assert whitening is not None
    own_nD = whitening.apply(pooled_latents(store, splits[1]))
    ranks = [own_ranks(whitening.apply(test[name]), own_nD).astype(np.float64) for name in ("query", "pooled")]
    return Trained(predictions, said_UtQ, *ranks)


def read_streams(scorer: Scorer, shards: Sequence[Shard]) -> Floats:
    """All that a student pools of each H&E, (n, F)."""
    reader, found = Reader(shards, ("he",), scorer.config.size), []
    for _, images in stream(reader, in_batches(range(reader.total), 64), threads=1):
        with torch.inference_mode(), exact_float32():
            out = scorer.model(torch.from_numpy(images["he"]).permute(0, 3, 1, 2).to(scorer.device))
        found.append(out["streams"].double().cpu().numpy())
    reader.close()
    return np.concatenate(found)


def draw_ranks(rank_n: Floats, groups: Sequence[str]) -> dict[str, Floats]:
    """The median rank and the share among the first ten, and after each that of each resample of groups: (1 + R,)."""
    names, group_n = np.unique(groups, return_inverse=True)
    count_RG = np.concatenate([np.ones((1, len(names))), *draws(len(names), _RESAMPLES, 0, _RESAMPLES)])
    order_n = np.argsort(rank_n)
    count_Rn = count_RG[:, group_n[order_n]]
    half_R = (2 * count_Rn.cumsum(axis=1) >= count_Rn.sum(axis=1, keepdims=True)).argmax(axis=1)
    first_R = (count_Rn * (rank_n[order_n] <= 10)).sum(axis=1) / count_Rn.sum(axis=1)
    return {"median rank": rank_n[order_n][half_R], "own IHC in the first 10": first_R}


def measure(trained: Sequence[Trained], out: str) -> dict[str, Floats]:
    """Of each endpoint the value of each training and of its resamples, (S, 1 + R)."""
    said = [one.predictions for one in trained]
    groups, drawn = said[0].groups, {"kappa": draw_runs(said, "kappa", _RESAMPLES, 0)}
    for number, question in enumerate(read_questions(as_location(f"{out}/tissue/questions.csv"))):
        answer_t = question.find(said[0].keys)
        if question.steps is None:
            scores = [
                score_answers(one.said_UtQ[:, :, number], answer_t, groups, None, _RESAMPLES, 0)["r2"]
                for one in trained
            ]
            drawn[question.name] = np.stack(scores)
    for ranks, by in (([one.rank_n for one in trained], ""), ([one.head_rank_n for one in trained], " by the head")):
        runs = [draw_ranks(rank_n, groups) for rank_n in ranks]
        drawn |= {f"{name}{by}": np.stack([run[name] for run in runs]) for name in runs[0]}
    return drawn


def format_study(arms: Mapping[str, Mapping[str, Floats]], groups: int) -> list[str]:
    """The values, and the differences to the first arm, in Markdown."""
    (first, today), *_ = arms.items()
    values = [
        [name, *(format_interval(interval(drawn, groups), ".3f") for drawn in one.values())]
        for name, one in arms.items()
    ]
    minus = [
        [
            f"{name} minus {first}",
            *(format_interval(interval(one[endpoint] - today[endpoint], groups), "+.3f") for endpoint in today),
        ]
        for name, one in arms.items()
        if name != first
    ]
    return markdown_table(["", *today], [*values, *minus])


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    parser = Parser("python tools/studies/losses.py", "Losses of the hallucination, in the checkout.")
    parser.add_argument("--out", default="runs/losses", metavar="DIR", help="its folder (default: %(default)s)")
    parser.add_argument("--seeds", type=typed(int), default=3, metavar="N", help="trainings of each (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="NAME", help="train these, and print nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args)
    commands = list_commands(asked.out)
    if asked.dry_run:
        print_lines(*map(shlex.join, commands))
        return 0
    if status := run_all(commands):
        return status
    runs = {arm: [configure(asked.out, arm, seed) for seed in range(asked.seeds)] for arm in asked.arms or ARMS}
    for seed in range(asked.seeds):
        for arm, configs in runs.items():
            trained = train_under(configs[seed], "student")
            logger.info("%s, seed %d: %s", arm, seed, "trained" if trained else "reused, nothing changed")
    if asked.arms:
        return 0
    answers = {arm: [score_one(config) for config in configs] for arm, configs in runs.items()}
    groups = len(set(answers["today"][0].predictions.groups))
    print_lines(*format_study({arm: measure(some, asked.out) for arm, some in answers.items()}, groups))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("losses", run, sys.argv[1:]))
