"""The verbs: `lgd VERB`, also `python -m lgd VERB`.

Progress goes to standard error, results to standard output. Exit status: 0 done; 1 the data or the environment is
wrong; 2 the command line or the configuration is wrong.
"""

import sys
import traceback
from collections.abc import Sequence

import lgd
from lgd.errors import ConfigError, DataError
from lgd.options import make_parser, parse
from lgd.text import escaped_output, print_lines
from lgd.cli.stages import VERBS


def usage() -> list[str]:
    """The list of verbs, line by line."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {text}" for name, (text, _) in VERBS.items()]
    return [
        "usage: lgd [--debug] VERB ...",
        "",
        "HER2 scoring from H&E alone, taught to hallucinate the latents of a frozen IHC teacher.",
        "",
        *lines,
        "",
        "lgd VERB --help tells the options of a verb; --debug shows the traceback of an error.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    with escaped_output():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(args: list[str]) -> int:
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print_lines(*usage())
        return 0 if args else 2
    if args[0] == "--version":
        print_lines(lgd.__version__)
        return 0
    try:
        _run(args[0], args[1:])
    except ConfigError as error:
        return _fail(error, 2, debug)
    except (DataError, OSError) as error:
        return _fail(error, 1, debug)
    except KeyboardInterrupt:
        print_lines("lgd: interrupted", file=sys.stderr)
        return 130
    except Exception:
        # Python itself would print the message of the error as it is.
        traceback.print_exc()
        return 1
    return 0


def _run(verb: str, args: list[str]) -> None:
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, 1)
        raise ConfigError(f"there is no verb {verb!r}{f', did you mean {close[0]!r}' if close else ''}: see lgd --help")
    text, add = VERBS[verb]
    parser = make_parser(prog=f"lgd {verb}", description=text)
    run = add(parser)
    run(parser, parse(parser, args))


def _fail(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
        return status
    first, *more = error.args if isinstance(error, ConfigError | DataError) and error.args else [error]
    print_lines(f"lgd: {first}", *more, file=sys.stderr)
    return status
