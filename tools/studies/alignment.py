"""The study of weights by alignment (docs/method.md): a third of the pairs misaligned, with and without the weights.

python tools/studies/alignment.py [--out DIR] [--seeds N] [--full Z] [--dry-run]

Draws virtual tissue under DIR, gives a third of its training pairs the IHC of one another, writes `pairs.csv` with an
alignment for each as it would be measured, trains one teacher, and two students a seed, and prints the table with their
paired difference. What is finished is not done again, so that `--seeds` may grow.
"""

import csv
import logging
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser, typed
from lgd.base.markup import markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.config import Config
from lgd.config_files import load_config
from lgd.io.files import write_bytes
from lgd.io.location import as_location
from lgd.io.tables import write_csv
from lgd.labels.predictions import Predictions
from lgd.metrics import Floats, draws, interval
from lgd.report.ablation_table import draw_runs
from lgd.report.embeddings import own_ranks
from lgd.report.probed import pooled_latents
from lgd.report.results import format_interval
from lgd.retrieval.factory import fit_on_parts
from lgd.scoring.predict import choose_latents, load_scorer, score_shards
from lgd.shards.repeats import open_disjoint
from lgd.store.store import Store
from lgd.train.launch import train_under

logger = logging.getLogger("lgd.studies")

ROOT = Path(__file__).resolve().parents[2]
TISSUE = "--pairs 1000 --slides 100 --size 96 --test 0.3 --seed 9302 --coupling 1.0"
SHARE = 1 / 3
ALIGNED, MISALIGNED = (3.2, 0.6), (-0.1, 0.55)
"""Mean and standard deviation of z: those of real pairs and shuffled ones, of windows of 177 um."""
GIVEN = "--student.distil_weight 0 --teacher.epochs 18 --student.epochs 18"
_RESAMPLES = 1000
_RECALL_AT = 10


class Trained(NamedTuple):
    """What one student says of the held-out patches, and at which rank each finds its own IHC."""

    predictions: Predictions
    rank_n: Floats


def misalign(rows: Sequence[Mapping[str, str]], seed: int = 0) -> list[dict[str, object]]:
    """Rows of truth.csv -> rows of pairs.csv, where a third of the training pairs have the IHC of one another."""
    dice = np.random.default_rng([seed, 0x616C69676E])
    training = [number for number, row in enumerate(rows) if row["split"] == "train"]
    order = dice.permutation(training)[: round(SHARE * len(training))].tolist()
    ihc_of = dict(zip(order, np.roll(order, 1).tolist(), strict=True))
    pairs = []
    for number, row in enumerate(rows):
        mean, spread = MISALIGNED if number in ihc_of else ALIGNED
        other = rows[ihc_of.get(number, number)]
        images = {
            name: f"{folder}/{one['split']}/{one['key']}.png"
            for name, folder, one in (("he", "HE", row), ("ihc", "IHC", other))
        }
        z = round(float(dice.normal(mean, spread)), 3)
        pairs.append(
            images | {name: row[name] for name in ("slide", "split")} | {"label": row["level"], "alignment": z}
        )
    return pairs


def prepare(out: str) -> list[list[str]]:
    """Commands of `lgd` before and after pairs.csv is written."""
    return [
        ["synth", f"{out}/tissue", *TISSUE.split()],
        [
            *("build-shards", "--layout", "csv", "--root", f"{out}/tissue/pairs.csv", "--out", f"{out}/shards"),
            *("--mpp", "0.46"),
        ],
    ]


def configure(out: str, full: float, seed: int) -> Config:
    """The run of one student."""
    folders = {"run.dir": out, "data.shards": f"[{out}/shards]", "student.dir": f"{out}/student-{full:g}-{seed}"}
    given = [f"--{name}={value}" for name, value in folders.items()]
    options = GIVEN.split()
    pairs = [f"{name}={value}" for name, value in zip(options[::2], options[1::2], strict=True)]
    config = load_config(str(ROOT / "configs" / "evidence.yaml"), [*given, *pairs, f"--student.full_alignment={full}"])
    return replace(config, run=replace(config.run, seed=1 + seed))


