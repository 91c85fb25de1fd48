"""What a report says of its numbers, as Markdown: the sections of `summary.md` below its first tables."""

from collections.abc import Mapping, Sequence

from lgd.base.markup import escape_markdown, list_items, markdown_table
from lgd.base.target import Target
from lgd.labels.measures import Measures
from lgd.labels.predictions import find_measures
from lgd.report.columns import list_first, name_briefly
from lgd.report.results import (
    BySite,
    Hubs,
    ModelScores,
    Results,
    Retrieval,
    Robustness,
    Scores,
    format_interval,
    format_number,
)

_AREA_NOTE = "The area gives a {} and no probability, and so neither ECE nor AUC."


def tabulate_scores(scores: Sequence[tuple[str, Scores]], unit: str, columns: Mapping[str, str]) -> list[str]:
    """The lines of a table: a row a model, a column a metric; `unit` is what was scored."""
    rows = [
        [name, str(one.scored), *(format_interval(one.metrics[column]) for column in columns)] for name, one in scores
    ]
    return markdown_table(["model", unit, *columns.values()], rows)


def slide_rules_section(results: Results) -> list[str]:
    """The two ways of scoring a slide side by side; nothing where there are no slides, or no second way."""
    rows, few, target = [], "", results.predicted
    columns = {name: find_measures(target).headline[name] for name in list_first(find_measures(target))}
    for model in results.models:
        mean, area, minus = model.by_slide, model.by_area, model.area_minus_mean
        if mean is None or area is None or minus is None:
            return []
        few = few or f"{area.one_patch_decides} of {area.scored} slides"
        rules = (("mean", mean.metrics, ".3f"), ("area", area.metrics, ".3f"), ("area minus mean", minus, "+.3f"))
        for rule, metrics, form in rules:
            rows.append([model.name, rule, *(format_interval(metrics[name], form) for name in columns)])
    note = escape_markdown(target.area_note or _AREA_NOTE.format(target.label_word))
    return [
        "### Two ways to score a slide\n",
        *list_items([f"{rule}." for rule in results.slide_rules.values()]),
        "",
        *markdown_table(["model", "way", *columns.values()], rows),
        "The mean is the headline, whatever this table shows: a way that is chosen on the scored split is no longer "
        f"measured by it. {note} In {few} the patches are so few "
        f"that a single one raises the {target.label_word} by area. Differences are paired by slide.\n",
    ]


def robustness_section(robustness: Robustness, measures: Measures) -> list[str]:
    """The section on robustness."""
    rows, main = [], measures.main
    names = ("mae", "pearson", "ccc") if measures.target.is_number else ("accuracy", "kappa", "ece")
    titles = [name_briefly(measures, name) for name in names]
    for model in robustness.models:
        rows.append([model.name, "none", *(format_interval(model.unchanged[name]) for name in names), ""])
        for change in model.changes:
            for at in change.at:
                cells = [format_interval(at.metrics[name]) for name in names]
                difference = format_interval(at.minus_unchanged[main], "+.3f")
                rows.append([model.name, f"{change.name}, {at.label}", *cells, difference])
    return [
        "## Robustness, by patch\n",
        "The same patches, changed as another scanner or laboratory would have them: H&E for the students, IHC for the "
        "teacher. Changes are applied at the network's input size, after the shrinking; the strengths were fixed "
        "beforehand.\n",
        *list_items([f"{one.name}: {one.what}. Strengths: {one.why}." for one in robustness.changes]),
        "",
        *markdown_table(
            ["model", "change", *titles, f"{name_briefly(measures, main)} minus that of the unchanged"], rows
        ),
    ]


