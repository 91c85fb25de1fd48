"""What `make test` tells when pytest itself does not live to tell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import ctypes, os, signal, threading, time

def test_lives():
    assert "LGD_CRASH_LOGS" not in os.environ

def wait():
    time.sleep(60)

def test_dies():
    threading.Thread(target=wait, daemon=True).start()
    ctypes.string_at(0)

def test_fails():
    assert False
"""


def make_test(folder, name):
    """`make test` of one of `TESTS`."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (folder / "test_some.py").write_text(TESTS)
    chosen = f"-p conftest -c {ROOT}/pyproject.toml --rootdir {folder} -p no:cacheprovider {folder} -k '{name}'"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment |= {"PYTEST_ADDOPTS": chosen, "PYTHONPATH": f"{ROOT}/tests", "TMPDIR": str(folder)}
    command = ["make", "-o", ".venv/installed-dev", "test", f"BIN={Path(sys.executable).parent}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_a_crash_is_told_last_with_its_test_and_all_stacks(tmp_path):
    done = make_test(tmp_path, "lives or dies")
    assert done.returncode == 2
    assert "1 failed, 1 passed" in done.stdout and "crashed while running 'test_some.py::test_dies'" in done.stdout
    told = done.stderr.partition("pytest crashed in\n")[2]
    assert told.startswith("test_some.py::test_dies\nFatal Python error: Segmentation fault\n"), done.stderr
    assert "in wait\n" in told and "in test_dies\n" in told


def test_of_a_failure_nothing_more_is_told(tmp_path):
    done = make_test(tmp_path, "lives or fails")
    assert done.returncode == 2 and "1 failed, 1 passed" in done.stdout and "crashed" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp.")] == []
