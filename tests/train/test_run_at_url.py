"""A run whose every folder is a url: an S3 server on loopback, over the wire."""

import contextlib
import io
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import AfterReads

from lgd import pipeline
from lgd.base.errors import DataError, Stopped
from lgd.cli import main
from lgd.config_files import load_config
from lgd.io.files import read_bytes, read_json
from lgd.io.location import as_location
from lgd.ray_jobs import cluster
from lgd.train import checkpoint, launch
from lgd.train.launch import train_under


@pytest.fixture(scope="module")
def s3(s3_server):
    s3_server.create_bucket(Bucket="runs")
    return s3_server


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """The local cache, and a folder for temporary files that must be empty in the end."""
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    cluster.disconnect()


@pytest.fixture
def at_url(tissue_run, change):
    """`at_url(name, student={...})`: the student of `tissue_run`, with its folder and all that a run keeps at a url."""

    def made(name, **sections):
        base = change(tissue_run, run={"dir": f"s3://runs/{name}"}, student={"dir": f"s3://runs/{name}/student"})
        return change(base, **sections)

    return made


def names(s3, prefix):
    """The names of what lies below a folder of the bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="runs", Prefix=f"{prefix}/")
    return sorted(entry["Key"][len(prefix) + 1 :] for page in pages for entry in page.get("Contents", []))


def curve(folder):
    return [json.loads(line)["loss"] for line in read_bytes(f"{folder}/log.jsonl").decode().splitlines()]


def digest(folder):
    return read_json(f"{folder}/config.json")["weights_sha256"]


def test_the_whole_run_lies_in_a_bucket(tissue_config, tissue_run, s3, tmp_path, capsys, caplog):
    options = {"run.dir": "s3://runs/whole/", "data.shards": tissue_config.shard_dirs[0], "report.queries": 2}
    given = {"teacher.epochs": 2, "student.epochs": 2, "latents.map": 2, "report.bootstrap": 10}
    given |= {"data.size": 64, "train.workers": 0, "train.engine": "torch", "train.batch": 8, "data.threads": 1}
    config = load_config(overrides=[f"--{name}={value}" for name, value in (options | given).items()])
    assert config.teacher.dir == "s3://runs/whole/teacher" and config.latents.dir == "s3://runs/whole/latents"
    table = pipeline.run(config)
    assert all(name in table for name in ("LGD-Net", "H&E-only", "IHC teacher"))
    assert digest("s3://runs/whole/teacher") == digest(tissue_run.teacher.dir)
    assert digest("s3://runs/whole/student") == digest(tissue_run.student.dir)
    assert curve("s3://runs/whole/student") == curve(tissue_run.student.dir)
    there = names(s3, "whole")
    assert {"config.yaml", "run.json", "report/summary.md", "report/confusion.png", "report/queries.png"} <= {*there}
    assert not list(Path().glob("s3*")), "no folder of that name here"
    cards = [read_bytes(f"s3://runs/whole/{name}/README.md").decode() for name in ("student", "he-only")]
    assert "Split test: 20 patches" in cards[0] and "Not scored yet" in cards[1] and "s3://" not in cards[0]
    # What a person watches.
    board = tmp_path / "board"
    board.mkdir()
    for name in [name for name in there if name.startswith("student/tensorboard/")]:
        s3.download_file("runs", f"whole/{name}", str(board / Path(name).name))
    events = EventAccumulator(str(board))
    events.Reload()
    assert len(events.Scalars("train/loss")) == len(curve("s3://runs/whole/student"))
    assert "report/confusion" in events.Tags()["images"]
    # Again: nothing is done twice. And its parts are used by their urls.
    with caplog.at_level(logging.INFO, "lgd"):
        pipeline.run(config)
    assert sum("reused, nothing changed" in line for line in caplog.messages) == 5, caplog.messages
    image = next((Path(tissue_config.run.dir).parent / "bci" / "HE" / "test").iterdir())
    assert main(["predict", "--config", "s3://runs/whole/config.yaml", "--json", str(image)]) == 0
    (row,) = json.load(io.StringIO(capsys.readouterr().out))
    assert row["level"] in ("0", "1+", "2+", "3+")


def test_a_stopped_run_goes_on_from_its_bucket_and_another_run_from_its_checkpoint(
    at_url, tissue_run, change, s3, monkeypatch, tmp_path
):
    config = at_url("stopped", train={"checkpoint_every": 1, "keep": 2})
    with monkeypatch.context() as patched:
        patched.setattr(launch, "stop_flag", lambda _: contextlib.nullcontext(AfterReads(3)))
        with pytest.raises(Stopped, match="stopped after step 3 of"):
            train_under(config, "student")
    folder = "s3://runs/stopped/student"
    assert {name.split("/")[1] for name in names(s3, "stopped/student") if name.startswith("checkpoints/")} == {
        "step-00000002",
        "step-00000003",
    }
    assert len(curve(folder)) == 3
    # A checkpoint from here starts a run there, and the other way round.
    for name, target in (("adopted", "s3://runs/adopted/student"), ("local", str(tmp_path / "local"))):
        resume = {"resume": f"{folder}/checkpoints/step-00000002", "keep": 9}
        taken = at_url(name, student={"dir": target}, train=resume)
        # Twice: the second time it is there already.
        for overwrite in (None, True):
            assert train_under(taken, "student", overwrite)
            assert digest(target) == digest(tissue_run.student.dir)
    # What a killed upload has left has no state.json, and is removed by the next save.
    for file in ("weights.safetensors", "moments.safetensors"):
        s3.put_object(Bucket="runs", Key=f"stopped/student/checkpoints/step-00000004/{file}", Body=b"half")
    assert train_under(config, "student")
    assert digest(folder) == digest(tissue_run.student.dir)
    assert curve(folder) == curve(tissue_run.student.dir)
    whole = [name.split("/")[1] for name in names(s3, "stopped/student") if name.endswith("state.json")]
    assert whole == ["step-00000003", "step-00000004", "step-00000005"], "the best and the newest two"
    assert checkpoint.problems(checkpoint.complete(as_location(f"{folder}/checkpoints"))[-1]) == []
    assert main(["verify", f"{folder}/checkpoints/step-00000005"]) == 0
    assert not train_under(config, "student"), "it is finished"
    with pytest.raises(DataError, match=r"of other inputs:\n(.|\n)*train\.lr: 0\.001 in the folder, 0\.5 asked for"):
        train_under(at_url("stopped", train={"lr": 0.5}), "student")


@pytest.mark.faults
def test_a_damaged_checkpoint_in_a_bucket_is_named(at_url, s3, monkeypatch, capsys):
    config = at_url("damaged")
    with monkeypatch.context() as patched:
        patched.setattr(launch, "stop_flag", lambda _: contextlib.nullcontext(AfterReads(2)))
        with pytest.raises(Stopped):
            train_under(config, "student")
    key = "damaged/student/checkpoints/step-00000003/moments.safetensors"
    whole = s3.get_object(Bucket="runs", Key=key)["Body"].read()
    s3.put_object(Bucket="runs", Key=key, Body=whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"moments\.safetensors does not match its digest"):
        train_under(config, "student")
    assert main(["verify", "s3://runs/damaged/student/checkpoints/step-00000003"]) == 1
    assert "moments.safetensors does not match its digest" in capsys.readouterr().err
    s3.delete_object(Bucket="runs", Key=key)
    assert main(["verify", "s3://runs/damaged/student/checkpoints/step-00000003"]) == 1
    assert "moments.safetensors is missing" in capsys.readouterr().err


def test_where_nothing_can_be_written_no_step_is_taken(at_url, s3):
    with pytest.raises(DataError, match="its bucket does not exist: create it, or correct the url"):
        train_under(at_url("x", run={"dir": "s3://no-such/x"}, student={"dir": "s3://no-such/x/student"}), "student")


def test_workers_of_ray_stop_and_go_on_in_a_bucket(at_url, tissue_run, change, s3, tmp_path, caplog):
    """Two workers, stopped by a signal to the driver; then one process goes on."""
    few = {"lr": 1e-4, "checkpoint_every": 2}
    config = at_url("ray", student={"epochs": 20}, train={"workers": 2} | few)

    def stop():
        while not any(name.endswith("state.json") for name in names(s3, "ray/student/checkpoints")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(DataError, match="stopped after step .* the same command goes on from there"):
        train_under(config, "student")
    assert "stopping: the workers end their step and save a checkpoint" in caplog.messages
    assert not any(name.endswith(".stop") for name in names(s3, "ray/ray"))
    cluster.disconnect()
    done = len(curve("s3://runs/ray/student"))
    assert 2 <= done < 50
    assert train_under(at_url("ray", student={"epochs": 20}, train={"workers": 0} | few), "student")
    own = {"run": {"dir": str(tmp_path)}, "student": {"dir": str(tmp_path / "straight"), "epochs": 20}}
    straight = change(tissue_run, **own, train={"lr": 1e-4})
    assert train_under(straight, "student")
    ours, theirs = curve("s3://runs/ray/student"), curve(tmp_path / "straight")
    # Rounding is amplified from step to step here: 2e-7 at the first, 1e-4 at the fortieth.
    assert len(ours) == len(theirs) and ours[: done + 4] == pytest.approx(theirs[: done + 4], abs=1e-4)
