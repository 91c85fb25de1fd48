"""The `ray job submit` of docs/cluster.md against a real head of cluster/head.sh, with ports and folders of its own."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from lgd.config_files import load_config
from lgd.io.files import read_json
from lgd.scoring.slide_answer import SlideScore
from lgd.store.store import Store
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from tests.cluster.test_rayservice import serve_config
from tests.support.sockets import free_ports, list_listening

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def head_process():
    """A head node of our own: its process, its dashboard's address, and the environment that may use it."""
    port, dashboard = free_ports(2)
    # A socket's path must be short, so not pytest's own folder.
    folder = tempfile.mkdtemp(prefix="lgd-", dir="/tmp")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    ray = str(Path(sys.executable).parent / "ray")
    env |= {"PATH": f"{Path(ray).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "cluster" / "head.sh"), "--block", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--num-cpus=4"]
    # The agent that takes the jobs has one port for the whole machine otherwise, and another Ray may hold it.
    command += ["--dashboard-agent-listen-port=0"]
    with Path(folder, "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, process, Path(folder) / "head.log")
        yield process, address, env, ray
    finally:
        # All of our own session and no other Ray process of this machine; nothing in it is worth a slow goodbye.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head(head_process):
    return head_process[1:]


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


def examples() -> list[list[str]]:
    """The entrypoints of the `ray job submit` examples in docs/cluster.md, in their order."""
    lines = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("ray job submit ")]
    assert all(w[3:8] == ["--address", "http://127.0.0.1:8265", "--working-dir", ".", "--"] for w in words)
    return [w[8:] for w in words]


def submit(head, *entrypoint: str) -> str:
    address, env, ray = head
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", *entrypoint]
    # The first that trains may have to compile DeepSpeed's extension.
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


# Seconds, and what two CPUs can do, instead of hours on eight GPUs.
SMALL = {
    "data.size": 32,
    "data.threads": 1,
    "latents.views": 1,
    "latents.precision": "fp32",
    "latents.map": 1,
    "train.workers": 2,
    "train.batch": 8,
    "train.precision": "fp32",
}
for network in ("teacher", "student"):
    SMALL |= {f"{network}.encoder": "resnet10", f"{network}.epochs": 1}


def test_the_documented_jobs_run(head, tmp_path):
    tissue = tmp_path / "BCI"
    synthesise(SynthOptions(out=str(tissue), pairs=24, size=64, slides=12, workers=1))
    synthesise(SynthOptions(out=str(tmp_path / "drawn"), slides_only=2, slide_size=512, workers=1))
    (tmp_path / "drawn" / "HE").rename(tmp_path / "slides")
    told = {}
    for python, *args in examples():
        assert python == "python"
        name = args[2] if args[0] == "-m" else args[0]
        args = [arg.replace("/data/", f"{tmp_path}/") for arg in args]
        if name == "tools/build_shards.py":
            args += ["--workers", "2", "--shard-size", "4"]
        elif name == "predict":
            args += ["--workers", "1"]
        else:
            args += [word for field, value in SMALL.items() for word in (f"--{field}", str(value))]
        told[name] = submit(head, sys.executable, *args)
    verbs = ["tools/build_shards.py", "train-teacher", "tools/cache_teacher_latents.py", "train", "predict"]
    assert list(told) == verbs
    shards, run = tmp_path / "shards" / "bci", tmp_path / "runs" / "bci"
    assert read_json(shards / "manifest.json")["splits"]["train"]["samples"] >= 8
    assert "step" in told["train-teacher"], "the progress of rank 0 is part of the job's output"
    assert read_json(run / "teacher" / "config.json")["workers"] == 2
    assert Store(run / "latents").verify() == []
    student = read_json(run / "student" / "config.json")
    assert (student["workers"], student["method"]) == (2, "lgd")
    assert "slide-0000" in told["predict"] and "slide-0001" in told["predict"]
    for name in ("slide-0000", "slide-0001"):
        folder = tmp_path / "scores" / name
        assert SlideScore.read(folder / "slide.json").failed == 0 and (folder / "heatmap.png").stat().st_size > 1000


