"""YAML files with dotted overrides, and command lines -> `Config` and the options of a verb.

Nothing is guessed: an unknown key, an option that is abbreviated and a value of another type fail, in one line that
names the file and its line or the option, and the nearest field.
"""

import argparse
import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lgd.base.arguments import Parser, as_type, suggest_name, typed
from lgd.base.errors import ConfigError, DataError
from lgd.base.plain_yaml import MOST_BYTES, YamlError, check_text, read_yaml
from lgd.base.text import escape_text
from lgd.config import Config
from lgd.io.files import exists, read_first_bytes
from lgd.io.location import Location, as_location, as_output_location

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import JsonValue

Options = TypeVar("Options", bound="DataclassInstance")
_SECTIONS: dict[str, Any] = {
    section.name: section.type for section in dataclasses.fields(Config) if section.name != "deepspeed"
}
_PARTS = {"student": ("config.json", "train"), "latents": ("store.json", "cache-latents")}
"""What is looked for in a run: the document that each has, and the verb that makes it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A verb and what was given to it on the command line, by field."""

    verb: str = ""
    fields: Mapping[str, "JsonValue"] = dataclasses.field(default_factory=dict)


def add_config_arguments(
    parser: Parser, default: str = "", aliases: Mapping[str, str] | None = None, listed: bool = True
) -> None:
    """Give a parser `--config F` and one dotted option a field.

    `default` is read where no --config is given; `aliases` are the verb's own options by field; the help has the other
    fields only if they are `listed`.
    """
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file of the run; see configs/")
    parser.set_defaults(_config=[default] if default else [])
    if not listed:
        parser.epilog = "Any field of the run may be given as --section.field VALUE: `lgd train --help` lists them."
    for section, kind in _SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__) if listed else parser
        for option in dataclasses.fields(kind):
            name = f"{section}.{option.name}"
            alias = [aliases[name]] if aliases and name in aliases else []
            text = f"{_described(kind)[option.name]} {_default(option)}" if listed else argparse.SUPPRESS
            _add_argument(parser if alias else group, [*alias, f"--{name}"], option.type, text, dest=name)
    group = parser.add_argument_group("deepspeed", "Passed to DeepSpeed as it is.") if listed else parser
    text = "such as {zero_optimization: {stage: 2}}" if listed else argparse.SUPPRESS
    _add_argument(group, ["--deepspeed"], dict[str, object], text, dest="deepspeed")


def add_option_arguments(
    parser: Parser, kind: type[Options], skip: Sequence[str] = ()
) -> Callable[[argparse.Namespace], Options]:
    """Give a parser one `--hyphened-option` a field of a dataclass, with the field's docstring as its help.

    Returns what makes the dataclass of a parsed command line.
    """
    options = dataclasses.fields(kind)
    for option in options:
        if option.name in skip:
            continue
        flags, text = [f"--{option.name.replace('_', '-')}"], _described(kind)[option.name]
        if option.default is dataclasses.MISSING:
            _add_argument(parser, flags, option.type, text, required=True)
        elif option.type is bool:
            _add_argument(parser, flags, bool, text, default=option.default, nargs="?", const=True)
        else:
            _add_argument(parser, flags, option.type, f"{text} {_default(option)}", default=option.default)
    return lambda namespace: kind(**{option.name: vars(namespace)[option.name] for option in options})


def _add_argument(
    parser: argparse._ActionsContainer, flags: list[str], kind: object, text: str, **options: Any
) -> None:
    """Add an option whose value is read as one of a type, and which is left out of the namespace unless given."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else flags[0].rpartition(".")[2].strip("-").upper()
    options = {"default": argparse.SUPPRESS, "metavar": metavar} | options
    parser.add_argument(*flags, type=typed(kind), help=text.replace("%", "%%"), **options)


@functools.cache
def _described(kind: "type[DataclassInstance]") -> dict[str, str]:
    """The docstring of each field of a dataclass."""
    import docstring_parser

    return {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(kind).params}


def _default(option: dataclasses.Field[object]) -> str:
    made = option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default
    made = str(made) if hasattr(made, "parse") else made
    return "" if made in ("", None) else f"(default: {made if isinstance(made, str) else json.dumps(made)})"


def load_config(path: str | Location | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides.

    Args:
        path: The file, or its url; without one, the defaults.
        overrides: As on a command line, such as `["--train.batch", "64"]`.

    Returns:
        The run, with every default folder filled in and paths absolute.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, a value is of another type, or two do not fit.
    """
    parser = Parser()
    add_config_arguments(parser)
    return config_of(parser.parse([*([] if path is None else [f"--config={path}"]), *overrides]))


def is_run(folder: Location) -> bool:
    """Whether a folder, or a url, is that of a run."""
    return exists(folder / "run.json") or exists(folder / "config.yaml")


def find_in_run(folder: str | Location, part: Literal["student", "latents"]) -> Location:
    """The student or the feature store of a run's folder; a folder that is no run is given back as it is.

    It is the one that the run's config.yaml names; of a run that was moved or copied, the one in its folder now. Raises
    `DataError` for a run that has none.
    """
    folder, (document, verb) = as_location(folder), _PARTS[part]
    if exists(folder / document) or not is_run(folder):
        return folder
    path = folder / part
    if exists(folder / "config.yaml"):
        config = load_config(folder / "config.yaml")
        named, root = getattr(config, part).dir, f"{config.run.dir}/"
        # The folder of a run may have been moved or copied, with what is in it or without.
        below = folder / named.removeprefix(root) if named.startswith(root) else as_location(named)
        path = below if exists(below / document) else as_location(named)
    if not exists(path / document):
        raise DataError(f"{folder} is a run, and {path} holds none of its {part} yet: run lgd {verb}, or name another")
    return path


