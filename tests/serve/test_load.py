"""The service under load: sixteen clients while its processes die, and what is left of it when it is stopped."""

import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support.shades import write_ramp

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("LGD_FAULTS") == "all"
CLIENTS = 16
REPLICAS = "SlideJobs", "Api"
TIMES = 4
"""By which a slide is enlarged, so that it takes seconds to score."""
LONGEST = 240
"""Seconds in which the service, or a process of it, must be there."""


class Service:
    """`lgd serve` in a session of its own."""

    def __init__(self, options, log):
        command = [sys.executable, "-m", "lgd", "serve", *(f"--{name}={value}" for name, value in options.items())]
        began = time.monotonic()
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.log = log
        found = wait(self._read_address)
        self.port = int(found[1])
        print(f"started in {time.monotonic() - began:.1f} s")

    def _read_address(self):
        assert self.process.poll() is None, self.log.read_text()
        return re.search(r"at http://127\.0\.0\.1:(\d+)/", self.log.read_text())

    def list_processes(self):
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def find_replica(self, name):
        """The process of a deployment; None where there is none."""
        for process in self.list_processes():
            try:
                if f"ServeReplica:lgd:{name}" in process.cmdline()[0]:
                    return process
            except (psutil.Error, IndexError):
                continue
        return None

    def kill_replica(self, name):
        """Kill a process of the service and wait until there is another one."""
        killed = self.find_replica(name)
        killed.kill()
        wait(lambda: (found := self.find_replica(name)) and found.pid != killed.pid)

    def stop(self, number):
        """Send a signal to the group, as a terminal and a supervisor do, and wait until nothing is left."""
        processes, began = self.list_processes(), time.monotonic()
        os.killpg(self.process.pid, number)
        assert self.process.wait(60) == 0, self.log.read_text()
        print(f"stopped in {time.monotonic() - began:.1f} s")
        _, alive = psutil.wait_procs(processes, 10)
        assert not alive
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))

    def ask(self, method, path, body=None):
        """One request of a connection of its own, as JSON."""
        status, content = Client(self.port).ask(method, path, body)
        assert status < 300, content
        return json.loads(content)


class Client:
    """A connection that is kept, and opened anew where it is lost."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=130)

    def ask(self, method, path, body=None):
        """The status and the content of the answer."""
        try:
            self.connection.request(method, f"/{path}", body, {"Content-Type": "image/jpeg"} if body else {})
            response = self.connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            return 599, repr(error).encode()


def wait(check, seconds=LONGEST):
    """What `check` gives once it is true."""
    ends = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < ends, "it did not come in time"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def start(tissue_run, tmp_path_factory):
    """What starts a service of a slide that takes seconds to score."""
    folder = tmp_path_factory.mktemp("load")
    (folder / "slides").mkdir()
    write_ramp(folder / "slides" / "ramp.tif", mpp=0.46, times=TIMES)
    services = []
    options = {"model": tissue_run.student.dir, "store": tissue_run.latents.dir, "slides": folder / "slides", "port": 0}

    def start_service(out):
        services.append(Service(options | {"out": folder / out}, folder / f"{out}.log"))
        return services[-1]

    yield start_service
    for service in services:
        if service.process.poll() is None:
            service.process.terminate()
            service.process.wait(60)


def list_requests(service, slide):
    """Requests of all kinds."""
    patches = [one["id"] for one in service.ask("GET", "patches")["patches"]][::10]
    patch = Client(service.port).ask("GET", f"patches/{patches[0]}/he.jpg")[1]
    requests = [("GET", f"slides/{slide}/tiles/{level}/0_0.jpg", None) for level in (1, 3)]
    requests += [("GET", f"patches/{name}/{role}.jpg", None) for name in patches for role in ("he", "ihc")]
    requests += [("POST", f"patches/{name}/query?k=3", None) for name in patches]
    requests += [("POST", f"slides/{slide}/query?x=1000&y=1000", None), ("GET", "health", None)]
    return [*requests, ("POST", "predict?mpp=0.46", patch), ("POST", "query?k=4", patch), ("POST", "predict", patch)]


def read_answer(content):
    """A picture as it is; of numbers, which other batches change in their last digits, what is found."""
    if content[:1] != b"{":
        return content
    answer = json.loads(content)
    return answer.get("level"), [one["key"] for one in answer.get("neighbours", [])]


def ask_on(service, requests, expected, goes_on, seed):
    """Ask while `goes_on()`; the seconds of each request, and each failure of a second try."""
    dice, client, seconds, failures, again = random.Random(seed), Client(service.port), [], [], 0
    while goes_on():
        number = dice.randrange(len(requests))
        began = time.monotonic()
        status, content = client.ask(*requests[number])
        if status >= 500:
            again += 1
            time.sleep(1)
            status, content = client.ask(*requests[number])
        seconds.append(time.monotonic() - began)
        if status != 200 or read_answer(content) != expected[number]:
            failures.append((requests[number][:2], status, content[:300]))
    return seconds, failures, again


def load(service, requests, expected, work):
    """Sixteen clients ask while `work()` lasts; how many asked again. Nothing may fail twice."""
    ended = False
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_on, service, requests, expected, lambda: not ended, seed) for seed in range(CLIENTS)]
        try:
            work()
        finally:
            ended = True
        seconds, failures, again = zip(*[one.result() for one in asking], strict=True)
    taken = np.concatenate(seconds)
    shown = ", ".join(f"p{share} {np.percentile(taken, share):.2f} s" for share in (50, 95, 99))
    print(f"{len(taken)} requests of {CLIENTS} clients: {shown}; {sum(again)} asked again")
    assert not [*itertools.chain(*failures)]
    return sum(again)


def test_answers_stay_right_under_load_and_while_processes_die(start):
    service = start("disturbed")
    (listed,) = service.ask("GET", "slides")
    slide = f"slides/{listed['id']}"
    requests = list_requests(service, listed["id"])
    expected = [read_answer(Client(service.port).ask(*one)[1]) for one in requests]
    assert load(service, requests, expected, lambda: time.sleep(120 if ALL else 5)) == 0
    service.ask("POST", f"{slide}/score")

    def strike():
        wait(lambda: 0 < service.ask("GET", slide)["progress"] < 1)
        # Each, and then all at a time.
        for names in [*([name] for name in REPLICAS if ALL), REPLICAS]:
            with ThreadPoolExecutor(len(names)) as pool:
                list(pool.map(service.kill_replica, names))
            # Until the new ones answer.
            wait(lambda: Client(service.port).ask(*requests[-1])[0] == 200)
            wait(lambda: Client(service.port).ask("GET", slide)[0] == 200)

    load(service, requests, expected, strike)
    wait(lambda: service.ask("GET", slide)["state"] == "scored")
    service.stop(signal.SIGINT)


@pytest.mark.skipif(not ALL, reason="a service takes half a minute to start")
def test_a_service_that_is_stopped_leaves_nothing(start):
    service = start("stopped")
    service.stop(signal.SIGTERM)
    assert service.process.returncode == 0
