"""What LGD-Net gains, against how much of the level the H&E reveals, from runs of `lgd ablate` on such worlds.

python tools/studies/plot_coupling.py docs/coupling.png 0=runs/evidence-0 0.5=runs/evidence-0.5 1=runs/evidence
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import make_parser
from lgd.base.errors import ConfigError
from lgd.base.markup import markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.report.ablation import read_table
from lgd.report.ablation_table import LGD_NET, METRICS
from lgd.report.figures import gain_curves
from lgd.report.markdown import format_interval


def run(args: list[str]) -> int:
    """Draw the figure and print its numbers; returns the exit status."""
    parser = make_parser("python tools/studies/plot_coupling.py", "LGD-Net's gain against how much the H&E reveals.")
    parser.add_argument("out", help="the picture, a PNG")
    parser.add_argument("runs", nargs="+", metavar="COUPLING=RUN", help="a run of lgd ablate, and its world's coupling")
    parser.add_argument("--metric", choices=list(METRICS), default="kappa")
    asked = parser.parse(args)
    tables = {}
    for one in asked.runs:
        coupling, _, folder = one.partition("=")
        try:
            value = float(coupling)
        except ValueError as error:
            raise ConfigError(f"{one}: give COUPLING=RUN, such as 0.5=runs/evidence-0.5") from error
        tables[value] = read_table(Path(folder))
    gain_curves(tables, asked.metric, asked.out)
    couplings = sorted(tables)
    rows = []
    for name in tables[couplings[0]].rows:
        if name != LGD_NET and all(name in table.rows for table in tables.values()):
            gains = [tables[at].rows[name][asked.metric].lgd_minus for at in couplings]
            rows.append([name, *(format_interval(gain, "+.3f") if gain else "" for gain in gains)])
    print_lines(*markdown_table([f"LGD-Net minus it, {METRICS[asked.metric]}", *map(str, couplings)], rows))
    print_lines(f"drawn: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("plot_coupling", run, sys.argv[1:]))
