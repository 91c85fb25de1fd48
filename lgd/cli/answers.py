"""The verbs that answer from a trained run: predict, query; and those that hand on what it made."""

import argparse
import dataclasses
import logging
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lgd.base.arguments import Parser, typed
from lgd.base.errors import ConfigError, DataError, require
from lgd.base.text import print_json, print_lines
from lgd.cli.verb import Run, Verb, add_code_argument
from lgd.config import Config
from lgd.config_files import add_config_arguments, add_option_arguments, config_of, find_in_run
from lgd.io.location import Location, as_location, as_output_location
from lgd.io.tables import print_csv, print_table

logger = logging.getLogger(__name__)

_Rows = Sequence[Mapping[str, object]]


def _add_images(parser: Parser, nargs: str, what: str) -> None:
    """The arguments that predict and query have in common."""
    parser.add_argument("images", nargs=nargs, metavar="IMAGE", help=what)
    parser.add_argument(
        "--model", default="", metavar="DIR", help="the student's folder, or its run's; or give --config"
    )
    parser.add_argument(
        "--mpp",
        type=typed(float | Literal["unknown"] | None),
        metavar="X",
        help="micrometres per pixel of the images, or unknown (default: that of training patches of their size)",
    )
    parser.add_argument("--slides", default="", metavar="CSV", help="columns key, slide: the slide of each image")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    add_code_argument(parser)


def _read_config(namespace: Namespace) -> Config | None:
    """The run of --config, if that was given; it names the student and the code that no option names."""
    require(not (namespace.json and namespace.csv), "--json and --csv are two formats: give one of them")
    if not namespace.config:
        return None
    config = config_of(namespace)
    namespace.model = namespace.model or config.student.dir
    namespace.code = {*namespace.code, *config.code}
    return config


def _find_student(namespace: Namespace) -> str:
    folder: str = namespace.model
    require(bool(folder), "name the student: --model DIR (its folder or its run's), or --config FILE of its run")
    return folder


def _find_store(namespace: Namespace, config: Config | None) -> Location:
    """The store of --store, of --config or of a run that --model names."""
    if folder := namespace.store or (config.latents.dir if config else ""):
        return find_in_run(folder, "latents")
    store = find_in_run(namespace.model, "latents") if namespace.model else None
    if store is None or store == as_location(namespace.model):
        raise ConfigError(
            "name the feature store: --store DIR (its folder or its run's), --config FILE of its run, or --model RUN"
        )
    return store


def _print_rows(namespace: Namespace, json: _Rows, csv: _Rows, table: _Rows, problems: Sequence[str]) -> None:
    """Print the rows in the format that was asked for; then `DataError` with the `problems`, if there are any."""
    if namespace.json:
        print_json(json)
    elif namespace.csv:
        print_csv(csv)
    else:
        print_table(table)
    if problems:
        raise DataError(*problems)


def _add_predict(parser: Parser) -> Run:
    _add_images(parser, "+", "H&E slides or image files, folders or patterns")
    text = "for slides: leave in DIR/SLIDE a score, a map, GeoJSON and features; a killed job goes on there"
    parser.add_argument("--out", default="", metavar="DIR", help=text)
    text = "for slides: processes of Ray that score them (default: 0, which is this one)"
    parser.add_argument("--workers", type=typed(int), default=0, metavar="N", help=text)
    add_config_arguments(parser, listed=False)

    def run(namespace: Namespace) -> None:
        config = _read_config(namespace)
        folder = _find_student(namespace)
        slides = as_location(namespace.slides) if namespace.slides else None
        from lgd.runs.folder import explain_overrides
        from lgd.scoring import images, notes, predict, slide_rows
        from lgd.scoring import slides as whole_slides
        from lgd.slides.source import INSTALL

        if scanned := whole_slides.find_slides(namespace.images):
            require(slides is None, "--slides names the slides of patches, and these are slides: leave it out")
            _score_slides(namespace, folder, scanned)
            return
        for option in ("out", "workers"):
            shown = ", ".join(namespace.images)
            # Without it a TIFF passes for an image.
            reader = "" if find_spec("openslide") else f"; if it does, {INSTALL}"
            require(
                not getattr(namespace, option),
                f"--{option} is for slides, and {shown} holds none: name slides, or leave it out{reader}",
            )
        paths = images.find_images(namespace.images)
        with explain_overrides(config):
            slide_of = slide_rows.slides_of_images(slides, paths) if slides else None
            scorer = predict.load_scorer(folder, code=namespace.code)
            predictions = predict.predict(scorer, paths, mpp=namespace.mpp, keep_going=True)
        unusable = {one.image: one.notes for one in predictions if not one.usable}
        problems = notes.describe_unusable(unusable, len(predictions))
        scored = (one.notes for one in predictions if one.usable)
        for note in notes.count_notes(scored, "images"):
            logger.warning("%s", note)
        rows = predictions if slide_of is None else slide_rows.join_slides(scorer.config, predictions, slide_of)
        cells = list(map(slide_rows.as_cells, rows))
        _print_rows(namespace, list(map(slide_rows.as_json, rows)), cells, cells, problems)

    return run


