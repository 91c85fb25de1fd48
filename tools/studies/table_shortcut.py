"""How far each method falls where the stain of the training slides gives their level away, from runs of `lgd ablate`.

Each pair of runs is a control and a world with the shortcut (`lgd synth --shortcut 0` and `--shortcut 0.9`), whose test
images are the same. The difference is paired over slides and trainings.

python tools/studies/table_shortcut.py 0.2=runs/control,runs/shortcut 0.4=runs/control-0.4,runs/shortcut-0.4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.errors import require
from lgd.base.markup import markdown_table
from lgd.base.target import DEFAULT_TARGET, find_target
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.labels.predictions import Predictions, check_same, find_measures
from lgd.metrics import interval
from lgd.report.ablation import SINGLE_RUN_ROWS, read_kept, slug
from lgd.report.ablation_table import AblationDocument, draw_runs
from lgd.report.columns import list_compared
from lgd.report.results import format_interval

METRICS = list_compared(find_measures(find_target(DEFAULT_TARGET)))
"""Of HER2's levels, which lgd synth draws."""


def read_answers(run: Path) -> dict[str, list[Predictions]]:
    """The answers behind the table of a run, by row: one a seed, and one of the teacher and of colour."""
    folder = run / "ablation"
    table = AblationDocument.read(folder / "ablation.json")
    target = table.measures.target
    return {
        name: [read_kept(folder / SINGLE_RUN_ROWS[name], name, target)[0]]
        if name in SINGLE_RUN_ROWS
        else [read_kept(folder / slug(name) / f"seed-{number}.npz", name, target)[0] for number in range(table.seeds)]
        for name in table.rows
    }


def run(args: list[str]) -> int:
    """Print the table; returns the exit status."""
    parser = Parser("python tools/studies/table_shortcut.py", "How far each method falls by a shortcut.")
    parser.add_argument(
        "pairs", nargs="+", metavar="NAME=CONTROL,SHORTCUT", help="two runs of lgd ablate, and their name"
    )
    parser.add_argument("--metric", choices=[*METRICS], default="kappa")
    parser.add_argument("--resamples", type=int, default=1000, help="of slides and trainings (default: %(default)s)")
    asked = parser.parse(args)
    rows = []
    for pair in asked.pairs:
        name, _, folders = pair.partition("=")
        control, _, shortcut = folders.partition(",")
        require(bool(shortcut), f"{pair}: give NAME=CONTROL,SHORTCUT, such as 0.2=runs/control,runs/shortcut")
        plain, short = read_answers(Path(control)), read_answers(Path(shortcut))
        for method in [method for method in plain if method in short]:
            for answers in (*plain[method], *short[method]):
                check_same(plain[method][0], answers)
            control_SR, shortcut_SR = (
                draw_runs(runs[method], asked.metric, asked.resamples, 0) for runs in (plain, short)
            )
            groups = plain[method][0].labelled_groups
            intervals = [format_interval(interval(drawn_SR, groups)) for drawn_SR in (control_SR, shortcut_SR)]
            fall = interval(shortcut_SR - control_SR, groups)
            rows.append([name, method, *intervals, format_interval(fall, "+.3f")])
    print_lines(*markdown_table(["", METRICS[asked.metric], "control", "shortcut", "shortcut minus control"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("table_shortcut", run, sys.argv[1:]))
