"""Ray as a laptop uses it: the verb starts a cluster of its own, trains on two workers with DeepSpeed, and stops it."""

import contextlib
import ctypes
import functools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base import threads
from lgd.base.device import find_device
from lgd.base.errors import DataError
from lgd.base.logs import progress, show_logs
from lgd.cli import main
from lgd.io.files import read_json
from lgd.ray_jobs import cluster, mapping, training
from lgd.scoring import slide_plan
from lgd.scoring.slides import score_slides
from lgd.store.store import Store
from lgd.tissue.pyramid import write_pyramid
from lgd.train.deepspeed_engine import deepspeed_problem
from tests.support.sockets import find_own_address, free_ports

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    """A local Ray must be started, whatever this machine has."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(autouse=True, scope="module")
def one_cluster():
    """The Ray that a test starts is that of the tests after it, up to one with `own_cluster`."""
    yield
    cluster.disconnect()


@pytest.fixture
def own_cluster(no_address):
    """Another cluster than that of the tests before."""
    cluster.disconnect()
    yield
    cluster.disconnect()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(deepspeed_problem() is not None, reason=str(deepspeed_problem()))
def test_two_workers_with_deepspeed_give_the_curve_of_one_process(own_cluster, tissue_run, tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text(tissue_run.as_yaml())
    options = ["--config", str(config), "--run.dir", str(tmp_path), "--teacher.dir", str(tmp_path / "teacher")]
    options += ["--latents.dir", str(tmp_path / "latents"), "--train.workers", "2", "--train.engine", "deepspeed"]
    assert main(["train-teacher", *options]) == 0
    made = read_json(tmp_path / "teacher" / "config.json")
    assert (made["engine"], made["workers"]) == ("deepspeed", 2)
    assert losses(tmp_path / "teacher") == pytest.approx(losses(Path(tissue_run.teacher.dir)), abs=1e-4)
    assert "step" in capfd.readouterr().err, "a person sees the progress of rank 0"
    assert main(["cache-latents", *options]) == 0
    assert Store(tmp_path / "latents").verify() == []
    assert Store(tmp_path / "latents").rows == Store(tissue_run.latents.dir).rows


def test_ctrl_c_at_the_driver_saves_a_checkpoint(tissue_run, tmp_path):
    """SIGTERM has the same answer: tests/test_job.py stops a job by it."""
    config = tmp_path / "config.yaml"
    config.write_text(tissue_run.as_yaml())
    command = [sys.executable, "-m", "lgd", "train", "--config", str(config), "--run.dir", str(tmp_path)]
    command += ["--student.dir", str(tmp_path / "student"), "--student.method", "he-only", "--train.engine", "torch"]
    command += ["--train.workers", "2", "--train.batch", "2", "--student.epochs", "40"]
    log, started = tmp_path / "student" / "log.jsonl", time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not log.is_file() or len(log.read_text().splitlines()) < 5:
            assert process.poll() is None and time.monotonic() - started < 200, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=100)
    assert process.returncode == 1 and not any(line.startswith("Traceback") for line in told.splitlines()), told
    assert "stopping: the workers end their step and save a checkpoint" in told
    steps = len(losses(tmp_path / "student"))
    assert f"lgd: stopped after step {steps} of 400; the same command goes on from there" in told
    assert (tmp_path / "student" / "checkpoints" / f"step-{steps:08d}" / "state.json").is_file()
    assert not list((tmp_path / "ray").glob("*.stop"))


def run_saying(folder: Path) -> None:
    """Work that logs, here by functions within one: workers cannot import this module."""

    def say(stop: str) -> None:
        """A worker that logs, draws a bar, and uses libraries that print."""
        print("noise on standard output")
        print("noise on standard error", file=sys.stderr)
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("another.library").warning("noise")
        logging.getLogger("lgd.train.log").debug("for debug")
        if os.environ["RANK"] == "0":
            with progress(3, "teacher", "steps") as bar:
                bar.update(3)
            logging.getLogger("lgd.train.log").info("teacher: step 3/3  val kappa 0.500")
        logging.getLogger("lgd.train.batch").warning("[data] skipped: a\x1b[2J")

    def make():
        return lambda number: logging.getLogger("lgd.store").info("part %d", number)

    try:
        training.launch(say, workers=2, max_failures=0, storage=folder / "ray", name="teacher")
        list(mapping.map_with(make, [1, 2], workers=1, option_name="--workers"))
    finally:
        cluster.disconnect()


def test_what_workers_log_is_told_once_and_what_libraries_print_is_not(own_cluster, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("lgd.base.logs.EVERY", 0.0)
    with show_logs(logging.INFO):
        run_saying(tmp_path)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    bars = [line for line in lines if line.startswith("teacher: ") and "/3 [" in line]
    assert not out and "3/3" in bars[-1], err
    others = sorted(line for line in lines if line not in bars)
    skipped = r"[data] skipped: a\x1b[2J"
    assert others == [skipped, skipped, "part 1", "part 2", "teacher: step 3/3  val kappa 0.500"]


def test_at_debug_what_libraries_print_in_workers_is_shown(own_cluster, tmp_path, capfd):
    with show_logs(logging.DEBUG):
        run_saying(tmp_path)
    out, err = capfd.readouterr()
    assert err.count("lgd.train.log: for debug") == 2 and (out + err).count("noise on standard error") == 2
    assert err.count("\npart 1\n") == 1


def test_a_program_that_asks_for_nothing_hears_nothing_of_workers(own_cluster, tmp_path, capfd):
    run_saying(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_messages_of_workers_go_on_when_their_queue_is_lost(capfd, monkeypatch):
    import ray

    def make():
        return lambda number: logging.getLogger("lgd.store").info("part %d", number)

    collected = cluster.collect_logs

    @contextlib.contextmanager
    def collect(several):
        with collected(several) as send:
            ray.kill(send.args[0].actor, no_restart=False)
            yield send

    monkeypatch.setattr(mapping, "collect_logs", collect)
    with show_logs(logging.INFO):
        assert len(list(mapping.map_with(make, [1, 2], workers=1, option_name="--workers"))) == 2
    assert sorted(capfd.readouterr().err.splitlines()) == ["part 1", "part 2"]


def test_an_error_in_a_worker_is_told_as_if_it_had_happened_here():
    def make():
        def fail(path: str) -> None:
            raise DataError(f"{path} is broken: fetch it again")

        return fail

    with pytest.raises(DataError, match="a.tar is broken: fetch it again"):
        list(mapping.map_with(make, ["a.tar"], workers=1, option_name="--workers"))


def test_bad_data_in_a_training_worker_is_told_once_and_not_tried_again(tmp_path):
    def fail(stop: str) -> None:
        with told.open("a") as tries:
            tries.write("x")
        raise DataError("shards/train-000000.tar, row 3: crc32 does not match: fetch it again")

    told = tmp_path / "tries"
    with pytest.raises(DataError, match=r"^shards/train-000000.tar, row 3: crc32 does not match: fetch it again$"):
        training.launch(fail, workers=1, max_failures=3, storage=tmp_path / "ray", name="teacher")
    assert told.read_text() == "x"


@pytest.mark.parametrize("after", [0, 5])
def test_workers_that_are_lost_too_often_are_told(tmp_path, after):
    def die(stop: str) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(after)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(DataError, match=r"lost more often than train\.max_failures 0 allows: the same command goes on"):
        training.launch(die, workers=2, max_failures=0, storage=tmp_path / "ray", name="teacher")


def test_results_come_from_all_workers_and_each_makes_its_function_once():
    def make():
        made = []
        made.append(os.getpid())
        return lambda number: (number * number, os.getpid(), len(made))

    results = list(mapping.map_with(make, list(range(12)), workers=2, option_name="--workers"))
    assert sorted(square for square, _, _ in results) == [number**2 for number in range(12)]
    assert all(pid != os.getpid() and times == 1 for _, pid, times in results)
    here = list(mapping.map_with(make, [3], workers=0, option_name="--workers"))
    assert here == [(9, os.getpid(), 1)]


def meeting(folder, processes):
    """A function whose first calls end only when two of them run in each of so many processes."""

    def make():
        def meet(number: int) -> tuple[int, int]:
            Path(folder, f"{os.getpid()}-{threading.get_ident()}").touch()
            began = time.monotonic()
            while len([*Path(folder).iterdir()]) < 2 * processes:
                assert time.monotonic() - began < 60
                time.sleep(0.01)
            return number, os.getpid()

        return meet

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_has_several_arguments_at_once_where_it_may(workers, tmp_path):
    make = meeting(tmp_path, max(1, workers))
    results = list(mapping.map_with(make, list(range(8)), workers=workers, option_name="x", at_once=2))
    assert sorted(number for number, _ in results) == list(range(8))
    assert len({pid for _, pid in results}) == max(1, workers)


def test_slides_are_scored_by_workers_as_by_one_process(tissue_run, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_plan, "CHUNK", 10)
    pixels = np.full((600, 900, 3), 240, np.uint8)
    pixels[64:536, 64:836] = np.random.default_rng(0).integers(90, 220, (472, 772, 3))
    for name in ("one", "two"):
        write_pyramid(tmp_path / f"{name}.tif", pixels, 0.46)
        pixels = pixels[::-1]
    slides = [tmp_path / f"{name}.tif" for name in ("one", "two")]
    for workers in (0, 2):
        scores, problems = score_slides(tissue_run.student.dir, slides, tmp_path / str(workers), workers=workers)
        assert problems == {} and [score.tiles > 20 for score in scores] == [True, True]
    for slide in ("one", "two"):
        alone, shared = ((tmp_path / workers / slide / "tiles.csv").read_bytes() for workers in "02")
        assert alone == shared
        assert not (tmp_path / "2" / slide / "parts").exists()


def test_a_lost_worker_is_replaced_and_an_argument_that_kills_each_is_named(monkeypatch, tmp_path, caplog, capfd):
    """And not the others that its workers had in hand; what Ray says of it is not printed among the results."""
    monkeypatch.setattr(mapping, "_MOST_LOSSES", 3)

    def make():
        def work(number: int) -> int:
            if number == 2:
                time.sleep(0.1)
                ctypes.string_at(0)
            if number == 1 and not list(tmp_path.iterdir()):
                Path(tmp_path, "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)
            return number

        return work

    results, fields = [], {"workers": 1, "option_name": "x", "at_once": 2, "name": "argument {}".format}
    with (
        pytest.raises(DataError, match="^argument 2: 3 workers died while they worked on it: it crashes them"),
        caplog.at_level(logging.WARNING),
    ):
        results.extend(mapping.map_with(make, list(range(4)), **fields))
    assert "argument 1: the worker that had it died and is started again (1 of 3)" in caplog.messages
    cluster.disconnect()
    assert 1 in results and capfd.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_ray_reserves_and_nobody_can_use_is_told(own_cluster, tmp_path, monkeypatch):
    """On the node of the worker; this process has none, and need not."""
    import ray

    def fail(stop: str) -> None:
        raise AssertionError("no worker may begin")

    def make():
        find_device()
        raise AssertionError("nor make anything")

    message = "^CUDA_VISIBLE_DEVICES is 0 on .*, but it cannot be used: .* and --num-gpus 0$"
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, num_cpus=2, num_gpus=1))
    with pytest.raises(DataError, match=message):
        training.launch(fail, workers=1, max_failures=3, storage=tmp_path / "ray", name="teacher")
    with pytest.raises(DataError, match=message):
        list(mapping.map_with(make, [1], workers=1, option_name="x"))


class Endless:
    """Ends when it is stopped; fails for the argument 3."""

    def __init__(self):
        self.stopped = threading.Event()

    def __call__(self, number):
        if number == 3:
            raise DataError("three")
        assert self.stopped.wait(60)

    def stop(self):
        self.stopped.set()


def test_calls_that_are_not_wanted_any_more_are_stopped():
    began = time.monotonic()
    with pytest.raises(DataError, match="three"):
        list(mapping.map_with(Endless, [1, 3, 5], workers=0, option_name="x", at_once=2))
    assert time.monotonic() - began < 30


@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=30)
def test_results_ahead_come_in_order_and_never_more_than_asked(total, count, pool_size):
    begun = []
    with ThreadPoolExecutor(pool_size) as pool:
        results = threads.map_ordered_prefetch(
            pool, lambda number: begun.append(number) or 7 * number, range(total), count
        )
        for taken, result in enumerate(results):
            assert result == 7 * taken and len(begun) <= taken + count + 1
    assert sorted(begun) == list(range(total))


LOCAL = """
import http.client, json, os
from lgd.ray_jobs.mapping import map_with
from tests.support.sockets import list_listening

