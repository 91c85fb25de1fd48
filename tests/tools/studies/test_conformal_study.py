"""The study of label sets in small: they hold their coverage where pooled patches do not."""

import json

import numpy as np
import pytest

from lgd.cli import run_command
from tools.studies import conformal


@pytest.mark.parametrize("name", ["ordinal of 5", "3 classes", "number", "ordinal of 4, small slides worse"])
def test_sets_hold_their_coverage_in_drawn_worlds(name):
    world = next(one for one in conformal.WORLDS if one.name == name)
    random = np.random.default_rng(3)
    measured = [conformal.measure_world(world, 20, random) for _ in range(16)]
    found = {by: np.array([one[f"{by} coverage"] for one in measured]) for by in ("patch", "slide", "pooled")}
    for by in ("patch", "slide"):
        assert found[by].mean() > 0.9 - 2.5 * found[by].std() / 4
    assert found["pooled"].mean() < found["patch"].mean() - 0.02
    if world.small > 1:
        assert found["pooled"].mean() < 0.9 - 2.5 * found["pooled"].std() / 4


def test_a_network_that_is_chosen_on_the_same_slides_is_overrated():
    """What the evidence warns of: ten equally good networks, of which luck on the calibration slides chooses one."""
    random = np.random.default_rng(4)
    measured = [conformal.measure_world(conformal.WORLDS[-1], 20, random)["slide coverage"] for _ in range(16)]
    assert np.mean(measured) < 0.9 - 2 * np.std(measured) / 4


def test_it_prints_a_row_for_each_cell_and_leaves_the_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(conformal, "WORLDS", [conformal.WORLDS[1], conformal.WORLDS[7]])
    out = tmp_path / "conformal.json"
    assert run_command("conformal", conformal.run, ["--worlds=2", "--slides=4,10", f"--out={out}"]) == 0
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[2:] if line]
    numbers = json.loads(out.read_text())["rows"]
    assert [[f" {one['world']} ", f" {one['slides']} "] for one in numbers] == rows and len(rows) == 4
    # Too few slides: all three classes, or the whole range.
    assert numbers[0]["patch size"]["mean"] == 3 and numbers[2]["slide size"]["mean"] == 100
