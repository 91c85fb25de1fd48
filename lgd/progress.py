"""How far a long stage is: a bar for a person at a terminal, a line now and then for a job's log."""

import sys
from typing import Any

from lgd.text import escape_text, print_lines

EVERY = 10.0
"""Seconds between two lines of a log, and before the first."""


def progress(total: int, desc: str, unit: str, done: int = 0) -> Any:
    """A tqdm bar with rate and time left on standard error; one that prints whole lines where that is no terminal.

    `done`: how much was done before.
    """
    from tqdm import tqdm

    class Lines(tqdm):
        """Carriage returns would make one endless line of a log."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.format_dict["elapsed"] >= EVERY:
                print_lines(self, file=sys.stderr)

    desc, unit = escape_text(desc), f" {unit}"
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, initial=done)
    return Lines(total=total, desc=desc, unit=unit, initial=done, mininterval=EVERY, ncols=0)