def ask(ip, port):
    connection = http.client.HTTPConnection(ip, port, timeout=5)
    try:
        connection.request("GET", "/api/jobs/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None

for _ in map_with(lambda: abs, [1], workers=1, option_name="--workers"):
    print(json.dumps([(ip, ask(ip, port)) for _, ip, port in list_listening(os.getpid())]))
"""


def test_a_local_ray_listens_on_loopback_and_asks_for_its_token():
    done = subprocess.run([sys.executable, "-c", LOCAL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) >= 6 and {ip for ip, _ in answers} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert 401 in {status for _, status in answers}, "the dashboard, which takes jobs"


UNUSED = """initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands
worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"""
AUTOSCALED = {
    "cluster_name": "lgd",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "provider": {"type": "fake_multinode", "disable_launch_config_check": True, "disable_node_updaters": True},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "more": {"resources": {"CPU": 2, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
    },
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in UNUSED.split()},
    "file_mounts_sync_continuously": False,
}
WIDER = """
import logging, os, sys
from lgd.base.errors import DataError
from lgd.ray_jobs import cluster
from lgd.ray_jobs.mapping import map_with
logging.basicConfig(format="%(message)s")
cluster._PATIENCE = int(sys.argv[1])
try:
    print(sorted(map_with(lambda: abs, [-1, -2], workers=int(sys.argv[2]), option_name="--workers", threads=1)))
except DataError as error:
    print(error)
"""


@pytest.fixture
def autoscaled():
    """A head of one CPU whose autoscaler may add two nodes of two, as processes of this machine."""
    port, dashboard, client = free_ports(3)
    address = f"{find_own_address()}:{port}"
    # A socket's path must be short, so not pytest's own folder.
    folder = Path(tempfile.mkdtemp(prefix="lgd-", dir="/tmp"))
    described = AUTOSCALED | {"provider": AUTOSCALED["provider"] | {"gcs_address": address}}
    (folder / "cluster.yaml").write_text(json.dumps(described))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "e" * 64, "RAY_ADDRESS": address}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=1", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    command += ["--dashboard-agent-listen-port=0", f"--autoscaling-config={folder / 'cluster.yaml'}"]
    start = {name: value for name, value in env.items() if name != "RAY_ADDRESS"} | {"RAY_FAKE_CLUSTER": "1"}
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=start, stdout=log, stderr=log, start_new_session=True)
    try:
        ends = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((address.split(":")[0], port), timeout=1).close()
                break
            assert head.poll() is None and time.monotonic() < ends, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield env
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(head.pid).children(recursive=True):
                process.kill()
        head.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_an_autoscaling_cluster_may_be_asked_for_more_than_it_has(autoscaled):
    def run(patience, workers):
        command = [sys.executable, "-c", WIDER, str(patience), str(workers)]
        return subprocess.run(command, cwd=ROOT, env=autoscaled, capture_output=True, text=True, timeout=200)

    done = run(120, 2)
    assert done.stdout == "[1, 2]\n", done.stdout + done.stderr
    assert "seconds: the cluster has room for 0 of 2 workers" in done.stderr
    lacking = run(2, 9)
    assert "--workers is 9, but this Ray cluster has 5 CPUs and 0 GPUs: set it to 2 or less" in lacking.stdout
    assert "(a worker takes 2 CPUs, one for each of 1 reading threads and one more)" in lacking.stdout


def test_an_address_without_a_cluster_is_told(own_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(DataError, match="RAY_ADDRESS=127.0.0.1:1 .*--workers"):
        cluster.connect(1, "--workers")


def test_the_error_of_a_worker_keeps_its_lines(tmp_path):
    """A line break within one is that of a name, and is escaped where it is printed."""
    note = tmp_path / "train.error.json"

    def fail():
        raise DataError("2 problems:", "a\nb", "é")

    with pytest.raises(DataError):
        training._run_recording_user_error(fail, note, contextlib.nullcontext)
    assert read_json(note) == ["2 problems:", "a\nb", "é"]
    training._run_recording_user_error(fail, note, contextlib.nullcontext)
