"""Leaving out the sections of her2st: what a fold may know, its commands, and the whole way on a few spots."""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest

from lgd.cli import run_command
from tests.support.studies import list_trained, run_here
from tools.studies import evidence, her2st

SECTIONS, SPOTS = ("B4", "C2", "C3", "C4"), 24
TINY = "--data.size 32 --student.epochs 1 --train.batch 12".split()


def command(args, capsys):
    status = run_command("her2st", her2st.run, args)
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def few(real_data, tmp_path_factory):
    """The folder of her2st as it would be of four sections with a few spots each."""
    folder = real_data / "her2st"
    if not (folder / "cut_patches.py").is_file():
        pytest.skip(f"no spots: {folder} is missing, as the authors of her2st published it")
    few = tmp_path_factory.mktemp("her2st")
    shutil.copy(folder / "cut_patches.py", few)
    data = dict(np.load(folder / "expression.npz", allow_pickle=False))
    chosen = np.concatenate([np.flatnonzero(data["section"] == one)[:SPOTS] for one in SECTIONS])
    genes = np.flatnonzero((data["genes"] == "ERBB2") | (np.arange(len(data["genes"])) % 20 == 0))
    cut = {name: data[name][chosen] for name in ("section", "patient", "spot", "xy")}
    np.savez(few / "expression.npz", counts=data["counts"][np.ix_(chosen, genes)], genes=data["genes"][genes], **cut)
    for one in SECTIONS:
        (few / f"{one}.jpg").symlink_to(folder / f"{one}.jpg")
    return few


def read_pairs(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def studied(few, tmp_path_factory):
    """A study that left out C2: its folder, its arguments and what it printed."""
    out = tmp_path_factory.mktemp("study")
    args = [str(few), "--sections", "C2", "--out", str(out), "--", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(her2st, "run_all", run_here)
        patch.chdir(evidence.ROOT)
        assert run_command("her2st", her2st.run, args) == 0
    return out, args


def test_a_fold_knows_labels_of_few_training_spots_alone(studied):
    out, _ = studied
    for label in her2st.LABELS:
        rows = read_pairs(out / "C2" / "cut" / f"{label}.csv")
        splits = {(row["slide"], row["split"]) for row in rows}
        assert splits == {("C2", "test"), ("C3", "train"), ("C4", "train")}
        known = [bool(row["label"]) for row in rows if row["split"] == "train"]
        assert len(known) == 2 * SPOTS and sum(known) == 8
        assert all(row["label"] for row in rows if row["split"] == "test")
        outside = read_pairs(out / "C2" / "cut" / f"{label}-outside.csv")
        assert {(row["slide"], row["split"]) for row in outside} == {("B4", "test")} and len(outside) == SPOTS
    # Quartiles are those of the training spots.
    spots = read_pairs(out / "C2" / "cut" / "spots.csv")
    training = [row["level"] for row in spots if row["slide"] in ("C3", "C4")]
    assert [training.count(level) for level in "0123"] == [2 * SPOTS // 4] * 4


def test_the_table_has_every_row_and_no_interval(studied, capsys):
    out, _ = studied
    text = (out / "her2st.md").read_text()
    for caveat in her2st.CAVEATS:
        assert caveat.split(":")[0].split("(")[0] in text.partition("## ")[0]
    document = json.loads((out / "her2st.json").read_text())
    for label in her2st.LABELS:
        rows = {*her2st.ARMS, her2st.RIDGE, her2st.TEACHER}
        for where in ("left out", "other patient"):
            assert document[label][where].keys() == rows
            assert all({*of_section} == {"C2"} for of_section in document[label][where].values())
    scores = document["number"]["left out"]
    minus = scores[her2st.DISTIL]["C2"] - scores[her2st.HE_ONLY]["C2"]
    assert any(line.startswith("| label distillation minus") and f"{minus:+.3f}" in line for line in text.splitlines())
    assert "[" not in text.partition("## ")[2].partition("    python")[0]


def test_the_same_command_gives_the_same_digits(studied, monkeypatch, capsys):
    out, args = studied
    monkeypatch.setattr(her2st, "run_all", run_here)
    monkeypatch.chdir(evidence.ROOT)
    before = (out / "her2st.json").read_bytes()
    weights = (out / "C2" / "quartile" / "student-3" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "C2" / "quartile" / "student-3")
    status, _, err = command(args, capsys)
    assert status == 0 and list_trained(err) == {f"{out}/C2/quartile/student-3"}
    assert (out / "her2st.json").read_bytes() == before
    assert (out / "C2" / "quartile" / "student-3" / "model.safetensors").read_bytes() == weights


def test_each_section_of_the_patient_is_left_out_by_the_same_commands(few, capsys):
    status, out, _ = command([str(few), "--out", "/r", "--dry-run"], capsys)
    lines = [shlex.split(line) for line in out.splitlines()]
    per_fold = 1 + len(her2st.LABELS) * (3 + len(her2st.ARMS))
    assert status == 0 and len(lines) == 3 * per_fold
    first, second = (lines[number * per_fold : (number + 1) * per_fold] for number in (0, 1))
    assert [[word.replace("C2", "C3") for word in line] for line in first] == second


@pytest.mark.parametrize(
    ("sections", "told"), [("B4", "--sections names 'B4': use some of C2,C3,C4"), ("C2,", "--sections names ''")]
)
def test_only_sections_of_the_patient_are_left_out(few, sections, told, capsys):
    status, out, err = command([str(few), "--sections", sections, "--dry-run"], capsys)
    assert (status, out) == (2, "") and told in err


def test_another_folder_is_refused_in_one_line(tmp_path, capsys):
    status, out, err = command([str(tmp_path)], capsys)
    assert (status, out) == (1, "") and "expression.npz cannot be read" in err and len(err.splitlines()) == 1
