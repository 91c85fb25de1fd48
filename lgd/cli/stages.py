"""The verbs that make something: virtual tissue, shards, the stages of a run, the demo, the comparison of methods."""

import importlib.resources
import logging
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lgd.base.arguments import Parser, typed
from lgd.base.text import print_lines
from lgd.cli.verb import Run, Verb, add_code_argument
from lgd.config_files import add_config_arguments, add_option_arguments, config_of, given_of
from lgd.io.tables import print_table

logger = logging.getLogger(__name__)


def _add_synth(parser: Parser) -> Run:
    from lgd.tissue.synth import synthesise
    from lgd.tissue.synth_options import SynthOptions

    parser.add_argument("out", metavar="DIR", help="folder to write to")
    read_options = add_option_arguments(parser, SynthOptions, skip=("out",))

    def run(namespace: Namespace) -> None:
        options = read_options(namespace)
        made = synthesise(options)
        done = "reused" if made.get("reused") else "drew"
        drawn = "" if options.slides_only else f"{options.pairs} pairs of "
        print_lines(f"{done} {drawn}{made['slides']} slides: {options.out}")

    return run


def _add_build_shards(parser: Parser) -> Run:
    from lgd.shards.builder import build
    from lgd.shards.options import ShardOptions
    from lgd.shards.shard_set import WITHOUT_IHC

    read_options = add_option_arguments(parser, ShardOptions)

    def run(namespace: Namespace) -> None:
        options = read_options(namespace)
        manifest, built = build(options)
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
            logger.warning(
                f"{unscaled} patches have no scale: give --mpp X (micrometres per pixel), or --mpp unknown, else no "
                "network is trained on their labels"
            )
        paired = manifest.extensions.ihc is not None
        if not paired:
            logger.warning(f"no patch has a second image (IHC), so the set holds H&E alone: {WITHOUT_IHC}")
        for name, use in (("train", "trained on"), ("test", "scored in a report")):
            if name not in manifest.splits:
                logger.warning(
                    f"no patch is in the split {name}, so nothing can be {use}: name the split of each pair in a "
                    "CSV, or draw another one with --split or --salt"
                )
        print_lines(f"{done}: {options.out} (from {sources.pairs} {'pairs' if paired else 'H&E patches'}{left_out})")

    return run


def _make_stage(
    verb: str, aliases: dict[str, str] | None = None, flags: dict[str, str] | None = None, loads: bool = False
) -> Callable[[Parser], Run]:
    """A verb that runs one stage of the pipeline; `flags` are options of its own, with their help.

    `loads`: it loads models that the run need not have made, and takes `--code`.
    """
    name = "train_student" if verb == "train" else verb.replace("-", "_")

    def add(parser: Parser) -> Run:
        for flag, text in (flags or {}).items():
            parser.add_argument(f"--{flag}", action="store_true", help=text)
        if loads:
            add_code_argument(parser)
        add_config_arguments(parser, aliases=aliases)

        def run(namespace: Namespace) -> None:
            config = config_of(namespace)
            from lgd import pipeline
            from lgd.ray_jobs.cluster import restore_connection
            from lgd.runs.folder import explain_overrides

            with restore_connection(), explain_overrides(config):
                own = {name: vars(namespace)[name] for name in [*(flags or ()), *(["code"] if loads else [])]}
                table = getattr(pipeline, name)(config, given_of(namespace, verb, **own), **own)
            if table:
                print_lines(*table.split("\n"))

        return run

    return add


def _add_import(parser: Parser) -> Run:
    from lgd.store.importing import ImportOptions

    what = "features by key (.h5, .npz, .parquet), or files of TRIDENT, CLAM or STAMP; or their folders"
    parser.add_argument("files", nargs="+", metavar="FILE", help=what)
    read_options = add_option_arguments(parser, ImportOptions, skip=("files",))
    add_config_arguments(parser)

    def run(namespace: Namespace) -> None:
        config, options = config_of(namespace), read_options(namespace)
        from lgd import pipeline
        from lgd.ray_jobs.cluster import restore_connection
        from lgd.runs.folder import explain_overrides

        own = {name: vars(namespace)[name] for name in type(options).__dataclass_fields__}
        with restore_connection(), explain_overrides(config):
            pipeline.import_latents(config, options, given_of(namespace, "import-latents", **own))

    return run


_PROGRAM = "lgd"


