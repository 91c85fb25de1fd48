"""cluster/head.sh: what it refuses, and what it hands to `ray start`; tests/test_job.py starts a real head with it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = Path(__file__).resolve().parents[2] / "cluster" / "head.sh"


@pytest.fixture
def start(tmp_path):
    """`start(*options, **environment)` runs head.sh in a home of its own; `ray start` only tells what it was given."""
    real = Path(sys.executable).parent / "ray"
    bin_dir, home = tmp_path / "bin", tmp_path / "home"
    bin_dir.mkdir()
    home.mkdir()
    fake = bin_dir / "ray"
    told = "mode=$RAY_AUTH_MODE stop=$RAY_JOB_STOP_WAIT_TIME_S $*"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = start ]; then echo "{told}"; else exec {real} "$@"; fi\n')
    fake.chmod(0o755)

    def run(*options, **environment) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(home), **environment}
        return subprocess.run([HEAD, *options], env=env, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (["--dashboard-host", "192.0.2.7", "--block"], {"RAY_AUTH_TOKEN": "  ", "RAY_AUTH_MODE": "disabled"}),
        (["--dashboard-host=127.0.0.1", "--dashboard-host=::"], {"RAY_AUTH_TOKEN_PATH": "/dev/null"}),
        # Ray would not fall back to a token of its own either.
        ([], {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}),
    ],
)
def test_an_exposed_dashboard_is_refused_without_a_token(start, tmp_path, options, environment):
    done = start(*options, **environment)
    assert done.returncode == 1 and "there is no token" in done.stderr
    assert "mode=" not in done.stdout, "ray start was not called"
    assert not (tmp_path / "home" / ".ray" / "auth_token").exists()


def test_an_exposed_dashboard_starts_with_a_token(start):
    done = start("--dashboard-host", "0.0.0.0", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="e" * 64)
    assert done.stdout == "mode=token stop=120 start --head --dashboard-host=0.0.0.0 --dashboard-host 0.0.0.0\n", (
        done.stderr
    )


def test_on_loopback_a_token_is_made_for_this_user_alone(start, tmp_path):
    done = start("--port=7001")
    assert done.stdout == "mode=token stop=120 start --head --dashboard-host=127.0.0.1 --port=7001\n", done.stderr
    token = tmp_path / "home" / ".ray" / "auth_token"
    made = token.read_text()
    assert len(made) >= 32 and made not in done.stdout + done.stderr
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert start("--dashboard-host=0.0.0.0").returncode == 0, "what loopback made counts from then on"
    assert token.read_text() == made


def test_help_tells_and_starts_nothing(start):
    done = start("--block", "-h")
    assert done.returncode == 0 and "usage: cluster/head.sh" in done.stdout and "mode=" not in done.stdout
