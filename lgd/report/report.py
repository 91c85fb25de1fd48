"""Numbers -> the report: `metrics.json`, predictions as CSV, pictures, and `summary.md`, which is written last.

A score never stands without its interval and its caveats. A group is a slide, or a source patch where slides are
unknown.
"""

import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lgd.base.errors import DataError
from lgd.base.markup import code_block, escape_markdown, list_items, markdown_table
from lgd.base.text import escape_text
from lgd.io.files import exists, list_folder, read_bytes, remove, write_bytes
from lgd.io.location import Location
from lgd.io.tables import format_table
from lgd.labels.classes import ClassMeasures
from lgd.labels.predictions import Predictions, find_measures
from lgd.report.agreement import draw_agreement, draw_values
from lgd.report.charts import confusion_matrix, reliability_diagram, robustness_curves
from lgd.report.colour import COLOUR, describe_colour
from lgd.report.columns import explain_direction, list_first, name_briefly
from lgd.report.contact_sheet import ALIKE, NEAR, contact_sheet
from lgd.report.grids import draw_grids
from lgd.report.listing import BY_PATCH, BY_SLIDE, write_predictions
from lgd.report.pictures import NOTHING_PICTURED, Pictured
from lgd.report.results import Results, format_interval
from lgd.report.sections import (
    agreement_section,
    retrieval_sections,
    robustness_section,
    sites_sections,
    slide_rules_section,
    tabulate_own_pairs,
    tabulate_scores,
)
from lgd.report.set_coverage import label_sets_section
from lgd.report.slide_map import draw_slide_maps
from lgd.report.slides import by_slide

logger = logging.getLogger(__name__)

_PICTURES = {
    "confusion.png": "Confusion matrix",
    "reliability.png": "Reliability diagram",
    "values.png": "Predicted over true values",
    "agreement.png": "Bland-Altman plot: differences over means",
    "robustness.png": "Robustness: accuracy and calibration as images change",
    "slides.png": "Slides: true labels beside those predicted, each patch where it lies",
    "grids.png": "Nuclei and staining: predicted from H&E, and measured",
    "queries.png": "Contact sheet: H&E queries, their own IHC, and the known IHCs that they resemble",
}

_CAPTIONS = {
    "values.png": "On the dashed line both are alike.",
    "agreement.png": "Lines are the mean difference and the limits of agreement, 1.96 standard deviations to either "
    "side of it; bands are their 95 % intervals over groups. Patches of one slide are repeated measures of it, and not "
    "independent.",
    "queries.png": f"Frames compare a value with the true one of the query: green up to {ALIKE:.0%} of the range of "
    f"values, dashed up to {NEAR:.0%}, dotted beyond, grey where one is unknown.",
}
"""Of values."""
_PROBABILITIES = "probabilities of a group's patches are averaged"


def write_report(
    folder: Location, results: Results, scored: Sequence[Predictions], pictured: Pictured = NOTHING_PICTURED
) -> None:
    """Write the report of one split into `folder`: `results`, and pictures of the models, the student first."""
    student, *_ = scored
    # A picture of an earlier report would pass for one of this.
    for name in (*_PICTURES, BY_PATCH, BY_SLIDE):
        remove(folder / name)
    if results.labelled:
        if student.target.is_number:
            _draw_values(folder, results, student)
        else:
            confusion_matrix(student, folder / "confusion.png", f"{student.name}: {results.labelled} patches")
            reliability_diagram(scored, folder / "reliability.png")
        if results.robustness is not None:
            robustness_curves(results.robustness, student.measures, folder / "robustness.png")
    if pictured.slides:
        draw_slide_maps(pictured.slides, student.target, pictured.ends, folder / "slides.png")
    if pictured.grids:
        draw_grids(pictured.grids, folder / "grids.png")
    if pictured.queries:
        contact_sheet(pictured.queries, folder / "queries.png")
    write_predictions(folder, scored)
    results.write(folder / "metrics.json")
    pictures = [name for name in _PICTURES if exists(folder / name)]
    write_bytes(folder / "summary.md", _summarise(results, pictures).encode())


def _draw_values(folder: Location, results: Results, student: Predictions) -> None:
    """The pictures of values, by patch and, where there are slides of several, by slide."""
    made = results.models[0]
    views = [("by patch", student, made.by_patch)]
    if made.by_slide is not None:
        views.append(("by slide", by_slide(student), made.by_slide))
    draw_values([(name, one) for name, one, _ in views], folder / "values.png", student.name)
    agreements = [(name, one, scores.agreement) for name, one, scores in views if scores.agreement is not None]
    draw_agreement(agreements, folder / "agreement.png", student.name)


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


def try_showing_pictures(report: Location, student: Location) -> None:
    """`show_pictures`, with a warning where the student's folder cannot be written."""
    try:
        show_pictures(report, student)
    except (DataError, OSError) as error:
        logger.warning("[report] no pictures in TensorBoard: %s", error)


