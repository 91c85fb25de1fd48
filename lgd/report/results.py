"""What a report holds in numbers: `metrics.json` and its parts, as `lgd evaluate` measures them; and as Markdown."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import JsonValue

from lgd.base.markup import list_items, markdown_table
from lgd.base.records import Count, Many, Measured, Record
from lgd.config_sections import LEVEL_NAMES
from lgd.io.documents import Document
from lgd.metrics import Interval

_ANSWERS = {"accuracy": "accuracy", "kappa": "quadratic weighted kappa", "macro_f1": "macro-F1"}
HEADLINE = _ANSWERS | {"within_one": "within one level", "ece": "ECE"}
"""The metrics of the first table, and their names there."""


class Scores(Record):
    """How one model scored the patches, or the slides, whose level is known."""

    scored: Count
    groups: Count
    metrics: dict[str, Interval]
    confusion: Many[Many[Count]]
    """A row a true level, a column a predicted one."""


class AreaScores(Scores):
    """How one model scored slides by area, which gives no probability."""

    one_patch_decides: Count
    """Slides of so few patches that one alone raises the level."""


class ModelScores(Record):
    """One model by patch, and by slide in two ways; the ways are None where `no_slides` says why."""

    name: str
    by_patch: Scores
    by_slide: Scores | None
    by_area: AreaScores | None
    area_minus_mean: dict[str, Interval] | None
    no_slides: str | None


class Difference(Record):
    """The student's metrics minus those of another model, paired by patch."""

    of: str
    minus: str
    metrics: dict[str, Interval]


class Precision(Interval):
    """Mean average precision of some queries, beside that of a random ranking."""

    chance: Measured
    queries: Count


class OwnPair(Record):
    """At which rank H&E queries find their own IHC, beside a blind guess (whose mean rank is its median rank)."""

    queries: Count
    gallery: Count
    median_rank: float
    chance_median_rank: float
    mean_rank: Interval
    recall_at_1: Interval
    chance_recall_at_1: float
    recall_at_5: Interval
    chance_recall_at_5: float
    recall_at_10: Interval
    chance_recall_at_10: float


class Hubs(Record):
    """How evenly H&E queries find the IHCs of the scored split; the hundredth found most often are hubs."""

    hubs: Count
    first_answers: Interval
    """Share of the first answers that are hubs."""
    chance_first_answers: float
    answers: Interval
    """Share of the first `Retrieval.at` answers that are hubs of these."""
    chance_answers: float
    never_found: Interval
    """Share of the IHCs that are in no query's first `Retrieval.at` answers."""
    chance_never_found: float


class EmbeddingScores(Record):
    """What vectors of one kind find in the galleries."""

    name: str
    gallery: str
    by_level: dict[str, Precision]
    """`overall`, and the level of the queries."""
    own_pair: OwnPair | None
    hubs: Hubs | None


class Retrieval(Record):
    """What retrieval is worth, by several embeddings."""

    caveats: Many[str]
    at: Count
    """Neighbours behind an average precision, and answers behind hubs."""
    gallery_rows: Count
    embeddings: Many[EmbeddingScores]


class ChangeText(Record):
    """A change of the images in words: what it is, as the report describes it, and why it has these strengths."""

    name: str
    what: str
    why: str


class AtStrength(Record):
    """Scores under a change at one strength."""

    strength: float
    label: str
    metrics: dict[str, Interval]
    minus_unchanged: dict[str, Interval]


class UnderChange(Record):
    """Scores under one change, by its strengths."""

    name: str
    at: Many[AtStrength]


class ModelRobustness(Record):
    """One model on the images as they are, and under each change."""

    name: str
    unchanged: dict[str, Interval]
    changes: Many[UnderChange]


class Robustness(Record):
    """Models on images as another scanner or laboratory would have made them."""

    seed: Count
    changes: Many[ChangeText]
    models: Many[ModelRobustness]


class Results(Document):
    """metrics.json; null stands where a number is undefined."""

    FORMAT: ClassVar[str] = "lgd-report/3"
    ABSENT: ClassVar[str] = "run lgd evaluate"
    REMEDY: ClassVar[str] = "run lgd evaluate again"

    caveats: Many[str]
    provenance: dict[str, JsonValue]
    """Its `command` is shown as the way to reproduce the report."""
    resamples: Count
    seed: Count
    patches: Count
    labelled: Count
    groups: Count
    levels: dict[str, Count]
    always_the_commonest_level: float | None
    slide_rules: dict[str, str]
    models: Many[ModelScores]
    differences: Many[Difference]
    retrieval: Retrieval | None
    robustness: Robustness | None


def slide_rules_section(results: Results) -> list[str]:
    """The two ways of scoring a slide side by side; nothing where there are no slides."""
    rows, few = [], ""
    for model in results.models:
        mean, area, minus = model.by_slide, model.by_area, model.area_minus_mean
        if mean is None or area is None or minus is None:
            return []
        few = few or f"{area.one_patch_decides} of {area.scored} slides"
        rules = (("mean", mean.metrics, ".3f"), ("area", area.metrics, ".3f"), ("area minus mean", minus, "+.3f"))
        for rule, metrics, form in rules:
            rows.append([model.name, rule, *(format_interval(metrics[name], form) for name in _ANSWERS)])
    return [
        "### Two ways to score a slide\n",
        *list_items([f"{rule}." for rule in results.slide_rules.values()]),
        "",
        *markdown_table(["model", "way", *_ANSWERS.values()], rows),
        "The mean is the headline, whatever this table shows: a way that is chosen on the scored split is no longer "
        "measured by it. The area copies the form of ASCO/CAP's rule with patches for tumour cells and is not that "
        "rule; it gives a level and no probability, and so neither ECE nor AUC. In "
        f"{few} the patches are so few that a single one raises the level by area. Differences are paired by slide.\n",
    ]


