"""A finished network is replaced only where that was asked for, and is there until the new one is."""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_loop import AfterReads, log_of

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.scoring.predict import load_scorer
from lgd.train import launch
from lgd.train.finished import fit_temperature
from lgd.train.launch import train_under


@pytest.fixture(scope="module")
def finished(tissue_run, change, tmp_path_factory):
    """A run whose student sees H&E only and was trained in two steps. No test may change its folder."""
    folder = tmp_path_factory.mktemp("finished")
    student = {"dir": str(folder / "student"), "method": "he-only", "epochs": 0.8}
    config = change(tissue_run, run={"dir": str(folder)}, student=student, train={"checkpoint_every": 1})
    assert train_under(config, "student")
    return config


@pytest.fixture
def lgd(finished, change, tmp_path, capsys):
    """`lgd(verb, *args)` on a copy of that run; its exit status, and its messages."""
    folder = tmp_path / "run"
    shutil.copytree(finished.run.dir, folder)
    config = change(finished, run={"dir": str(folder)}, student={"dir": str(folder / "student")})
    (tmp_path / "config.yaml").write_text(config.as_yaml())

    def run(verb, *args):
        status = main([verb, "--config", str(tmp_path / "config.yaml"), *args])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "student"


def contents(folder):
    """Of all files but the model card, which `lgd train` adds to a network that Python trained."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name != "README.md"}


def test_another_one_is_refused_with_the_difference_and_replaced_when_asked_for(lgd, folder, tmp_path):
    before = contents(folder)
    other = ["train", "--train.lr=0.01", "--student.epochs=1.2"]
    status, message = lgd(*other)
    assert status == 1 and message.splitlines()[-4:] == [
        f"lgd: {folder} holds a finished student of other inputs:",
        "  task.epochs: 0.8 in the folder, 1.2 asked for",
        "  train.lr: 0.001 in the folder, 0.01 asked for",
        "give --overwrite to replace it, or name another folder as student.dir",
    ]
    assert contents(folder) == before
    assert lgd("train")[0] == 0 and lgd("train", "--overwrite")[0] == 0
    assert contents(folder) == before, "the same command again changes nothing"
    status, message = lgd(*other, "--overwrite")
    assert status == 0 and f"trained: {folder}" in message
    assert len(log_of(folder)) == 3 and load_scorer(folder).config.epochs == 1.2
    # It is no part of what the run depends on, and no later command is allowed it.
    status, message = lgd(*other)
    assert status == 0 and f"reused, nothing changed: {folder}" in message
    assert "overwrite" not in (tmp_path / "run" / "config.yaml").read_text()
    assert lgd("train")[0] == 1


def test_shards_with_the_he_at_the_models_size_are_other_inputs(lgd, folder, small_he_shards):
    """The network sees the same patches, a little changed by one more JPEG."""
    status, message = lgd("train", f"--data.shards={small_he_shards}")
    assert status == 1 and "holds a finished student of other inputs:" in message
    assert "  shards.train.digest: " in message and "  shards.val.digest: " in message
    status, message = lgd("train", f"--data.shards={small_he_shards}", "--overwrite")
    assert status == 0 and load_scorer(folder).config.training.shards


def test_the_old_one_is_there_until_the_new_one_is_and_a_stopped_replacement_goes_on(lgd, folder, monkeypatch):
    network = [folder / "config.json", folder / "model.safetensors"]
    before = [path.read_bytes() for path in network]
    other = ["train", "--student.epochs=1.6", "--overwrite"]
    with monkeypatch.context() as patched:
        patched.setattr(launch, "stop_flag", lambda _: contextlib.nullcontext(AfterReads(3)))
        status, message = lgd(*other)
    assert status == 1 and "stopped after step 3 of 4; the same command goes on from there" in message
    assert [path.read_bytes() for path in network] == before and load_scorer(folder)
    # The old one's checkpoints, which told what it was made of, are gone.
    status, message = lgd("train", "--student.epochs=1.6")
    assert status == 1 and "  its checkpoints, which would show the difference, are not in" in message
    # A third one is not taken for either, and what the second has done so far is not lost by it.
    status, message = lgd("train", "--student.epochs=2", "--overwrite")
    assert status == 1 and "step-00000003 is of another run:\n  task.epochs: 1.6 in the checkpoint, 2.0" in message
    status, message = lgd(*other)
    assert status == 0 and "goes on after step 3 of 4" in message
    assert network[1].read_bytes() != before[1] and load_scorer(folder).config.epochs == 1.6


def test_the_same_one_is_trained_anew_when_asked_for_twice(lgd, folder):
    before = contents(folder)
    status, message = lgd("train", "--resume", "never")
    assert status == 1 and f"{folder} holds the student of this very run, finished: give --overwrite" in message
    status, message = lgd("train", f"--train.resume={folder / 'checkpoints' / 'step-00000001'}")
    assert status == 0 and "reused, nothing changed" in message
    assert contents(folder) == before
    status, message = lgd("train", "--resume", "never", "--overwrite")
    assert status == 0 and "trained" in message
    assert (folder / "model.safetensors").read_bytes() == before[folder / "model.safetensors"], "from the same seed"
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    resumed = ["train", f"--train.resume={folder / 'checkpoints' / 'step-00000001'}", "--overwrite"]
    status, message = lgd(*resumed)
    assert status == 0 and "goes on after step 1 of 2" in message


@pytest.mark.parametrize("content", ["{", '{"format": "lgd-model/0"}'])
def test_a_network_that_cannot_be_read_is_not_replaced_unasked(lgd, folder, content):
    (folder / "config.json").write_text(content)
    before = contents(folder)
    status, message = lgd("train")
    assert status == 1 and f"{folder} holds what cannot be read as a student: give --overwrite" in message
    assert contents(folder) == before
    status, message = lgd("train", "--overwrite")
    assert status == 0 and load_scorer(folder)


def test_commands_without_the_option_name_what_helps_there(lgd, tissue_run, tmp_path):
    teacher = tmp_path / "run" / "teacher"
    shutil.copytree(tissue_run.teacher.dir, teacher)
    status, message = lgd("ablate", f"--teacher.dir={teacher}", "--teacher.epochs=3")
    assert status == 1 and "task.epochs: 2.0 in the folder, 3.0 asked for" in message
    assert message.splitlines()[-1] == f"remove {teacher}, or name another folder as run.dir"


def test_damaged_weights_of_the_same_run_are_made_again_unasked(lgd, folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert lgd("train")[0] == 0 and (folder / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(temperature):
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 4)) * 2
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    level = (random.random((4000, 1)) > chances.cumsum(1)).sum(1).clip(max=3)
    assert fit_temperature(level, logits * temperature) == pytest.approx(temperature, rel=0.06)


def test_a_temperature_needs_finite_logits():
    assert 0.1 <= fit_temperature(np.arange(4), np.eye(4)) < 1
    with pytest.raises(DataError, match="not finite"):
        fit_temperature(np.array([0]), np.array([[np.nan, 0, 0, 0]]))