def name_program() -> str:
    """`lgd` as this process was called, so that a command that is printed runs as it is."""
    called, found = Path(sys.argv[0]), shutil.which("lgd")
    if called.name == "__main__.py":
        installed = found is not None and Path(found).parent == Path(sys.executable).parent
        return "lgd" if installed else f"{shlex.quote(sys.executable)} -m lgd"
    if called.name != _PROGRAM or (found is not None and called.exists() and called.samefile(found)):
        return "lgd"
    return shlex.quote(sys.argv[0])


def _add_demo(parser: Parser) -> Run:
    parser.add_argument("--pairs", type=typed(int), default=720, metavar="N", help="patch pairs of virtual tissue")
    parser.add_argument("--size", type=typed(int), default=192, metavar="PX", help="their side in pixels")
    add_config_arguments(parser, default=str(importlib.resources.files("lgd") / "configs" / "demo.yaml"))

    def run(namespace: Namespace) -> None:
        config = config_of(namespace)
        from lgd import pipeline
        from lgd.runs.folder import command, explain_overrides

        with explain_overrides(config):
            table = pipeline.demo(config, namespace.pairs, namespace.size, given_of(namespace, "demo"))
        from lgd.models.methods import find_method

        # Other students hallucinate no latents to query with.
        by_latents = find_method(config.student.method).retrieves_by == "latents"
        verb, more = ("query", " -k 5") if by_latents else ("predict", "")
        program = name_program()
        run_dir = Path(config.run.dir)
        drawn, shown = (shlex.quote(str(run_dir.with_name("drawn") / part)) for part in ("", "HE"))
        served = f"{program} serve --model {shlex.quote(str(run_dir))}"
        images = shlex.quote(f"{pipeline.tissue_dir(config)}/HE/test")
        next_command = command(config, verb, ("latents.dir", "student.dir")).replace("lgd", program, 1)
        install = "" if find_spec("fastapi_offline") else "   (after pip install 'lgd[serve]')"
        print_lines(
            "",
            *table.split("\n"),
            "",
            "Held-out slides of virtual tissue, which is not tissue: this shows that the parts work together.",
            f"report         {Path(config.report.dir) / 'summary.md'}",
            f"contact sheet  {Path(config.report.dir) / 'queries.png'}",
            f"curves         tensorboard --logdir {shlex.quote(str(run_dir))}",
            f"try next       {next_command}{more} {images}",
            f"in a browser   {served}{install}",
            f"with a slide   {program} synth {drawn} --slides-only 1",
            f"               {served} --slides {shown}",
        )

    return run


def _make_comparison(verb: str, function: str) -> Callable[[Parser], Run]:
    """A verb that compares, by a function of `lgd.comparisons`."""

    def add(parser: Parser) -> Run:
        from lgd.report.ablation import AblateOptions
        from lgd.report.teacher_rows import TeachersOptions

        kind: type[AblateOptions | TeachersOptions] = {"ablate": AblateOptions, "teachers": TeachersOptions}[verb]
        read_options = add_option_arguments(parser, kind)
        add_config_arguments(parser)

        def run(namespace: Namespace) -> None:
            config, options = config_of(namespace), read_options(namespace)
            from lgd import comparisons
            from lgd.runs.folder import explain_overrides

            with explain_overrides(config):
                table = getattr(comparisons, function)(config, options, given_of(namespace, verb))
            print_lines(*table.split("\n"))

        return run

    return add


_OVERWRITE = {"overwrite": "replace a finished network of other inputs"}

VERBS = {
    "demo": Verb("the whole pipeline on virtual tissue, on this machine, in minutes", _add_demo),
    "synth": Verb(
        "draw virtual tissue, patches in the BCI layout or whole slides, with the truth about it", _add_synth
    ),
    "build-shards": Verb("pack paired patches into WebDataset shards", _add_build_shards),
    "train-teacher": Verb("train the IHC encoder and freeze it", _make_stage("train-teacher", flags=_OVERWRITE)),
    "cache-latents": Verb(
        "fill the feature store with latents and domain targets",
        _make_stage("cache-latents", flags={"prune": "remove the parts of shards that this run does not have"}),
    ),
    "import-latents": Verb("put features of other tools into the feature store as a teacher's latents", _add_import),
    "build-index": Verb("build the FAISS index and measure its recall", _make_stage("build-index")),
    "train": Verb("train the H&E student", _make_stage("train", {"train.resume": "--resume"}, _OVERWRITE)),
    "evaluate": Verb("score the held-out split and write the report", _make_stage("evaluate", loads=True)),
    "ablate": Verb(
        "LGD-Net beside its controls and without its parts, over several seeds", _make_comparison("ablate", "ablate")
    ),
    "teachers": Verb(
        "teachers compared, by what they know and what students make of it",
        _make_comparison("teachers", "compare_teachers"),
    ),
}
