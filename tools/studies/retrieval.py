"""The study of docs/queries.md: what the map and the whitening do to retrieval, on virtual tissue of three seeds.

python tools/studies/retrieval.py [--out DIR] [--seeds N,N] [--bias B] [--dry-run]

Runs `lgd demo` once a seed at the top of the checkout, where it is not done yet, and prints the table: vectors before
(the hallucination head's, by the cosine) and after (the map's, whitened) for each seed and for all queries together,
with 95 % intervals over slides.
"""

import itertools
import logging
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser, typed
from lgd.base.markup import markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.config_files import load_config
from lgd.io.files import exists
from lgd.io.location import as_location
from lgd.metrics import Floats
from lgd.models.methods import BASELINE, METHODS
from lgd.report.embeddings import RECALL_AT, Embedding, count_answers, own_ranks
from lgd.report.neighbours import PRECISION_AT_K, average_precision, mean_with_interval
from lgd.report.results import format_interval
from lgd.report.retrieval import Network, list_embeddings
from lgd.retrieval.hubs import chance_of_hubs, chance_of_never
from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.repeats import open_disjoint
from lgd.store.parts import read_labels
from lgd.store.store import Store

logger = logging.getLogger("lgd.studies")

ROOT = Path(__file__).resolve().parents[2]
SEEDS = "3101,3102,3103"
WORLD = "--pairs 720 --size 96 --data.size 96 --train.workers 0 --train.engine torch"
_RESAMPLES = 1000
COLUMNS = (
    *(f"own IHC in the first {k}" for k in RECALL_AT),
    *("median rank", "precision by label", "hubs among first answers", "never found"),
)


class Measured(NamedTuple):
    """What some queries found: a number a query, but for `never`, which has one a row of the gallery."""

    groups: list[str]
    rank: Floats
    precision: Floats
    chance: Floats
    """Precision of a random ranking."""
    hubs: Floats
    never: Floats


def list_commands(out: str, seeds: Sequence[str]) -> dict[str, list[str]]:
    """Run folder -> arguments of `lgd`."""
    runs = {f"{out}/seed-{seed}": seed for seed in seeds}
    return {run: ["demo", *WORLD.split(), "--run.seed", seed, "--run.dir", run] for run, seed in runs.items()}


def measure_run(run: str, bias: float) -> dict[str, Measured]:
    """The vectors of a finished run -> what its held-out H&Es found with them; 0 is no bias."""
    config = load_config(f"{run}/config.yaml", [f"--latents.bias={bias}"])
    shards, store = open_disjoint(config.shard_dirs), Store(config.latents.dir)
    training, split = shards.of_split("train"), shards.of_split("test")
    networks = []
    for folder in (f"{run}/student", f"{run}/he-only"):
        scorer = load_scorer(folder)
        networks.append(Network(scorer, *score_shards(scorer, split, threads=1)))
    scored = networks[0].predictions
    groups = [f"{run} {group}" for group in scored.groups]
    embeddings = list_embeddings(config, store, training, split, networks, shards)
    label_m, classes = read_labels(store.parts_of(training)), scored.target.width

    def measure(one: Embedding, own_nD: np.ndarray) -> Measured:
        precision_n, chance_n = average_precision(
            one.queries_nD, scored.label, one.train_mD, label_m, PRECISION_AT_K, classes
        )
        hubs_n, _, never_m = count_answers(one.queries_nD, own_nD, PRECISION_AT_K)
        rank_n = own_ranks(one.queries_nD, own_nD)
        return Measured(groups, rank_n, precision_n, chance_n, hubs_n, never_m)

    return {one.name.split(" (")[0]: measure(one, one.own_nD) for one in embeddings if one.own_nD is not None}


def join(some: Sequence[Measured]) -> Measured:
    """The queries of several runs together."""
    groups = [group for one in some for group in one.groups]
    return Measured(groups, *(np.concatenate(parts) for parts in list(zip(*some, strict=True))[1:]))


def as_values(one: Measured) -> list[Floats]:
    """What the cells with an interval are means of."""
    return [*((one.rank <= k).astype(np.float64) for k in RECALL_AT), one.precision, one.hubs, one.never]


def as_row(one: Measured) -> list[str]:
    """The cells of a row of the table."""
    cells = [format_interval(mean_with_interval(value, one.groups, _RESAMPLES, 0)) for value in as_values(one)]
    return [*cells[: len(RECALL_AT)], f"{np.median(one.rank):g}", *cells[len(RECALL_AT) :]]


def as_difference(after: Measured, before: Measured) -> list[str]:
    """The cells of the paired differences; a median has none."""
    values = [one - other for one, other in zip(as_values(after), as_values(before), strict=True)]
    cells = [format_interval(mean_with_interval(value, after.groups, _RESAMPLES, 0), "+.3f") for value in values]
    return [*cells[: len(RECALL_AT)], "", *cells[len(RECALL_AT) :]]


def by_chance(one: Measured) -> list[str]:
    """The cells of blind queries of one run."""
    n = len(one.groups)
    ranks = [*(f"{k / n:.3f}" for k in RECALL_AT), f"{(n + 1) / 2:g}"]
    shares = (one.chance.mean(), chance_of_hubs(n, 1, n), chance_of_never(n, PRECISION_AT_K, n))
    return [*ranks, *(f"{share:.3f}" for share in shares)]


def format_study(runs: Mapping[str, Mapping[str, Measured]]) -> list[str]:
    """The table, in Markdown."""
    rows: list[list[str]] = []
    for run, of_run in runs.items():
        rows += [[Path(run).name, name, *as_row(one)] for name, one in of_run.items()]
        rows.append([Path(run).name, "by chance", *by_chance(next(iter(of_run.values())))])
    first, *_ = runs.values()
    pooled = {name: join([of_run[name] for of_run in runs.values()]) for name in first}
    rows += [["all", name, *as_row(one)] for name, one in pooled.items()]
    # What queries compare comes first, then what lacks its last step.
    student = [name for name in pooled if not name.startswith(METHODS[BASELINE].title)]
    for after, before in itertools.pairwise(student):
        rows.append(["all", f"{after} minus {before}", *as_difference(pooled[after], pooled[before])])
    return markdown_table(["", "vectors", *COLUMNS], rows)


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    parser = Parser("python tools/studies/retrieval.py", "Run the study of docs/queries.md, in the checkout.")
    parser.add_argument("--out", default="runs/retrieval", metavar="DIR", help="its folder (default: %(default)s)")
    parser.add_argument("--seeds", default=SEEDS, metavar="N,N", help="seeds of tissue and training (%(default)s)")
    parser.add_argument("--bias", type=typed(float), default=0.0, metavar="B", help="latents.bias (%(default)s: none)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args)
    commands = list_commands(asked.out, asked.seeds.split(","))
    if asked.dry_run:
        print_lines(*(shlex.join(["lgd", *command]) for command in commands.values()))
        return 0
    for folder, command in commands.items():
        if not exists(as_location(folder) / "report" / "summary.md"):
            logger.info("lgd %s", shlex.join(command))
            if status := subprocess.run([sys.executable, "-m", "lgd", *command], cwd=ROOT).returncode:
                return status
    print_lines(*format_study({folder: measure_run(folder, asked.bias) for folder in commands}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("retrieval", run, sys.argv[1:]))
