"""What a run leaves for a person."""

import json
import logging
import math
import subprocess
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.base.logs import show_logs
from lgd.base.target import find_target
from lgd.train.log import Log, read_lines


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


def test_the_log_is_strict_json(tmp_path, capsys):
    with show_logs(logging.INFO):
        log = Log(tmp_path / "a\x1b[2J", 0, 2, 4, find_target("her2"))
        log.step(1, {"loss": 0.5, "rate": 0.1}, 0.0)
        log.step(2, {"loss": math.nan, "rate": math.inf}, 0.0)
        log.validation(2, {"kappa": 0.1, "accuracy": 0.5}, np.eye(4), np.arange(4))
        log.close()
    rows = [
        json.loads(line, parse_constant=refuse) for line in (log.working.path / "log.jsonl").read_text().splitlines()
    ]
    assert rows == [{"step": 1, "loss": 0.5, "rate": 0.1}, {"step": 2, "loss": None, "rate": None}]
    err = capsys.readouterr().err
    assert r"a\x1b[2J: step 2/2  val kappa 0.100" in err and "\x1b" not in err


# A run may have died within a line, or after steps that it takes again; a disk may have lost lines.
BROKEN = ('{"step": 2, "lo', "", "[3]", '{"step": null}', "\x00\x00", '{"loss": 1}')
LINES = st.one_of(st.integers(0, 9).map(lambda step: json.dumps({"step": step, "loss": 1})), st.sampled_from(BROKEN))


@given(st.lists(LINES, max_size=20), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_the_lines_of_a_log_are_those_of_the_steps_that_are_done(tmp_path_factory, lines, last):
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    path.write_text("\n".join(lines))
    found = read_lines(path, last)
    steps = {json.loads(line)["step"] for line in lines if line not in BROKEN}
    assert [*found] == sorted(step for step in steps if 1 <= step <= last)
    assert all(json.loads(line)["step"] == step for step, line in found.items())


def test_a_resumed_log_has_each_step_once_and_says_which_are_lost(tmp_path, caplog):
    lines = [json.dumps({"step": step, "loss": 1}) for step in (1, 2, 5, 6, 7)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 8, "lo']))
    for start, lost in ((6, "lacks 2 of the 6 steps that are done, from step 3 to 4"), (2, "")):
        caplog.clear()
        log = Log(tmp_path, start, 8, 4, find_target("her2"))
        for step in range(start + 1, 9):
            log.step(step, {"loss": 0.5}, 0.0)
        log.close()
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == bool(lost) and all(f"log.jsonl {lost}" in message for message in said)
        steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert steps == [step for step in range(1, 9) if not lost or step not in (3, 4)]


@pytest.mark.parametrize("room", ["16k", "64k"])
def test_a_log_that_cannot_be_written_says_so(tmp_path, capsys, room):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here: run the tests as root")
    hook = threading.excepthook
    try:
        with show_logs(logging.INFO):
            log = Log(folder / "student", 0, 10**4, 4, find_target("her2"))
            with pytest.raises(DataError, match=r"student/log\.jsonl cannot be written, no space is left"):
                for step in range(1, 10**4):
                    log.step(step, {"loss": 0.5}, 0.0)
                    log.publish()
            log.close()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    error = capsys.readouterr().err
    assert "student: the log is incomplete" in error and "Traceback" not in error
    assert threading.excepthook is hook
