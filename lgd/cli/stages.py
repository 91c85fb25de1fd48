"""What each verb takes and does; `lgd.cli` runs one.

A verb adds its arguments to a parser, and gives the function that is then called with what was parsed.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lgd
from lgd.config import Config
from lgd.errors import ConfigError, DataError
from lgd.options import add_config_arguments, add_option_arguments, config_of, given_of, typed
from lgd.tables import print_csv, print_table
from lgd.text import print_json, print_lines
from lgd.urls import place, place_output

Run = Callable[[Any, Any], None]


def _plain(namespace: Any, kind: type) -> Any:
    """The options dataclass of a verb, from a parsed command line."""
    return kind(**{name: namespace[name] for name in kind.__dataclass_fields__})  # type: ignore[attr-defined]


def _synth(parser: Any) -> Run:
    from lgd.data.synth import SynthOptions, synthesise

    parser.add_argument("out", help="folder to write to")
    add_option_arguments(parser, SynthOptions, skip=("out",))

    def run(parser: Any, namespace: Any) -> None:
        options = _plain(namespace, SynthOptions)
        made = synthesise(options)
        done = "reused" if made.get("reused") else "drew"
        print_lines(f"{done} {options.pairs} pairs of {made['slides']} slides: {options.out}")

    return run


def _build_shards(parser: Any) -> Run:
    from lgd.data.shards import ShardOptions, build
    from lgd.distribute import disconnect, map_with

    add_option_arguments(parser, ShardOptions)

    def run(parser: Any, namespace: Any) -> None:
        options = _plain(namespace, ShardOptions)

        def map_jobs(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Any:
            return map_with(lambda: function, jobs, workers=options.workers, what="--workers", use_gpus=False)

        try:
            manifest, built = build(options, map_jobs)
        finally:
            disconnect()
        rows = []
        for name, split in manifest.splits.items():
            size = sum(shard.bytes for shard in split.shards) / 1e6
            shards = len(split.shards)
            rows.append({"split": name, "samples": split.samples, **split.labels, "shards": shards, "MB": size})
        print_table(rows)
        sources = manifest.sources
        left_out = f", {sources.rejected} left out (rejected.csv)" if sources.rejected else ""
        done = "built" if built else "reused, nothing changed"
        unscaled = sum(shape.samples for split in manifest.splits.values() for shape in split.shapes if not shape.mpp)
        if unscaled and options.mpp != "unknown":
            print_lines(
                f"{unscaled} patches have no scale: give --mpp X (micrometres per pixel), or --mpp unknown, else no "
                "network is trained on their labels",
                file=sys.stderr,
            )
        print_lines(f"{done}: {options.out} (from {sources.pairs} pairs{left_out})")

    return run


def _stage(
    verb: str, aliases: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> Callable[[Any], Run]:
    """A verb that runs one stage of the pipeline; `flags` are options of its own, with their help."""
    name = "train_student" if verb == "train" else verb.replace("-", "_")

    def add(parser: Any) -> Run:
        for flag, text in (flags or {}).items():
            parser.add_argument(f"--{flag}", action="store_true", help=text)
        add_config_arguments(parser, aliases=aliases)

        def run(parser: Any, namespace: Any) -> None:
            config = config_of(namespace)
            from lgd import pipeline
            from lgd.distribute import disconnect
            from lgd.run_folder import explain_overrides

            try:
                with explain_overrides(config):
                    own = {flag: namespace[flag] for flag in flags or ()}
                    table = getattr(pipeline, name)(config, given_of(namespace, verb, **own), **own)
            finally:
                disconnect()
            if table:
                print_lines(*table.split("\n"))

        return run

    return add


def _demo(parser: Any) -> Run:
    parser.add_argument("--pairs", type=int, default=720, help="patch pairs of virtual tissue")
    parser.add_argument("--size", type=int, default=192, help="their side in pixels")
    add_config_arguments(parser, default=str(Path(lgd.__file__).parents[1] / "configs" / "demo.yaml"))

    def run(parser: Any, namespace: Any) -> None:
        config = config_of(namespace)
        from lgd import pipeline
        from lgd.run_folder import command, explain_overrides

        with explain_overrides(config):
            table = pipeline.demo(config, namespace.pairs, namespace.size, given_of(namespace, "demo"))
        print_lines("", *table.split("\n"))
        out = Path(config.run.dir)
        print_lines(
            "", "Held-out slides of virtual tissue, which is not tissue: this shows that the parts work together."
        )
        print_lines(f"report         {Path(config.report.dir) / 'summary.md'}")
        print_lines(f"contact sheet  {Path(config.report.dir) / 'queries.png'}")
        print_lines(f"curves         tensorboard --logdir {shlex.quote(str(out))}")
        # Other students hallucinate no latents to query with.
        verb, more = ("query", " -k 5") if config.student.method == "lgd" else ("predict", "")
        images = shlex.quote(f"{pipeline.tissue_dir(config)}/HE/test")
        print_lines(f"try next       {command(config, verb, ('latents.dir', 'student.dir'))}{more} {images}")

    return run


def _images(parser: Any, nargs: str) -> None:
    parser.add_argument("images", nargs=nargs, help="H&E image files, folders or patterns")
    parser.add_argument("--model", default="", help="folder of the student; or give --config")
    parser.add_argument(
        "--mpp",
        type=typed(float | Literal["unknown"] | None),
        default=None,
        help="micrometres per pixel of the images, or unknown; by default that of training patches of their size",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def _model(namespace: Any) -> tuple[str, Config | None]:
    """The student's folder, from --model or --config."""
    config = config_of(namespace) if namespace.config else None
    folder = namespace.model or (config.student.dir if config else "")
    if not folder:
        raise ConfigError("name the student: --model DIR, or --config F of its run")
    return folder, config


