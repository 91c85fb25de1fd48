"""Numbers of a report as Markdown: cells, tables, and the sections on slides, robustness and retrieval."""

from collections.abc import Sequence
from typing import Any

from lgd.config import LEVEL_NAMES
from lgd.evaluate.ranking import RECALL_AT
from lgd.markup import list_items, markdown_table
from lgd.metrics import Interval

GALLERIES = [
    "The gallery of the levels is the training split, which every network here was trained on: its vectors are better "
    "told apart by level than those of new patches would be.",
    "A neighbour counts as relevant for its level alone, whatever the tissue looks like; where a level is that of a "
    "slide, so is the relevance.",
    "The gallery of the own pair is the IHC of the scored split, which holds neighbours from the query's own slide.",
    "The features of H&E alone are compared with H&E, the other vectors with IHC latents: of the precisions by level "
    "only those of one gallery compare directly.",
]
"""What a reader must know of how the galleries were made."""
_RECALLS = {f"recall_at_{k}": f"recall at {k}" for k in RECALL_AT}
_ANSWERS = {"accuracy": "accuracy", "kappa": "quadratic weighted kappa", "macro_f1": "macro-F1"}


def ways_section(models: Sequence[dict[str, Any]], ways: dict[str, str]) -> list[str]:
    """The two ways of scoring a slide side by side; `ways` says how each is made."""
    area = models[0]["by_area"]
    few = f"{area['one_patch_decides']} of {area['scored']} slides"
    rows = []
    for model in models:
        for way, metrics, form in (
            ("mean", model["by_slide"]["metrics"], ".3f"),
            ("area", model["by_area"]["metrics"], ".3f"),
            ("area minus mean", model["area_minus_mean"], "+.3f"),
        ):
            rows.append([model["name"], way, *(shown(metrics[name], form) for name in _ANSWERS)])
    return [
        "### Two ways to score a slide\n",
        *list_items([f"{way}." for way in ways.values()]),
        "",
        *markdown_table(["model", "way", *_ANSWERS.values()], rows),
        "The mean is the headline, whatever this table shows: a way that is chosen on the scored split is no longer "
        "measured by it. The area copies the form of ASCO/CAP's rule with patches for tumour cells and is not that "
        "rule; it gives a level and no probability, and so neither ECE nor AUC. In "
        f"{few} the patches are so few that a single one raises the level by area. Differences are paired by slide.\n",
    ]


def robustness_sections(found: dict[str, Any]) -> list[str]:
    """The section on robustness, of what `lgd.evaluate.robustness.measure` gave."""
    rows = []
    for model in found["models"]:
        before = model["unchanged"]
        rows.append([model["name"], "none", *(shown(before[name]) for name in ("accuracy", "kappa", "ece")), ""])
        for change in model["changes"]:
            for at in change["at"]:
                cells = [shown(at["metrics"][name]) for name in ("accuracy", "kappa", "ece")]
                difference = shown(at["minus_unchanged"]["kappa"], "+.3f")
                rows.append([model["name"], f"{change['name']}, {at['label']}", *cells, difference])
    return [
        "## Robustness, by patch\n",
        "The same patches, changed as another scanner or laboratory would have them: H&E for the students, IHC for the "
        "teacher. Changes are applied at the network's input size, after the shrinking; the strengths were fixed "
        "beforehand.\n",
        *list_items([f"{one['name']}: {one['what']}. Strengths: {one['why']}." for one in found["changes"]]),
        "",
        *markdown_table(["model", "change", "accuracy", "kappa", "ECE", "kappa minus that of the unchanged"], rows),
    ]


def retrieval_sections(found: dict[str, Any]) -> list[str]:
    """The sections on retrieval, of what `lgd.evaluate.embeddings.measure` gave."""
    columns = ("overall", *LEVEL_NAMES)
    levels = [
        [row["name"], row["gallery"], *(shown(row["by_level"][name]) for name in columns)]
        for row in found["embeddings"]
    ]
    # The levels of all galleries are the same, and so is chance.
    by_chance = [number(found["embeddings"][0]["by_level"][name]["chance"]) for name in columns]
    levels.append(["by chance", "", *by_chance])
    own = [row for row in found["embeddings"] if row["own_pair"]]
    ranks = [
        [
            row["name"],
            number(row["own_pair"]["median_rank"]),
            shown(row["own_pair"]["mean_rank"], ".1f"),
            *map(shown, _recalls(row)),
        ]
        for row in own
    ]
    text = [
        "## Retrieval by level\n",
        f"Mean average precision of the {found['at']} nearest of {found['gallery_rows']} training patches, by the "
        "level of the query; a neighbour of the same level is relevant. Chance is the expected value under a random "
        "ranking.\n",
        *markdown_table(["vectors", "gallery", *columns], levels),
    ]
    if own:
        first = own[0]["own_pair"]
        chance = [number(first[f"chance_{name}"]) for name in ("median_rank", "median_rank", *_RECALLS)]
        text += [
            "## Retrieval of the own IHC\n",
            f"{first['queries']} H&E queries, each searching its own pair among {first['gallery']} IHC latents.\n",
            *markdown_table(
                ["vectors", "median rank", "mean rank", *_RECALLS.values()], [*ranks, ["by chance", *chance]]
            ),
        ]
    return [*text, *list_items(found["caveats"]), ""]


def _recalls(row: dict[str, Any]) -> list[Any]:
    return [row["own_pair"][name] for name in _RECALLS]


def shown(interval: Interval | dict[str, None], form: str = ".3f") -> str:
    """`0.712 [0.650, 0.770]`, a dash for what is undefined."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return "–"
    if low is None:
        return f"{value:{form}} [–]"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def number(value: float | None) -> str:
    """A number, a dash for what is undefined."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:g}"
