"""YAML files with dotted overrides, and command lines -> `Config` and the options of a verb; the owner of jsonargparse.

Unknown keys fail, and the message names the file and the nearest field.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lgd.config import Config
from lgd.errors import ConfigError
from lgd.files import read_bytes


def make_parser(**options: Any) -> Any:
    """A jsonargparse parser whose errors become `ConfigError`."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    return jsonargparse.ArgumentParser(exit_on_error=False, **options)


def add_config_arguments(parser: Any) -> None:
    """Give a parser `--config F` and one dotted option a field."""
    parser.add_argument("--config", action="config", help="YAML file of the run; see configs/")
    for section in dataclasses.fields(Config):
        if section.name == "deepspeed":
            parser.add_argument("--deepspeed", type=dict[str, Any], default={}, help="passed to DeepSpeed as it is")
        else:
            parser.add_class_arguments(section.type, section.name)


def add_option_arguments(parser: Any, kind: Any, skip: Sequence[str] = ()) -> None:
    """Give a parser one `--hyphened-option` a field of a dataclass, with the field's docstring as its help."""
    import docstring_parser

    described = {p.arg_name: p.description for p in docstring_parser.parse_from_object(kind).params}
    for option in dataclasses.fields(kind):
        if option.name in skip:
            continue
        required = option.default is dataclasses.MISSING
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=option.type,
            help=described[option.name],
            **({"required": True} if required else {"default": option.default}),
            **({"nargs": "?", "const": True} if option.type is bool else {}),
        )


def parse(parser: Any, args: Sequence[str]) -> Any:
    """Parse `args`; a mistake raises `ConfigError` that names the file or the option, and the nearest field."""
    import jsonargparse

    files = [value for name, value in itertools.pairwise(args) if name == "--config"]
    files += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    for file in files:
        _check_keys(file)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parser.parse_args(list(args))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(_told(str(error), args, files)) from error


def _told(message: str, args: Sequence[str], files: Sequence[str]) -> str:
    """The message of jsonargparse, with the file that it is about or the nearest option."""
    value = re.fullmatch(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if value:
        given = any(arg.split("=")[0] == f"--{value[1]}" for arg in args)
        wrong = value[2]
        kinds = re.findall(r"- Expected an? <class '(\w+)'>", wrong)
        if kinds:
            *_, told = wrong.rpartition("Given value: ")
            wrong = f"{told} is no {' or '.join(kinds).replace('NoneType', 'null')}"
        return f"{'' if given or not files else ', '.join(files) + ': '}{value[1]}: {wrong}"
    unknown = re.match(r"unrecognized arguments: --([\w.]+)", message)
    if unknown:
        names = [f"{name}.{key}" for name, keys in _known().items() for key in keys]
        close = difflib.get_close_matches(unknown[1], names, 1)
        return message + (f", did you mean --{close[0]}?" if close else "")
    return message


def _check_keys(path: str) -> None:
    """Raise `ConfigError` for a file that is no YAML of sections and fields of `Config`."""
    try:
        document = yaml.safe_load(read_bytes(path).decode())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror or error}): name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML ({error})") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no sections such as `train:`; see the files in configs/")
    known = _known()
    for name, content in document.items():
        if name not in known:
            raise ConfigError(f"{path}: there is no section {name}{_nearest(str(name), known)}")
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: section {name} is {content!r}: give it fields, or remove it")
        for key in content if name != "deepspeed" else ():
            if key not in known[name]:
                raise ConfigError(
                    f"{path}: there is no field {name}.{key}{_nearest(str(key), known[name], f'{name}.')}"
                )


def _known() -> dict[str, list[str]]:
    """The fields of each section; `deepspeed` has none of ours."""
    kinds: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
    return {
        name: [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        for name, kind in kinds.items()
    }


def _nearest(name: str, known: Iterable[str], before: str = "") -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {before}{close[0]}?" if close else f"; there are {', '.join(before + k for k in known)}"


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `--section.field value` overrides, and return the resolved run.

    Raises `ConfigError` for an unknown key, a value of the wrong type or a broken cross-field rule.
    """
    parser = make_parser()
    add_config_arguments(parser)
    config_args = [] if path is None else ["--config", str(path)]
    return config_of(parser, parse(parser, [*config_args, *overrides]))


def config_of(parser: Any, namespace: Any) -> Config:
    """The resolved `Config` of a namespace that `add_config_arguments`' parser gave."""
    names = [f.name for f in dataclasses.fields(Config)]
    instantiated = parser.instantiate(namespace)
    return Config(**{name: instantiated[name] for name in names}).resolved()