def format_scores(results: Results) -> str:
    """The first metrics of each model, such as accuracy, kappa and macro-F1, with 95 % intervals, as text of fixed
    width.

    Where nothing is scored for want of labels, at which rank the own IHC is found.
    """
    if not results.labelled and results.retrieval and (own := tabulate_own_pairs(results.retrieval)):
        return "\n".join(format_table(own))
    measures, rows = find_measures(results.predicted), []
    columns = {name: name_briefly(measures, name) for name in list_first(measures)}
    for model in results.models:
        scores = model.by_patch
        intervals = {title: format_interval(scores.metrics[name]) for name, title in columns.items()}
        rows.append({"model": model.name, "patches": scores.scored, "groups": scores.groups, **intervals})
    return "\n".join(format_table(rows))


def _summarise(results: Results, pictures: Sequence[str]) -> str:
    target = results.predicted
    word, name = target.label_word, escape_markdown(target.name)
    predicted = name if name.lower().endswith(word.lower()) else f"{name} {word}"
    counts = ", ".join(f"{count} of {escape_markdown(one)}" for one, count in results.levels.items())
    if (values := results.values) is not None:
        ends = [escape_markdown(target.format_label(one)) for one in (values.least, values.most, values.mean)]
        counts = "from {} to {}, {} in the mean".format(*ends)
    scored = f"{results.labelled} have a {word} ({counts})" if results.labelled else "none is scored"
    text = [
        f"# {predicted if results.labelled else 'Hallucinated latents'} from H&E: report\n",
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
        text += robustness_section(results.robustness, find_measures(target))
    if results.retrieval is not None:
        text += retrieval_sections(results.retrieval, target)
    for picture in pictures:
        title = _PICTURES[picture]
        if target.is_number:
            title = title.replace("accuracy and calibration", "error and correlation")
        text += [f"## {title}\n", f"![{title}]({picture})\n"]
        text += [f"{_CAPTIONS[picture]}\n"] if target.is_number and picture in _CAPTIONS else []
    command = results.provenance.get("command")
    text += ["## How to reproduce\n", *([f"{code_block(str(command))}\n"] if command else [])]
    models = len(results.models)
    text.append(f"All numbers, and the provenance of model and data, are in `metrics.json` ({models} models).\n")
    return "\n".join(text)


def _score_sections(results: Results) -> list[str]:
    models, target, measures = results.models, results.predicted, find_measures(results.predicted)
    by_patch = [(model.name, model.by_patch) for model in models]
    of_slides = [(model.name, model.by_slide) for model in models if model.by_slide]
    text = [
        "## Scores by patch\n",
        *tabulate_scores(by_patch, "patches", measures.headline),
        f"Brackets hold 95 % intervals from {results.resamples} resamples of the groups. One of no width means "
        "that all groups agree, not that the value is certain; [–] means that fewer than two groups stand behind the "
        f"value.{_explain_constant(results)}\n",
        *([f"{describe_colour(target)}\n"] if any(model.name == COLOUR for model in models) else []),
        "## Scores by slide\n",
    ]
    if of_slides:
        text += tabulate_scores(of_slides, "slides", measures.headline)
        what = "values of a group's patches are averaged, and so are their true ones"
        text.append(f"The {what if target.is_number else _PROBABILITIES}.\n")
        text += slide_rules_section(results)
    else:
        text.append(f"There is no table by slide: {models[0].no_slides}.\n")
    text += sites_sections(results.sites or (), measures)
    text += label_sets_section(results, target)
    if isinstance(measures, ClassMeasures):
        titles = sorted((numbers, f"auc_{name}", title) for name, (title, numbers) in target.group_titles.items())
        text += [f"## Sensitivity by {target.label_word}, by patch\n"]
        text += tabulate_scores(by_patch, "patches", measures.sensitivities)
        text += [
            "## AUC, by patch\n",
            *tabulate_scores(by_patch, "patches", {name: title for _, name, title in titles}),
        ]
    else:
        text += agreement_section(models, target)
    text += [f"{note}\n" for note in map(escape_markdown, target.notes or ())]
    if results.differences:
        text += ["## Paired differences, by patch\n"]
        rows = [
            [f"{row.of} minus {row.minus}", *(format_interval(row.metrics[name], "+.3f") for name in measures.headline)]
            for row in results.differences
        ]
        text += markdown_table(["", *measures.headline.values()], rows)
        direction = escape_markdown(explain_direction(measures))
        text.append(
            "Both models see the same resamples, of groups alone. One training stands behind each: an interval that "
            f"leaves 0 out distinguishes these networks, and not their methods. {direction}\n"
        )
    return text


def _explain_constant(results: Results) -> str:
    """What a constant answer reaches."""
    word = results.predicted.label_word
    if results.always_the_commonest_level is not None:
        accuracy = f"{results.always_the_commonest_level:.3f}"
        return f" Always answering the commonest {word} would reach an accuracy of {accuracy}."
    if results.always_the_mean is not None:
        return f" Always answering the mean of the training {word}s would have an MAE of {results.always_the_mean:.3f}."
    return ""
