"""A module imports only from rows above its own in this list, which is DESIGN's reading order."""

import ast
import functools
from pathlib import Path

import lgd

ROOT = Path(lgd.__file__).parent
ORDER = """
base.errors base.extensions base.text base.logs base.process_state base.threads base.markup base.plain_yaml base.records
base.spelling base.environment base.device base.arguments base.target base.labels
io.location io.calls io.digests io.files io.folders io.tables io.locks io.download_cache io.remote io.documents
config_sections config config_files metrics
labels.measures labels.classes labels.numbers labels.conformal labels.predictions
ray_jobs.cluster ray_jobs.mapping ray_jobs.training
stain.deconvolve stain.filters stain.targets stain.nuclear stain.checks
tissue.look tissue.drawing tissue.centers tissue.staining tissue.painting tissue.sections tissue.truth
tissue.pyramid tissue.world tissue.whole_slide tissue.synth_options tissue.drawing_pool tissue.slide_set tissue.synth
slides.source slides.openslide_file slides.ome slides.slide slides.tissue_mask slides.tiles slides.preview
slides.affine slides.alignment
shards.manifest shards.tiff shards.jpeg2000 shards.image_limits shards.pillow_image shards.profiles
shards.image shards.image_files
shards.region shards.candidate shards.slide_layout shards.layouts shards.pairs shards.slide_pairs shards.options
shards.archive shards.shard_set
shards.writer shards.builder shards.repeats shards.verify
stream.plan stream.reader
models.spec models.description models.export models.pretrained models.known models.backbone models.timm_backbone
models.encoder models.availability
models.heads models.query_map models.student models.grids models.teacher models.losses models.method models.methods
models.loading
store.document store.drift store.writer store.parts store.targets store.store store.commit store.regression store.probe
store.recipes store.supervision store.cache
store.export store.features store.feature_layouts store.joining store.importing
train.targets train.batch train.partners train.tasks train.engine train.deepspeed_engine train.world train.checkpoint
train.log train.prepare train.finished train.loop train.launch
scoring.images scoring.notes scoring.label_sets scoring.predict scoring.onnx_export scoring.slide_answer
scoring.slide_rows
scoring.colours scoring.slide_plan scoring.slide_parts scoring.tile_table scoring.slide_files scoring.slide_grids
scoring.heatmap
scoring.slide_result scoring.tile_scorer scoring.slides
retrieval.index_files retrieval.search retrieval.factory retrieval.bias retrieval.index
retrieval.hubs retrieval.answers retrieval.chance retrieval.filters retrieval.rows retrieval.queries
runs.folder
report.columns report.results report.sections report.colour report.caveats report.ablation_table report.figures
report.charts report.contact_sheet report.grids report.slide_map
report.sheet report.neighbours report.embeddings report.biased report.robustness report.agreement report.slides
report.sites report.set_coverage report.listing report.probed report.retrieval report.pictures report.evaluation
report.card_facts report.card_sections report.checklist report.card
report.report report.ablation report.leave_out report.questions report.transfer_table report.transfer
report.teachers_table report.teacher_rows report.teachers
serve.messages serve.names serve.options serve.overlays serve.gallery serve.neighbours serve.batches serve.network
serve.slide_folder serve.slide_jobs serve.connections serve.guard serve.calls serve.patch_routes
serve.slide_routes serve.application serve.replicas serve.launch
pipeline comparisons
cli.contents cli.facts cli.slide_facts cli.verb cli.stages cli.answers cli.service cli.checks
""".split()
# Heavy or optional packages have one importing module each (a folder names all its modules).
OWNERS = {
    "ray": {"ray_jobs.cluster", "ray_jobs.mapping", "ray_jobs.training", "serve.replicas", "serve.launch"},
    "faiss": {"retrieval.search"},
    "deepspeed": {"train.deepspeed_engine"},
    "h5py": {
        "store.parts",
        "store.writer",
        "store.export",
        "store.features",
        "store.feature_layouts",
        "scoring.slide_files",
        "scoring.slide_grids",
    },
    "pyarrow": {"io.location", "store.feature_layouts"},
    "webdataset": {"shards.writer"},
    "transformers": {"models.backbone"},
    "timm": {"models.timm_backbone"},
    "huggingface_hub": {"models.pretrained"},
    "matplotlib": {"report.figures", "report.slide_map", "scoring.heatmap"},
    "contourpy": {"scoring.slide_files"},
    "openslide": {"slides.openslide_file"},
    "tifffile": {"slides.ome", "tissue.pyramid"},
    "onnxruntime": {"scoring.onnx_export"},
}
# These may not be imported when the module is: `lgd --help` must be quick, and works without them.
LATE = {
    "ray",
    "timm",
    "faiss",
    "deepspeed",
    "h5py",
    "transformers",
    "huggingface_hub",
    "matplotlib",
    "docstring_parser",
    "pyarrow",
    "openslide",
    "tifffile",
    "onnxruntime",
}
LATE |= {"sklearn", "timm", "fastapi", "fastapi_offline", "starlette", "uvicorn"}
# What runs inside Ray Serve: its classes are decorated by it. They are imported late themselves.
IN_RAY_SERVE = "serve.connections serve.guard serve.calls serve.patch_routes serve.slide_routes".split()
IN_RAY_SERVE += ["serve.application", "serve.replicas"]


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name not in ("__init__.py", "__main__.py"):
            found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(name: str) -> str | None:
    """The module of lgd that an import names, if it does."""
    parts = name.split(".")
    if parts[0] != "lgd":
        return None
    for end in range(len(parts), 1, -1):
        if ".".join(parts[1:end]) in ORDER:
            return ".".join(parts[1:end])
    return None


