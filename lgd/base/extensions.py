"""Code of other packages, named `python:package.module:name` where LGD has names of its own.

To use such a name is to import its module, which runs it. So it is imported only where the user gave the name, in the
run's configuration or on the command line; one that is read from a model's folder must be among those.
"""

import importlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from lgd.base.errors import ConfigError, DataError

FORM = "python:package.module:name"
_NAME = re.compile(r"python:([a-z_]\w*(?:\.[a-z_]\w*)*):([a-z_]\w*)", re.ASCII | re.IGNORECASE)


def is_python(name: str) -> bool:
    """Whether a name is one of code outside LGD."""
    return name.startswith("python:")


def load_object(name: str, field: str) -> Any:
    """The object that a name stands for; its module is imported.

    Args:
        name: `python:package.module:name`.
        field: What holds the name, for errors.

    Raises:
        ConfigError: The name has another form, its module cannot be imported, or has no such object.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ConfigError(f"{field} is {name!r:.120}: write {FORM}")
    try:
        module = importlib.import_module(parts[1])
    # A module of others may raise anything.
    except Exception as error:
        raise ConfigError(
            f"{field} is {name}, and module {parts[1]} cannot be imported ({type(error).__name__}: {error!s:.200}): "
            "install it, or put its folder into PYTHONPATH"
        ) from error
    if not hasattr(module, parts[2]):
        raise ConfigError(f"{field} is {name}, and module {parts[1]} ({module.__file__}) has no {parts[2]}")
    return getattr(module, parts[2])


def refuse_unnamed(path: object, names: Mapping[str, str], code: Collection[str]) -> None:
    """Raise `DataError` where a file names code that the user did not.

    Args:
        path: The file, for the error.
        names: What it names, by field; names of LGD's own are passed over.
        code: What the user named.
    """
    missing = {field: name for field, name in names.items() if is_python(name) and name not in code}
    if missing:
        named = ", ".join(f"field {field} names {name:.200}" for field, name in missing.items())
        options = " ".join(f"--code {name:.200}" for name in dict.fromkeys(missing.values()))
        raise DataError(f"{path}: {named}, code that this would run: if you trust it, give {options}")