def _predict(parser: Any) -> Run:
    _images(parser, "+")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument("--slides", default="", help="CSV with columns key,slide: one row a slide")
    add_config_arguments(parser)

    def run(parser: Any, namespace: Any) -> None:
        folder, config = _model(namespace)
        slides = place(namespace.slides) if namespace.slides else None
        from lgd.evaluate import images, notes, predict
        from lgd.run_folder import explain_overrides

        found = images.find_images(namespace.images)
        with explain_overrides(config):
            scorer = predict.load_scorer(folder)
            predictions = predict.predict_images(scorer, found.paths, slides, namespace.mpp, keep_going=True)
        unread = [one for one in predictions if one.probability_4 is None]
        problems = predict.problems_of(unread, len(predictions))
        if len(unread) == len(predictions):
            raise DataError(*problems)
        scored = (one.notes for one in predictions if one.probability_4 is not None)
        print_lines(*found.notes, *notes.count_notes(scored, "images"), file=sys.stderr)
        rows = predict.as_rows(predictions)
        if namespace.json:
            print_json(rows)
        elif namespace.csv:
            print_csv([predict.as_cells(row) for row in rows])
        else:
            print_table([predict.as_cells(row) for row in rows])
        if problems:
            raise DataError(*problems)

    return run


def _query(parser: Any) -> Run:
    _images(parser, "*")
    parser.add_argument("--key", nargs="+", default=[], help="keys of stored patches, whose IHC latents are the query")
    parser.add_argument("--store", default="", help="folder of the feature store; or give --config")
    parser.add_argument("-k", type=int, default=5, help="neighbours of each query")
    parser.add_argument("--split", default="", help="search these splits of the index only, such as train,val")
    parser.add_argument("--level", default="", help="search these levels only, such as 2+,3+")
    parser.add_argument(
        "--exclude-same-slide",
        action="store_true",
        help="leave out patches of the query's own slide, and those of unknown slides",
    )
    parser.add_argument("--slides", default="", help="CSV with columns key,slide: the slides of images")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument("--sheet", default="", help="draw the queries and their neighbours into this PNG")
    add_config_arguments(parser)

    def run(parser: Any, namespace: Any) -> None:
        config = config_of(namespace) if namespace.config else None
        drawn = place_output(namespace.sheet, "--sheet") if namespace.sheet else None
        from lgd.evaluate import answer, images, predict, retrieve, sheet
        from lgd.run_folder import explain_overrides
        from lgd.store.latents import Store

        store_folder = namespace.store or (config.latents.dir if config else "")
        if not store_folder:
            raise ConfigError("name the feature store: --store DIR, or --config F of its run")
        with explain_overrides(config):
            # Keys are answered from the store alone.
            scorer = predict.load_scorer(_model(namespace)[0]) if namespace.images else None
            store = Store(store_folder)
            found = images.find_images(namespace.images)
            if drawn:
                sheet.check_sheet(len(found.paths) + len(namespace.key), namespace.k)
            unread: list[predict.ScoredImage] = []
            answers = retrieve.query(
                scorer,
                store,
                found.paths,
                namespace.k,
                keys=namespace.key,
                splits=namespace.split.split(",") if namespace.split else None,
                levels=namespace.level.split(",") if namespace.level else None,
                exclude_same_slide=namespace.exclude_same_slide,
                slides=place(namespace.slides) if namespace.slides else None,
                mpp=namespace.mpp,
                unread=unread,
            )
        problems = predict.problems_of(unread, len(found.paths))
        if not answers:
            raise DataError(*problems)
        if drawn:
            sheet.draw_sheet(store, answers, drawn)
        print_lines(*found.notes, *answer.summary(store, answers), file=sys.stderr)
        if namespace.json:
            print_json(answer.as_json(answers))
        elif namespace.csv:
            print_csv(answer.as_rows(answers))
        else:
            print_table(answer.as_table(answers))
        if problems:
            raise DataError(*problems)

    return run


