"""The table of `lgd ablate --transfer`: how well probes of features answer each question (`transfer.json`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.io.documents import Document
from lgd.io.location import Location
from lgd.metrics import Interval
from lgd.report.ablation_table import LGD_NET
from lgd.report.figures import LINES, MARKERS, error_bars, new_figure, save_figure
from lgd.report.questions import MEASURES
from lgd.report.results import format_interval

if TYPE_CHECKING:
    from lgd.report.figures import Axes

_SHOWN = 100
"""Patches behind the probes that the table shows, where there are as many."""
_STYLES = ("-", "--", ":")


class Probed(Record):
    """A measure of a row."""

    mean: Interval
    lgd_minus: Interval | None
    """LGD-Net minus this row; None of itself."""


class Asked(Record):
    """A question by one measure."""

    question: Line
    measure: Line
    training_patches: Count
    """Those whose answer is known, of which probes are fitted on some."""
    patches: Count
    """Scored ones."""
    groups: Count
    sizes: Annotated[dict[Line, dict[Line, Probed]], Field(min_length=1)]
    """Patches behind a probe -> row -> what it scores."""

    @property
    def title(self) -> str:
        """As tables and figures name it."""
        return f"{self.question}: {MEASURES.get(self.measure, self.measure)}"


class TransferDocument(Document):
    """transfer.json."""

    FORMAT: ClassVar[str] = "lgd-transfer/1"
    ABSENT: ClassVar[str] = "run lgd ablate --transfer first"
    REMEDY: ClassVar[str] = "run lgd ablate --transfer again"

    seeds: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=1)]
    """Probes of each size, of other patches each."""
    resamples: Annotated[int, Field(ge=1)]
    questions: Sha256
    """Digest of the answers."""
    asked: Annotated[Many[Asked], Field(min_length=1)]
    caveats: Many[Line]
    command: Line
    shards: Many[Sha256]
    teacher: Sha256


def _choose_size(asked: Asked) -> str:
    """What the table shows: 100 patches, or the most below."""
    return max((size for size in asked.sizes if int(size) <= _SHOWN), key=int, default=next(iter(asked.sizes)))


def format_transfer(table: TransferDocument) -> str:
    """The table in Markdown, with what must be known to believe it."""
    shown = [(asked, asked.sizes[_choose_size(asked)]) for asked in table.asked]
    heads = [f"{asked.title} ({_choose_size(asked)} patches)" for asked, _ in shown]
    names = [*shown[0][1]]
    scores = [[name, *(format_interval(rows[name].mean) for _, rows in shown)] for name in names]
    differences = [
        [name, *(format_interval(minus, "+.3f") if (minus := rows[name].lgd_minus) else "" for _, rows in shown)]
        for name in names
        if name != LGD_NET
    ]
    one = table.seeds == 1
    over = "groups alone, of one training each: no difference is shown" if one else "groups and over the trainings"
    lines = [
        f"# Questions that training never asked: {table.seeds} seed{'s' * (not one)}\n",
        *list_items(table.caveats),
        "",
        *markdown_table(["", *heads], scores),
        f"{LGD_NET} minus it:\n",
        *markdown_table(["", *heads], differences),
        f"Ridge regressions on frozen features, of so few training patches, drawn {table.draws} times, alike for all "
        f"rows; means over the draws. Brackets hold 95 % intervals over {over} ({table.resamples} resamples). The IHC "
        "latents need the IHC: they are what hallucination can reach at most. Other sizes are in transfer.json and "
        "transfer.png.\n",
        f"{code_block(table.command)}\n",
    ]
    return "\n".join(lines)


def draw_transfer(table: TransferDocument, path: Location) -> None:
    """A panel a question: what each row scores against the patches behind a probe."""
    columns = min(3, len(table.asked))
    lines = -(-len(table.asked) // columns)
    names = [*next(iter(table.asked[0].sizes.values()))]
    figure = new_figure(4.2 * columns, 3.2 * lines + 0.1 * len(names) + 0.6)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, asked in zip(panels, table.asked, strict=False):
        for number, name in enumerate(names):
            _draw_row(axes, asked.sizes, name, number - (len(names) - 1) / 2, number)
        axes.set_xticks(range(len(asked.sizes)), [*asked.sizes])
        axes.set_title(asked.title, fontsize=9)
    for axes in panels[len(table.asked) :]:
        axes.set_axis_off()
    figure.supxlabel("patches behind a probe", fontsize=9)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _draw_row(axes: "Axes", sizes: Mapping[str, Mapping[str, Probed]], name: str, aside: float, number: int) -> None:
    value, bars = error_bars([rows[name].mean for rows in sizes.values()])
    axes.errorbar(
        np.arange(len(sizes)) + 0.05 * aside,
        value,
        bars,
        label=name,
        linewidth=1,
        elinewidth=0.6,
        color=LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=_STYLES[number // len(LINES) % len(_STYLES)],
        markersize=4,
    )