def robustness_section(robustness: Robustness) -> list[str]:
    """The section on robustness."""
    rows, names = [], ("accuracy", "kappa", "ece")
    for model in robustness.models:
        rows.append([model.name, "none", *(format_interval(model.unchanged[name]) for name in names), ""])
        for change in model.changes:
            for at in change.at:
                cells = [format_interval(at.metrics[name]) for name in names]
                difference = format_interval(at.minus_unchanged["kappa"], "+.3f")
                rows.append([model.name, f"{change.name}, {at.label}", *cells, difference])
    return [
        "## Robustness, by patch\n",
        "The same patches, changed as another scanner or laboratory would have them: H&E for the students, IHC for the "
        "teacher. Changes are applied at the network's input size, after the shrinking; the strengths were fixed "
        "beforehand.\n",
        *list_items([f"{one.name}: {one.what}. Strengths: {one.why}." for one in robustness.changes]),
        "",
        *markdown_table(["model", "change", "accuracy", "kappa", "ECE", "kappa minus that of the unchanged"], rows),
    ]


def retrieval_sections(retrieval: Retrieval) -> list[str]:
    """The sections on retrieval by level, of the own pair, and on hubs, as far as there is anything to say."""
    text = []
    if any(row.by_level["overall"].queries for row in retrieval.embeddings):
        text += _levels_section(retrieval)
    if own := tabulate_own_pairs(retrieval):
        first = next(row.own_pair for row in retrieval.embeddings if row.own_pair)
        text += [
            "## Retrieval of the own IHC\n",
            f"{first.queries} H&E queries, each searching its own pair among {first.gallery} IHC latents.\n",
            *markdown_table([*own[0]], [[*row.values()] for row in own]),
        ]
    if hubs := [(row.name, row.hubs) for row in retrieval.embeddings if row.hubs]:
        text += _hubs_section(hubs, retrieval.at)
    return [*text, *list_items(retrieval.caveats), ""]


def _levels_section(retrieval: Retrieval) -> list[str]:
    columns, embeddings = ("overall", *LEVEL_NAMES), retrieval.embeddings
    levels = [[row.name, row.gallery, *(format_interval(row.by_level[name]) for name in columns)] for row in embeddings]
    # The levels of all galleries are the same, and so is chance.
    levels.append(["by chance", "", *(format_number(embeddings[0].by_level[name].chance) for name in columns)])
    return [
        "## Retrieval by level\n",
        f"Mean average precision of the {retrieval.at} nearest of {retrieval.gallery_rows} training patches, by the "
        "level of the query; a neighbour of the same level is relevant. Chance is the expected value under a random "
        "ranking.\n",
        *markdown_table(["vectors", "gallery", *columns], levels),
    ]


def tabulate_own_pairs(retrieval: Retrieval) -> list[dict[str, str]]:
    """A row each kind of vectors, and one of chance: at which rank they find the own IHC; none where nothing does."""
    columns = ("vectors", "median rank", "mean rank", "recall at 1", "recall at 5", "recall at 10")
    rows, chance = [], []
    for name, own in [(row.name, row.own_pair) for row in retrieval.embeddings if row.own_pair]:
        recalls = map(format_interval, (own.recall_at_1, own.recall_at_5, own.recall_at_10))
        rows.append([name, format_number(own.median_rank), format_interval(own.mean_rank, ".1f"), *recalls])
        chance = [own.chance_median_rank, own.chance_median_rank]
        chance += [own.chance_recall_at_1, own.chance_recall_at_5, own.chance_recall_at_10]
    if rows:
        rows.append(["by chance", *map(format_number, chance)])
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _hubs_section(hubs: Sequence[tuple[str, Hubs]], at: int) -> list[str]:
    first = hubs[0][1]
    chance = [first.chance_first_answers, first.chance_answers, first.chance_never_found]
    rows = [[name, *map(format_interval, (one.first_answers, one.answers, one.never_found))] for name, one in hubs]
    rows.append(["by chance", *map(format_number, chance)])
    columns = [
        "vectors",
        "first answers that are hubs",
        f"first {at} answers that are hubs",
        "IHCs that are never found",
    ]
    return [
        "## Hubs\n",
        f"How evenly the same queries find these IHCs. Hubs are the {first.hubs} (1 %) found most often; never "
        f"found is what is in no query's first {at} answers. Chance is the expected value of blind queries.\n",
        *markdown_table(columns, rows),
    ]


def format_interval(interval: Interval, form: str = ".3f") -> str:
    """`0.712 [0.650, 0.770]`, a dash for what is undefined."""
    if interval.value is None:
        return "–"
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}} [–]"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def format_number(value: float | None) -> str:
    """A number, a dash for what is undefined."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:g}"
