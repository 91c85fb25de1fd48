"""Numbers -> the report: `metrics.json`, `summary.md`, and pictures (`confusion.png`, `reliability.png`,
`robustness.png`, `queries.png`) of what was measured.

    document = write_report(folder, evaluation)
    print(format_table(evaluation))

A score never stands without its interval and its caveats. `summary.md` is written last. A group is a slide, or
a source patch where slides are unknown.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from lgd.config import LEVEL_NAMES
from lgd.evaluate.caveats import found_by_chance, told_by_colour
from lgd.evaluate.colour import COLOUR, HOW
from lgd.evaluate.evaluation import Evaluation
from lgd.evaluate.figures import confusion_matrix, contact_sheet, reliability_diagram, robustness_curves
from lgd.evaluate.markdown import GALLERIES, retrieval_sections, robustness_sections, shown, ways_section
from lgd.evaluate.slides import WAYS, both_ways, scores
from lgd.files import exists, list_folder, read_bytes, remove, write_bytes
from lgd.folders import WorkingFolder
from lgd.markup import code_block, escape_markdown, list_items, markdown_table
from lgd.metrics import Predictions, paired_difference, score_with_intervals
from lgd.records import Count, Document, Many
from lgd.text import escape_text
from lgd.urls import Location

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


class Numbers(Document):
    """metrics.json; null stands where a number is undefined."""

    FORMAT: ClassVar[str] = "lgd-report/2"
    ABSENT: ClassVar[str] = "run lgd evaluate"
    REMEDY: ClassVar[str] = "run lgd evaluate again"

    caveats: Many[str]
    provenance: dict[str, Any]
    resamples: Count
    seed: Count
    patches: Count
    labelled: Count
    groups: Count
    levels: dict[str, Count]
    always_the_commonest_level: float | None
    slide_rules: dict[str, str]
    models: Many[dict[str, Any]]
    differences: Many[dict[str, Any]]
    retrieval: dict[str, Any] | None
    robustness: dict[str, Any] | None


def write_report(folder: Location, evaluation: Evaluation) -> dict[str, Any]:
    """Write the report of one split into `folder` and return what `metrics.json` holds (None for undefined).

    Raises `DataError` where models were scored on different patches.
    """
    student, scored, retrieval = evaluation.student, evaluation.rows, evaluation.retrieval
    resamples, seed = evaluation.resamples, evaluation.seed
    groups = set(student.groups)
    labels = student.level[student.level >= 0]
    common = int(np.bincount(labels).argmax()) if len(labels) else None
    models = [_model(predictions, resamples, seed) for predictions in scored]
    differences = [_differences(student, other, resamples, seed) for other in evaluation.others]
    found = {
        "caveats": [*evaluation.caveats, *told_by_colour(models, differences), *found_by_chance(retrieval)],
        "provenance": evaluation.provenance,
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
        "robustness": evaluation.robustness,
    }
    numbers = Numbers.from_json(_json_ready(found))
    # A picture of an earlier report would pass for one of this.
    for name in _PICTURES:
        remove(folder / name)
    if len(labels):
        confusion_matrix(student, folder / "confusion.png", f"{student.name}: {len(labels)} patches")
        reliability_diagram(scored, folder / "reliability.png")
        if evaluation.robustness is not None:
            robustness_curves(evaluation.robustness, folder / "robustness.png")
    if evaluation.queries:
        contact_sheet(evaluation.queries, folder / "queries.png")
    numbers.write(folder / "metrics.json")
    document = numbers.document()
    pictures = [name for name in _PICTURES if exists(folder / name)]
    write_bytes(folder / "summary.md", _summary(document, pictures).encode())
    return document


def show_pictures(report: Location, student: Location) -> None:
    """Put the report's pictures beside the student's curves in TensorBoard."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with WorkingFolder(student / "tensorboard") as working:
        with SummaryWriter(working.path) as board:
            for name in sorted(name for name in list_folder(report) if name.endswith(".png")):
                image = np.asarray(Image.open(io.BytesIO(read_bytes(report / name))).convert("RGB"))
                board.add_image(f"report/{escape_text(name.removesuffix('.png'))}", image, dataformats="HWC")
        working.publish()


def format_table(evaluation: Evaluation) -> str:
    """Accuracy, kappa and macro-F1 of each model, with 95 % intervals, as text of fixed width."""
    names = ("accuracy", "kappa", "macro_f1")
    rows = [["model", "patches", "groups", "accuracy", "kappa", "macro-F1"]]
    for predictions in evaluation.rows:
        known = predictions.labelled()
        scores = score_with_intervals(known, evaluation.resamples, evaluation.seed)
        counts = [str(len(known.keys)), str(len(set(known.groups)))]
        rows.append([known.name, *counts, *(shown(_json_ready(scores[name])) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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
    counts = ", ".join(f"{count} of {escape_markdown(name)}" for name, count in document["levels"].items())
    text = [
        "# HER2 level from H&E: report\n",
        "## Read this first\n",
        *list_items(document["caveats"]),
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
    text += ["## How to reproduce\n", *([f"{code_block(command)}\n"] if command else [])]
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
        text += markdown_table(["", *_HEADLINE.values()], rows)
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
    return markdown_table(["model", unit, *columns.values()], rows)
