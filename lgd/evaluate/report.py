"""Numbers -> the report: `metrics.json`, `summary.md`, and pictures (`confusion.png`, `reliability.png`,
`robustness.png`, `queries.png`) of what was measured.

    document = write_report(folder, [student, he_only, teacher], ...)
    print(table([student, he_only, teacher], resamples, seed))

A score never stands without its interval and its caveats. `summary.md` is written last. A group is a slide, or
a source patch where slides are unknown.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lgd.config import LEVEL_NAMES
from lgd.data.archive import count_levels
from lgd.evaluate.colour import COLOUR, HOW
from lgd.evaluate.figures import Query, confusion_matrix, contact_sheet, reliability_diagram, robustness_curves
from lgd.evaluate.markdown import GALLERIES, markdown, retrieval_sections, robustness_sections, shown, ways_section
from lgd.evaluate.slides import WAYS, both_ways, scores
from lgd.files import exists, remove, write_bytes, write_json
from lgd.metrics import Predictions, paired_difference, score_with_intervals

FEW_GROUPS = 10
"""Below this many slides a bootstrap interval means little."""
FEW_OF_A_LEVEL = 3
"""Below this many slides a level's sensitivity is that of these slides."""
FEW_LEVEL_0 = 50
"""Below this many patches of level 0 its sensitivity and AUC mean little."""

_HEADLINE = {
    "accuracy": "accuracy",
    "kappa": "quadratic weighted kappa",
    "macro_f1": "macro-F1",
    "within_one": "within one level",
    "ece": "ECE",
}
_SENSITIVITY = {f"sensitivity_{level}": name for level, name in enumerate(LEVEL_NAMES)}
_AUC = {"auc_0_vs_rest": "0 against rest", "auc_low": "1+/2+ against rest", "auc_3_vs_rest": "3+ against rest"}
_PICTURES = {
    "confusion.png": "Confusion matrix",
    "reliability.png": "Reliability diagram",
    "robustness.png": "Robustness: accuracy and calibration as images change",
    "queries.png": "Contact sheet: H&E queries, their own IHC, and the known IHCs that they resemble",
}


