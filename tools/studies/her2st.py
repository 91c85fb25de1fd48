"""Real tissue: her2st, of whose one tumour each section is left out in turn, from its folder to a table.

python tools/studies/her2st.py FOLDER [--sections C2,C3] [--out DIR] [--dry-run] [-- OPTION ...]

FOLDER holds the sections, expression.npz and cut_patches.py, which cuts the spots of a fold: the quartiles, means and
components of gene counts are those of the sections that it trains on. The label is ERBB2, as quartile and as number,
and few training spots keep it; the teacher is the other genes of the same spot. One section is of another patient, and
is only scored. All commands run at the top of the checkout; what is finished is not done again. Leaves
OUT/her2st.md and her2st.json.

Shapes: n spots, D components of gene counts.
"""

import argparse
import csv
import dataclasses
import io
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.errors import DataError, require
from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.io.files import publish, write_bytes, write_json
from lgd.io.tables import write_csv
from lgd.labels.predictions import Predictions
from lgd.models.heads import read_answers
from lgd.report.embeddings import ridge
from lgd.report.probed import pooled_latents, score_by_probe
from lgd.scoring.predict import load_scorer, score_shards
from lgd.shards.archive import Shard
from lgd.shards.repeats import open_disjoint
from lgd.store.probe import find_probe
from lgd.store.store import Store
from tools.studies.evidence import ROOT, run_all

PATIENT = "C"
"""Whose sections are left out; those of others are only scored."""
LABELLED = 0.15
"""Share of the training spots whose label is known."""
GIVEN = "--teacher.source imported --teacher.name genes --data.lanes 16"
BUILT = "--shard-size 16 --he-size 96"
"""Small shards, for a batch is mixed from several; and small images, whose decoding takes no time."""
GENES = "30 components of log1p counts of other genes"


class Label(NamedTuple):
    """ERBB2 as one kind of target."""

    title: str
    target: str
    """Its YAML file."""
    metric: str
    metric_title: str


LABELS = {
    "quartile": Label(
        "ERBB2 as an ordinal, its quartile among the training spots",
        "name: ERBB2 quartile\nkind: ordinal\nclasses: [Q1, Q2, Q3, Q4]\n",
        "kappa",
        "quadratic weighted kappa",
    ),
    "number": Label(
        "ERBB2 as a number, log1p of counts per 10,000",
        "name: ERBB2\nkind: number\nunit: log1p of counts per 10,000\n",
        "pearson",
        "Pearson r",
    ),
}
DISTIL, LGD_NET, BOTH, RIDGE = "label distillation", "LGD-Net, latents alone", "LGD-Net, both", "post-hoc ridge"
HE_ONLY, SHUFFLED, TEACHER = "H&E only", "both, pairs shuffled", "teacher (probe)"
ARMS = {
    HE_ONLY: "--student.method he-only",
    DISTIL: "--student.method distil",
    LGD_NET: "--student.method lgd --student.distil_weight 0",
    BOTH: "--student.method lgd",
    SHUFFLED: "--student.method lgd --student.pairs shuffled",
}
"""The students that are trained; configs/evidence.yaml teaches soft labels beside latents."""
DIFFERENCES = ((LGD_NET, HE_ONLY), (DISTIL, HE_ONLY), (LGD_NET, DISTIL), (BOTH, DISTIL), (BOTH, SHUFFLED))
CAVEATS = (
    "One tumour: the sections are serial sections of one patient, so their differences are no sample of patients. "
    "There is no interval over patients, and none can be had from these data.",
    "One training of each network in each fold: another seed moves every number, and what differs between folds is the "
    "seed's as much as the section's.",
    f"The labels are gene counts and no IHC levels. {LABELLED:.0%} of the training spots have one; all others teach by "
    "the teacher's latents or soft labels alone.",
    "The networks start from random weights, and their settings are those of virtual tissue (configs/evidence.yaml): "
    "nothing was chosen on these sections.",
    "The other patient's section is only scored, by the networks of each fold, and its mean is shown. It is shallow "
    "and low in ERBB2, so that nearly all its spots are of the lowest quartile.",
)
"""What stands above the table."""

Scores = dict[str, dict[str, float]]
"""Row -> section that was left out -> score."""


