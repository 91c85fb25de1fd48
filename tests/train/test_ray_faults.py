"""Training under Ray Train that loses workers and nodes: nobody does anything, and the run is the undisturbed one.

Each cluster is this test's own, with ports and a folder of its own, and is stopped by its handle.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_train_faults import (
    BATCH,
    STEPS,
    assert_each_sample_once,
    assert_same_run,
    attempts,
    worker_that_records,
)

from lgd.ray_jobs.cluster import connect, disconnect
from lgd.ray_jobs.mapping import map_with
from lgd.train import launch
from lgd.train.deepspeed_engine import deepspeed_problem
from lgd.train.launch import train_under
from tests.support.sockets import free_ports

pytestmark = pytest.mark.faults


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of two nodes with two CPUs each, and what takes its second node away and brings another."""
    for name in [name for name in os.environ if name.startswith("RAY_") and not name.startswith("RAY_AUTH_")]:
        monkeypatch.delenv(name)
    import ray.util
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray.cluster_utils import Cluster

    # A local Ray of an earlier test has turned authentication on in this process for good, and not in its environment:
    # nodes without it could never answer the driver.
    if is_token_auth_enabled():
        monkeypatch.setenv("RAY_AUTH_MODE", "token")

    # A socket's path must be short, so not pytest's own folder.
    folder = tempfile.mkdtemp(prefix="lgd-", dir="/tmp")
    second = {"num_cpus": 2, "temp_dir": folder}
    names = "gcs_server_port", "dashboard_port", "dashboard_agent_listen_port"
    ports = dict(zip(names, free_ports(3), strict=True))
    # Named before any of its processes starts: they would ask another Ray of this machine else.
    monkeypatch.setenv("RAY_ADDRESS", f"{ray.util.get_node_ip_address()}:{ports['gcs_server_port']}")
    cluster = Cluster(initialize_head=True, head_node_args=second | ports | {"include_dashboard": True})
    assert cluster.address == os.environ["RAY_ADDRESS"]
    cluster.add_node(**second)

    def lose_one():
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(**second)

    yield lose_one
    disconnect()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(os.environ.get("LGD_FAULTS") != "all", reason="a node takes half a minute to come and to go")
def test_what_a_lost_node_had_in_hand_is_done_by_others(nodes, tmp_path):
    def make():
        def work(number: int) -> int:
            Path(tmp_path, f"{number}-{time.time_ns()}").touch()
            time.sleep(3)
            return number

        return work

    connect(2, "x")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: list(map_with(make, list(range(6)), workers=2, option_name="x")))
        while len([*tmp_path.iterdir()]) < 2:
            time.sleep(0.1)
        nodes()
        assert sorted(done.result(timeout=200)) == list(range(6))
    assert len([*tmp_path.iterdir()]) == 7


def wait_until_all_reach(records, seen, step):
    """Wait until an attempt that is not among the `seen` first ones of all ranks takes this step."""
    began = time.monotonic()
    while True:
        fresh = [lines[-1][0] for _, _, _, lines in attempts(records)[seen:] if lines]
        # No rank is more than a step ahead of another.
        if len(fresh) >= 2 and max(fresh) >= step * BATCH:
            return
        assert time.monotonic() - began < 300, f"no attempt came to step {step}: {fresh}"
        time.sleep(0.01)


def strike(records, faults, lose_node):
    """Make each fault, (step, rank or None for a node), when the run comes to its step."""
    seen = 0
    for step, victim in faults:
        wait_until_all_reach(records, seen, step)
        seen = len(attempts(records))
        pids = {rank: pid for rank, _, pid, _ in attempts(records)}
        if victim is None:
            lose_node()
        else:
            os.kill(pids[victim], signal.SIGKILL)


# Engine, killed workers, lost nodes.
RUNS = [("torch", 10, 0), ("deepspeed", 10, 0), ("torch", 0, 5)]
if os.environ.get("LGD_FAULTS") != "all":
    # A tenth of the 25 losses, in one run: each takes half a minute.
    RUNS = [("torch", 1, 1)]


@pytest.mark.parametrize(("engine", "killed", "lost"), RUNS)
def test_lost_workers_and_nodes_are_replaced_and_the_run_goes_on(
    engine, killed, lost, disturbed, undisturbed, nodes, monkeypatch, tmp_path
):
    if engine == "deepspeed" and deepspeed_problem():
        pytest.skip(str(deepspeed_problem()))
    dice, records = random.Random(f"{engine} {lost}"), tmp_path / "records"
    victims = dice.sample([*(dice.randrange(2) for _ in range(killed)), *[None] * lost], killed + lost)
    faults = list(zip(sorted(dice.sample(range(5, STEPS - 5), len(victims))), victims, strict=True))
    print(faults)
    monkeypatch.setattr(launch, "worker", worker_that_records(records))
    config = disturbed(workers=2, max_failures=-1, engine=engine)
    # Ray starts nodes in the main thread only, so training takes another.
    connect(2, "train.workers")
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_under, config, "student")
        strike(records, faults, nodes)
        assert training.result(timeout=300)
    assert len(attempts(records)) >= 2 * (len(faults) + 1), "every loss was followed by another attempt"
    assert_same_run(config, undisturbed)
    assert_each_sample_once(records, config)
