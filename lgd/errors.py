"""What is wrong, by whose it is: each becomes one message and an exit status."""


class ConfigError(ValueError):
    """The command line or the configuration is wrong (exit status 2)."""


class DataError(ValueError):
    """The data or the environment is wrong (exit status 1)."""


class Stopped(DataError):
    """Training was asked to end, and saved a checkpoint."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
