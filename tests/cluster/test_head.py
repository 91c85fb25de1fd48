"""cluster/head.sh: what it refuses, and what it hands to `ray start`; tests/test_job.py runs jobs on one."""

import contextlib
import http.client
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.sockets import find_own_address, free_ports, list_listening

HEAD = Path(__file__).resolve().parents[2] / "cluster" / "head.sh"
STARTED = "mode=token stop=120 loopback=0 metrics= start --head"


@pytest.fixture
def start(tmp_path):
    """`start(*options, **environment)` runs head.sh in a home of its own; `ray start` only tells what it was given."""
    real = Path(sys.executable).parent / "ray"
    bin_dir, home = tmp_path / "bin", tmp_path / "home"
    bin_dir.mkdir()
    home.mkdir()
    fake = bin_dir / "ray"
    loopback, metrics = "$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "$RAY_enable_metrics_collection$AUTOSCALER_METRIC_PORT"
    told = f"mode=$RAY_AUTH_MODE stop=$RAY_JOB_STOP_WAIT_TIME_S loopback={loopback} metrics={metrics} $*"
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
    assert (
        done.stdout
        == "mode=token stop=120 loopback=0 metrics= start --head --dashboard-host=0.0.0.0 --dashboard-host 0.0.0.0\n"
    ), done.stderr


def test_on_loopback_a_token_is_made_for_this_user_alone(start, tmp_path):
    done = start("--port=7001")
    assert done.stdout == f"{STARTED} --dashboard-host=127.0.0.1 --port=7001\n", done.stderr
    token = tmp_path / "home" / ".ray" / "auth_token"
    made = token.read_text()
    assert len(made) >= 32 and made not in done.stdout + done.stderr
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert start("--dashboard-host=0.0.0.0").returncode == 0, "what loopback made counts from then on"
    assert token.read_text() == made


@pytest.mark.parametrize("name", ["~/.ray/auth_token", "elsewhere"])
def test_a_token_that_others_can_read_is_refused(start, tmp_path, name):
    token = tmp_path / ("elsewhere" if name == "elsewhere" else "home/.ray/auth_token")
    token.parent.mkdir(exist_ok=True)
    token.write_text("e" * 64)
    token.chmod(0o640)
    environment = {"RAY_AUTH_TOKEN_PATH": str(token)} if name == "elsewhere" else {}
    done = start(**environment)
    assert done.returncode == 1 and f"run `chmod 600 {token}`" in done.stderr and "mode=" not in done.stdout
    token.chmod(0o600)
    assert "mode=" in start(**environment).stdout


@pytest.mark.parametrize(
    ("ray", "told"),
    [
        (None, "`ray` is not in PATH: activate the environment that has lgd"),
        (
            "echo 'No module named ray.scripts' >&2; exit 1",
            "Ray does not work in this environment: No module named ray",
        ),
    ],
)
def test_a_ray_that_is_missing_or_broken_is_named_as_the_cause(start, tmp_path, ray, told):
    (tmp_path / "bin" / "ray").unlink()
    if ray:
        (tmp_path / "bin" / "ray").write_text(f"#!/bin/sh\n{ray}\n")
        (tmp_path / "bin" / "ray").chmod(0o755)
    done = start(PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1 and told in done.stderr and "token" not in done.stderr.replace("get-auth-token", "")


def test_it_says_how_to_end_the_head(start):
    assert "`ray stop` ends this head, and with it every Ray process" in start().stderr
    assert "Ctrl-C, or `kill " in start("--block").stderr


def is_answered(ip: str, port: int, path: str) -> bool:
    """Whether something other than a refusal comes back to whoever has no token."""
    connection = http.client.HTTPConnection(ip, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def test_beyond_loopback_nothing_but_its_health_is_answered_without_the_token():
    ip, (client,) = find_own_address(), free_ports(1)
    assert not ip.startswith("127."), "this machine has no network"
    # A socket's path must be short, so not pytest's own folder.
    folder, token = tempfile.mkdtemp(prefix="lgd-", dir="/tmp"), secrets.token_hex(32)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_TOKEN": token, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = [
        f"--node-ip-address={ip}",
        "--port=0",
        "--dashboard-port=0",
        f"--ray-client-server-port={client}",
        "--num-cpus=1",
    ]
    options += ["--dashboard-agent-listen-port=0", f"--temp-dir={folder}", "--block"]
    with Path(folder, "head.log").open("wb") as log:
        head = subprocess.Popen([HEAD, *options], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        ended = time.monotonic() + 120
        # The agent is the last to listen.
        while sum(name.startswith("ray::Dash") for name, *_ in list_listening(head.pid)) < 3:
            assert head.poll() is None and time.monotonic() < ended, Path(folder, "head.log").read_text()
            time.sleep(0.5)
        beyond = [
            port for _, address, port in list_listening(head.pid) if address not in ("127.0.0.1", "::ffff:127.0.0.1")
        ]
        assert len(beyond) >= 4, "Ray's own ports are there for other machines"
        paths = "/", "/metrics", "/api/jobs/"
        assert not {(port, path) for port in beyond for path in paths if is_answered(ip, port, path)}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_help_tells_and_starts_nothing(start):
    done = start("--block", "-h")
    assert done.returncode == 0 and "usage: cluster/head.sh" in done.stdout and "mode=" not in done.stdout
