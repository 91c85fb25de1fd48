"""Numbers -> the report: `metrics.json`, pictures of what was measured, and `summary.md`, which is written last.

A score never stands without its interval and its caveats. A group is a slide, or a source patch where slides are
unknown.
"""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lgd.base.markup import code_block, escape_markdown, list_items, markdown_table
from lgd.base.text import escape_text
from lgd.config_sections import LEVEL_NAMES
from lgd.io.files import exists, list_folder, read_bytes, remove, write_bytes
from lgd.io.location import Location
from lgd.io.tables import format_table
from lgd.metrics import Predictions
from lgd.report.caveats import COLOUR, HOW
from lgd.report.figures import Query, confusion_matrix, contact_sheet, reliability_diagram, robustness_curves
from lgd.report.results import (
    HEADLINE,
    Results,
    Scores,
    format_interval,
    retrieval_sections,
    robustness_section,
    slide_rules_section,
    tabulate_own_pairs,
)

_SENSITIVITY = {f"sensitivity_{level}": name for level, name in enumerate(LEVEL_NAMES)}
_AUC = {"auc_0_vs_rest": "0 against rest", "auc_low": "1+/2+ against rest", "auc_3_vs_rest": "3+ against rest"}
_PICTURES = {
    "confusion.png": "Confusion matrix",
    "reliability.png": "Reliability diagram",
    "robustness.png": "Robustness: accuracy and calibration as images change",
    "queries.png": "Contact sheet: H&E queries, their own IHC, and the known IHCs that they resemble",
}


def write_report(
    folder: Location, results: Results, scored: Sequence[Predictions], queries: Sequence[Query] = ()
) -> None:
    """Write the report of one split into `folder`: `results`, and pictures of the models, the student first."""
    student, *_ = scored
    # A picture of an earlier report would pass for one of this.
    for name in _PICTURES:
        remove(folder / name)
    if results.labelled:
        confusion_matrix(student, folder / "confusion.png", f"{student.name}: {results.labelled} patches")
        reliability_diagram(scored, folder / "reliability.png")
        if results.robustness is not None:
            robustness_curves(results.robustness, folder / "robustness.png")
    if queries:
        contact_sheet(queries, folder / "queries.png")
    results.write(folder / "metrics.json")
    pictures = [name for name in _PICTURES if exists(folder / name)]
    write_bytes(folder / "summary.md", _summarise(results, pictures).encode())


def show_pictures(report: Location, student: Location) -> None:
    """Put the report's pictures beside the student's curves in TensorBoard."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    # Its writer works in a thread, whose errors of a full disk would come with a traceback.
    with tempfile.TemporaryDirectory(prefix="lgd-") as temporary:
        with SummaryWriter(temporary) as board:
            for name in sorted(name for name in list_folder(report) if name.endswith(".png")):
                image = np.asarray(Image.open(io.BytesIO(read_bytes(report / name))).convert("RGB"))
                board.add_image(f"report/{escape_text(name.removesuffix('.png'))}", image, dataformats="HWC")
        for path in Path(temporary).iterdir():
            write_bytes(student / "tensorboard" / path.name, path.read_bytes())


def format_scores(results: Results) -> str:
    """Accuracy, kappa and macro-F1 of each model, with 95 % intervals, as text of fixed width.

    Where nothing is scored for want of labels, at which rank the own IHC is found.
    """
    if not results.labelled and results.retrieval and (own := tabulate_own_pairs(results.retrieval)):
        return "\n".join(format_table(own))
    columns = {"accuracy": "accuracy", "kappa": "kappa", "macro_f1": "macro-F1"}
    rows = []
    for model in results.models:
        scores = model.by_patch
        intervals = {title: format_interval(scores.metrics[name]) for name, title in columns.items()}
        rows.append({"model": model.name, "patches": scores.scored, "groups": scores.groups, **intervals})
    return "\n".join(format_table(rows))


def _summarise(results: Results, pictures: Sequence[str]) -> str:
    counts = ", ".join(f"{count} of {escape_markdown(name)}" for name, count in results.levels.items())
    scored = f"{results.labelled} have a level ({counts})" if results.labelled else "none is scored"
    text = [
        f"# {'HER2 level' if results.labelled else 'Hallucinated latents'} from H&E: report\n",
        "## Read this first\n",
        *list_items(results.caveats),
        "",
        f"{results.patches} patches in {results.groups} {'group' if results.groups == 1 else 'groups'}; {scored}. A "
        "group is a slide, or a source patch where slides are unknown.\n",
    ]
    if results.labelled:
        text += _score_sections(results)
    else:
        text += [
            "There is nothing to score, for the reason above. Brackets hold 95 % intervals from "
            f"{results.resamples} resamples of the groups; [–] means that fewer than two groups stand behind a value.\n"
        ]
    if results.robustness is not None and results.labelled:
        text += robustness_section(results.robustness)
    if results.retrieval is not None:
        text += retrieval_sections(results.retrieval)
    text += [line for name in pictures for line in (f"## {_PICTURES[name]}\n", f"![{_PICTURES[name]}]({name})\n")]
    command = results.provenance.get("command")
    text += ["## How to reproduce\n", *([f"{code_block(str(command))}\n"] if command else [])]
    models = len(results.models)
    text.append(f"All numbers, and the provenance of model and data, are in `metrics.json` ({models} models).\n")
    return "\n".join(text)


def _score_sections(results: Results) -> list[str]:
    models = results.models
    by_patch = [(model.name, model.by_patch) for model in models]
    by_slide = [(model.name, model.by_slide) for model in models if model.by_slide]
    text = [
        "## Scores by patch\n",
        *_scores_table(by_patch, "patches", HEADLINE),
        f"Brackets hold 95 % intervals from {results.resamples} resamples of the groups. One of no width means "
        "that all groups agree, not that the value is certain; [–] means that fewer than two groups stand behind the "
        "value. Always answering the commonest level would reach an "
        f"accuracy of {results.always_the_commonest_level:.3f}.\n",
        *([f"{HOW}\n"] if any(model.name == COLOUR for model in models) else []),
        "## Scores by slide\n",
    ]
    if by_slide:
        text += _scores_table(by_slide, "slides", HEADLINE)
        text.append("The probabilities of a group's patches are averaged.\n")
        text += slide_rules_section(results)
    else:
        text.append(f"There is no table by slide: {models[0].no_slides}.\n")
    text += ["## Sensitivity by level, by patch\n", *_scores_table(by_patch, "patches", _SENSITIVITY)]
    text += ["## AUC, by patch\n", *_scores_table(by_patch, "patches", _AUC)]
    text.append("1+/2+ is the grouping by IHC alone; HER2-low needs ISH for 2+.\n")
    if results.differences:
        text += ["## Paired differences, by patch\n"]
        rows = [
            [f"{row.of} minus {row.minus}", *(format_interval(row.metrics[name], "+.3f") for name in HEADLINE)]
            for row in results.differences
        ]
        text += markdown_table(["", *HEADLINE.values()], rows)
        text.append(
            "Both models see the same resamples, of groups alone. One training stands behind each: an interval that "
            "leaves 0 out distinguishes these networks, and not their methods. Of ECE, lower is better.\n"
        )
    return text


def _scores_table(scores: Sequence[tuple[str, Scores]], unit: str, columns: dict[str, str]) -> list[str]:
    rows = [
        [name, str(one.scored), *(format_interval(one.metrics[column]) for column in columns)] for name, one in scores
    ]
    return markdown_table(["model", unit, *columns.values()], rows)
