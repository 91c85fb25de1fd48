"""`ray job submit` against a real head node: token authentication on, loopback only, ports and folders of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lgd.data.synth import SynthOptions, synthesise
from lgd.files import read_json
from lgd.store.latents import Store

ROOT = Path(__file__).resolve().parents[1]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head():
    """A head node of our own: its dashboard's address, and the environment that may use it."""
    port, dashboard = free_ports(2)
    # A socket's path must be short, so not pytest's own folder.
    folder = tempfile.mkdtemp(prefix="lgd-", dir="/tmp")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--num-cpus=2"]
    with open(Path(folder) / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, process, Path(folder) / "head.log")
        yield address, env, ray
    finally:
        # All of our own session and no other Ray process of this machine; nothing in it is worth a slow goodbye.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the head node did not come up: {log.read_text()}")


def submit(head, *entrypoint: str) -> str:
    address, env, ray = head
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", *entrypoint]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_stages_run_as_jobs(head, tmp_path):
    tissue, shards, run = tmp_path / "tissue", tmp_path / "shards", tmp_path / "run"
    synthesise(SynthOptions(out=str(tissue), pairs=24, size=64, slides=12, workers=1))
    python = sys.executable
    source = ["--layout", "bci", "--root", str(tissue), "--slides", str(tissue / "truth.csv")]
    source += ["--out", str(shards), "--split", "group:0.6,0.2,0.2", "--shard-size", "4"]
    submit(head, python, "tools/build_shards.py", *source, "--workers", "2")
    assert read_json(shards / "manifest.json")["splits"]["train"]["samples"] >= 4

    config = ["--run.dir", str(run), "--data.shards", str(shards), "--data.size", "32", "--data.threads", "1"]
    config += ["--train.workers", "2", "--train.batch", "8", "--teacher.epochs", "1", "--student.epochs", "1"]
    told = submit(head, python, "-m", "lgd", "train-teacher", *config)
    assert "step" in told, "the progress of rank 0 is part of the job's output"
    assert read_json(run / "teacher" / "config.json")["workers"] == 2
    submit(head, python, "tools/cache_teacher_latents.py", *config)
    assert Store(run / "latents").verify() == []
    submit(head, python, "-m", "lgd", "train", *config)
    student = read_json(run / "student" / "config.json")
    assert (student["workers"], student["method"]) == (2, "lgd")


def test_a_failing_job_fails_with_one_message(head, tmp_path):
    address, env, ray = head
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable, "-m", "lgd"]
    command += ["cache-latents", "--run.dir", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "holds no finished shard set; run lgd build-shards" in done.stdout + done.stderr


def test_without_the_token_nobody_gets_in(head):
    address, env, ray = head
    stranger = {name: value for name, value in env.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    done = subprocess.run(
        [ray, "job", "list", "--address", address], env=stranger, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
    assert refused.value.code in (401, 403)


def test_the_dashboard_listens_on_loopback_only(head):
    port = int(head[0].rsplit(":", 1)[1])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    addresses = {address.split(":")[0] for address in listening if int(address.split(":")[1], 16) == port}
    assert addresses == {"0100007F"}
