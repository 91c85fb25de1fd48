"""Training under Ray Train that loses workers and nodes: nobody does anything, and the run is the undisturbed one.

Each cluster is this test's own, with ports and a folder of its own, and is stopped by its handle.
"""

import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback

import pytest
from test_train_faults import BATCH, STEPS, assert_each_sample_once, assert_same_run, attempts, worker_that_records

from lgd import distribute
from lgd.train import launch
from lgd.train.engine import deepspeed_problem
from lgd.train.launch import train_under

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Ray is started here, whatever this machine has."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    yield
    distribute.disconnect()


def wait_for(found, what, process_of=None):
    began = time.monotonic()
    while not found():
        assert time.monotonic() - began < 200, f"waited in vain for {what}"
        time.sleep(0.01)


def strike(records, steps, lose):
    """A thread that calls `lose(rank's attempts)` each time that a new attempt of all ranks comes to the next step."""
    problems = []

    def run():
        seen = 0
        try:
            for step in steps:
                def there(step=step, seen=seen):
                    fresh = attempts(records)[seen:]
                    reached = {rank: lines[-1][0] for rank, _, _, lines in fresh if lines}
                    return len(reached) == 2 and max(reached.values()) >= step * BATCH

                wait_for(there, f"step {step} of {steps}")
                pids = {rank: pid for rank, _, pid, _ in attempts(records)}
                seen = len(attempts(records))
                lose(pids)
        except BaseException:
            problems.append(traceback.format_exc())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, problems


def train_and_lose(config, records, steps, lose, monkeypatch):
    monkeypatch.setattr(launch, "worker", worker_that_records(records))
    thread, problems = strike(records, steps, lose)
    assert train_under(config, "student")
    thread.join(10)
    assert not thread.is_alive() and not problems, problems
    assert len(attempts(records)) >= 2 * (len(steps) + 1), "every loss was followed by another attempt"


needs_deepspeed = pytest.mark.skipif(deepspeed_problem() is not None, reason=str(deepspeed_problem()))


@pytest.mark.parametrize("engine", ["torch", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_killed_workers_are_restarted(engine, disturbed, undisturbed, fault_count, monkeypatch, tmp_path):
    dice, told = random.Random(engine), []
    config = disturbed(workers=2, max_failures=-1, engine=engine)

    def lose(pids):
        told.append(dice.randrange(2))
        os.kill(pids[told[-1]], signal.SIGKILL)

    steps = sorted(dice.sample(range(5, STEPS - 5), fault_count(10)))
    train_and_lose(config, tmp_path / "records", steps, lose, monkeypatch)
    print("killed (step, rank)", list(zip(steps, told, strict=True)))
    assert_same_run(config, undisturbed)
    assert_each_sample_once(tmp_path / "records", config)