def config_of(namespace: argparse.Namespace) -> Config:
    """The resolved `Config` of a namespace that `add_config_arguments`' parser gave.

    Later files win over earlier ones, and options over files.
    """
    content: dict[str, dict[str, JsonValue]] = {}
    for file in namespace.config or namespace._config:
        for name, fields in _read_file(file).items():
            content[name] = fields if name == "deepspeed" else content.get(name, {}) | fields
    for name, value in _given_fields(namespace).items():
        section, _, field = name.partition(".")
        if isinstance(value, str):
            try:
                check_text(value)
            except YamlError as error:
                raise ConfigError(f"--{name}: {error}") from error
        content[section] = content.get(section, {}) | {field: value} if field else value
    deepspeed = content.pop("deepspeed", {})
    sections = {name: _SECTIONS[name](**fields) for name, fields in content.items()}
    return resolve_config(Config(**sections, deepspeed={**deepspeed}))


def given_of(namespace: argparse.Namespace, verb: str = "", **own: "JsonValue") -> Given:
    """The fields of the run that a command line gave, the files that it named, and the verb's `own` options."""
    files = {"config": list(namespace.config)} if namespace.config else {}
    given = _given_fields(namespace)
    fields = {name: str(value) if hasattr(value, "parse") else value for name, value in given.items()}
    return Given(verb, files | {name: value for name, value in own.items() if value} | fields)


def _given_fields(namespace: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(namespace).items() if "." in name or name == "deepspeed"}


def locate_field(given: Given | None, name: str) -> str:
    """`FILE, line N: ` for an error about a field, where a YAML file of the command line gave it."""
    files = given.fields.get("config") if given and name not in given.fields else None
    for path in map(str, reversed(files if isinstance(files, list) else [])):
        if line := read_yaml(_read_text(path)).lines.get(name):
            return f"{escape_text(path)}, line {line}: "
    return ""


def _read_file(path: str) -> dict[str, dict[str, "JsonValue"]]:
    """The sections and fields of a YAML file; `ConfigError` names it and the line of what `Config` has not."""
    text, path = _read_text(path), escape_text(path)
    try:
        content, lines = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}, line {error.line}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no sections such as `train:`; see the files in configs/")
    sections = [*_SECTIONS, "deepspeed"]
    for name, fields in content.items():
        where = f"{path}, line {lines[name]}"
        if name not in sections:
            raise ConfigError(f"{where}: there is no section {name:.60}{suggest_name(name, sections)}")
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: section {name} is {fields!r:.60}: give it fields, or remove it")
        if name == "deepspeed":
            continue
        known = {option.name: option.type for option in dataclasses.fields(_SECTIONS[name])}
        for key, value in fields.items():
            where = f"{path}, line {lines[f'{name}.{key}']}"
            if key not in known:
                raise ConfigError(f"{where}: there is no field {name}.{key:.60}{suggest_name(key, known, f'{name}.')}")
            try:
                fields[key] = as_type(known[key], value)
            except ValueError as error:
                raise ConfigError(f"{where}: {name}.{key}: {error}") from error
    return content


def _read_text(path: str) -> str:
    name = escape_text(path)
    try:
        check_text(path)
        content = read_first_bytes(path, MOST_BYTES + 1)
    except YamlError as error:
        raise ConfigError(f"--config {name}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config {name} cannot be read ({error.strerror or error}): name a YAML file") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"--config {name} has more than {MOST_BYTES:,} bytes: name a YAML file of a run")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no UTF-8 text: save it as such") from error


def resolve_config(config: Config) -> Config:
    """The same run with every default folder filled in, and paths absolute: workers have other working folders."""
    root = _absolute(config.run.dir, "run.dir")

    def output(name: str, default: str = "") -> str:
        folder: str = getattr(config, name).dir
        return _absolute(folder, f"{name}.dir") if folder else f"{root}/{default or name}"

    def encoder(name: str) -> str:
        local = name.startswith("~") or ("/" in name and Path(name).is_dir())
        return _absolute(name) if local else name

    replace, resume = dataclasses.replace, config.train.resume
    named = "teacher" if config.teacher.name == "teacher" else f"teacher-{config.teacher.name}"
    shards = [_absolute(folder) if folder else f"{root}/shards" for folder in config.shard_dirs]
    also = [_absolute(folder) for folder in config.report.also]
    return replace(
        config,
        run=replace(config.run, dir=root),
        data=replace(config.data, shards=shards),
        teacher=replace(config.teacher, dir=output("teacher", named), encoder=encoder(config.teacher.encoder)),
        latents=replace(config.latents, dir=output("latents")),
        student=replace(config.student, dir=output("student"), encoder=encoder(config.student.encoder)),
        train=replace(config.train, resume=resume if resume in ("auto", "never") else _absolute(resume)),
        report=replace(config.report, dir=output("report"), also=also),
    )


def _absolute(folder: str, output: str = "") -> str:
    """A path that is the same in every working folder, or a url; `output` is the field of what will be written."""
    scheme, is_url, rest = folder.partition("://")
    if is_url and scheme != "file":
        return f"{scheme}://{rest.rstrip('/')}"
    return str((as_output_location(folder, output) if output else as_location(folder)).absolute())
