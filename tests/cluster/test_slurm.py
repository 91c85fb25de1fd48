"""cluster/slurm.sh with a real Ray cluster of two nodes; `srun` and `scontrol` are stand-ins that work on this machine.

SLURM itself is not here: these stand-ins start a step's command where SLURM would start it on another node.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sh"
# `exec`: a signal to the stand-in reaches the step, as srun would hand it on. Two nodes on one machine need two
# folders.
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >> {log}
[ "$SLURM_EXPORT_ENV" = ALL ] && [ "$SRUN_CPUS_PER_TASK" = 1 ] || exit 9
options=()
for word in "$@"; do
    case "$word" in
    --nodes=* | --ntasks=*) ;;
    --nodelist=node-a) ;;
    --exclude=node-a) other=yes ;;
    --temp-dir=*) options+=("$word${{other:+-other}}") ;;
    *) options+=("$word") ;;
    esac
done
exec "${{options[@]}}"
"""
SCONTROL = '#!/bin/sh\necho "$*" >> {log}\n'
# What a training does as far as this script sees it: use the cluster, save on SIGTERM, and exit.
COMMAND = """
import json, os, signal, sys, time
from pathlib import Path
import ray
ray.init(log_to_driver=False)
told = Path(sys.argv[1])
def save(*_):
    time.sleep(1)
    Path(f"{told}.saved").touch()
    sys.exit(7)
signal.signal(signal.SIGTERM, save)
place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
where = [
    ray.get(ray.remote(lambda: ray.get_runtime_context().get_node_id()).options(
        scheduling_strategy=place(node["NodeID"], soft=False)).remote())
    for node in ray.nodes() if node["Alive"]
]
facts = {"nodes": where, "cpus": ray.cluster_resources()["CPU"], "address": os.environ["RAY_ADDRESS"],
         "mode": os.environ["RAY_AUTH_MODE"], "token": os.environ["RAY_AUTH_TOKEN"]}
partial = Path(f"{told}.partial")
partial.write_text(json.dumps(facts))
partial.rename(told)
time.sleep(120)
"""


@pytest.fixture
def job(tmp_path):
    """`job(nodes, *command)` starts slurm.sh as SLURM would, as a group of its own; all of it is ended afterwards."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_dir / name).write_text(text.format(log=tmp_path / f"{name}.log"))
        (bin_dir / name).chmod(0o755)
    # Ports follow from the number, so two runs of this test at once need two numbers.
    number = str(os.getpid())
    started = []

    def start(nodes: int, *command: str, **environment: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "SRUN_"))}
        env |= {"PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        env |= {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": str(nodes), "SLURMD_NODENAME": "node-a"}
        env |= {"SLURM_CPUS_ON_NODE": "1", "SLURM_EXPORT_ENV": "NONE", **environment}
        with (tmp_path / "job.log").open("ab") as log:
            process = subprocess.Popen([SCRIPT, *command], env=env, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for folder in ("", "-other"):
        shutil.rmtree(f"/tmp/lgd-ray-{number}{folder}", ignore_errors=True)


def wait_for(path: Path, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def group(leader: int) -> list[str]:
    """The command lines of the processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == leader:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]


def test_two_nodes_run_a_command_that_is_stopped_and_queued_again(job, tmp_path):
    told, log = tmp_path / "told.json", tmp_path / "job.log"
    process = job(2, "python", "-c", COMMAND, str(told))
    wait_for(told, process, log)
    facts = json.loads(told.read_text())
    assert len(set(facts["nodes"])) == 2 and facts["cpus"] == 2
    assert facts["mode"] == "token" and re.fullmatch("[0-9a-f]{64}", facts["token"])
    port = int(facts["address"].rsplit(":", 1)[1])
    assert 20000 <= port < 32000 and port == 20000 + os.getpid() % 4000 * 3
    lines = group(process.pid)
    assert any("gcs_server" in line for line in lines) and sum("raylet" in line for line in lines) >= 2
    assert not any(facts["token"] in line for line in lines), "the token is on no command line"
    steps = (tmp_path / "srun.log").read_text().splitlines()
    assert [re.search("--(nodelist|exclude)=node-a", step)[1] for step in steps] == ["nodelist", "exclude"]
    assert "--dashboard-host=127.0.0.1" in steps[0]

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7
    assert (tmp_path / "told.json.saved").exists(), "it waited for the command to save"
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    end = time.monotonic() + 30
    while group(process.pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert group(process.pid) == [], "nothing that it started is left"


def test_a_head_that_cannot_start_ends_the_job_for_good(job, tmp_path):
    process = job(1, "touch", str(tmp_path / "ran"), SLURMD_NODENAME="another")
    assert process.wait(60) == 1
    assert "Ray's head ended before it listened" in (tmp_path / "job.log").read_text()
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "scontrol.log").exists(), "what would fail again is not queued again"


def test_a_job_without_a_command_is_told(job, tmp_path):
    assert job(1).wait(10) == 2
    assert "usage: sbatch" in (tmp_path / "job.log").read_text()


def test_sbatch_reads_what_the_job_needs():
    options = re.findall(r"^#SBATCH (--\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)
    warned = re.search(r"--signal=B:(TERM|USR1)@(\d+)", " ".join(options))
    assert warned and int(warned[2]) >= 60
    before = SCRIPT.read_text().split("#SBATCH", 1)[0]
    assert all(line.startswith("#") for line in before.splitlines()), "sbatch stops reading at the first command"
