"""The table of retrieval before and after the map, of known numbers and of a run."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from lgd.cli import run_command
from tools.studies import retrieval
from tools.studies.retrieval import Measured, as_difference, as_row, format_study, join, measure_run


def command(args, capsys):
    status = run_command("retrieval", retrieval.run, shlex.split(args))
    return status, *capsys.readouterr()


def test_it_is_a_demo_a_seed(capsys):
    expected = "".join(
        f"lgd demo --pairs 720 --size 96 --data.size 96 --train.workers 0 --train.engine torch --run.seed {seed} "
        f"--run.dir r/seed-{seed}\n"
        for seed in (5, 6)
    )
    assert command("--out r --seeds 5,6 --dry-run", capsys) == (0, expected, "")


def draw(seed, better=0.0):
    random = np.random.default_rng(seed)
    groups = [f"{seed} slide-{row // 3}" for row in range(30)]
    values = [random.random(30) for _ in range(4)]
    return Measured(groups, random.integers(1, 20, 30) - 10 * better, values[0] + better, *values[1:])


def test_queries_of_all_runs_stand_together_and_differences_are_paired():
    runs = {f"r/seed-{seed}": {"after": draw(seed, 1.0), "before": draw(seed)} for seed in (1, 2)}
    table = format_study(runs)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")][2:]
    assert [row[:2] for row in cells] == [
        *[[seed, name] for seed in ("seed-1", "seed-2") for name in ("after", "before", "by chance")],
        *[["all", name] for name in ("after", "before", "after minus before")],
    ]
    pooled = join([draw(1), draw(2)])
    assert cells[-2][2:] == as_row(pooled) and len(set(pooled.groups)) == 20
    mean = np.mean([row for seed in (1, 2) for row in draw(seed).precision])
    assert cells[-2][6].startswith(f"{mean:.3f} [")
    difference = as_difference(join([draw(1, 1.0), draw(2, 1.0)]), pooled)
    assert (
        cells[-1][2:] == difference
        and difference[4] == "+1.000 [+1.000, +1.000]"
        and difference[5].startswith("+0.000")
    )


@pytest.fixture(scope="module")
def finished(tissue_run, change, tmp_path_factory):
    """A folder with the config.yaml of `tissue_run`, its student, and a student of H&E alone."""
    from lgd.train.launch import train_under

    folder = tmp_path_factory.mktemp("study") / "seed-0"
    folder.mkdir()
    config = change(tissue_run, student={"dir": str(folder / "he-only"), "method": "he-only", "epochs": 0.5})
    assert train_under(config, "student")
    (folder / "student").symlink_to(Path(tissue_run.student.dir))
    (folder / "config.yaml").write_text(tissue_run.as_yaml())
    return folder


def test_a_run_is_measured_with_a_number_a_query(finished):
    found = measure_run(str(finished), bias=20)
    assert [*found] == [
        "LGD-Net, mapped latents, whitened, with bias",
        "LGD-Net, mapped latents, whitened",
        "LGD-Net, hallucinated latents",
        "H&E-only, ridge to the whitened latents",
    ]
    for one in found.values():
        assert {len(values) for values in one} == {20}
        assert ((one.hubs == 0) | (one.hubs == 1)).all() and ((one.never == 0) | (one.never == 1)).all()
    assert [*measure_run(str(finished), bias=0)] == [*found][1:]
    assert any("by chance" in line for line in format_study({str(finished): found}))
