"""cluster/Dockerfile, as far as it can be checked without building it."""

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of each line, continued lines joined."""
    lines = [line for line in (ROOT / "cluster" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in joined if line.strip()]


def of(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def let_through(path: str) -> bool:
    """Whether .dockerignore leaves a path at the top of the checkout to the builder: the last pattern counts."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            kept = line.startswith("!")
    return kept


def test_what_is_copied_is_there_and_reaches_the_builder():
    copied = [source for text in of("COPY") for source in text.split()[:-1]]
    assert {"pyproject.toml", "lgd", "configs", "tools"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert let_through(source), source
    # What the build of the package reads.
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)
    for private in (".git", "runs", "shards", "shared", ".env", ".venv", "cluster", "cluster/slurm.sh", "tests"):
        assert not let_through(private), private


def test_pip_installs_this_project_with_extras_that_it_has():
    (pip,) = (text for text in of("RUN") if text.startswith("pip "))
    folder, extras = re.search(r'"(.)\[(.+)\]"', pip).groups()
    assert folder == "." and "--no-cache-dir" in pip
    (default,) = (text.partition("=")[2] for text in of("ARG") if text.startswith("FAISS="))
    named = extras.replace("${FAISS}", default).split(",")
    assert default == "gpu" and set(named) <= set(PROJECT["optional-dependencies"])
    assert "cpu" in PROJECT["optional-dependencies"], "the other value that the head of the file names"
    # One of the two, never both.
    assert len({"cpu", "gpu"} & set(named)) == 1


def test_what_pip_installs_is_pinned_within_the_bounds_of_the_project():
    (pip,) = (text for text in of("RUN") if text.startswith("pip "))
    assert "--constraint constraints.txt" in pip
    lines = (ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["cpu"] + extras["gpu"] + extras["s3"] + extras["slides"]:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(pins[name]), f"{name} {pins.get(name)}"


def test_the_base_is_a_python_that_the_project_supports():
    assert of("FROM") == ["${BASE}"]
    (base,) = (text.partition("=")[2] for text in of("ARG") if text.startswith("BASE="))
    major, minor = map(int, re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-bookworm", base).groups())
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert major == 3 and int(low) <= minor < int(high)
    apt = next(text for text in of("RUN") if text.startswith("apt-get"))
    assert "g++" in apt.split() and "wget" in apt.split() and "rm -rf /var/lib/apt/lists" in apt


def test_it_runs_as_a_plain_user_with_token_authentication():
    names = [name for name, _ in instructions()]
    (user,) = of("USER")
    assert user != "0" and any(f"useradd --uid {user}" in text for text in of("RUN"))
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    (environment,) = of("ENV")
    # As cluster/head.sh has it where other machines join; tests/cluster/test_head.py asks such a head's ports.
    metrics = {"RAY_enable_metrics_collection=0", "AUTOSCALER_METRIC_PORT=-1", "DASHBOARD_METRIC_PORT=-1"}
    assert {"RAY_AUTH_MODE=token", *metrics} <= set(environment.split())
    assert "TOKEN=" not in environment and not any("TOKEN" in text for text in of("ARG"))
    (place,) = of("WORKDIR")
    assert place == "/opt/lgd"


def test_its_command_runs():
    (command,) = of("CMD")
    python, *args = json.loads(command)
    assert python == "python"
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: lgd" in done.stdout, done.stderr
