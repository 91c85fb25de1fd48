"""What a verb is to the command line."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lgd.base.arguments import Parser
from lgd.base.extensions import FORM

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
Run = Callable[[Namespace], None]


class Verb(NamedTuple):
    """A verb."""

    summary: str
    """Its line in `lgd --help`."""
    add: Callable[[Parser], Run]
    """Adds its arguments to a parser, and gives the function that is called with what was parsed."""


def read_options(namespace: Namespace, kind: type[Options]) -> Options:
    """The options dataclass of a verb, from a parsed command line."""
    return kind(**{field.name: vars(namespace)[field.name] for field in fields(kind)})


def add_code_argument(parser: Parser) -> None:
    """`--code`, of a verb that loads models."""
    parser.add_argument(
        "--code", action="append", default=[], metavar="NAME", help=f"code outside LGD that a model may run, as {FORM}"
    )