def _score_slides(namespace: Namespace, student: str, slides: Sequence[Path]) -> None:
    from lgd.scoring import notes, slide_rows
    from lgd.scoring.slides import score_slides

    require(namespace.mpp != "unknown", "--mpp is unknown, and a slide needs a scale: give its micrometres per pixel")
    require(
        bool(namespace.out or not namespace.workers),
        "--workers needs --out DIR, a folder that all workers share, or a url",
    )
    with tempfile.TemporaryDirectory(prefix="lgd-") as temporary:
        scores, problems = score_slides(
            student,
            slides,
            namespace.out or temporary,
            mpp=namespace.mpp,
            workers=namespace.workers,
            code=namespace.code,
        )
    unusable = notes.describe_unusable(
        {str(path): problem for path, problem in problems.items()}, len(slides), "slides"
    )
    for note in notes.count_notes((score.notes for score in scores), "slides"):
        logger.warning("%s", note)
    rows = slide_rows.list_scores(scores[0].target, scores, problems)
    documents = [score.document() for score in scores]
    _print_rows(namespace, documents, rows, rows, unusable)


def _add_query(parser: Parser) -> Run:
    _add_images(parser, "*", "H&E image files, folders or patterns; or give --key")
    parser.add_argument("--key", nargs="+", default=[], metavar="KEY", help="stored patches whose IHC is the query")
    parser.add_argument("--store", default="", metavar="DIR", help="the feature store's folder, or its run's")
    parser.add_argument(
        "--teacher",
        default=None,
        metavar="NAME",
        help="latents of this teacher (default: the student's first)",
    )
    parser.add_argument("-k", type=typed(int), default=5, metavar="N", help="neighbours of each query (default: 5)")
    parser.add_argument("--split", default="", metavar="S,S", help="search these splits only, such as train,val")
    text = "search these only (also --level): 2+,3+ or 10:20,90:"
    parser.add_argument("--label", default="", metavar="L,L", help=text)
    parser.add_argument("--level", dest="label", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--exclude-same-slide",
        action="store_true",
        help="leave out patches of the query's own slide, and those of unknown slides",
    )
    parser.add_argument("--sheet", default="", metavar="PNG", help="draw queries and neighbours into this file")
    add_config_arguments(parser, listed=False)
    return _run_query


def _run_query(namespace: Namespace) -> None:
    config = _read_config(namespace)
    require(bool(namespace.images or namespace.key), "name what to ask for: IMAGE ..., or stored patches by --key")
    drawn = as_output_location(namespace.sheet, "--sheet") if namespace.sheet else None
    from lgd.report import sheet
    from lgd.retrieval import answers, queries, rows
    from lgd.retrieval.search import choose_near, read_document
    from lgd.runs.folder import explain_overrides
    from lgd.scoring import images, notes, predict

    store_folder = _find_store(namespace, config)
    with explain_overrides(config):
        # Keys are answered from the store alone.
        scorer = predict.load_scorer(_find_student(namespace), code=namespace.code) if namespace.images else None
        store = queries.open_for(scorer, store_folder, namespace.teacher)
        paths = images.find_images(namespace.images)
        if drawn:
            sheet.check_sheet(len(paths) + len(namespace.key), namespace.k)
        replies = queries.query(
            scorer,
            store,
            paths,
            namespace.k,
            keys=namespace.key,
            splits=namespace.split.split(",") if namespace.split else None,
            labels=namespace.label.split(",") if namespace.label else None,
            exclude_same_slide=namespace.exclude_same_slide,
            slides=as_location(namespace.slides) if namespace.slides else None,
            mpp=namespace.mpp,
            keep_going=True,
        )
    problems = notes.describe_unusable({one.name: one.notes for one in replies if not one.usable}, len(replies))
    replies = [one for one in replies if one.usable]
    if drawn:
        sheet.draw_sheet(store, replies, drawn, namespace.mpp)
    document = read_document(store)
    logger.info("%s", answers.count_neighbours(replies, choose_near(document)))
    # With a filter each query searches other rows.
    whole = not (namespace.split or namespace.label or namespace.exclude_same_slide)
    if whole and (hubs := answers.describe_hubs(replies, document.rows)):
        logger.info("%s", hubs)
    for note in answers.collect_notes(store, replies):
        logger.warning("%s", note)
    _print_rows(namespace, rows.as_json(replies), rows.as_rows(replies), rows.as_table(replies), problems)


def _add_export(parser: Parser) -> Run:
    from lgd.store.export import ExportOptions, export

    read_options = add_option_arguments(parser, ExportOptions)

    def run(namespace: Namespace) -> None:
        options = read_options(namespace)
        rows = export(dataclasses.replace(options, store=str(find_in_run(options.store, "latents"))))
        print_lines(f"wrote {sum(row.patches for row in rows)} latents in {len(rows)} files: {options.out}")

    return run


def _add_export_onnx(parser: Parser) -> Run:
    parser.add_argument("--model", required=True, metavar="DIR", help="the student's folder, or its run's")
    parser.add_argument("--out", required=True, metavar="FILE", help="file or url to write to; it ends with .onnx")
    add_code_argument(parser)

    def run(namespace: Namespace) -> None:
        from lgd.scoring.onnx_export import export_onnx

        made = export_onnx(namespace.model, namespace.out, namespace.code)
        outputs = ", ".join(f"{name} (n, {count})" for name, count in made.shapes.items())
        print_lines(
            f"wrote {namespace.out}: image (n, {made.size}, {made.size}, 3), uint8 -> {outputs}; "
            f"checked, {made.difference:.1g} from the student at most"
        )

    return run


VERBS = {
    "predict": Verb("label and probabilities of H&E images, such as the HER2 level, or a number", _add_predict),
    "query": Verb("the nearest IHC latents of H&E images or of stored patches", _add_query),
    "export-latents": Verb("write a store's latents in TRIDENT's HDF5 layout, for other tools", _add_export),
    "export-onnx": Verb("write a student as one ONNX file, for programs without lgd", _add_export_onnx),
}
