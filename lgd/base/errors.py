"""What is wrong, by whose it is: each becomes one message and an exit status.

The arguments of an error are the lines of its message. Text of others never breaks a line: a file name with a line
break in it could otherwise forge a line of ours.
"""

import re
from dataclasses import dataclass


class _Error(ValueError):
    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(_Error):
    """The command line or the configuration is wrong (exit status 2)."""


class DataError(_Error):
    """The data or the environment is wrong (exit status 1)."""


class CostError(ValueError):
    """Reading a file would take much memory or time; the text says what it has, as in `has 1,000 scans`."""


class Stopped(DataError):
    """Training was asked to end, and saved a checkpoint."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class OnBad:
    """What training does at samples that cannot be read: `stop`, or `skip:N`."""

    skips: int = 0
    """Samples that it may leave out."""

    @classmethod
    def parse(cls, text: str) -> "OnBad":
        """Read it as it is written; `ValueError` for another form."""
        if re.fullmatch(r"stop|skip:[1-9]\d{0,8}", text) is None:
            raise ValueError(f"{text!r:.100}: use stop, or skip:N to leave out up to N samples")
        return cls(int(text.partition(":")[2] or 0))

    def __str__(self) -> str:
        return f"skip:{self.skips}" if self.skips else "stop"
