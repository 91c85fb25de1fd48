"""Numbers of a report as Markdown: cells, tables, and the sections on slides, robustness and retrieval."""

from collections.abc import Sequence

from lgd.base.markup import list_items, markdown_table
from lgd.config import LEVEL_NAMES
from lgd.metrics import Interval
from lgd.report.results import OwnPair, Results, Retrieval, Robustness

_ANSWERS = {"accuracy": "accuracy", "kappa": "quadratic weighted kappa", "macro_f1": "macro-F1"}


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
    """The sections on retrieval by level and of the own pair."""
    columns, embeddings = ("overall", *LEVEL_NAMES), retrieval.embeddings
    levels = [[row.name, row.gallery, *(format_interval(row.by_level[name]) for name in columns)] for row in embeddings]
    # The levels of all galleries are the same, and so is chance.
    levels.append(["by chance", "", *(format_number(embeddings[0].by_level[name].chance) for name in columns)])
    own_pairs = [(row.name, row.own_pair) for row in embeddings if row.own_pair]
    text = [
        "## Retrieval by level\n",
        f"Mean average precision of the {retrieval.at} nearest of {retrieval.gallery_rows} training patches, by the "
        "level of the query; a neighbour of the same level is relevant. Chance is the expected value under a random "
        "ranking.\n",
        *markdown_table(["vectors", "gallery", *columns], levels),
    ]
    if own_pairs:
        text += _own_pair_section(own_pairs)
    return [*text, *list_items(retrieval.caveats), ""]


def _own_pair_section(own_pairs: Sequence[tuple[str, OwnPair]]) -> list[str]:
    first = own_pairs[0][1]
    chance = [first.chance_median_rank] * 2
    chance += [first.chance_recall_at_1, first.chance_recall_at_5, first.chance_recall_at_10]
    rows = [
        [
            name,
            format_number(own.median_rank),
            format_interval(own.mean_rank, ".1f"),
            *map(format_interval, (own.recall_at_1, own.recall_at_5, own.recall_at_10)),
        ]
        for name, own in own_pairs
    ]
    rows.append(["by chance", *map(format_number, chance)])
    return [
        "## Retrieval of the own IHC\n",
        f"{first.queries} H&E queries, each searching its own pair among {first.gallery} IHC latents.\n",
        *markdown_table(["vectors", "median rank", "mean rank", "recall at 1", "recall at 5", "recall at 10"], rows),
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
