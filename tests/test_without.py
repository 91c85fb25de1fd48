"""What still works without Ray, FAISS, DeepSpeed or a C++ compiler, and what the rest says.

Absence is real: Python runs without its site folders (-S), on a folder of links to what they hold, less what is absent.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drawn_slides import draw_colours, write_ome
from verbs import VERBS

from lgd.io.files import read_json
from lgd.tissue.pyramid import write_pyramid

ROOT = Path(__file__).resolve().parents[1]

ABSENT = {
    "ray": {"ray"},
    "faiss": {"faiss", "faiss_cpu", "faiss_gpu"},
    "deepspeed": {"deepspeed"},
    "h5py": {"h5py"},
    "torch": {"torch"},
    "openslide": {"openslide", "openslide_python", "openslide_bin"},
    "tifffile": {"tifffile"},
    "fastapi": {"fastapi", "fastapi_offline", "starlette"},
}
"""Package -> how its entries in a site folder begin."""

RAY = "Ray is not installed: pip install 'ray[default,train]', or set {} to 0 to do without"
FAISS = "FAISS is not installed: pip install 'lgd[cpu]', or 'lgd[gpu]' on a CUDA machine"
NO_DEEPSPEED = "DeepSpeed is not installed: pip install deepspeed"
NO_COMPILER = "DeepSpeed compiles an extension on the CPU and there is no C++ compiler: install g++"


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """`without(packages, compiler)(*args)`: run Python where these are absent, and return what it printed."""
    made = {}

    def links(packages):
        folder = tmp_path_factory.mktemp("site")
        gone = set().union(*(ABSENT[package] for package in packages))
        for site in [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]:
            for path in site.iterdir():
                there = (folder / path.name).is_symlink() or re.split(r"[-.]", path.name.lower())[0] in gone
                if not there and path.suffix != ".pth":
                    (folder / path.name).symlink_to(path)
        return folder

    empty = tmp_path_factory.mktemp("bin")

    def python(packages, compiler=True):
        if packages not in made:
            made[packages] = links(packages)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{made[packages]}", "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        if not compiler:
            environment["PATH"] = str(empty)

        def run(*args, status=0):
            command = [sys.executable, "-S", *map(str, args)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=empty, timeout=200)
            assert done.returncode == status, done.stderr
            return done

        return run

    return python


def verbs(python, folder, commands):
    """Status, output and errors of each of some named commands, all in one process."""
    script = folder / "verbs.py"
    script.write_text(VERBS)
    args = [[str(arg) for arg in command] for command in commands.values()]
    done = python(script, json.dumps(args))
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


PARTS = {
    "all": (("deepspeed", "faiss", "ray"), False),
    "ray": (("ray",), True),
    "faiss": (("faiss",), True),
    "deepspeed": (("deepspeed",), True),
    "compiler": ((), False),
}
"""Name of a test -> the packages that are absent, and whether there is a compiler."""


def options(run, shards, workers=0):
    fields = {
        "run.dir": run,
        "data.shards": shards,
        "data.size": 64,
        "data.threads": 1,
        "teacher.epochs": 1,
        "latents.map": 2,
        "student.epochs": 1,
        "train.batch": 4,
        "train.workers": workers,
        "report.bootstrap": 5,
    }
    return [text for name, value in fields.items() for text in (f"--{name}", value)]


def build(folder, out):
    tissue = folder / "tissue"
    split = ["--slides", tissue / "truth.csv", "--split", "group:0.4,0.2,0.4", "--shard-size", "8"]
    return ["build-shards", "--layout", "bci", "--root", tissue, "--mpp", "0.46", *split, "--out", out]


def refused_without(absent, folder, shards):
    """Name -> a command that needs what is absent, its exit status and its one message."""
    run = options(folder / "refused", shards)
    under_ray = options(folder / "refused", shards, workers=1)
    store = ["--latents.dir", folder / "run" / "latents"]
    images = ["--model", folder / "run" / "student", "--store", folder / "run" / "latents"]
    zero = "deepspeed: is set, but this run uses the torch engine: remove it, or install DeepSpeed"
    why = NO_COMPILER if absent == "compiler" else NO_DEEPSPEED
    ray = {
        "build-shards by Ray": ([*build(shards.parent, folder / "none"), "--workers", "1"], 1, RAY.format("--workers")),
        "train-teacher by Ray": (["train-teacher", *under_ray], 1, RAY.format("train.workers")),
        "cache-latents by Ray": (
            ["cache-latents", *under_ray, "--teacher.dir", folder / "run" / "teacher"],
            1,
            RAY.format("train.workers"),
        ),
    }
    faiss = {
        "demo": (["demo", "--run.dir", folder / "refused"], 1, FAISS),
        "build-index": (["build-index", *run, *store], 1, FAISS),
        "query": (["query", *images, shards.parent / "tissue" / "HE" / "test"], 1, FAISS),
    }
    deepspeed = {
        "train by DeepSpeed": (
            ["train-teacher", *run, "--train.engine", "deepspeed"],
            1,
            f"train.engine is deepspeed, but {why}; or set train.engine to torch",
        ),
        "train by ZeRO": (["train-teacher", *run, "--deepspeed", '{"zero_optimization": {"stage": 1}}'], 2, zero),
    }
    of = {"ray": ray, "faiss": faiss, "deepspeed": deepspeed, "compiler": deepspeed, "all": ray | faiss | deepspeed}
    return of[absent]


def journey(folder):
    """The whole way from drawing tissue to scores, less what needs an index."""
    run, student, store = options(folder / "run", folder / "shards"), folder / "run/student", folder / "run/latents"
    return {
        "synth": ["synth", folder / "tissue", "--pairs", "24", "--size", "64", "--slides", "12", "--workers", "1"],
        "build-shards": build(folder, folder / "shards"),
        "train-teacher": ["train-teacher", *run],
        "cache-latents": ["cache-latents", *run],
        "train": ["train", *run],
        "evaluate": ["evaluate", *run],
        "predict": ["predict", "--model", student, "--json", folder / "tissue" / "HE" / "test"],
        "verify shards": ["verify", folder / "shards"],
        "verify store": ["verify", store, "--reencode", "2"],
        "export-latents": ["export-latents", "--store", store, "--out", folder / "trident"],
        "doctor": ["doctor"],
    }


def needed(absent, folder, shards):
    """What is near to the one absent part, and works: on a copy of what the journey made."""
    run = options(folder / "run", shards)
    images = ["--model", folder / "run" / "student", "--store", folder / "run" / "latents"]
    searches = {
        "build-index": ["build-index", *run],
        "query": ["query", *images, shards.parent / "tissue" / "HE" / "test"],
        "evaluate": ["evaluate", *run],
        "verify store": ["verify", folder / "run" / "latents"],
    }
    trains = {"train-teacher": ["train-teacher", *options(folder / "again", shards)]}
    works = {"ray": searches, "faiss": {"evaluate": searches["evaluate"]}, "deepspeed": trains, "compiler": trains}
    return works[absent] | {"doctor": ["doctor"]}


@pytest.fixture(scope="module")
def told(without, tmp_path_factory):
    """`told(absent)`: its folder, what each command must give that is refused, and what each command gave."""
    gone = {}

    def go(absent):
        if absent not in gone:
            folder = tmp_path_factory.mktemp(absent)
            if absent == "all":
                shards, works = folder / "shards", journey(folder)
            else:
                shards = go("all")[0] / "shards"
                works = needed(absent, folder, shards)
                shutil.copytree(go("all")[0] / "run", folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
            refused = refused_without(absent, folder, shards)
            # First what works: what is refused needs tissue, and an index that cannot be built needs a store.
            commands = works | {f"refused {name}": command for name, (command, _, _) in refused.items()}
            gone[absent] = folder, refused, verbs(without(*PARTS[absent]), folder, commands)
        return gone[absent]

    return go


@pytest.mark.parametrize("absent", PARTS)
def test_what_works_works_and_the_rest_says_what_to_install(told, absent):
    folder, refused, gave = told(absent)
    for name, (status, out, err) in gave.items():
        if name.startswith("refused "):
            _, wanted, message = refused[name.removeprefix("refused ")]
            # A progress bar that did not get far ends its line.
            assert (status, out, err.strip()) == (wanted, "", f"lgd: {message}"), name
        else:
            assert status == 0, f"{name}: {err}"
    # What is refused leaves nothing.
    assert not (folder / "none").exists()
    assert not [path for path in (folder / "refused").rglob("*") if path.is_file()]


def test_a_laptop_with_torch_alone_trains_and_scores(told):
    folder, _, gave = told("all")
    run = folder / "run"
    assert [read_json(run / name / "config.json")["engine"] for name in ("teacher", "student")] == ["torch", "torch"]
    assert len(json.loads(gave["predict"][1])) == len(list((folder / "tissue" / "HE" / "test").iterdir()))
    assert read_json(run / "report" / "metrics.json")["retrieval"]["embeddings"]
    assert not (run / "ray").exists() and not (run / "latents" / "index").exists()


@pytest.mark.parametrize("absent", ["all", "faiss", "ray"])
def test_of_a_report_only_the_pictures_of_neighbours_need_faiss(told, absent):
    folder, _, gave = told(absent)
    made = {path.name for path in (folder / "run" / "report").iterdir()}
    assert {"metrics.json", "summary.md", "confusion.png"} <= made
    left_out = absent != "ray"
    assert ("queries.png" in made) != left_out
    assert (f"[report] the contact sheet is left out: {FAISS}\n" in gave["evaluate"][2]) == left_out


@pytest.mark.parametrize("absent", PARTS)
def test_doctor_names_what_is_absent_and_its_remedy(told, absent):
    lines = {line.split()[1]: line for line in told(absent)[2]["doctor"][1].splitlines()}
    lacks = {
        "ray": "lacks   ray           not installed: pip install 'ray[default,train]', or train.workers 0",
        "faiss": "lacks   faiss         not installed: pip install 'lgd[cpu]' or 'lgd[gpu]'",
        "deepspeed": f"lacks   deepspeed     {NO_DEEPSPEED}; training uses the torch engine",
    }
    if absent == "compiler":
        assert lines["deepspeed"] == f"lacks   deepspeed     {NO_COMPILER}; training uses the torch engine"
    for name in PARTS[absent][0]:
        assert lines[name] == lacks[name]
    for name in {"ray", "faiss"} - set(PARTS[absent][0]):
        assert lines[name].startswith("ok ")


@pytest.mark.parametrize("absent", ["deepspeed", "compiler", "all"])
def test_the_twin_engine_is_told(told, absent):
    folder, _, gave = told(absent)
    why = NO_COMPILER if absent == "compiler" else NO_DEEPSPEED
    run = folder / ("run" if absent == "all" else "again")
    assert read_json(run / "teacher" / "config.json")["engine"] == "torch"
    err = gave["train-teacher"][2]
    assert why in err and "torch engine" in err


def test_doctor_without_what_everything_needs(without):
    done = without(("h5py", "torch"))("-m", "lgd", "doctor", status=1)
    assert "broken  torch         not installed: pip install torch\n" in done.stdout
    assert "broken  h5py          not installed: pip install h5py\n" in done.stdout
    assert done.stderr == "lgd: something is broken: see the lines above\n"


def test_job_entry_points_without_ray(without, told, tmp_path):
    folder, python = told("all")[0], without(*PARTS["all"])
    script, tool = [ROOT / "tools" / name for name in ("build_shards.py", "cache_teacher_latents.py")]
    err = python(script, *build(folder, tmp_path / "shards")[1:], "--workers", "1", status=1).stderr
    assert err.strip() == f"lgd: {RAY.format('--workers')}"
    assert "reused, nothing changed" in python(tool, *options(folder / "run", folder / "shards")).stderr


PREDICT = """
import json, sys

