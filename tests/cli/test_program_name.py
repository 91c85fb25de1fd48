"""The name of the program in commands that are printed: they run as they are."""

import sys

import pytest

from lgd.cli.stages import name_program


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`one/lgd` and `two/lgd`, of which the first is on PATH, seen from the folder above."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lgd").write_text("#!/bin/sh")
        (tmp_path / name / "lgd").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "one"))
    return tmp_path


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("one/lgd", "lgd"),
        ("two/lgd", "two/lgd"),
        ("pytest", "lgd"),
        ("lgd/__main__.py", f"{sys.executable} -m lgd"),
    ],
)
def test_a_command_runs_as_it_is_printed(folder, monkeypatch, called, name):
    monkeypatch.setattr(sys, "argv", [called])
    assert name_program() == name


def test_without_one_on_path_it_is_named_as_it_was_called(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(folder / "one" / "lgd")])
    assert name_program() == str(folder / "one" / "lgd")
