"""The command line: `lgd VERB`, also `python -m lgd VERB`.

Progress goes to standard error, results to standard output. Exit status: 0 done; 1 the data or the environment is
wrong; 2 the command line or the configuration is wrong; 141 nobody reads the output any more, as in `lgd ... | head`.
"""

import contextlib
import io
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence

import lgd
from lgd.base.arguments import Parser, suggest_name
from lgd.base.errors import ConfigError, DataError
from lgd.base.logs import show_logs
from lgd.base.text import escape_text, escaped_output, print_lines
from lgd.cli import answers, checks, service, stages
from lgd.io.files import explain_full
from lgd.io.location import FULL

VERBS = {**stages.VERBS, **answers.VERBS, **service.VERBS, **checks.VERBS}
"""What `lgd --help` lists, in this order."""


def usage() -> list[str]:
    """The list of verbs, line by line."""
    width = max(map(len, VERBS))
    return [
        "usage: lgd [--debug] [--quiet] VERB ...",
        "",
        "Scoring from H&E alone, of HER2 or another label, taught to hallucinate the latents of a frozen IHC teacher.",
        "",
        *(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        "lgd VERB --help lists the options of a verb. --quiet shows warnings, notes and errors only; --debug also what",
        "other libraries print, and the traceback of an error.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    return run_command("lgd", _run, sys.argv[1:] if argv is None else argv)


def run_command(name: str, run: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run a command with lgd's logs, and with each error as one message; returns the exit status.

    `run` is given the arguments without `--debug` and `--quiet`, and `name` begins the message of an error.
    """
    args = list(argv)
    debug = "--debug" in args
    level = logging.DEBUG if debug else logging.WARNING if "--quiet" in args else logging.INFO
    args = [arg for arg in args if arg not in ("--debug", "--quiet")]
    try:
        with escaped_output(), show_logs(level):
            try:
                return _answer_errors(name, run, args, debug)
            finally:
                # What is buffered would otherwise fail after the last handler of errors.
                if sys.stdout is not None:
                    sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain at exit that what is still buffered cannot be written.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in _closed_outputs():
            os.dup2(nowhere, number)
        os.close(nowhere)
        return 141


def _answer_errors(name: str, run: Callable[[list[str]], int], args: list[str], debug: bool) -> int:
    try:
        return run(args)
    except (ConfigError, DataError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _closed_outputs():
            raise
        if debug:
            traceback.print_exception(error)
        else:
            first, *more = error.args if isinstance(error, ConfigError | DataError) and error.args else [error]
            if isinstance(error, OSError) and error.errno in FULL:
                first = explain_full(error.filename or "the output", error)
            print_lines(f"{name}: {first}", *more, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print_lines(f"{name}: interrupted", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - nothing above it can answer
        # Python itself would print the message of the error as it is.
        traceback.print_exc()
        return 1


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print_lines(*usage())
        return 0 if args else 2
    if args[0] == "--version":
        print_lines(lgd.__version__)
        return 0
    verb = args[0]
    if verb not in VERBS:
        shown = escape_text(verb, 60)
        if verb.startswith("-"):
            raise ConfigError(f"the verb comes first, and {shown} is an option: lgd --help lists the verbs")
        raise ConfigError(f"lgd has no verb {shown!r}{suggest_name(verb, VERBS)}")
    parser = Parser(f"lgd {verb}", VERBS[verb].summary)
    run = VERBS[verb].add(parser)
    run(parser.parse(args[1:]))
    return 0


def _closed_outputs() -> list[int]:
    """Which of our outputs are pipes that nobody reads any more."""
    watch = select.poll()
    for stream in (sys.stdout, sys.stderr):
        # An output of a caller from Python may be no file.
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            watch.register(stream.fileno(), 0)
    return [number for number, event in watch.poll(0) if event & select.POLLERR]
