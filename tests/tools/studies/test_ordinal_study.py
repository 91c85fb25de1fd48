"""The commands of the comparison of CORN with cross-entropy, and its table."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from lgd.base.target import find_target
from lgd.cli import run_command
from lgd.config_files import load_config
from lgd.labels.predictions import Predictions
from lgd.metrics import interval
from lgd.report.ablation_table import draw_runs
from lgd.report.results import format_interval
from tools.studies import ordinal

HER2 = find_target("her2")
ROOT = Path(__file__).resolve().parents[3]


def test_both_ways_have_the_same_commands(capsys):
    assert run_command("ordinal", ordinal.run, ["--out", "r", "--seeds", "2", "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    ways = [[line for line in lines if way in line] for way in ("cross-entropy", "corn")]
    # Of 2 tissues: a teacher, its latents, and two students of two seeds.
    assert [len(some) for some in ways] == [12, 12] and len(lines) == 4 + 24
    usual, other = ([" ".join(line) for line in some] for some in ways)
    assert [line.replace("cross-entropy", "corn").replace("cross_entropy", "corn") for line in usual] == other
    for line in (line for some in ways for line in some):
        given = [f"{name}={value}" for name, value in zip(line[2::2], line[3::2], strict=True) if name != "--config"]
        load_config(ROOT / "configs" / "evidence.yaml", given)
    drawn = [" ".join(line) for line in lines if line[1] == "synth"]
    assert [line.split("--seed ")[1] for line in drawn] == ["901", "902"]


def answer(name, seed, noise):
    """24 patches of 12 slides, and answers to them."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, noise, (24, 4))
    label = np.arange(24) // 2 % 4
    logits[np.arange(24), label] += 2
    output = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    keys, groups = [f"p{n}" for n in range(24)], [f"s{n // 2}" for n in range(24)]
    # What answers to patches of shards have, too.
    more = {"places": np.full((24, 4), np.nan), "sites": {"center": [""] * 24}}
    return Predictions(target=HER2, name=name, keys=keys, groups=groups, label=label, output=output, **more)


def answers(noise):
    joined = [ordinal.join({"901": answer("a", seed, noise), "902": answer("a", seed + 50, noise)}) for seed in (1, 2)]
    return {"IHC teacher": joined[:1], "H&E-only": joined, "LGD-Net": joined[::-1]}


def test_slides_of_two_tissues_count_apart_and_differences_are_paired():
    usual, other = answers(2.0), answers(0.5)
    assert usual["LGD-Net"][0].labelled_groups == 24 and len({*usual["LGD-Net"][0].keys}) == 48
    rows = ordinal.compare_ways(usual, other)
    assert [row[:2] for row in rows[:4]] == [
        ["kappa (quadratic)", name] for name in ("IHC teacher", "H&E-only", "LGD-Net", "both students")
    ]
    usual_SR, other_SR = (draw_runs(some["H&E-only"], "kappa", 1000, 0) for some in (usual, other))
    assert rows[1][4] == format_interval(interval(other_SR - usual_SR, 24), "+.3f")
    # LGD-Net has the same trainings in another order, so that each pair of them has one mean.
    both = [cell.split()[0] for cell in rows[3][2:]]
    assert both == [cell.split()[0] for cell in rows[1][2:]] and rows[3][4] != rows[1][4]


def test_networks_of_other_patches_are_not_compared():
    other = answers(0.5)
    other["LGD-Net"] = [other["LGD-Net"][0].select(np.arange(40))] * 2
    with pytest.raises(ValueError, match="do not hold the same patches"):
        ordinal.compare_ways(answers(2.0), other)