def list_sections(folder: Path) -> list[str]:
    """The sections of the patient."""
    try:
        with np.load(folder / "expression.npz", allow_pickle=False) as data:
            return sorted({*data["section"][data["patient"] == PATIENT].tolist()})
    except (OSError, KeyError, ValueError) as error:
        remedy = "name the folder of her2st, with its sections, expression.npz and cut_patches.py"
        raise DataError(f"{folder / 'expression.npz'} cannot be read ({error}): {remedy}") from error


def write_fold(cut: Path, section: str, number: int) -> None:
    """Write the pairs of a fold, one CSV a label and one of what is only scored, and its table of features."""
    with (cut / "spots.csv").open(newline="") as file:
        spots = [*csv.DictReader(file)]
    training = [row["key"] for row in spots if row["patient"] == PATIENT and row["slide"] != section]
    dice = np.random.default_rng([number, 0x4845523253])
    unknown = {*dice.permutation(training)[math.ceil(LABELLED * len(training)) :].tolist()}
    split_of = dict.fromkeys(training, "train")
    for name in LABELS:
        rows: dict[bool, list[list[str]]] = {True: [], False: []}
        for row in spots:
            key = row["key"]
            label = f"Q{int(row['level']) + 1}" if name == "quartile" else f"{math.log1p(float(row['erbb2'])):.4f}"
            fields = [key, row["he"], row["slide"], split_of.get(key, "test"), row["mpp"]]
            rows[row["patient"] == PATIENT].append([*fields, "" if key in unknown else label])
        for suffix, some in (("", rows[True]), ("-outside", rows[False])):
            text = io.StringIO()
            write_csv(text, ["key", "he", "slide", "split", "mpp", "label"], some)
            write_bytes(cut / f"{name}{suffix}.csv", text.getvalue().encode())
    with np.load(cut / "latents.npz") as table, publish(cut / "features.npz") as temporary, temporary.open("wb") as to:
        np.savez(to, key=table["key"], features=table["latents"])


def list_commands(fold: Path, options: Sequence[str]) -> list[list[str]]:
    """The commands of a fold after its spots were cut: shards, the store and the students of each label."""
    commands = []
    for name in LABELS:
        run = fold / name
        folders = [f"{run}/shards", f"{run}/outside"]
        for folder, suffix in zip(folders, ("", "-outside"), strict=True):
            what = ["--root", f"{fold}/cut/{name}{suffix}.csv", "--out", folder]
            built = ["--layout", "csv", "--target", f"{fold.parent}/{name}.yaml", *BUILT.split()]
            commands.append(["lgd", "build-shards", *built, *what])
        given = ["--config", "configs/evidence.yaml", "--run.dir", str(run), *GIVEN.split(), *options]
        shards = ["--data.shards", f"[{', '.join(folders)}]"]
        commands.append(["lgd", "import-latents", *given, *shards, "--encoder", GENES, f"{fold}/cut/features.npz"])
        given += ["--data.shards", f"[{folders[0]}]"]
        for number, arm in enumerate(ARMS.values()):
            commands.append(["lgd", "train", *given, *arm.split(), "--student.dir", f"{run}/student-{number}"])
    return commands


def score_fold(run: Path) -> tuple[dict[str, Predictions], dict[str, Predictions]]:
    """What each row says of the section that was left out, and of the other patient's."""
    shards, outside = open_disjoint([f"{run}/shards"]), open_disjoint([f"{run}/outside"])
    store = Store(run / "latents", teachers=("genes",))
    probe = find_probe(store, shards.of_split("train"))
    assert probe is not None, "label distillation was trained"
    answers: list[dict[str, Predictions]] = []
    for split in (shards.of_split("test"), outside.of_split("test")):
        rows = {
            name: score_shards(load_scorer(run / f"student-{number}"), split, threads=1)[0]
            for number, name in enumerate(ARMS)
        }
        mapped_nD = map_features(run / "student-0", store, shards.of_split("train"), split)
        logits_nK = probe.network().logits_of(torch.from_numpy(mapped_nD))
        output_nK = read_answers(logits_nK, shards.target, probe.values, 1.0).numpy()
        rows[RIDGE] = dataclasses.replace(rows[HE_ONLY], output=output_nK)
        rows[TEACHER] = score_by_probe(store, probe, shards, split, rows[HE_ONLY])
        answers.append(rows)
    return answers[0], answers[1]