import lgd
from lgd.scoring.slide_rows import as_json

scorer = lgd.load_scorer(sys.argv[1])
print(json.dumps([as_json(row) for row in lgd.predict(scorer, sys.argv[2:])]))
unwanted = {"ray", "faiss", "deepspeed", "h5py", "webdataset"} & set(sys.modules)
assert not unwanted, unwanted
"""


def test_a_student_goes_anywhere_as_two_files(without, told, tmp_path):
    folder, _, gave = told("all")
    original, student = folder / "run" / "student", tmp_path / "elsewhere"
    student.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(original / name, student / name)
    (tmp_path / "images").mkdir()
    for path in sorted((folder / "tissue" / "HE" / "test").iterdir()):
        shutil.copy(path, tmp_path / "images" / path.name)
    python = without(("deepspeed", "faiss", "h5py", "ray"), False)
    # Nothing of the run is there any more.
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    try:
        rows = json.loads(python("-m", "lgd", "predict", "--model", student, "--json", tmp_path / "images").stdout)
        images = [row["image"] for row in rows]
        assert json.loads(python("-c", PREDICT, student, *images).stdout) == rows
    finally:
        hidden.rename(folder)
    before = json.loads(gave["predict"][1])
    assert [row["probabilities"] for row in rows] == [row["probabilities"] for row in before]
    assert str(folder) not in (student / "config.json").read_text()


@pytest.mark.parametrize("absent", ["openslide", "tifffile"])
def test_slides_without_what_reads_them(without, tmp_path, absent):
    """Of OME-TIFF, which needs both."""
    slide = write_ome(tmp_path / "S.ome.tif", draw_colours(300, 300))
    script = "import sys; from lgd.slides.slide import open_slide; open_slide(sys.argv[1])"
    error = without((absent,))("-c", script, slide, status=1).stderr
    remedy = "slides need packages that are not installed: pip install 'lgd[slides]'"
    assert error.splitlines()[-1] == f"lgd.base.errors.DataError: {slide}: {remedy}"


def test_a_slide_that_passes_for_an_image_without_openslide(without, tmp_path):
    write_pyramid(tmp_path / "S.tif", draw_colours(600, 600), 0.46)
    command = ("-m", "lgd", "predict", "--model", "none", tmp_path / "S.tif", "--out", tmp_path / "out")
    error = without(("openslide",))(*command, status=2).stderr
    assert error.endswith("if it does, slides need packages that are not installed: pip install 'lgd[slides]'\n")


def test_without_fastapi_the_service_names_what_to_install(without, tissue_run):
    python = without(("fastapi",))
    serve = ("-m", "lgd", "serve")
    done = python(*serve, "--model", tissue_run.student.dir, status=1)
    assert done.stderr == "lgd: starlette, which the service needs, is not installed: pip install 'lgd[serve]'\n"
    assert "--token-file" in python(*serve, "--help").stdout
