"""BCI and MIST in full: what is checked of their folders, the commands, and the whole way on tiny stand-ins."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lgd.cli import run_command
from lgd.config_files import load_config
from tests.support.published import write_published
from tests.support.studies import list_trained, run_here
from tools.studies import evidence, real

FEW = {"0": 3, "1+": 3, "2+": 3, "3+": 3}
FEWER = {
    "bci": {
        "images": {"HE/train": 40, "HE/test": 12, "IHC/train": 40, "IHC/test": 12},
        "levels": {"HE/test": FEW, "IHC/test": FEW},
    },
    "mist": {"images": {"trainA": 60, "trainB": 60, "valA": 20, "valB": 20}},
}
TINY = """
--deepspeed {} --train.engine torch --train.workers 0 --train.precision fp32 --latents.precision fp32 --train.batch 8
--teacher.encoder resnet10 --student.encoder resnet10 --teacher.epochs 0.2 --student.epochs 0.2 --data.size 32
--data.threads 1 --latents.views 1 --latents.map 1 --latents.nuclei_grid 2 --latents.membrane_grid 2
--report.bootstrap 10
""".split()
"""Networks and images of a test."""


def command(args, capsys):
    status = run_command("real", real.run, args)
    return status, *capsys.readouterr()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """`published(layout)`: a stand-in of a data set that is taken to be published with fewer images."""
    fewer = {layout: one._replace(**FEWER[layout]) for layout, one in real.PUBLISHED.items()}
    monkeypatch.setattr(real, "PUBLISHED", fewer)
    monkeypatch.setattr(real, "run_all", run_here)
    # As run_all has it.
    monkeypatch.chdir(evidence.ROOT)

    def write(layout):
        write_published(tmp_path / layout, layout, fewer[layout].images, fewer[layout].levels)
        return tmp_path / layout

    return write


def read_options(line):
    """The fields of the run in a command."""
    return load_config(evidence.ROOT / line[line.index("--config") + 1], line[line.index("--run.dir") :])


def test_bci_is_built_trained_reported_and_compared(capsys):
    status, out, _ = command(["bci", "/data/BCI", "--dry-run", "--", "--data.size", "256"], capsys)
    build, *stages = map(shlex.split, out.splitlines())
    given = "--config configs/bci.yaml --run.dir runs/bci --data.shards [runs/bci/shards/bci] --data.size 256".split()
    assert status == 0 and build[2:] == (
        "--layout bci --root /data/BCI --out runs/bci/shards/bci --split keep:0.1 --mpp 0.46".split()
    )
    own = [["train-teacher"], ["cache-latents"], ["build-index"], ["train"]]
    own += [
        ["train", "--student.method", "he-only", "--student.dir", "runs/bci/he-only"],
        ["evaluate", "--report.also", "[runs/bci/he-only]"],
        ["ablate", "--seeds", "5"],
    ]
    assert stages == [["lgd", verb, *given, *more] for verb, *more in own]


def test_mist_alone_has_no_levels_to_compare_and_with_bci_it_has(capsys):
    _, out, _ = command(["mist", "/data/MIST", "--out", "r", "--dry-run"], capsys)
    build, *stages = map(shlex.split, out.splitlines())
    assert build[-4:] == ["--split", "group:0.8,0.1,0.1", "--mpp", "0.4661"]
    assert [line[1] for line in stages] == "train-teacher cache-latents build-index train evaluate".split()
    config = read_options(stages[0])
    assert [Path(one).name for one in config.shard_dirs] == ["mist"] and config.teacher.learns == [
        "membranes",
        "nuclei",
    ]
    _, out, _ = command(["mist", "/data/MIST", "--bci", "/data/BCI", "--out", "r", "--dry-run"], capsys)
    *builds, teacher, _, _, _, _, _, ablate = map(shlex.split, out.splitlines())
    assert [line[line.index("--layout") + 1] for line in builds] == ["bci", "mist"] and ablate[1] == "ablate"
    config = read_options(teacher)
    assert [Path(one).name for one in config.shard_dirs] == ["bci", "mist"] and config.teacher.learns == ["label"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["bci"], "real: python tools/studies/real.py needs FOLDER"),
        (["her2match", "f"], "choose from"),
        (["bci", "f", "--bci", "g"], "--bci is for mist"),
    ],
)
def test_a_mistake_in_the_command_starts_nothing(args, told, capsys):
    status, out, err = command(args, capsys)
    assert (status, out) == (2, "") and told in err and "Traceback" not in err


def test_the_numbers_add_up():
    for published in real.PUBLISHED.values():
        for folder, levels in published.levels.items():
            assert sum(levels.values()) == published.images[folder]


def test_all_that_differs_is_told_at_once_and_nothing_is_built(published, tmp_path, capsys):
    folder = published("bci")
    next((folder / "HE" / "train").iterdir()).unlink()
    for path in (folder / "IHC" / "test").iterdir():
        path.unlink()
    (folder / "IHC" / "test").rmdir()
    (folder / "HE" / "test" / "00000_test_0.png").rename(folder / "HE" / "test" / "00000_test_3+.png")
    status, out, err = command(["bci", str(folder), "--out", str(tmp_path / "run"), "--", *TINY], capsys)
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines() == [
        f"real: {folder} is not BCI as it is published:",
        "- HE/train has 39 images: 40 are published",
        "- HE/test has 2 images of level 0: 3 are published",
        "- HE/test has 4 images of level 3+: 3 are published",
        "- IHC/test is missing: 12 images are published in it",
        "Name the folder that holds HE and IHC, and where it does, unpack the archive of "
        "https://bupt-ai-cz.github.io/BCI/ anew. Other patches are packed as docs/shards.md shows.",
    ]
    assert not (tmp_path / "run").exists()


def test_bci_runs_to_its_report_and_resumes(published, tmp_path, capsys):
    folder, run = published("bci"), tmp_path / "run"
    args = ["bci", str(folder), "--out", str(run), "--seeds", "1", "--", *TINY]
    status, out, _ = command(args, capsys)
    assert status == 0 and out.splitlines()[-2:] == [
        f"report   {run}/report/summary.md",
        f"methods  {run}/ablation/ablation.md",
    ]
    rows = [model["name"] for model in json.loads((run / "report" / "metrics.json").read_text())["models"]]
    assert {"LGD-Net", "H&E-only", "IHC teacher"} <= {*rows}
    assert "label distillation" in (run / "ablation" / "ablation.md").read_text()
    made = {path: path.read_bytes() for path in run.rglob("model.safetensors")}
    assert len(made) == 7
    # What is gone is made again, with the same digits, and what is there stays.
    shutil.rmtree(run / "he-only")
    status, _, err = command(args, capsys)
    assert status == 0 and {path: path.read_bytes() for path in run.rglob("model.safetensors")} == made
    assert list_trained(err) == {f"{run}/he-only"}


def test_mist_runs_without_any_level(published, tmp_path, capsys):
    folder, run = published("mist"), tmp_path / "run"
    status, out, _ = command(["mist", str(folder), "--out", str(run), "--", *TINY], capsys)
    assert status == 0 and out.splitlines()[-1] == f"report   {run}/report/summary.md"
    assert (run / "report" / "summary.md").is_file() and not (run / "ablation").exists()


def test_make_names_the_folders():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def make(*args):
        command = ["make", "-n", "-o", ".venv/installed", *args]
        return subprocess.run(command, cwd=evidence.ROOT, env=environment, capture_output=True, text=True)

    expected = ".venv/bin/python tools/studies/real.py mist 'a b' --bci c -- --data.size 256"
    asked = make("mist", "MIST=a b", "BCI=c", "OPTIONS=--data.size 256").stdout.replace("\\\n", "")
    assert shlex.split(asked) == shlex.split(expected)
    assert "make bci BCI=FOLDER" in make("bci").stderr