def map_features(student: Path, store: Store, training: Sequence[Shard], split: Sequence[Shard]) -> np.ndarray:
    """The latents (n, D) that a ridge regression reads off the features of a student that was taught none."""
    scorer = load_scorer(student)
    train, train_vectors = score_shards(scorer, training, threads=1)
    _, vectors = score_shards(scorer, split, threads=1)
    latents_nD = pooled_latents(store, training)
    mapped_nD, _ = ridge(train_vectors["features"], latents_nD, train.groups, vectors["features"])
    return mapped_nD


def format_scores(label: Label, inside: Scores, outside: Scores) -> list[str]:
    """The table of a label, and that of the differences, in Markdown."""
    sections = [*inside[HE_ONLY]]
    rows = [
        [row, *(f"{value:.3f}" for value in of_row.values()), _mean(of_row, ".3f"), _mean(outside[row], ".3f")]
        for row, of_row in inside.items()
    ]
    lines = [f"## {label.title}", ""]
    lines += markdown_table([label.metric_title, *sections, "mean", "other patient, mean"], rows)
    rows = []
    for after, before in DIFFERENCES:
        minus = {name: inside[after][name] - inside[before][name] for name in sections}
        cells = [f"{value:+.3f}" for value in minus.values()]
        rows.append([f"{after} minus {before}", *cells, _mean(minus, "+.3f")])
    return [*lines, *markdown_table(["difference", *sections, "mean"], rows)]


def _mean(of_section: Mapping[str, float], form: str) -> str:
    return format(float(np.mean([*of_section.values()])), form)


def write_study(out: Path, sections: Sequence[str], command: str) -> list[str]:
    """Score what was trained, and write her2st.json and her2st.md; returns the lines of the latter."""
    document: dict[str, object] = {"command": command, "caveats": [*CAVEATS]}
    lines = ["# her2st: one tumour, each section left out in turn", "", *list_items(CAVEATS), ""]
    for name, label in LABELS.items():
        found: tuple[Scores, Scores] = {}, {}
        for section in sections:
            for scores, rows in zip(found, score_fold(out / section / name), strict=True):
                for row, said in rows.items():
                    value = said.measures.score(said.label, said.output)[label.metric]
                    scores.setdefault(row, {})[section] = value
        inside, outside = found
        document[name] = {"metric": label.metric, "left out": inside, "other patient": outside}
        lines += format_scores(label, inside, outside)
    lines.append(code_block(command))
    write_json(out / "her2st.json", document)
    write_bytes(out / "her2st.md", "\n".join([*lines, ""]).encode())
    return lines


def run(args: list[str]) -> int:
    """Run the study; returns the exit status."""
    end = args.index("--") if "--" in args else len(args)
    parser = Parser("python tools/studies/her2st.py", "Leave out each section of her2st's one tumour, in the checkout.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "What follows -- are fields of the run, such as -- --student.epochs 24."
    parser.add_argument("folder", metavar="FOLDER", help="the folder of her2st, with cut_patches.py")
    parser.add_argument("--sections", default="", metavar="S,S", help="those that are left out in turn (default: all)")
    parser.add_argument("--out", default="runs/her2st", metavar="DIR", help="the study's folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    asked = parser.parse(args[:end])
    folder, out = Path(asked.folder).expanduser().absolute(), ROOT / asked.out
    there = list_sections(folder)
    sections = asked.sections.split(",") if asked.sections else there
    for section in sections:
        require(section in there, f"--sections names {section!r:.40}: use some of {','.join(there)}")
    for section in sections:
        fold = out / section
        cut = [str(folder / "cut_patches.py"), f"{fold}/cut", section]
        commands = list_commands(fold, args[end + 1 :])
        if asked.dry_run:
            print_lines(*map(shlex.join, [cut, *commands]))
            continue
        for name, label in LABELS.items():
            write_bytes(out / f"{name}.yaml", label.target.encode())
        # The table of features is written last.
        if not (fold / "cut" / "features.npz").exists():
            if status := run_all([cut]):
                return status
            write_fold(fold / "cut", section, there.index(section))
        if status := run_all(commands):
            return status
    if not asked.dry_run:
        print_lines(*write_study(out, sections, shlex.join(["python", "tools/studies/her2st.py", *args])))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("her2st", run, sys.argv[1:]))