def retrieval_sections(retrieval: Retrieval, target: Target) -> list[str]:
    """The sections on retrieval by label, of the own pair, and on hubs, as far as there is anything to say."""
    text = []
    if any(row.asks for row in retrieval.embeddings):
        text += _values_section(retrieval, target) if target.is_number else _classes_section(retrieval, target)
    if own := tabulate_own_pairs(retrieval):
        first = next(row.own_pair for row in retrieval.embeddings if row.own_pair)
        text += [
            "## Retrieval of the own IHC\n",
            f"{first.queries} H&E queries, each searching its own pair among {first.gallery} IHC latents.\n",
            *markdown_table([*own[0]], [[*row.values()] for row in own]),
        ]
    if hubs := [(row.name, row.hubs) for row in retrieval.embeddings if row.hubs]:
        text += _hubs_section(hubs, retrieval.at)
    if retrieval.index_recall is not None:
        text += [
            f"The index ({retrieval.index}) gives the student's H&E queries {retrieval.index_recall:.3f} of the ten "
            "nearest latents that exact search finds.\n"
        ]
    return [*text, *list_items(retrieval.caveats), ""]


def _classes_section(retrieval: Retrieval, target: Target) -> list[str]:
    columns, embeddings, word = ("overall", *target.classes), retrieval.embeddings, target.label_word
    rows = [[row.name, row.gallery, *(format_interval(row.by_level[name]) for name in columns)] for row in embeddings]
    # The labels of all galleries are the same, and so is chance.
    rows.append(["by chance", "", *(format_number(embeddings[0].by_level[name].chance) for name in columns)])
    return [
        f"## Retrieval by {word}\n",
        f"Mean average precision of the {retrieval.at} nearest of {retrieval.gallery_rows} training patches, by the "
        f"{word} of the query; a neighbour of the same {word} is relevant. Chance is the expected value under a random "
        "ranking.\n",
        *markdown_table(["vectors", "gallery", *columns], rows),
    ]


def _values_section(retrieval: Retrieval, target: Target) -> list[str]:
    found = [(row.name, row.gallery, row.by_value) for row in retrieval.embeddings if row.by_value]
    rows = [[name, gallery, format_interval(near)] for name, gallery, near in found]
    first = found[0][2]
    rows += [["by chance", "", _format_mean(first.chance)], [f"by {target.label_word}", "", _format_mean(first.best)]]
    unit = f" ({target.unit})" if target.unit else ""
    return [
        f"## Retrieval by {target.label_word}\n",
        f"Mean difference between the {target.label_word} of the query and those of its {retrieval.at} nearest of "
        f"{retrieval.gallery_rows} training patches; lower is better. Chance is the expected value under a random "
        f"ranking, and the last row is of those whose {target.label_word}s are nearest: no ranking does better.\n",
        *markdown_table(["vectors", "gallery", f"difference{unit}"], rows),
    ]


def _format_mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def sites_sections(sites: Sequence[BySite], measures: Measures) -> list[str]:
    """A section a kind of site: how each model scores the patches of each."""
    text, titles = [], list(measures.headline.values())
    for by in sites:
        rows = [
            [
                row.site or "unknown",
                row.model,
                str(row.scored),
                str(row.groups),
                *(format_interval(row.metrics[name]) for name in measures.headline),
            ]
            for row in by.rows
        ]
        text += [
            f"## Scores by {by.kind}, by patch\n",
            *markdown_table([by.kind, "model", "patches", "groups", *titles], rows),
            "Intervals are over the groups of this one alone.\n",
        ]
    return text


def agreement_section(models: Sequence[ModelScores], target: Target) -> list[str]:
    """Limits of agreement of values; nothing for classes."""
    rows = [
        [model.name, unit, *map(format_interval, (one.mean_difference, one.lower_limit, one.upper_limit))]
        for model in models
        for unit, scores in (("patch", model.by_patch), ("slide", model.by_slide))
        if scores and (one := scores.agreement)
    ]
    if not rows:
        return []
    unit = f" ({escape_markdown(target.unit)})" if target.unit else ""
    return [
        "## Limits of agreement\n",
        f"Predicted minus true {target.label_word}{unit}: its mean, and 1.96 standard deviations below and above it, "
        "between which 95 % of the differences lie where they are normal (Bland and Altman 1999).\n",
        *markdown_table(["model", "by", "mean difference", "lower limit", "upper limit"], rows),
        "Patches of one slide are repeated measures of it and not independent; all intervals resample the groups.\n",
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
