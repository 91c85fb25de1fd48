"""A verb's command line: an argparse parser whose help is short and whose errors are plain words.

Nothing is guessed: an unknown or abbreviated option, a missing argument and a value of another type raise a
`ConfigError` of one line that names the option and what to type instead.
"""

import argparse
import dataclasses
import difflib
import functools
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lgd.base.errors import ConfigError
from lgd.base.plain_yaml import read_yaml
from lgd.base.text import escape_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Parser(argparse.ArgumentParser):
    """An argparse parser that knows options by their whole names only, and raises `ConfigError`."""

    def __init__(self, prog: str = "lgd", description: str = "") -> None:
        narrow = functools.partial(argparse.HelpFormatter, max_help_position=28)
        super().__init__(prog, description=description, allow_abbrev=False, exit_on_error=False, formatter_class=narrow)
        self._positionals.title = "arguments"

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """The values of a command line; options and other arguments may come in any order."""
        self.usage = self._describe_usage()
        required = [action for action in self._actions if action.required and action.nargs != "*"]
        for action in required:
            # argparse would report them in its own words.
            action.required = False
        for arg in itertools.takewhile(lambda arg: arg != "--", args):
            name, equals, value = arg.partition("=")
            if equals and name in self._option_string_actions and self._option_string_actions[name].nargs == 0:
                raise ConfigError(f"{name} takes no value: leave out {escape_text(equals + value, 60)}")
        # Only the plain way knows that all after -- are no options.
        read = self.parse_known_args if "--" in args else self.parse_known_intermixed_args
        try:
            namespace, rest = read(list(args))
        except argparse.ArgumentError as error:
            # It joins the names of an option.
            name = str(error.argument_name).partition("/")[0]
            raise ConfigError(escape_text(f"{name}: {error.message}", 1000)) from error
        if rest:
            raise ConfigError(self._explain(rest[0]))
        missing = [_name(action) for action in required if getattr(namespace, action.dest, None) in (None, [])]
        if missing:
            raise ConfigError(f"{self.prog} needs {' and '.join(missing)}: see {self.prog} --help")
        return namespace

    def _describe_usage(self) -> str:
        """What must be given, in one line; argparse would list every field of a run."""
        options = [f"{_name(one)} {one.metavar}" for one in self._actions if one.option_strings and one.required]
        forms = {"+": "{} ...", "*": "[{} ...]", "?": "[{}]"}
        words = [forms.get(str(one.nargs), "{}").format(_name(one)) for one in self._actions if not one.option_strings]
        return " ".join([self.prog, *options, "[OPTIONS]", *words]).replace("%", "%%")

    def _explain(self, arg: str) -> str:
        """Why an argument cannot be used, and what to type instead."""
        known, shown = self._option_string_actions, escape_text(arg, 60)
        if arg.startswith("-"):
            name = arg.partition("=")[0]
            return f"{self.prog} has no option {escape_text(name, 60)}{_suggest_option(name, known)}"
        if arg.endswith((".yaml", ".yml")) and "--config" in known:
            return f"{shown}: the file of a run is given as --config {shown}"
        words = [action for action in self._actions if not action.option_strings]
        takes = f"takes {' and '.join(map(_name, words))} only" if words else "takes options only"
        return f"{self.prog} {takes}: leave out {shown!r}, or write the option that it belongs to before it"

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            name = _name(action)
            raise ConfigError(f"{name} needs a value: write {name}={action.metavar or 'VALUE'}") from error


def suggest_name(name: str, known: Iterable[str], before: str = "") -> str:
    """The end of a message on an unknown name: the nearest one, or all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {before}{close[0]}?" if close else f"; there are {', '.join(before + k for k in known)}"


def _suggest_option(name: str, known: Iterable[str]) -> str:
    known = [option for option in known if option.startswith("--")]
    bare = name.lstrip("-")
    longer = [option for option in known if option.startswith(f"--{bare}")]
    same_field = [option for option in known if option.endswith(f".{bare}")]
    close = longer or same_field or difflib.get_close_matches(f"--{bare}", known, 1)
    return f", did you mean {' or '.join(close[:3])}?" if close else ": see --help"


def _name(action: argparse.Action) -> str:
    """An option's whole name, or what stands for another argument in the help."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


_UNIONS = (types.UnionType, typing.Union)
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}
_LIMITS |= {"min_length": "of a length of at least"}


def typed(kind: object) -> Callable[[str], object]:
    """An argparse type: text stays as it is where `kind` allows any, all else is read as YAML of that kind."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    words = [word for one in kinds if typing.get_origin(one) is Literal for word in typing.get_args(one)]
    has_list = any(typing.get_origin(one) is list for one in kinds)
    has_text = str in kinds or (words and all(isinstance(word, str) for word in words) and len(kinds) == 1)

    def read(text: str) -> object:
        is_text = text in words or (has_text and not (has_list and text.lstrip().startswith("[")))
        try:
            return as_type(kind, text if is_text else read_yaml(text).value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def as_type(kind: object, value: object) -> Any:
    """A plain value as one of a field's type, which may `parse` a text; `ValueError` says what it should be."""
    if hasattr(kind, "parse"):
        return kind.parse(str(value))
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        quotes = kind is str and isinstance(value, int | float | None)
        raise ValueError(f"{value!r:.100} should be {'put in quotes' if quotes else _describe(kind)}") from error


def check_bounds(settings: "DataclassInstance", before: str = "") -> None:
    """Raise `ConfigError` for a number outside the bounds of its field, or a word that is none of its choices.

    The name of the field has `before` in front of it.
    What a file or a command line gave was read as its type; Python may give anything.
    """
    for one in dataclasses.fields(settings):
        if any(typing.get_origin(kind) in (Annotated, Literal) for kind in (one.type, *typing.get_args(one.type))):
            try:
                as_type(one.type, getattr(settings, one.name))
            except ValueError as error:
                raise ConfigError(f"{before}{one.name}: {error}") from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[object]:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _describe(kind: object) -> str:
    """A type in words."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        limits = [limit for one in arguments[1].metadata for limit in dataclasses.asdict(one).items()]
        return f"{_describe(arguments[0])}, {' and '.join(f'{_LIMITS[name]} {limit}' for name, limit in limits)}"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(kind) in _UNIONS:
        return " or ".join(map(_describe, arguments))
    if typing.get_origin(kind) is list:
        return (
            "a list of numbers, such as [0.5, 0.5, 0.5]"
            if arguments == (float,)
            else "a list of texts, such as [train, val]"
        )
    words: dict[object, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "null" if kind is type(None) else "a mapping, such as {stage: 1}")
