"""Two stages of other options that meet in one folder: one does its work, the other is told, and nothing mixes."""

import random
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lgd import pipeline
from lgd.base.errors import DataError
from lgd.io.digests import sha256
from lgd.io.files import read_json
from lgd.io.locks import LOCK
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.store.store import Store
from tests.support.forks import FORKS

pytestmark = pytest.mark.faults


class Kind(NamedTuple):
    """A stage, two runs of it that want the same folder, and what it leaves there."""

    stage: str
    doing: str
    runs: list
    read: object
    """`read(config)`: what the stage has left, to be compared."""
    alone: list
    """What each of the runs leaves where it is alone."""


def digest_of_network(folder):
    """Weights, and what is said of them; the checkpoint and the log are of the same training."""
    made = read_json(Path(folder) / "config.json")
    (*_, newest) = sorted((Path(folder) / "checkpoints").iterdir())
    steps = len((Path(folder) / "log.jsonl").read_text().splitlines())
    assert made["weights_sha256"] == sha256(Path(folder) / "model.safetensors")
    return made["weights_sha256"], made["inputs"], sha256(newest / "weights.safetensors"), newest.name, steps


def read_report(folder):
    """The numbers, and in which files they are."""
    document = read_json(Path(folder) / "metrics.json")
    names = sorted(path.name for path in Path(folder).iterdir() if path.name != LOCK)
    accuracy = [f"{model['by_patch']['metrics']['accuracy']['value']:.3f}" for model in document["models"]]
    text = (Path(folder) / "summary.md").read_text()
    assert all(value in text for value in accuracy)
    return document["models"], document["patches"], document["provenance"]["split"], names


def read_store(folder):
    store = Store(folder)
    assert store.verify() == []
    return store.rows


@pytest.fixture(scope="module")
def kinds(tissue, tissue_run, change, tmp_path_factory):
    """`kinds(name, folder)`: a `Kind` whose runs work in this folder."""
    at = tmp_path_factory.mktemp("two")
    split = {"slides": str(tissue / "truth.csv"), "split": "group:0.5,0.25,0.25"}
    build(ShardOptions(layout="bci", root=str(tissue), out=str(at / "shards"), shard_size=5, mpp=0.46, **split))
    alone = {}

    def runs_of(name, folder):
        base = change(tissue_run, run={"dir": str(folder)}, report={"bootstrap": 2, "queries": 0})
        if name == "teacher":
            ours = [change(base, teacher={"dir": str(folder / "x"), "epochs": epochs}) for epochs in (0.4, 0.8)]
            return "train_teacher", "training", ours, lambda config: digest_of_network(config.teacher.dir)
        if name == "student":
            student = {"dir": str(folder / "x"), "method": "he-only", "epochs": 0.8}
            ours = [change(base, student=student, run={"seed": seed}) for seed in (1, 2)]
            return "train_student", "training", ours, lambda config: digest_of_network(config.student.dir)
        if name == "report":
            ours = [change(base, report={"dir": str(folder / "x"), "split": split}) for split in ("test", "val")]
            return "evaluate", "evaluating", ours, lambda config: read_report(config.report.dir)
        shards = [tissue_run.data.shards, [str(at / "shards")]]
        ours = [change(base, latents={"dir": str(folder / "x")}, data={"shards": each}) for each in shards]
        return "cache_latents", "caching latents", ours, lambda config: read_store(config.latents.dir)

    def make(name, folder):
        if name not in alone:
            alone[name] = []
            for number in range(2):
                stage, _, ours, read = runs_of(name, at / f"{name}{number}")
                getattr(pipeline, stage)(ours[number])
                alone[name].append(read(ours[number]))
            assert alone[name][0] != alone[name][1] or name == "store"
        return Kind(*runs_of(name, folder), alone[name])

    return make


def run_stage(stage, config, barrier, results):
    """Process: run a stage, and tell when, and how it ended."""
    torch.set_num_threads(1)
    barrier.wait(120)
    began = time.monotonic()
    try:
        getattr(pipeline, stage)(config)
        outcome = "done"
    except DataError as error:
        outcome = str(error)
    except BaseException:  # noqa: BLE001 - an outcome of this process
        outcome = traceback.format_exc()
    results.put((began, time.monotonic(), outcome))


def run_pair(kind):
    """(began, ended, outcome) of each run of a kind."""
    barrier, queues = FORKS.Barrier(2), [FORKS.SimpleQueue(), FORKS.SimpleQueue()]
    processes = [
        FORKS.Process(target=run_stage, args=(kind.stage, config, barrier, queue))
        for config, queue in zip(kind.runs, queues, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [queue.get() for queue in queues]


def came_late(outcome, name):
    """Whether a training found the other's finished network: on a busy machine it started after the other's end."""
    return name in ("teacher", "student") and " of other inputs" in outcome


def test_of_two_stages_one_works_and_the_other_is_told(kinds, fault_count, tmp_path):
    names = ["student", "store", "teacher", "report"] * 5
    chosen = names[: fault_count(len(names))]
    met = 0
    for number, name in enumerate(random.Random(0).sample(chosen, len(chosen))):
        for attempt in range(5):
            kind = kinds(name, tmp_path / f"{number}-{attempt}")
            ends = run_pair(kind)
            outcomes = [outcome for _, _, outcome in ends]
            if not any(came_late(outcome, name) for outcome in outcomes):
                break
        refused = [text for text in outcomes if f" is {kind.doing} there, for " in text and "\n" not in text]
        assert len(refused) == 1 and outcomes.count("done") == 1, outcomes
        winner = outcomes.index("done")
        assert kind.read(kind.runs[winner]) == kind.alone[winner]
        met += max(began for began, _, _ in ends) < min(ended for _, ended, _ in ends)
        # The same command again changes nothing; the other one is refused, or adds what is its own.
        getattr(pipeline, kind.stage)(kind.runs[winner])
        assert kind.read(kind.runs[winner]) == kind.alone[winner]
        loser = kind.runs[1 - winner]
        if name == "store":
            assert cache_latents(loser, ShardSet.open(loser.shard_dirs).shards, workers=0).computed > 0
            assert read_store(loser.latents.dir) == sum(kind.alone)
        elif name != "report":
            with pytest.raises(DataError, match="of other inputs"):
                getattr(pipeline, kind.stage)(loser)
    print(f"{met} of {len(chosen)} pairs met")
    assert met == len(chosen)
