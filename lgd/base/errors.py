"""What is wrong, by whose it is: each becomes one message and an exit status.

The arguments of an error are the lines of its message. Text of others never breaks a line: a file name with a line
break in it could otherwise forge a line of ours.
"""


class _Error(ValueError):
    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(_Error):
    """The command line or the configuration is wrong (exit status 2)."""


class DataError(_Error):
    """The data or the environment is wrong (exit status 1)."""


class Stopped(DataError):
    """Training was asked to end, and saved a checkpoint."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