def _export(parser: Any) -> Run:
    from lgd.store.export import ExportOptions, export

    add_option_arguments(parser, ExportOptions)

    def run(parser: Any, namespace: Any) -> None:
        options = _plain(namespace, ExportOptions)
        rows = export(options)
        print_lines(f"wrote {sum(row['patches'] for row in rows)} latents in {len(rows)} files: {options.out}")

    return run


def _verify(parser: Any) -> Run:
    parser.add_argument("folder", help="a run, shards, a feature store, a trained network or a checkpoint")
    parser.add_argument("--reencode", type=int, default=0, help="rows of a store to run the teacher on again")
    parser.add_argument("--teacher", default="", help="folder of the teacher, if it is not where it was")

    def run(parser: Any, namespace: Any) -> None:
        from lgd.check import check

        folder = place(namespace.folder)
        what, problems, told = check(folder, namespace.reencode, namespace.teacher)
        print_lines(*told)
        if problems:
            raise DataError(f"{what} {folder} has {len(problems)} problem(s):", *problems)
        print_lines(f"{what} {folder}: no problems")

    return run


def _doctor(parser: Any) -> Run:
    parser.add_argument("--gpu", action="store_true", help="try a bf16 step and a FAISS search on the GPU")

    def run(parser: Any, namespace: Any) -> None:
        from lgd.doctor import examine

        findings = examine(namespace.gpu)
        for finding in findings:
            print_lines(f"{finding.state:7} {finding.name:13} {finding.detail}")
        if any(finding.state == "broken" for finding in findings):
            raise DataError("something is broken: see the lines above")

    return run


def _ablate(parser: Any) -> Run:
    from lgd.ablate import AblateOptions

    add_option_arguments(parser, AblateOptions)
    add_config_arguments(parser)

    def run(parser: Any, namespace: Any) -> None:
        config, options = config_of(namespace), _plain(namespace, AblateOptions)
        from lgd import pipeline
        from lgd.run_folder import explain_overrides

        with explain_overrides(config):
            table = pipeline.ablate(config, options, given_of(namespace, "ablate"))
        print_lines(*table.split("\n"))

    return run


def _bench(parser: Any) -> Run:
    from lgd.bench.measure import Settings
    from lgd.bench.suite import BENCHMARKS, bench, rows, summary

    parser.add_argument("name", nargs="?", default="", help=f"one of {', '.join(BENCHMARKS)}; by default all")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    shown = (
        *("images", "size", "batch", "threads", "seconds", "rounds", "teacher", "rows"),
        *("model", "train_batch", "precision"),
    )
    hidden = [name for name in Settings.__dataclass_fields__ if name not in shown]
    add_option_arguments(parser, Settings, skip=hidden)

    def run(parser: Any, namespace: Any) -> None:
        document = bench(namespace.name, Settings(**{name: namespace[name] for name in shown}))
        if namespace.json:
            print_json(document)
            return
        print_table(rows(document))
        print_lines(summary(document))

    return run


_OVERWRITE = {"overwrite": "replace a finished network of other inputs"}

VERBS: dict[str, tuple[str, Callable[[Any], Run]]] = {
    "demo": ("the whole pipeline on virtual tissue, on this machine, in minutes", _demo),
    "synth": ("draw virtual tissue in the BCI layout, with a truth.csv", _synth),
    "build-shards": ("pack paired patches into WebDataset shards", _build_shards),
    "train-teacher": ("train the IHC encoder and freeze it", _stage("train-teacher", flags=_OVERWRITE)),
    "cache-latents": (
        "fill the feature store with latents and domain targets",
        _stage("cache-latents", flags={"prune": "remove the parts of shards that this run does not have"}),
    ),
    "build-index": ("build the FAISS index and measure its recall", _stage("build-index")),
    "train": ("train the H&E student", _stage("train", {"train.resume": "--resume"}, _OVERWRITE)),
    "evaluate": ("score the held-out split and write the report", _stage("evaluate")),
    "predict": ("HER2 level and probabilities of H&E images", _predict),
    "query": ("the nearest IHC latents of H&E images or of stored patches", _query),
    "export-latents": ("write a store's latents in TRIDENT's HDF5 layout, for other tools", _export),
    "verify": ("check a run, or its shards, store, networks or checkpoints, end to end", _verify),
    "ablate": ("LGD-Net beside its controls and without its parts, over several seeds", _ablate),
    "doctor": ("what this machine has and lacks", _doctor),
    "bench": ("how fast the parts are, as ratios against a bare loop or a peer", _bench),
}
