"""Bars of progress; what they print is tested with all other output in `test_text.py`."""

import sys
import threading

import pytest

from lgd.progress import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_leave_no_thread_behind(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    before = threading.enumerate()
    for _ in range(3):
        with progress(2, "stage", "steps") as bar:
            assert threading.enumerate() == before
            bar.update()
    assert threading.enumerate() == before


def test_a_stage_that_becomes_slow_is_told(monkeypatch, capsys):
    """Without a thread that watches: each update looks at the clock."""
    monkeypatch.setattr("lgd.progress.EVERY", 10.0)
    with progress(10**6, "stage", "steps") as bar:
        now = bar._time()
        monkeypatch.setattr(bar, "_time", lambda: now)
        for _ in range(5):
            now += 10
            bar.update(100_000)
        capsys.readouterr()
        now += 10
        bar.update()
        assert "500001/1000000" in capsys.readouterr().err