def train_one(config: Config) -> Trained:
    """Train a student, unless it is there, and score the test split."""
    train_under(config, "student")
    shards, store = open_disjoint(config.shard_dirs), Store(config.latents.dir)
    split = shards.of_split("test")
    predictions, vectors = score_shards(load_scorer(config.student.dir), split, threads=1)
    whitening = fit_on_parts(store.parts_of(shards.of_split("train")), config.latents.components)
    assert whitening is not None
    own_nD = whitening.apply(pooled_latents(store, split))
    return Trained(predictions, own_ranks(whitening.apply(choose_latents(vectors)), own_nD).astype(np.float64))


def draw_means(runs: Sequence[Floats], groups: Sequence[str]) -> Floats:
    """The mean of each run's values, and after it that of each resample of groups: (S, 1 + R)."""
    names, group_n = np.unique(groups, return_inverse=True)
    count_RG = np.concatenate([*draws(len(names), _RESAMPLES, 0, _RESAMPLES)])
    patches_R = count_RG @ np.bincount(group_n)
    sums = [count_RG @ np.bincount(group_n, value_n) / patches_R for value_n in runs]
    return np.stack([np.append(value_n.mean(), sums_R) for value_n, sums_R in zip(runs, sums, strict=True)])


def measure(trained: Sequence[Trained]) -> dict[str, Floats]:
    """Of each metric the value of each training and of its resamples."""
    said = [one.predictions for one in trained]
    ranks, groups = [one.rank_n for one in trained], said[0].groups
    return {
        "kappa": draw_runs(said, "kappa", _RESAMPLES, 0),
        "macro-F1": draw_runs(said, "macro_f1", _RESAMPLES, 0),
        f"own IHC in the first {_RECALL_AT}": draw_means(
            [(rank_n <= _RECALL_AT).astype(np.float64) for rank_n in ranks], groups
        ),
        "rank of the own IHC": draw_means(ranks, groups),
    }


def format_study(plain: Sequence[Trained], weighed: Sequence[Trained]) -> list[str]:
    """The table, in Markdown."""
    groups = len(set(plain[0].predictions.groups))
    arms = {"without weights": measure(plain), "weights by alignment": measure(weighed)}
    rows = [
        [name, *(format_interval(interval(drawn, groups), ".3f") for drawn in one.values())]
        for name, one in arms.items()
    ]
    before, after = arms.values()
    minus = [format_interval(interval(after[name] - before[name], groups), "+.3f") for name in before]
    return markdown_table(["", *before], [*rows, ["weights minus none", *minus]])


def make_store(out: str) -> int:
    """Tissue, shards, teacher and latents, where they are not there yet; returns an exit status."""
    synth, build = prepare(out)
    config = configure(out, 0.0, 0)
    write_bytes(as_location(out) / "config.yaml", config.as_yaml().encode())
    for command in (
        synth,
        build,
        *([verb, "--config", f"{out}/config.yaml"] for verb in ("train-teacher", "cache-latents")),
    ):
        logger.info("lgd %s", shlex.join(command))
        if status := subprocess.run([sys.executable, "-m", "lgd", *command], cwd=ROOT).returncode:
            return status
        if command is synth:
            with Path(out, "tissue", "truth.csv").open(newline="") as file:
                pairs = misalign([*csv.DictReader(file)])
            with Path(out, "tissue", "pairs.csv").open("w", newline="") as file:
                write_csv(file, [*pairs[0]], ([*pair.values()] for pair in pairs))
    return 0


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    parser = Parser("python tools/studies/alignment.py", "Run the study of weights by alignment, in the checkout.")
    parser.add_argument("--out", default="runs/alignment", metavar="DIR", help="its folder (default: %(default)s)")
    parser.add_argument("--seeds", type=typed(int), default=5, metavar="N", help="trainings of each (%(default)s)")
    parser.add_argument("--full", type=typed(float), default=2.0, metavar="Z", help="full_alignment (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args)
    if asked.dry_run:
        print_lines(*(shlex.join(["lgd", *command]) for command in prepare(asked.out)))
        return 0
    if status := make_store(asked.out):
        return status
    plain, weighed = (
        [train_one(configure(asked.out, full, seed)) for seed in range(asked.seeds)] for full in (0.0, asked.full)
    )
    print_lines(*format_study(plain, weighed))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("alignment", run, sys.argv[1:]))
