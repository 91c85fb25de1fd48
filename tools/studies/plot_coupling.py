"""What LGD-Net gains, against how much of the level the H&E reveals, from runs of `lgd ablate` on such worlds.

python tools/studies/plot_coupling.py docs/coupling.png 0=runs/evidence-0 0.5=runs/evidence-0.5 1=runs/evidence
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from lgd.base.arguments import Parser
from lgd.base.errors import ConfigError
from lgd.base.markup import markdown_table
from lgd.base.target import DEFAULT_TARGET, find_target
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.io.location import Location
from lgd.labels.predictions import find_measures
from lgd.report.ablation_table import LGD_NET, AblationDocument
from lgd.report.columns import list_compared
from lgd.report.figures import LINES, MARKERS, error_bars, new_figure, save_figure
from lgd.report.results import format_interval

METRICS = list_compared(find_measures(find_target(DEFAULT_TARGET)))
"""Of HER2's levels, which lgd synth draws."""


def gain_curves(tables: dict[float, AblationDocument], metric: str, path: str | Location) -> None:
    """What LGD-Net gains over each control, and how well each row does, against the coupling of virtual tissue.

    `tables` are the documents of `lgd ablate`, by coupling; bars are 95 % intervals over slides and seeds.
    """
    figure = new_figure(9.0, 4.4)
    scores, gains = figure.subplots(1, 2)
    couplings = sorted(tables)
    # What all tables have.
    names = [name for name in tables[couplings[0]].rows if all(name in table.rows for table in tables.values())]
    for number, name in enumerate(names):
        style = {"color": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)], "linewidth": 1}
        place = np.array(couplings) + 0.006 * (number - (len(names) - 1) / 2)
        compared = [tables[coupling].rows[name][metric] for coupling in couplings]
        for axes, intervals in (
            (scores, [one.mean for one in compared]),
            (gains, [one.lgd_minus for one in compared]),
        ):
            if all(intervals):
                value, bars = error_bars(intervals)
                axes.errorbar(place, value, bars, label=name, **style)
    gains.axhline(0, color="black", linewidth=0.8)
    scores.set(title="what each reaches", ylabel=metric)
    gains.set(title="LGD-Net minus it", ylabel=f"difference of {metric}")
    for axes in (scores, gains):
        axes.set(xlabel="coupling: what the H&E reveals", xticks=couplings)
    figure.legend(*scores.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def run(args: list[str]) -> int:
    """Draw the figure and print its numbers; returns the exit status."""
    parser = Parser("python tools/studies/plot_coupling.py", "LGD-Net's gain against how much the H&E reveals.")
    parser.add_argument("out", help="the picture, a PNG")
    parser.add_argument("runs", nargs="+", metavar="COUPLING=RUN", help="a run of lgd ablate, and its world's coupling")
    parser.add_argument("--metric", choices=[*METRICS], default="kappa")
    asked = parser.parse(args)
    tables = {}
    for one in asked.runs:
        coupling, _, folder = one.partition("=")
        try:
            value = float(coupling)
        except ValueError as error:
            raise ConfigError(f"{one}: give COUPLING=RUN, such as 0.5=runs/evidence-0.5") from error
        tables[value] = AblationDocument.read(Path(folder) / "ablation" / "ablation.json")
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
