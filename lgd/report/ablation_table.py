"""The table of `lgd ablate`: what each row scores over the seeds, and what LGD-Net gains over it (`ablation.json`).

Slides and seeds are resampled jointly. An interval over slides alone says how far another set of slides would move this
one network; one over seeds alone how far another training would. A claim about a method needs both.

Shapes: S seeds, R resamples.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.io.documents import Document
from lgd.metrics import Floats, Interval, Predictions, bootstrap, check_same, interval
from lgd.models import methods
from lgd.report.caveats import COLOUR, HOW, PROBE_ROW
from lgd.report.results import format_interval
from lgd.scoring.predict import TEACHER_ROW

METRICS = {"kappa": "quadratic weighted kappa", "macro_f1": "macro-F1", "accuracy": "accuracy"}
LGD_NET, BASELINE = (methods.METHODS[name].title for name in (methods.PROPOSED, methods.BASELINE))
UPPER_BOUNDS = (TEACHER_ROW, PROBE_ROW)
"""The row that no student is expected to pass: the teacher's, or that of its probe."""


class Compared(Record):
    """A metric of a row of the table."""

    mean: Interval
    lgd_minus: Interval | None


class AblationDocument(Document):
    """ablation.json."""

    FORMAT: ClassVar[str] = "lgd-ablation/2"
    ABSENT: ClassVar[str] = "run lgd ablate first"
    REMEDY: ClassVar[str] = "run lgd ablate again"

    seeds: Annotated[int, Field(ge=1)]
    resamples: Annotated[int, Field(ge=1)]
    patches: Count
    groups: Count
    rows: dict[Line, dict[Line, Compared]]
    gap_closed: dict[Line, Interval]
    caveats: Many[Line]
    explained_by_levels: float | None
    command: Line
    shards: Many[Sha256]
    teacher: Sha256


def draw_mean(runs: Sequence[Predictions], metric: str, resamples: int, seed: int) -> Floats:
    """The mean of `metric` over the runs, and after it that of each resample: (1 + R,).

    All runs see the same slides in a resample. Which seeds it takes depends on their number only, so that two methods
    of as many seeds are compared seed by seed.
    """
    drawn_SR = np.stack([bootstrap(run, resamples, seed, [metric])[metric] for run in runs])
    taken_RS = np.random.default_rng([seed, len(runs)]).integers(len(runs), size=(resamples, len(runs)))
    return np.append(drawn_SR[:, 0].mean(), drawn_SR[taken_RS, np.arange(1, 1 + resamples)[:, None]].mean(axis=1))


def share_of_gap(ours: Floats, least: Floats, most: Floats) -> Floats:
    """(ours - least) / (most - least): 0 where nothing is gained, 1 where `most`, such as the teacher, is reached.

    NaN where `most` is not better than `least`.
    """
    gap = most - least
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, (ours - least) / gap, np.nan)


def compare_rows(
    rows: Mapping[str, Sequence[Predictions]], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Compared]], dict[str, Interval]]:
    """Scores of each row and its difference to LGD-Net; and the share of the gap to the teacher that LGD-Net closes.

    Raises `DataError` where rows hold different patches.
    """
    for run in itertools.chain(*rows.values()):
        check_same(rows[LGD_NET][0], run)
    drawn = {
        name: {metric: draw_mean(runs, metric, resamples, seed) for metric in METRICS} for name, runs in rows.items()
    }
    ours, baseline = drawn[LGD_NET], drawn[BASELINE]
    (bound,) = (drawn[name] for name in UPPER_BOUNDS if name in drawn)
    compared = {
        name: {
            metric: Compared(
                mean=interval(values),
                lgd_minus=None if name == LGD_NET else interval(ours[metric] - values),
            )
            for metric, values in row.items()
        }
        for name, row in drawn.items()
    }
    closed = {name: interval(share_of_gap(ours[name], baseline[name], bound[name])) for name in METRICS}
    return compared, closed


def format_ablation(table: AblationDocument) -> str:
    """The table in Markdown, with what must be known to believe it."""
    cells = [
        [
            name,
            *(format_interval(row[metric].mean) for metric in METRICS),
            *(format_interval(minus, "+.3f") if (minus := row[metric].lgd_minus) else "" for metric in METRICS),
        ]
        for name, row in table.rows.items()
    ]
    gaps = ", ".join(f"{METRICS[name]} {format_interval(gap, '.2f')}" for name, gap in table.gap_closed.items())
    lines = [
        f"# LGD-Net, its controls and its parts: {table.seeds} seed{'s' * (table.seeds > 1)}, {table.patches} patches "
        f"of {table.groups} groups\n",
        *list_items(table.caveats),
        "",
        *markdown_table(["", *METRICS.values(), *(f"LGD-Net minus it: {text}" for text in METRICS.values())], cells),
        f"Means over the seeds. Brackets hold 95 % intervals from {table.resamples} resamples of groups and seeds, "
        "drawn jointly; a difference whose interval holds 0 shows nothing.\n",
        *([f"{HOW}\n"] if COLOUR in table.rows else []),
        f"Share of the gap between {BASELINE} and the {TEACHER_ROW} that {LGD_NET} closes: {gaps}.\n",
        f"Of what varies in the teacher's latents, its soft levels tell {table.explained_by_levels:.2f} (R^2 on these "
        "patches): the nearer to 1, the less latents can teach that label distillation does not.\n",
        f"{code_block(table.command)}\n",
    ]
    return "\n".join(lines)
