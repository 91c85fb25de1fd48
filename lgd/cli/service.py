"""The verb that stays: serve."""

import dataclasses
from argparse import Namespace

from lgd.base.arguments import Parser
from lgd.base.text import print_lines
from lgd.cli.verb import Run, Verb, add_code_argument
from lgd.config_files import add_option_arguments


def _add_serve(parser: Parser) -> Run:
    from lgd.serve.options import ServeOptions

    read_options = add_option_arguments(parser, ServeOptions, skip=("code",))
    add_code_argument(parser)

    def run(namespace: Namespace) -> None:
        options = read_options(namespace)
        from lgd.serve.launch import serve_until_stopped

        def announce(url: str) -> None:
            print_lines(f"LGD answers at {url} (its urls: {url}docs); Ctrl-C stops it")
            if options.token_file:
                print_lines(f"in a browser: {url}#token=TOKEN, where TOKEN is what {options.token_file} holds")

        serve_until_stopped(dataclasses.replace(options, code=tuple(namespace.code)), announce)

    return run


VERBS = {"serve": Verb("predictions, queries and the atlas of slides over HTTP and in a browser", _add_serve)}