def test_a_stopped_job_saves_a_checkpoint(head, tissue_run, tmp_path):
    address, env, ray = head
    command = [sys.executable, "-m", "lgd", "train", "--run.dir", str(tmp_path / "run"), "--student.method", "he-only"]
    command += ["--data.shards", tissue_run.shard_dirs[0], "--data.size", "64", "--data.threads", "1"]
    command += ["--train.workers", "2", "--train.batch", "2", "--train.engine", "torch", "--student.epochs"]

    def steps() -> list[int]:
        log = tmp_path / "run" / "student" / "log.jsonl"
        return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.is_file() else []

    def of_job(*words: str) -> str:
        asked = [ray, "job", *words[:1], "--address", address, *words[1:]]
        return subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200).stdout

    job = ["--submission-id", "stopped", "--no-wait", "--working-dir", ".", "--", *command, "100"]
    of_job("submit", *job)
    began = time.monotonic()
    while len(steps()) < 5:
        assert time.monotonic() - began < 200, of_job("logs", "stopped")
        time.sleep(0.1)
    of_job("stop", "stopped")
    while not (said := re.findall(r"stopped after step (\d+) of 1000; the same", of_job("logs", "stopped"))):
        assert time.monotonic() - began < 300, of_job("logs", "stopped")
        time.sleep(0.5)
    done = int(said[0])
    assert (tmp_path / "run" / "student" / "checkpoints" / f"step-{done:08d}" / "state.json").is_file()
    assert steps() == list(range(1, done + 1))


def test_the_documented_commands_elsewhere_are_runs():
    """What it says for SLURM; tests/cluster/ runs the script itself."""
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^sbatch .*", text, re.MULTILINE)
    words = shlex.split(line)
    place = words.index("cluster/slurm.sh")
    sizes = dict(word.removeprefix("--").split("=") for word in words[1:place])
    assert words[place + 1 : place + 5] == ["python", "-m", "lgd", "train"]
    args = [str(ROOT / word) if word.startswith("configs/") else word for word in words[place + 6 :]]
    config = load_config(args[0], args[1:])
    assert config.train.workers == int(sizes["nodes"]) * int(sizes["gpus-per-node"])
    for name in re.findall(r"cluster/[\w.]+", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("{tmp_path}/nothing", "it is no finished shard set; run lgd build-shards"),
        ("runs/nothing", "run.dir is runs/nothing, and a job of Ray works in a copy of your folder that is deleted"),
    ],
)
def test_a_failing_job_fails_with_one_message(head, tmp_path, folder, told):
    address, env, ray = head
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable, "-m", "lgd"]
    command += ["cache-latents", "--run.dir", folder.format(tmp_path=tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr


def test_it_listens_on_loopback_only_and_a_program_joins_it_there(head_process, tmp_path):
    process, _, env, _ = head_process
    (port,) = (port for name, _, port in list_listening(process.pid) if name == "gcs_server")
    synthesise(SynthOptions(out=str(tmp_path / "tissue"), pairs=12, size=64, workers=1))
    command = [sys.executable, "tools/build_shards.py", "--layout", "bci", "--root", str(tmp_path / "tissue")]
    command += ["--out", str(tmp_path / "shards"), "--workers", "1", "--mpp", "0.5"]
    env = env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "shards" / "manifest.json")["splits"]
    sockets = list_listening(process.pid)
    assert len(sockets) >= 8 and {address for _, address, _ in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1"}


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


def test_the_service_of_kubernetes_answers_on_a_cluster(head, tissue_run, tmp_path):
    address, env, ray = head
    (port,) = free_ports(1)
    (slides := tmp_path / "slides").mkdir()
    (token := tmp_path / "token").write_text(secrets.token_hex(32))
    config = serve_config()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    small = {"replicas": 1, "cpus": 0, "gpus": 0}
    config["applications"][0]["args"] |= small | {
        "model": tissue_run.student.dir,
        "store": tissue_run.latents.dir,
        "slides": str(slides),
        "out": str(tmp_path / "out"),
        "token_file": str(token),
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    serve = [str(Path(ray).parent / "serve")]
    done = subprocess.run(
        [*serve, "deploy", str(tmp_path / "serve.yaml"), "--address", address],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/model")
    code, ends = 0, time.monotonic() + 400
    # Serve's own answers while it deploys are others.
    while code != 401:
        assert time.monotonic() < ends, f"the service did not come up: {code}"
        time.sleep(1)
        try:
            urllib.request.urlopen(asked, timeout=5)
        except urllib.error.HTTPError as error:
            code = error.code
        except OSError:
            pass
    asked.add_header("Authorization", f"Bearer {token.read_text()}")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert json.load(answer)["store"]["patches"] == 48
    done = subprocess.run([*serve, "shutdown", "-y", "--address", address], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
