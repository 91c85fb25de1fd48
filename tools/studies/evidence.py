"""The studies of docs/evidence.md: for each, the commands from virtual tissue to its table, run one after the other.

python tools/studies/evidence.py STUDY [--out DIR] [--dry-run] [-- OPTION ...]

All run at the top of the checkout. `--out` becomes a run of `lgd ablate` beside its tissue and shards; worlds other
than that of `method` lie beside it, under its name and theirs. What is finished is not done again.
"""

import argparse
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.text import print_lines
from lgd.cli import run_command

logger = logging.getLogger("lgd.studies")

ROOT = Path(__file__).resolve().parents[2]

STUDIES = {
    "method": "each method beside its controls, five trainings",
    "coupling": "the same where the H&E reveals less, and nothing",
    "shortcut": "the training slides' stain gives their level away",
    "background": "the same with the background, from white to grey",
    "centers": "each of three centers of unequal stain left out",
    "ki67": "a number, the percentage of stained nuclei, with a report",
}
TISSUE = "--pairs 4800 --slides 400 --size 96 --test 0.3 --seed 7001"
LABELS = "--split keep:0.05 --labelled 24 --mpp 0.46"
COUPLINGS = ("0", "0.5", "0.75")
CENTERS = ("center-1", "center-2", "center-3")
JITTERS = {"shortcut": ("0", "0.2", "0.4"), "background": ("0", "0.2")}
"""Strengths of augmentation under which a shortcut is tried."""


def compare_methods(run: str, tissue: str, world: str, ablate: str) -> list[list[str]]:
    """Commands that draw a world under `tissue`, build its shards, and train and compare all methods in `run`."""
    drawn, shards = f"{tissue}/tissue", f"{tissue}/shards"
    folders = ["--root", drawn, "--out", shards, "--slides", f"{drawn}/truth.csv"]
    given = ["--config", "configs/evidence.yaml", "--run.dir", run, "--data.shards", f"[{shards}]"]
    return [
        ["lgd", "synth", drawn, *TISSUE.split(), *world.split()],
        ["lgd", "build-shards", "--layout", "bci", *folders, *LABELS.split()],
        ["lgd", "ablate", *given, *ablate.split()],
    ]


def list_commands(study: str, out: str) -> list[list[str]]:
    """The commands of a study: arguments of `lgd`, or of Python."""
    if study in JITTERS:
        return _list_shortcut(study, out)
    if study == "centers":
        return _list_centers(f"{out}-centers")
    if study == "ki67":
        return _list_ki67(f"{out}-ki67")
    commands = compare_methods(out, out, "--coupling 1.0", "--seeds 5 --jobs 2")
    if study == "coupling":
        for coupling in COUPLINGS:
            run = f"{out}-{coupling}"
            commands += compare_methods(run, run, f"--coupling {coupling}", "--seeds 3 --jobs 2")
        runs = [*(f"{coupling}={out}-{coupling}" for coupling in COUPLINGS), f"1.0={out}"]
        commands.append(["tools/studies/plot_coupling.py", f"{out}/coupling.png", *runs])
    return commands


def _list_shortcut(study: str, out: str) -> list[list[str]]:
    """A world where nothing (0), and one where the level of most (0.9), is given away, under each augmentation."""
    place, field = ("stain", "stain_jitter") if study == "shortcut" else ("background", "light_jitter")
    commands, pairs = [], []
    for jitter in JITTERS[study]:
        tissues = [f"{out}-{place}-{shortcut}" for shortcut in ("0", "0.9")]
        for tissue, shortcut in zip(tissues, ("0", "0.9"), strict=True):
            world = f"--coupling 1.0 --shortcut {shortcut} --shortcut-in {place}"
            run = f"{tissue}-jitter-{jitter}"
            commands += compare_methods(run, tissue, world, f"--seeds 3 --jobs 2 --data.{field} {jitter}")
        pairs.append(f"{jitter}=" + ",".join(f"{tissue}-jitter-{jitter}" for tissue in tissues))
    return [*commands, ["tools/studies/table_shortcut.py", *pairs]]


def _list_centers(run: str) -> list[list[str]]:
    """A world of three centers, each with a scanner and dyes of its own, all with all levels."""
    world = "--pairs 1600 --slides 200 --size 96 --test 0.3 --coupling 1.0 --seed 7002"
    folders = [f"{run}/shards/{center}" for center in CENTERS]
    given = "--layout csv --split keep:0.05 --mpp 0.46"
    built = [
        ["lgd", "build-shards", *given.split(), "--root", f"{run}/tissue", "--center", center, "--out", folder]
        for center, folder in zip(CENTERS, folders, strict=True)
    ]
    shards = f"[{', '.join(folders)}]"
    ablate = ["--config", "configs/evidence.yaml", "--run.dir", run, "--data.shards", shards, "--leave-out", "center"]
    return [
        ["lgd", "synth", f"{run}/tissue", "--centers", str(len(CENTERS)), *world.split()],
        *built,
        ["lgd", "ablate", *ablate, "--seeds", "3"],
    ]


def _list_ki67(run: str) -> list[list[str]]:
    """Nuclei of which a share is stained, the methods that predict it, and the report on one training of LGD-Net."""
    world = "--stain nuclei --pairs 1200 --slides 200 --size 96 --test 0.3 --coupling 1.0 --seed 7003"
    given = "--layout csv --target ki67 --split keep:0.05 --mpp 0.46"
    config = ["--config", "configs/evidence.yaml", "--run.dir", run, "--data.shards", f"[{run}/shards]"]
    trained = f"{run}/ablation"
    report = ["--student.dir", f"{trained}/lgd-net/seed-0", "--report.also", f"[{trained}/h-e-only/seed-0]"]
    return [
        ["lgd", "synth", f"{run}/tissue", *world.split()],
        ["lgd", "build-shards", *given.split(), "--root", f"{run}/tissue/pairs.csv", "--out", f"{run}/shards"],
        ["lgd", "ablate", *config, "--seeds", "3"],
        ["lgd", "build-index", *config],
        ["lgd", "evaluate", *config, *report],
    ]


def run_all(commands: Sequence[Sequence[str]]) -> int:
    """Run commands in turn until one fails; returns its exit status."""
    for command in commands:
        logger.info(shlex.join(command))
        arguments = ["-m", *command] if command[0] == "lgd" else command
        status = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
        if status:
            return status
    return 0


def run(args: list[str]) -> int:
    """Run a study; returns the exit status."""
    end = args.index("--") if "--" in args else len(args)
    parser = Parser("python tools/studies/evidence.py", "Run a study of docs/evidence.md, in the checkout.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    studies = [f"  {name:12}{what}" for name, what in STUDIES.items()]
    parser.epilog = "\n".join(["studies:", *studies, "", "What follows -- is given to lgd ablate, such as -- --full."])
    parser.add_argument("study", choices=list(STUDIES), metavar="STUDY", help="one of the list below")
    parser.add_argument("--out", default="runs/evidence", metavar="DIR", help="the run's folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args[:end])
    commands = [
        command + args[end + 1 :] if command[1] == "ablate" else command
        for command in list_commands(asked.study, asked.out)
    ]
    if asked.dry_run:
        print_lines(*map(shlex.join, commands))
        return 0
    return run_all(commands)


if __name__ == "__main__":
    sys.exit(run_command("evidence", run, sys.argv[1:]))
