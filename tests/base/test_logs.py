"""What is logged, and who sees it; what the lines escape is tested with all other output in `test_text.py`."""

import contextlib
import logging
import os
import pickle
import pty
import queue
import subprocess
import sys
import termios
import threading
import warnings

import pytest

from lgd.base.logs import log_prints, progress, receive_logs, send_logs, show_logs

logger = logging.getLogger("lgd.some.module")


# ---- lines ----


def say_all():
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)("[stage] a line of %s", level)


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (logging.WARNING, ["[stage] a line of warning", "[stage] a line of error"]),
        (logging.INFO, ["[stage] a line of info", "[stage] a line of warning", "[stage] a line of error"]),
    ],
)
def test_the_command_line_shows_lines_from_its_level_on(capsys, level, lines):
    with show_logs(level):
        say_all()
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == lines


def test_a_line_of_debug_names_its_module(capsys):
    with show_logs(logging.DEBUG):
        say_all()
    assert capsys.readouterr().err.splitlines()[0] == "lgd.some.module: [stage] a line of debug"


def test_a_line_is_one_line_and_escaped(capsys):
    with show_logs(logging.INFO):
        logger.info("a file %s", "a\nlgd: verified \x1b[2J")
    assert capsys.readouterr().err == "a file a\\nlgd: verified \\x1b[2J\n"


def test_a_program_that_imports_lgd_sees_nothing_unless_it_asks():
    code = "import logging, lgd; logging.getLogger('lgd.x').warning('said'); "
    for more, wanted in (("", ""), ("logging.basicConfig(); logging.getLogger('lgd').warning('x')", "WARNING:lgd:x\n")):
        done = subprocess.run([sys.executable, "-c", code + more], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, wanted)


def test_a_program_takes_lines_and_progress_where_it_likes(tissue_config, tmp_path, capsys, caplog, monkeypatch):
    """A stage as a function prints nothing; its records come through `logging`."""
    from lgd.shards.builder import build
    from lgd.shards.options import ShardOptions

    monkeypatch.setattr("lgd.base.logs.EVERY", 0.0)
    with caplog.at_level(logging.INFO, "lgd"):
        options = {"slides": tissue_config.shard_dirs[0].replace("shards", "bci/truth.csv")}
        root = tissue_config.shard_dirs[0].replace("shards", "bci")
        build(ShardOptions(layout="bci", root=root, out=str(tmp_path / "out"), mpp=0.46, **options))
    assert capsys.readouterr() == ("", "")
    assert any(record.name == "lgd.base.logs" and "48/48" in record.message for record in caplog.records)
    assert all(record.name.startswith("lgd.") for record in caplog.records)


# ---- bars ----


@contextlib.contextmanager
def terminal_output(monkeypatch):
    """Standard error as a terminal; what was written to it is in the list that it gives, once the block ends."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    lines: list[str] = []
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield lines
    written = b""
    with contextlib.suppress(OSError):
        # Linux tells the end by an error.
        while part := os.read(ours, 1 << 16):
            written += part
    os.close(ours)
    # What a person sees of each line at the end.
    lines += [line.split("\r")[-1].rstrip() for line in written.decode().split("\r\n")]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_leave_no_thread_behind(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    before = threading.enumerate()
    with show_logs(logging.INFO):
        for _ in range(3):
            with progress(2, "stage", "steps") as bar:
                assert threading.enumerate() == before
                bar.update()
    assert threading.enumerate() == before


def test_a_stage_that_becomes_slow_is_logged(capsys):
    """Without a thread that watches: each update looks at the clock."""
    with show_logs(logging.INFO), progress(10**6, "stage", "steps") as bar:
        now = bar._time()
        bar._time = lambda: now
        for _ in range(5):
            now += 10
            bar.update(100_000)
        capsys.readouterr()
        now += 10
        bar.update()
        assert "500001/1000000" in capsys.readouterr().err


def test_a_quick_stage_leaves_no_line_in_a_log(capsys):
    with show_logs(logging.INFO), progress(2, "stage", "steps") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_line_goes_above_a_live_bar(monkeypatch):
    with terminal_output(monkeypatch) as lines, show_logs(logging.INFO), progress(3, "stage", "steps") as bar:
        bar.update()
        logger.warning("a note")
    assert lines[0] == "a note" and lines[1].startswith("stage:  33%") and lines[2:] == [""]


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_neither_bars_nor_their_lines(monkeypatch, capsys, terminal):
    monkeypatch.setattr("lgd.base.logs.EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with show_logs(logging.WARNING), progress(2, "stage", "steps") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


# ---- workers ----


class Wire:
    """What a record goes through on its way to another process."""

    def __init__(self):
        self.records = queue.SimpleQueue()

    def put_nowait(self, record):
        self.records.put(pickle.dumps(record))

    def get(self, block):
        return pickle.loads(self.records.get(block))


def test_records_of_a_worker_are_the_drivers(capsys, caplog):
    wire = Wire()
    with send_logs(wire, logging.INFO):
        say_all()
        logger.info("%s of %s", 1, lambda: "what cannot be pickled")
    assert capsys.readouterr().err == "" and not caplog.records
    with show_logs(logging.INFO), receive_logs(wire, several=False):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [f"[stage] a line of {level}" for level in ("info", "warning", "error")]
    assert lines[3].startswith("1 of <function") and len(lines) == 4


def test_the_bar_of_a_worker_is_drawn_at_the_driver_once(monkeypatch):
    """A worker that was started again goes on in the bar of the lost one."""
    monkeypatch.setattr("lgd.base.logs._SENT_EVERY", 0.0)
    wire = Wire()
    with send_logs(wire, logging.INFO):
        lost = progress(4, "student", "steps")
        lost.update()
        logger.info("student: step 1/4  val kappa 0.500")
        with progress(4, "student", "steps", done=2) as bar:
            bar.set_postfix_str("loss 0.5", refresh=False)
            bar.update(2)
        wire.put_nowait(None)
    with terminal_output(monkeypatch) as lines, show_logs(logging.INFO), receive_logs(wire, several=False):
        pass
    assert lines[0] == "student: step 1/4  val kappa 0.500"
    assert "4/4" in lines[-2] and "loss 0.5" in lines[-2] and len(lines) <= 4


def test_a_quiet_driver_is_sent_nothing_but_warnings():
    wire = Wire()
    with send_logs(wire, logging.WARNING):
        say_all()
        with progress(4, "student", "steps") as bar:
            bar.update()
    wire.put_nowait(None)
    assert [wire.get(False).levelname for _ in range(2)] == ["WARNING", "ERROR"] and wire.get(False) is None


# ---- other libraries ----


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_lines_of_other_libraries_are_for_debug(level, caplog):
    with warnings.catch_warnings(record=True) as caught, show_logs(level):
        logging.getLogger("DeepSpeed").warning("noise")
        logging.getLogger("DeepSpeed").error("an error")
        warnings.warn("Grad strides do not match bucket view strides. This may", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    debug = level == logging.DEBUG
    assert [record.message for record in caplog.records] == (["noise"] if debug else []) + ["an error"]
    assert [str(one.message)[:9] for one in caught] == (["Grad stri"] if debug else []) + ["something"]


def test_the_prints_of_a_library_are_no_results(capsys):
    with pytest.raises(RuntimeError), show_logs(logging.DEBUG), log_prints(logger):
        print("built")
        raise RuntimeError
    out, err = capsys.readouterr()
    assert not out and err == "lgd.some.module: built\n"
