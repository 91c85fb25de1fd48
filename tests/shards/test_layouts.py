"""Layouts are classes; the pairs that each finds are tested in test_pairs.py."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from lgd.base.errors import ConfigError
from lgd.base.target import find_target
from lgd.cli import main
from lgd.shards.layouts import LAYOUTS, find_layout
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder

FLAT = "python:mine:Flat"


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def draw(folder, names):
    folder.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (64, 64), (200, number, 40)).save(folder / name)


def test_a_layout_outside_the_package_is_packed_and_verified(mine, tmp_path, capsys):
    draw(tmp_path / "flat", ["a-1-he.png", "a-1-ihc.png", "b-7-he.png", "b-7-ihc.png"])
    build = ["build-shards", "--layout", FLAT, "--root", f"{tmp_path}/flat", "--out", f"{tmp_path}/out", "--mpp", "0.5"]
    assert main(build) == 0
    opened = ShardFolder.open(tmp_path / "out")
    assert opened.manifest.layout == FLAT and opened.manifest.splits["train"].samples == 2
    # The set is plain: nothing of the layout is imported to read it.
    sys.modules.pop("mine", None)
    assert main(["verify", f"{tmp_path}/out"]) == 0
    assert "mine" not in sys.modules
    capsys.readouterr()

    draw(tmp_path / "odd", ["a-1-he.png"])
    assert main([*build[:4], f"{tmp_path}/odd", "--out", f"{tmp_path}/other"]) == 1
    assert "a-1-he.png: has no partner a-1-ihc.png: add it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mit", r"^--layout is 'mit': use one of bci, mist, csv, slides, or python:package.module:name$"),
        ("python:mine", r"^--layout is 'python:mine': write python:package.module:name$"),
        ("python:mine:tiny", r"^--layout is python:mine:tiny, which is no layout: derive it from"),
        ("python:lgd.shards.layouts:Layout", r"which is no layout: .*, with a `scan`$"),
        ("python:nowhere_at_all:X", r"module nowhere_at_all cannot be imported"),
    ],
)
def test_what_is_no_layout_is_refused(mine, name, message):
    with pytest.raises(ConfigError, match=message):
        find_layout(name, find_target("her2"))


def test_an_unknown_layout_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="--layout is 'mit'"):
        ShardOptions(layout="mit", root="nowhere", out="out")
    for name in (*LAYOUTS, FLAT):
        assert ShardOptions(layout=name, root="nowhere", out="out", tile=256, mpp=0.5).layout == name
