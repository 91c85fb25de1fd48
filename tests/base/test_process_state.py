"""What a run changes in its process is as before after it."""

import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch.distributed as dist

from lgd.base.process_state import default_environment, stop_signals, undo_changes
from lgd.cli import main
from lgd.ray_jobs import cluster, training
from lgd.train.deepspeed_engine import deepspeed_environment, deepspeed_problem
from lgd.train.launch import train_under

needs_deepspeed = pytest.mark.skipif(deepspeed_problem() is not None, reason=str(deepspeed_problem()))


# What PyTorch and scikit-learn set for good as they are imported for the first time.
OF_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}


def read_state():
    """All that a run may change in its process and must put back."""
    loggers = [logging.getLogger(name) for name in (None, "lgd", "DeepSpeed")]
    return {
        "environment": {name: value for name, value in os.environ.items() if name not in OF_OTHERS},
        "signals": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)},
        "warnings": list(warnings.filters),
        "process group": dist.is_initialized(),
        "loggers": [(one.propagate, list(one.filters)) for one in loggers[1:]],
        "handlers": [(one.level, list(one.handlers)) for one in loggers[:2]],
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.fixture
def unchanged(monkeypatch):
    """The state at the end is that of the beginning; nothing of it is that of another test."""
    # Filters of warnings that libraries add as they are imported are theirs.

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "RAY_ADDRESS")
    for name in [*names, *(name for name in os.environ if name.startswith("RAY_"))]:
        monkeypatch.delenv(name, raising=False)
    # What the first import of these two changes has tests of its own, and their loggers are theirs.
    importlib.import_module("ray")
    if deepspeed_problem() is None:
        import_deepspeed()
    before, modules = read_state(), {*sys.modules}
    yield
    after = read_state()
    filters, was = after.pop("warnings"), before.pop("warnings")
    assert [one for one in was if one not in filters] == []
    # Libraries add some as they are imported for the first time.
    assert filters == was or {*sys.modules} - modules
    for name, value in before.items():
        assert after[name] == value, name


def test_the_command_line_leaves_its_process_as_it_was(unchanged, tmp_path):
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["--quiet", "--help"]) == 0


@pytest.mark.parametrize("engine", ["torch", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_a_training_leaves_its_process_as_it_was(unchanged, tissue_config, change, tmp_path, engine):
    teacher = {"dir": str(tmp_path / "teacher"), "epochs": 1}
    config = change(tissue_config, run={"dir": str(tmp_path)}, teacher=teacher, train={"engine": engine})
    assert train_under(config, "teacher")


def changed_by(function, library):
    """The variables that `function` changes, which imports a library for the first time in this process."""
    assert library not in sys.modules
    before = dict(os.environ)
    function()
    assert library in sys.modules
    return {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}


def import_deepspeed():
    with deepspeed_environment("cpu"):
        import deepspeed  # noqa: F401


def fail_to_connect():
    os.environ["RAY_ADDRESS"] = "127.0.0.1:1"
    with pytest.raises(ValueError, match="RAY_ADDRESS"):
        cluster.connect(1, "--workers")
    del os.environ["RAY_ADDRESS"]


@needs_deepspeed
def test_the_import_of_deepspeed_leaves_the_environment_as_it_was(alone):
    assert not alone(changed_by, import_deepspeed, "deepspeed")


def test_the_import_of_ray_leaves_the_environment_as_it_was(alone, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not alone(changed_by, fail_to_connect, "ray")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@needs_deepspeed
def test_another_training_can_follow(unchanged, tissue_config, change, tmp_path, stage):
    """DeepSpeed does not hold on to the process group of the first."""
    for name in ("first", "second"):
        teacher = {"dir": str(tmp_path / name), "epochs": 0.5}
        config = change(tissue_config, run={"dir": str(tmp_path)}, teacher=teacher, train={"engine": "deepspeed"})
        assert train_under(replace(config, deepspeed={"zero_optimization": {"stage": stage}}), "teacher")


def test_a_failed_training_leaves_its_process_as_it_was(unchanged, tissue_config, change, tmp_path):
    teacher = {"dir": str(tmp_path / "teacher")}
    config = change(tissue_config, run={"dir": str(tmp_path)}, teacher=teacher, train={"lr": 1e30})
    with pytest.raises(ValueError, match=r"lower train\.lr"):
        train_under(config, "teacher")


def test_a_training_under_ray_leaves_its_process_as_it_was(unchanged, tmp_path):
    def leave_mark(stop):
        (tmp_path / str(os.getpid())).touch()

    try:
        training.launch(leave_mark, workers=2, max_failures=0, storage=tmp_path / "ray", name="teacher")
    finally:
        cluster.disconnect()
    marks = {path.name for path in tmp_path.iterdir()} - {"ray"}
    assert len(marks) == 2 and str(os.getpid()) not in marks


def test_a_ray_that_does_not_start_leaves_its_process_as_it_was(unchanged, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(ValueError, match="RAY_ADDRESS"):
            cluster.connect(1, "--workers")


# ---- the tools ----


def test_a_variable_that_somebody_set_stays(monkeypatch):
    monkeypatch.setenv("LGD_SET", "before")
    with pytest.raises(RuntimeError), default_environment({"LGD_SET": "other", "LGD_NEW": "x"}):
        assert (os.environ["LGD_SET"], os.environ["LGD_NEW"]) == ("before", "x")
        raise RuntimeError
    assert os.environ["LGD_SET"] == "before" and "LGD_NEW" not in os.environ


def change_state():
    os.environ.update(LGD_SET="other", LGD_NEW="x")
    signal.signal(signal.SIGTERM, lambda *_: None)


def test_changes_of_a_library_are_undone_when_asked(monkeypatch):
    monkeypatch.setenv("LGD_SET", "before")
    before = read_state()
    with undo_changes() as undo:
        change_state()
    assert os.environ["LGD_NEW"] == "x" and read_state()["signals"] != before["signals"]
    # What others change meanwhile is theirs.
    monkeypatch.setenv("LGD_OTHER", "x")
    undo.close()
    before["environment"]["LGD_OTHER"] = "x"
    assert read_state() == before


def test_changes_of_a_library_that_fails_are_undone_at_once(monkeypatch):
    monkeypatch.setenv("LGD_SET", "before")
    before = read_state()
    with pytest.raises(RuntimeError), undo_changes():
        change_state()
        raise RuntimeError
    assert read_state() == before


def test_stop_signals_mean_what_they_meant(unchanged):
    caught = []
    before = signal.getsignal(signal.SIGINT)
    with stop_signals(lambda number, _: caught.append(number)) as restore:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        restore()
        assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_changes_no_signals():
    def enter():
        with stop_signals(print) as restore:
            done.append(signal.getsignal(signal.SIGTERM) is before)
            restore()

    before, done = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert done == [True]
