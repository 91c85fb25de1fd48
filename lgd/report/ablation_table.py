"""The table of `lgd ablate`: what each row scores over the seeds, and what LGD-Net gains over it (`ablation.json`).

Slides and seeds are resampled jointly. An interval over slides alone says how far another set of slides would move this
one network; one over seeds alone how far another training would. A claim about a method needs both.

Shapes: S seeds, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.io.documents import Document
from lgd.metrics import Floats, Interval, Predictions, bootstrap, check_same, interval, score
from lgd.models import methods
from lgd.report.caveats import COLOUR, HOW
from lgd.report.results import format_interval

METRICS = {"kappa": "quadratic weighted kappa", "macro_f1": "macro-F1", "accuracy": "accuracy"}
LGD_NET, BASELINE = (methods.METHODS[name].title for name in (methods.PROPOSED, methods.BASELINE))
UPPER_BOUND = "IHC teacher"


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


def mean_of(runs: Sequence[Predictions], metric: str, resamples: int, seed: int) -> Interval:
    """The mean of `metric` over the seeds, and its 95 % interval over slides and seeds."""
    return interval(*_drawn(runs, metric, resamples, seed))


def difference(
    ours: Sequence[Predictions], theirs: Sequence[Predictions], metric: str, resamples: int, seed: int
) -> Interval:
    """The mean of ours minus that of theirs; both see the same slides, and the same seeds where both have several."""
    for other in [*ours, *theirs]:
        check_same(ours[0], other)
    (a, a_R), (b, b_R) = (_drawn(runs, metric, resamples, seed) for runs in (ours, theirs))
    return interval(a - b, a_R - b_R)


def gap_closed(
    ours: Sequence[Predictions],
    least: Sequence[Predictions],
    most: Sequence[Predictions],
    metric: str,
    resamples: int,
    seed: int,
) -> Interval:
    """(ours - least) / (most - least): 0 where nothing is gained, 1 where `most`, such as the teacher, is reached.

    NaN where `most` is not better than `least`; such resamples are left out.
    """
    for other in [*ours, *least, *most]:
        check_same(ours[0], other)
    (a, a_R), (low, low_R), (high, high_R) = (_drawn(runs, metric, resamples, seed) for runs in (ours, least, most))
    gap, gap_R = high - low, high_R - low_R
    with np.errstate(divide="ignore", invalid="ignore"):
        share_R = np.where(gap_R > 0, (a_R - low_R) / gap_R, np.nan)
    return interval((a - low) / gap if gap > 0 else np.nan, share_R)


def _drawn(runs: Sequence[Predictions], metric: str, resamples: int, seed: int) -> tuple[float, Floats]:
    """The mean over the runs, and that of each resample, (R,).

    All runs see the same slides in a resample. Which seeds it takes depends on their number only, so that two methods
    of as many seeds are compared seed by seed.
    """
    values_S = np.array([score(run.level, run.probability)[metric] for run in runs])
    samples_SR = np.stack([bootstrap(run, resamples, seed, [metric])[metric] for run in runs])
    taken_RS = np.random.default_rng([seed, len(runs)]).integers(len(runs), size=(resamples, len(runs)))
    return float(values_S.mean()), samples_SR[taken_RS, np.arange(resamples)[:, None]].mean(axis=1)


def compare_rows(
    rows: Mapping[str, Sequence[Predictions]], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Compared]], dict[str, Interval]]:
    """Scores of each row and its difference to LGD-Net; and the share of the gap to the teacher that LGD-Net closes."""
    ours, baseline, bound = rows[LGD_NET], rows[BASELINE], rows[UPPER_BOUND]
    compared = {
        name: {
            metric: Compared(
                mean=mean_of(runs, metric, resamples, seed),
                lgd_minus=None if name == LGD_NET else difference(ours, runs, metric, resamples, seed),
            )
            for metric in METRICS
        }
        for name, runs in rows.items()
    }
    closed = {metric: gap_closed(ours, baseline, bound, metric, resamples, seed) for metric in METRICS}
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
        f"Share of the gap between {BASELINE} and the {UPPER_BOUND} that {LGD_NET} closes: {gaps}.\n",
        f"Of what varies in the teacher's latents, its soft levels tell {table.explained_by_levels:.2f} (R^2 on these "
        "patches): the nearer to 1, the less latents can teach that label distillation does not.\n",
        f"{code_block(table.command)}\n",
    ]
    return "\n".join(lines)