def test_every_module_has_a_row():
    assert sorted(modules()) == sorted(ORDER)


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by that."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_the_root_holds_what_has_no_folder():
    assert [name for name in ORDER if "." not in name] == [
        "config_sections",
        "config",
        "config_files",
        "metrics",
        "pipeline",
        "comparisons",
    ]


def test_modules_and_functions_are_short():
    """The one long function is the training loop, which stands in sight; docstrings are not counted."""
    lines = {name: len((ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()) for name in ORDER}
    assert {name: count for name, count in lines.items() if count > 300} == {}
    long = {
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno - node.lineno - len((ast.get_docstring(node) or "").splitlines()) >= 60
    }
    assert long <= {"train.loop.fit"}


def test_imports_go_upward_only():
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in map(own, imported(tree))
        if target and ORDER.index(target) >= ORDER.index(name)
    ]
    assert not wrong


def test_only_io_tells_a_path_from_a_url():
    wrong = [
        f"{name}:{node.lineno} names {known}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        for known in (getattr(node, field, "") for field in ("id", "attr", "name"))
        if known == "is_remote" or (known == "UPath" and not name.startswith("io."))
    ]
    branches = [
        f"{name}:{call.lineno} asks whether it has a Path"
        for name, tree in modules().items()
        for call in calls(tree, {"isinstance"})
        if not name.startswith("io.") and ast.unparse(call.args[1]) == "Path"
    ]
    casts = [
        f"{name}:{call.lineno} casts to a Path"
        for name, tree in modules().items()
        for call in calls(tree, {"cast"})
        if ast.unparse(call.args[0]).strip("'") in ("Path", "UPath", "Location")
    ]
    assert not wrong + branches + casts


def test_heavy_packages_have_one_importer():
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in imported(tree)
        if name not in OWNERS.get(target.split(".")[0], {name})
    ]
    assert not wrong


def test_heavy_packages_are_imported_late():
    wrong = [
        f"{name} imports {target} at once"
        for name, tree in modules().items()
        for node in tree.body
        for target in imported(node if isinstance(node, ast.Import | ast.ImportFrom) else ast.Pass())
        if (target.split(".")[0] in LATE or own(target) in IN_RAY_SERVE) and name not in IN_RAY_SERVE
    ]
    assert not wrong


def calls(tree: ast.AST, names: set[str]) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def test_everything_is_printed_by_print_lines():
    """It escapes text of others; so does `dump_json`."""
    assert not [name for name, tree in modules().items() if calls(tree, {"print"})]


def test_only_the_command_line_writes_to_standard_error():
    """All else is logged, so that a program can route and silence it; `lgd.cli` itself prints errors."""
    users = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "stderr"
    }
    assert users == {"base.text", "base.logs"}


def test_the_lines_of_an_error_are_its_arguments():
    """A line break within one could be that of a file's name, and is escaped."""
    wrong = [
        f"{name}: {part.value!r}"
        for name, tree in modules().items()
        for call in calls(tree, {"DataError", "ConfigError"})
        for part in ast.walk(call)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value
    ]
    assert not wrong
