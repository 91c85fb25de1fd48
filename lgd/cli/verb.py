"""What a verb is to the command line."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from lgd.base.arguments import Parser
from lgd.base.extensions import FORM

Run = Callable[[Namespace], None]


class Verb(NamedTuple):
    """A verb."""

    summary: str
    """Its line in `lgd --help`."""
    add: Callable[[Parser], Run]
    """Adds its arguments to a parser, and gives the function that is called with what was parsed."""


def add_code_argument(parser: Parser) -> None:
    """`--code`, of a verb that loads models."""
    parser.add_argument(
        "--code", action="append", default=[], metavar="NAME", help=f"code outside LGD that a model may run, as {FORM}"
    )
