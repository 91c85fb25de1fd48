"""How far a long stage is: a bar for a person at a terminal, a line now and then for a job's log."""

import functools
import sys
from typing import Any

from lgd.text import escape_text, print_lines

EVERY = 10.0
"""Seconds between two lines of a log, and before the first."""


def progress(total: int, desc: str, unit: str, done: int = 0) -> Any:
    """A tqdm bar with rate and time left on standard error; one that prints whole lines where that is no terminal.

    `done`: how much was done before.
    """
    options: dict[str, Any] = {"total": total, "desc": escape_text(desc), "unit": f" {unit}", "initial": done}
    # Each update looks at the clock: otherwise tqdm needs a thread of its own to notice that a stage has become slow.
    options["miniters"] = 1
    bars, lines = _bar_classes()
    return bars(**options) if sys.stderr.isatty() else lines(**options, mininterval=EVERY, ncols=0)


@functools.cache
def _bar_classes() -> tuple[type, type]:
    """The bar of a terminal, and that of a log."""
    from tqdm import tqdm

    class Bar(tqdm):
        """tqdm starts a thread for every class of bars, which nothing ends."""

        monitor_interval = 0

    class Lines(Bar):
        """Carriage returns would make one endless line of a log."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.format_dict["elapsed"] >= EVERY:
                print_lines(self, file=sys.stderr)

    return Bar, Lines
