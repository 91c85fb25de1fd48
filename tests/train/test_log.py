"""What a run leaves for a person."""

import json
import logging
import math

import numpy as np

from lgd.base.logs import show_logs
from lgd.train.log import Log


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


def test_the_log_is_strict_json(tmp_path, capsys):
    with show_logs(logging.INFO):
        log = Log(tmp_path / "a\x1b[2J", 0, 2, 4)
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
