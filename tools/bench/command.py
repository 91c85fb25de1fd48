"""The command line of the benchmarks: a table, or with `--json` one document, on standard output."""

import argparse

from lgd.base.arguments import Parser
from lgd.base.text import print_json, print_lines
from lgd.cli import run_command
from lgd.config_files import add_option_arguments
from lgd.io.tables import print_table
from tools.bench.measure import Settings
from tools.bench.suite import BENCHMARKS, bench, rows, summary

_ABOUT = """Speed and memory of lgd's parts, as ratios against a bare loop or a peer, measured
in turn in one run."""
_MINUTES = """The benchmarks, and the minutes that each takes with the default options, measured on 2 cores
of an AMD EPYC that had other work, or estimated (~):"""
_OPTIONS = (
    *("images", "size", "batch", "threads", "seconds", "rounds", "teacher", "rows"),
    *("model", "train_batch", "precision", "slide"),
)


def main(argv: list[str]) -> int:
    """Run what is asked for; returns the exit status, as `lgd` does."""
    return run_command("bench", _run, argv)


def _run(args: list[str]) -> int:
    parser = Parser("python tools/bench", _ABOUT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [f"  {name:21}{'~' if one.estimated else ' '}{one.minutes:g}" for name, one in BENCHMARKS.items()]
    parser.epilog = "\n".join([_MINUTES, *lines])
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks of the list below; by default all")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    hidden = [name for name in Settings.__dataclass_fields__ if name not in _OPTIONS]
    add_option_arguments(parser, Settings, skip=hidden)
    namespace = parser.parse(args)
    document = bench(namespace.names, Settings(**{name: vars(namespace)[name] for name in _OPTIONS}))
    if namespace.json:
        print_json(document)
    else:
        print_table(rows(document))
        print_lines(summary(document))
    return 0
