"""A full disk: one clear message, nothing that looks whole, and the same command goes on when there is room.

Those of the store, of checkpoints and of the download cache lie beside the tests of these.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.io.files import explain_write_errors, list_folder
from lgd.io.folders import publish_folder
from lgd.report.report import show_pictures

pytestmark = pytest.mark.faults
FULL = "cannot be written, no space is left (No space left on device): free some, or use another disk"


@pytest.fixture
def refuse(disk, capsys):
    """`refuse(command, size)`: run a command on a disk of a size, which is too small for it."""

    def run(command, size):
        folder = disk(f"size={size}")
        assert main(command) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("lgd: "))
        assert FULL in line and str(folder) in line
        return folder

    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build_command(tissue, out, *more):
    split = ("--slides", f"{tissue}/truth.csv", "--split", "group:0.5,0.25,0.25")
    command = ("build-shards", "--layout", "bci", "--root", f"{tissue}", "--out", f"{out}")
    return [*command, "--mpp", "0.46", "--shard-size", "8", *split, *more]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards(tissue, tissue_config, tmp_path, disk, refuse, workers):
    command = build_command(tissue, tmp_path / "disk" / "out", "--workers", workers)
    for size in ("4k", "60k", "300k") if workers == "0" else ("60k",):
        out = refuse(command, size) / "out"
        assert "manifest.json" not in list_folder(out) and not [*out.glob(".*.tmp")]
    disk("size=50m")
    # As many workers as you like: the bytes are the same.
    assert main(command[:-2]) == 0
    assert contents(out) == contents(Path(tissue_config.shard_dirs[0]))


def test_virtual_tissue(tmp_path, disk, refuse):
    out = tmp_path / "disk" / "out"
    command = ["synth", str(out), "--pairs", "8", "--size", "64", "--workers", "1"]
    for size in ("4k", "20k", "40k"):
        refuse(command, size)
        assert not (out / "synth.json").exists()
    disk("size=50m")
    assert main(command) == 0
    assert main([*command[:1], str(tmp_path / "straight"), *command[2:]]) == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_exports_and_sheets(tissue_run, tissue, tmp_path, disk, refuse):
    (tmp_path / "config.yaml").write_text(tissue_run.as_yaml())
    out, image = tmp_path / "disk" / "out", str(next((tissue / "HE" / "test").iterdir()))
    commands = [
        ["export-latents", "--store", str(tissue_run.latents.dir), "--out", str(out)],
        ["query", "--config", str(tmp_path / "config.yaml"), "--sheet", f"{out}.png", image],
    ]
    for command in commands:
        refuse(command, "20k")
        assert not [*tmp_path.glob("disk/**/.*.tmp")]
    disk("size=50m")
    assert [main(command) for command in commands] == [0, 0]
    assert {*contents(tmp_path / "disk")} >= {Path("out.png"), Path("out/export.json")}


def test_pictures_beside_the_curves(tmp_path, disk):
    Image.effect_noise((256, 256), 99).save(tmp_path / "a.png")
    student = disk("size=20k") / "student"
    with pytest.raises(DataError, match=r"student/tensorboard/.* cannot be written, no space is left"):
        show_pictures(tmp_path, student)
    assert contents(student) == {}
    disk("size=50m")
    show_pictures(tmp_path, student)
    assert len(contents(student)) == 1


def test_the_output(tissue_config):
    command = [sys.executable, "-m", "lgd", "info", *tissue_config.shard_dirs]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(f"lgd: the output {FULL}")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EDQUOT, "no space is left .Disk quota exceeded.: free some"),
        (errno.EFBIG, "no space is left .File too large.: free some"),
        (errno.EROFS, ".Read-only file system.: get write access, or name another folder"),
        (errno.EIO, ".Input/output error.: its disk or network drive fails: try again, or use another one"),
        (errno.ESTALE, ".Stale file handle.: its disk or network drive fails"),
    ],
)
def test_what_errors_of_a_disk_mean(tmp_path, code, reason):
    for write in (explain_write_errors(tmp_path), publish_folder(tmp_path / "a", "mark")):
        with pytest.raises(DataError, match=f"{tmp_path}.* cannot be written,? {reason}"), write:
            raise OSError(code, os.strerror(code))
    assert [*tmp_path.iterdir()] == []