def write_report(
    folder: Path,
    scored: Sequence[Predictions],
    retrieval: dict[str, Any] | None,
    queries: Sequence[Query],
    caveats: Sequence[str],
    provenance: dict[str, Any],
    resamples: int,
    seed: int,
    robustness: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the report of one split into `folder` and return what `metrics.json` holds (None for undefined).

    `scored` holds at least one model; the first is the student, and every other one is compared to it.
    `retrieval` is what `lgd.evaluate.embeddings.measure` gave, `robustness` what `lgd.evaluate.robustness.measure`
    did. `provenance` may be any JSON; its `command` is shown as the way to reproduce the report. Raises `DataError`
    where models were scored on different patches.
    """
    student = scored[0]
    groups = set(student.groups)
    labels = student.level[student.level >= 0]
    common = int(np.bincount(labels).argmax()) if len(labels) else None
    models = [_model(predictions, resamples, seed) for predictions in scored]
    differences = [_differences(student, other, resamples, seed) for other in scored[1:]]
    document = _json_ready(
        {
            "format": "lgd-report/1",
            "caveats": [*caveats, *_told_by_colour(models, differences), *_found_by_chance(retrieval)],
            "provenance": provenance,
            "resamples": resamples,
            "seed": seed,
            "patches": len(student.keys),
            "labelled": len(labels),
            "groups": len(groups),
            "levels": {name: int((labels == level).sum()) for level, name in enumerate(LEVEL_NAMES)},
            "always_the_commonest_level": None if common is None else float((labels == common).mean()),
            "slide_rules": WAYS,
            "models": models,
            "differences": differences,
            "retrieval": None if retrieval is None else {"caveats": GALLERIES, **retrieval},
            "robustness": robustness,
        }
    )
    # A picture of an earlier report would pass for one of this.
    for name in _PICTURES:
        remove(folder / name)
    if len(labels):
        confusion_matrix(student, folder / "confusion.png", f"{student.name}: {len(labels)} patches")
        reliability_diagram(scored, folder / "reliability.png")
        if robustness is not None:
            robustness_curves(robustness, folder / "robustness.png")
    if queries:
        contact_sheet(queries, folder / "queries.png")
    write_json(folder / "metrics.json", document)
    pictures = [name for name in _PICTURES if exists(folder / name)]
    write_bytes(folder / "summary.md", _summary(document, pictures).encode())
    return document


def table(scored: Sequence[Predictions], resamples: int, seed: int) -> str:
    """Accuracy, kappa and macro-F1 of each model, with 95 % intervals, as text of fixed width."""
    names = ("accuracy", "kappa", "macro_f1")
    rows = [["model", "patches", "groups", "accuracy", "kappa", "macro-F1"]]
    for predictions in scored:
        known = predictions.labelled()
        scores = score_with_intervals(known, resamples, seed)
        counts = [str(len(known.keys)), str(len(set(known.groups)))]
        rows.append([known.name, *counts, *(shown(_json_ready(scores[name])) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def caveats_of(manifests: Sequence[dict[str, Any]], predictions: Predictions, virtual: bool) -> list[str]:
    """What a reader must know before believing a score of `predictions`, most serious first.

    `manifests` are those of the shard folders; `virtual` says that their tissue is synthetic.
    """
    known = predictions.labelled()
    found = []
    if virtual:
        found.append("The tissue is virtual: drawn by a program. Nothing here says anything about real tissue.")
    if any(manifest.get("may_leak") for manifest in manifests):
        found.append(
            "Slides are unknown, so the split may leak: patches of one slide can be in training and in this split, "
            "and recognising the slide then passes for scoring HER2. The intervals treat the patches of a slide as "
            "independent and are too narrow."
        )
    of_slides = any(manifest["layout"] == "bci" for manifest in manifests) or _share_levels(known)
    if len(known.keys) and of_slides and not virtual:
        found.append(
            "A level is that of the whole slide, not of the patch: a patch can look unlike its level, and its score "
            "cannot be checked against the brown on it."
        )
    if any(manifest["layout"] == "bci" for manifest in manifests) and not virtual:
        found.append(
            "BCI's background is grey in some images and white in others, a shortcut that a network can learn, and "
            "its two stains are neighbouring sections that are registered only approximately."
        )
    taught = count_levels(manifests, "train")
    if any(taught[name] for name in LEVEL_NAMES) and (untaught := [name for name in LEVEL_NAMES if not taught[name]]):
        found.append(f"No patch of level {', '.join(untaught)} was in training: the networks cannot call any so.")
    found += _caveats_of_counts(known)
    if unlabelled := len(predictions.keys) - len(known.keys):
        found.append(f"{unlabelled} of {len(predictions.keys)} patches have no level and are not scored.")
    found += [caveat for manifest in manifests for caveat in manifest.get("caveats", [])]
    found.append(
        "This is an independent design of what the abstract of LGD-Net (arXiv:2602.17793) states: no number here is "
        "the paper's. It is for research and not for diagnosis."
    )
    return list(dict.fromkeys(found))


def _share_levels(known: Predictions) -> bool:
    """Some group has several patches, and no group has patches of two levels."""
    pairs = set(zip(known.groups, known.level.tolist(), strict=True))
    return len(pairs) == len(set(known.groups)) < len(known.keys)


def _caveats_of_counts(known: Predictions) -> list[str]:
    if not known.keys:
        return ["No patch of this split has a level: there is nothing to score."]
    found = []
    patches = np.bincount(known.level, minlength=len(LEVEL_NAMES))
    behind = Counter(level for _, level in set(zip(known.groups, known.level.tolist(), strict=True)))
    groups = len(set(known.groups))
    if groups < FEW_GROUPS:
        found.append(f"Slides or source patches that are scored: only {groups}. The intervals mean little.")
    if few := [f"{LEVEL_NAMES[level]} ({behind[level]})" for level in sorted(behind) if behind[level] < FEW_OF_A_LEVEL]:
        found.append(
            f"Levels that come from very few slides or source patches: {', '.join(few)}. Their sensitivity is that of "
            "these alone."
        )
    if absent := [name for name, count in zip(LEVEL_NAMES, patches, strict=True) if not count]:
        found.append(f"No patch of level {', '.join(absent)} is scored: no metric tells how such patches fare.")
    if 0 < patches[0] < FEW_LEVEL_0:
        found.append(f"Patches of level 0 that are scored: only {patches[0]}. Telling 0 from 1+ is hardly measured.")
    return found


def _told_by_colour(models: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> list[str]:
    """Where stain and background go with the level, a network may have learnt them and not the tissue."""
    found = []
    for model in models:
        kappa = model["by_patch"]["metrics"]["kappa"]
        # Comparisons with NaN are false.
        if model["name"] == COLOUR and kappa["low"] > 0:
            found.append(
                f"Stain and background alone, without any shape, tell the level with a kappa of {shown(kappa)} here. A "
                "network can learn them too, and loses that on slides of another laboratory or scanner."
            )
    for row in differences:
        kappa = row["metrics"]["kappa"]
        if row["minus"] == COLOUR and kappa["low"] <= 0:
            found.append(
                f"{row['of']} is not shown to beat stain and background alone: its kappa minus theirs is "
                f"{shown(kappa, '+.3f')}."
            )
    return found


def _found_by_chance(retrieval: dict[str, Any] | None) -> list[str]:
    """Levels can look well while all latents are alike: the mean of the teacher's is a fair guess of each."""
    rows = [] if retrieval is None else retrieval["embeddings"]
    owns = [(row["name"], row["own_pair"]) for row in rows if row["own_pair"]]
    return [
        f"{name}: they find their own IHC no better than by chance. Nothing of the IHC was learnt that tells one patch "
        "from another, and what queries find means little."
        for name, own in owns
        if own["mean_rank"]["high"] is not None and own["mean_rank"]["high"] >= own["chance_median_rank"]
    ]


def _model(predictions: Predictions, resamples: int, seed: int) -> dict[str, Any]:
    by_patch = scores(predictions, resamples, seed)
    return {"name": predictions.name, "by_patch": by_patch} | both_ways(predictions, resamples, seed)


def _differences(student: Predictions, other: Predictions, resamples: int, seed: int) -> dict[str, Any]:
    metrics = {name: paired_difference(student, other, name, resamples, seed) for name in _HEADLINE}
    return {"of": student.name, "minus": other.name, "metrics": metrics}


def _json_ready(value: Any) -> Any:
    """`value` with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: _json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _summary(document: dict[str, Any], pictures: Sequence[str]) -> str:
    models = document["models"]
    counts = ", ".join(f"{count} of {name}" for name, count in document["levels"].items())
    text = [
        "# HER2 level from H&E: report\n",
        "## Read this first\n",
        *(f"- {caveat}" for caveat in document["caveats"]),
        "",
        f"{document['patches']} patches in {document['groups']} groups; {document['labelled']} have a level "
        f"({counts}). A group is a slide, or a source patch where slides are unknown.\n",
    ]
    if document["labelled"]:
        text += _score_sections(document)
    else:
        text += ["## Scores\n", "No patch of this split has a level, so there is nothing to score.\n"]
    if document["robustness"] is not None and document["labelled"]:
        text += robustness_sections(document["robustness"])
    if document["retrieval"] is not None:
        text += retrieval_sections(document["retrieval"])
    text += [line for name in pictures for line in (f"## {_PICTURES[name]}\n", f"![{_PICTURES[name]}]({name})\n")]
    command = document["provenance"].get("command")
    text += ["## How to reproduce\n", *([f"    {command}\n"] if command else [])]
    text.append(f"All numbers, and the provenance of model and data, are in `metrics.json` ({len(models)} models).\n")
    return "\n".join(text)


def _score_sections(document: dict[str, Any]) -> list[str]:
    models = document["models"]
    text = [
        "## Scores by patch\n",
        *_scores_table(models, "by_patch", _HEADLINE),
        f"Brackets hold 95 % intervals from {document['resamples']} resamples of the groups. One of no width means "
        "that all groups agree, not that the value is certain; [–] means that fewer than two groups stand behind the "
        "value. Always answering the commonest level would reach an "
        f"accuracy of {document['always_the_commonest_level']:.3f}.\n",
        *([f"{HOW}\n"] if any(model["name"] == COLOUR for model in models) else []),
        "## Scores by slide\n",
    ]
    if models[0]["by_slide"] is None:
        text.append(f"There is no table by slide: {models[0]['no_slides']}.\n")
    else:
        text += _scores_table(models, "by_slide", _HEADLINE)
        text.append("The probabilities of a group's patches are averaged.\n")
        text += ways_section(models, document["slide_rules"])
    text += ["## Sensitivity by level, by patch\n", *_scores_table(models, "by_patch", _SENSITIVITY)]
    text += ["## AUC, by patch\n", *_scores_table(models, "by_patch", _AUC)]
    text.append("1+/2+ is the grouping by IHC alone; HER2-low needs ISH for 2+.\n")
    if document["differences"]:
        text += ["## Paired differences, by patch\n"]
        rows = [
            [f"{row['of']} minus {row['minus']}", *(shown(row["metrics"][name], "+.3f") for name in _HEADLINE)]
            for row in document["differences"]
        ]
        text += markdown(["", *_HEADLINE.values()], rows)
        text.append(
            "Both models see the same resamples. An interval that holds 0 shows no difference. Of ECE less is better.\n"
        )
    return text


def _scores_table(models: Sequence[dict[str, Any]], level: str, columns: dict[str, str]) -> list[str]:
    unit = "patches" if level == "by_patch" else "slides"
    rows = [
        [
            model["name"],
            str(model[level]["scored"]),
            *(shown(model[level]["metrics"][name]) for name in columns),
        ]
        for model in models
    ]
    return markdown(["model", unit, *columns.values()], rows)
