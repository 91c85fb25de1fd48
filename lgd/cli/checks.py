"""The verbs that look: what a folder is, what is wrong with it, what this machine has."""

from lgd.base.arguments import Namespace, Parser, typed
from lgd.base.errors import DataError
from lgd.base.text import print_json, print_lines
from lgd.cli.verb import Run, Verb, add_code_argument
from lgd.io.location import as_location

_FOLDER = "a run, shards, a feature store, a trained network or a checkpoint"
_JSON = "print one JSON document and nothing else"


def _add_info(parser: Parser) -> Run:
    parser.add_argument("folder", metavar="DIR", help=_FOLDER)
    parser.add_argument("--json", action="store_true", help=_JSON)

    def run(namespace: Namespace) -> None:
        from lgd.cli.info import as_lines, describe

        description = describe(as_location(namespace.folder))
        if namespace.json:
            print_json(description)
        else:
            print_lines(*as_lines(description))

    return run


def _add_verify(parser: Parser) -> Run:
    parser.add_argument("folder", metavar="DIR", help=_FOLDER)
    parser.add_argument(
        "--reencode", type=typed(int), default=0, metavar="N", help="rows of a store to run the teacher on again"
    )
    parser.add_argument("--teacher", default="", metavar="DIR", help="the teacher's folder, if it is not where it was")
    add_code_argument(parser)

    def run(namespace: Namespace) -> None:
        from lgd.cli.check import check

        folder = as_location(namespace.folder)
        checked = check(folder, namespace.reencode, namespace.teacher, namespace.code)
        print_lines(*checked.notes)
        if checked.problems:
            raise DataError(f"{checked.kind} {folder} has {len(checked.problems)} problem(s):", *checked.problems)
        print_lines(f"{checked.kind} {folder}: no problems")

    return run


def _add_doctor(parser: Parser) -> Run:
    parser.add_argument("--gpu", action="store_true", help="try a bf16 step and a FAISS search on the GPU")

    def run(namespace: Namespace) -> None:
        from lgd.cli.doctor import examine

        findings = examine(namespace.gpu)
        for finding in findings:
            print_lines(f"{finding.state:7} {finding.name:13} {finding.detail}")
        if any(finding.state == "broken" for finding in findings):
            raise DataError("something is broken: see the lines above")

    return run


VERBS = {
    "info": Verb("what a run, shard folder, feature store, network or checkpoint is", _add_info),
    "verify": Verb("check one of these end to end", _add_verify),
    "doctor": Verb("what this machine has and lacks", _add_doctor),
}
