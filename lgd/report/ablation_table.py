"""The table of `lgd ablate`: what each row scores over the seeds, and what LGD-Net gains over it (`ablation.json`).

Intervals are over slides and seeds (`lgd.metrics.interval`). One over slides alone says how far another set of slides
would move this one network; one over seeds alone how far another training would. A claim about a method needs both.

Shapes: S seeds, R resamples.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.base.target import DEFAULT_TARGET, StatedTarget, find_target
from lgd.io.documents import Document
from lgd.labels.measures import Measures
from lgd.labels.predictions import Predictions, bootstrap, check_same, find_measures
from lgd.metrics import Floats, Interval, interval
from lgd.models import methods
from lgd.report.caveats import PROBE_ROW
from lgd.report.colour import COLOUR, describe_colour
from lgd.report.columns import list_compared
from lgd.report.results import format_interval
from lgd.scoring.predict import TEACHER_ROW

LGD_NET, BASELINE = (methods.METHODS[name].title for name in (methods.PROPOSED, methods.BASELINE))
UPPER_BOUNDS = (TEACHER_ROW, PROBE_ROW)
"""The row that no student is expected to pass: the teacher's, or that of its probe."""


FEW_SEEDS = 5
"""Below this many trainings the quantiles of Student's t are large: 4.3 of three, 2.8 of five, 2.3 of ten."""


class Compared(Record):
    """A metric of a row of the table."""

    mean: Interval
    lgd_minus: Interval | None


class AblationDocument(Document):
    """ablation.json."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("target",)

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
    target: StatedTarget | None = None
    """What is predicted; None for the default target."""

    @property
    def measures(self) -> Measures:
        """The metrics of what is predicted."""
        return find_measures(self.target or find_target(DEFAULT_TARGET))


def draw_runs(runs: Sequence[Predictions], metric: str, resamples: int, seed: int) -> Floats:
    """The value of `metric` of each run, and after it that of each resample: (S, 1 + R).

    All runs see the same slides in a resample. Of two methods of as many seeds the difference is paired seed by seed.
    """
    return np.stack([bootstrap(run, resamples, seed, [metric])[metric] for run in runs])


def share_of_gap(ours_SR: Floats, least_SR: Floats, most_SR: Floats, lower_is_better: bool = False) -> Floats:
    """(ours - least) / (most - least) of the means over the runs: 0 where nothing is gained, 1 where `most`, such as
    the teacher, is reached.

    (S, 1 + R): by run, linearised about the share of the means, which is their mean. NaN where `most` is not better
    than `least`.
    """
    gap_R, gain_SR = (most_SR - least_SR).mean(axis=0), ours_SR - least_SR
    with np.errstate(divide="ignore", invalid="ignore"):
        share_R = np.where((gap_R < 0) if lower_is_better else (gap_R > 0), gain_SR.mean(axis=0) / gap_R, np.nan)
        linear_SR: Floats = share_R + (gain_SR - share_R * (most_SR - least_SR)) / gap_R
    return linear_SR


def compare_rows(
    rows: Mapping[str, Sequence[Predictions]], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Compared]], dict[str, Interval]]:
    """Scores of each row and its difference to LGD-Net; and the share of the gap to the teacher that LGD-Net closes.

    Raises `DataError` where rows hold different patches.
    """
    for run in itertools.chain(*rows.values()):
        check_same(rows[LGD_NET][0], run)
    groups, measures = rows[LGD_NET][0].labelled_groups, rows[LGD_NET][0].measures
    metrics = list_compared(measures)
    drawn = {
        name: {metric: draw_runs(runs, metric, resamples, seed) for metric in metrics} for name, runs in rows.items()
    }
    ours, baseline = drawn[LGD_NET], drawn[BASELINE]
    (bound,) = (drawn[name] for name in UPPER_BOUNDS if name in drawn)
    compared = {
        name: {
            metric: Compared(
                mean=interval(values, groups),
                lgd_minus=None if name == LGD_NET else interval(ours[metric] - values, groups),
            )
            for metric, values in row.items()
        }
        for name, row in drawn.items()
    }
    closed = {
        name: share_of_gap(ours[name], baseline[name], bound[name], name in measures.lower_is_better)
        for name in metrics
    }
    return compared, {name: interval(share_SR, groups) for name, share_SR in closed.items()}


def _explain_intervals(table: AblationDocument) -> str:
    over = f"Brackets hold 95 % intervals over groups ({table.resamples} resamples)"
    if table.seeds == 1:
        return f"{over} alone, of one training each: no difference is shown, whether its interval holds 0 or not."
    few = " Of so few trainings they are wide: more seeds make them narrower." if table.seeds < FEW_SEEDS else ""
    return (
        f"Means over the seeds. {over} and over the trainings (Student's t, {table.seeds - 1} degrees of freedom); a "
        f"difference whose interval holds 0 shows nothing.{few}"
    )


def format_ablation(table: AblationDocument) -> str:
    """The table in Markdown, with what must be known to believe it."""
    measures, metrics = table.measures, list_compared(table.measures)
    target, lower = measures.target, [title for name, title in metrics.items() if name in measures.lower_is_better]
    direction = f" Of {' and '.join(lower)}, lower is better." if lower else ""
    soft = f"{target.label_word}s" if target.is_number else f"soft {target.label_word}s"
    cells = [
        [
            name,
            *(format_interval(row[metric].mean) for metric in metrics),
            *(format_interval(minus, "+.3f") if (minus := row[metric].lgd_minus) else "" for metric in metrics),
        ]
        for name, row in table.rows.items()
    ]
    gaps = ", ".join(f"{metrics[name]} {format_interval(gap, '.2f')}" for name, gap in table.gap_closed.items())
    lines = [
        f"# LGD-Net, its controls and its parts: {table.seeds} seed{'s' * (table.seeds > 1)}, {table.patches} patches "
        f"of {table.groups} groups\n",
        *list_items(table.caveats),
        "",
        *markdown_table(["", *metrics.values(), *(f"LGD-Net minus it: {text}" for text in metrics.values())], cells),
        f"{_explain_intervals(table)}{direction}\n",
        *([f"{describe_colour(target)}\n"] if COLOUR in table.rows else []),
        f"Share of the gap between {BASELINE} and the {TEACHER_ROW} that {LGD_NET} closes: {gaps}.\n",
        f"Of what varies in the teacher's latents, its {soft} explain {table.explained_by_levels:.2f} (R^2 on "
        "these patches): the nearer to 1, the less latents can teach that label distillation does not.\n",
        f"{code_block(table.command)}\n",
    ]
    return "\n".join(lines)
