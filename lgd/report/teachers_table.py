"""The table of `lgd teachers`: what each teacher knows, and what students make of it (`teachers.json`)."""

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.records import Count, Line, Many, Record, Sha256
from lgd.base.target import DEFAULT_TARGET, StatedTarget, find_target
from lgd.io.documents import Document
from lgd.labels.measures import Measures
from lgd.labels.predictions import find_measures
from lgd.metrics import Interval
from lgd.report.results import format_interval

COUNTED = ("explained", "tells", "tells_beyond", "rank", "own_rank", "hubs")


class Judged(Record):
    """What a teacher knows, and what students make of it. Tuples hold a number a training."""

    title: Line
    encoder: Line
    learns: Many[Line]
    """What teaches it; nothing of one that is not trained here."""
    teacher: Interval
    """What its head scores, or a probe on its latents."""
    fewer: Interval | None
    """The same of fewer labels: a head is trained anew, a probe is fitted anew."""
    distil: Interval
    lgd: Interval
    gain: Interval
    """LGD-Net minus label distillation, by the labels of this teacher, paired by training and resample."""
    explained: Many[float]
    """R^2 from its soft labels to its latents."""
    tells: Many[float]
    """R^2 from features of the H&E to its latents."""
    tells_beyond: Many[float]
    """R^2 from these features to what the soft labels leave of the latents."""
    rank: Many[float]
    """Effective rank of its latents."""
    own_rank: Many[float | None]
    """Median rank of the own IHC among those of the scored split, asked by LGD-Net."""
    hubs: Many[float | None]
    """Share of the first answers that are among the hundredth of the IHCs found most often."""
    weights: Many[Sha256]
    """Of its trainings."""


class TeachersDocument(Document):
    """teachers.json."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("target",)

    FORMAT: ClassVar[str] = "lgd-teachers/1"
    ABSENT: ClassVar[str] = "run lgd teachers first"
    REMEDY: ClassVar[str] = "run lgd teachers again"

    seeds: Annotated[int, Field(ge=1)]
    resamples: Annotated[int, Field(ge=1)]
    metric: Line
    patches: Count
    groups: Count
    labelled: dict[Line, Count]
    """Slides of the training split by label, or those with a value."""
    labelled_fewer: dict[Line, Count] | None
    teachers: Annotated[dict[Line, Judged], Field(min_length=1)]
    """By the names that they were asked for by."""
    caveats: Many[Line]
    command: Line
    shards: Many[Sha256]
    target: StatedTarget | None = None
    """What is predicted; None for the default target."""

    @property
    def measures(self) -> Measures:
        """The metrics of what is predicted."""
        return find_measures(self.target or find_target(DEFAULT_TARGET))


def _mean(values: Many[float] | Many[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(float(np.mean(known)), form) if known else ""


def _list_slides(labelled: dict[Line, Count]) -> str:
    return ", ".join(f"{count} {name}" for name, count in labelled.items())


def format_teachers(table: TeachersDocument) -> str:
    """The table in Markdown, with what must be known to believe it."""
    measures, one = table.measures, table.seeds == 1
    metric, word = measures.headline[table.metric], measures.target.label_word
    lower = " Lower is better." if table.metric in measures.lower_is_better else ""
    fewer = table.labelled_fewer
    columns = [f"teacher: {metric}", *(["with fewer labels"] if fewer else [])]
    columns += ["label distillation from it", "LGD-Net from it", "LGD-Net minus label distillation"]
    scores = [
        [
            judged.title,
            format_interval(judged.teacher),
            *([format_interval(judged.fewer) if judged.fewer else ""] if fewer else []),
            format_interval(judged.distil),
            format_interval(judged.lgd),
            format_interval(judged.gain, "+.3f"),
        ]
        for judged in table.teachers.values()
    ]
    forms = dict.fromkeys(COUNTED, ".2f") | {"tells_beyond": ".3f", "rank": ".1f", "own_rank": ".0f"}
    latents = [
        [judged.title, *(_mean(getattr(judged, name), form) for name, form in forms.items())]
        for judged in table.teachers.values()
    ]
    heads = [f"its soft {word}s explain", "H&E tells", "H&E tells beyond them", "effective rank"]
    heads += [f"median rank of the own IHC (of {table.patches})", "hubs in first answers"]
    over = "alone, of one training each: no difference is shown" if one else "and over the trainings"
    taught = f"Slides with a {word} in training: {_list_slides(table.labelled)}"
    taught += f"; with fewer labels {_list_slides(fewer)}.\n" if fewer else ".\n"
    lines = [
        f"# Teachers compared: {table.seeds} seed{'s' * (not one)}, {table.patches} patches of {table.groups} groups\n",
        *list_items(table.caveats),
        "",
        taught,
        *markdown_table(["", *columns], scores),
        f"Each seed trains the teacher and both students anew. Brackets hold 95 % intervals over groups {over} "
        f"({table.resamples} resamples).{lower} A teacher that no label taught answers by a probe on its latents, and "
        "label distillation is by its answers too.\n",
        *markdown_table(["", *heads], latents),
        "Means over the seeds, on the scored patches. The first three are R²: of a linear regression from soft "
        f"{word}s to unit latents, of a ridge regression from the H&E features of label distillation to the latents, "
        f"and of the same to what soft {word}s leave of them. Near 0 in the third column nothing but the {word} can be "
        "hallucinated, whatever the loss. The effective rank is the exponential of the entropy of the shares of the "
        f"principal components. By chance the median rank is {(table.patches + 1) / 2:g}.\n",
        f"{code_block(table.command)}\n",
    ]
    return "\n".join(lines)
