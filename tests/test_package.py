"""The package as people install and import it: its public names, its wheel, its version, the commit that it records."""

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lgd
from lgd.base.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "ray", "faiss", "h5py", "pydantic", "numpy", "transformers", "deepspeed")


def python(*args, folder, path=ROOT, status=0):
    """What a Python that finds lgd in `path` alone printed."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done


def test_importing_lgd_imports_nothing_heavy(tmp_path):
    code = f"import lgd, sys; dir(lgd); print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code, folder=tmp_path).stdout == "[]\n"


def test_public_names_are_those_of_their_modules():
    assert set(lgd.__all__) <= set(dir(lgd))
    for name, module in lgd._MODULES.items():
        value = getattr(importlib.import_module(module), name)
        assert getattr(lgd, name) is value and inspect.getdoc(value)
    assert not {module.name for module in pkgutil.iter_modules(lgd.__path__)} & set(lgd.__all__)
    with pytest.raises(AttributeError, match="module 'lgd' has no attribute 'predicts'"):
        lgd.predicts  # noqa: B018


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse((ROOT / "lgd" / "__init__.py").read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == lgd._MODULES


def test_build_shards_takes_the_fields_of_the_options(tissue, tmp_path):
    from lgd.shards.options import ShardOptions

    assert [*inspect.signature(lgd.build_shards).parameters] == [*ShardOptions.__dataclass_fields__]
    options = {"layout": "bci", "root": tissue, "slides": tissue / "truth.csv", "mpp": 0.46}
    manifest = lgd.build_shards(out=tmp_path / "shards", **options)
    assert sum(split.samples for split in manifest.splits.values()) == 48
    assert lgd.build_shards(out=str(tmp_path / "shards"), **options) == manifest
    with pytest.raises(TypeError):
        lgd.build_shards(layout="bci", root=tissue)


@pytest.fixture(scope="module")
def patches(tissue, tmp_path_factory):
    """Three H&E patches without loss: a JPEG is shrunk while it is decoded, which an array cannot be."""
    folder, paths = tmp_path_factory.mktemp("patches"), []
    for path in sorted((tissue / "HE" / "test").iterdir())[:3]:
        paths.append(folder / path.name)
        Image.open(path).save(paths[-1], "PNG")
    return paths


def unnamed(rows):
    return [(row.level, row.probabilities, row.notes) for row in rows]


def test_paths_arrays_and_pillow_images_score_alike(tissue_run, patches, tmp_path):
    scorer = lgd.load_scorer(tissue_run.student.dir)
    for path in patches:
        shutil.copy(path, tmp_path)
    arrays = [np.asarray(Image.open(path)) for path in patches]
    opened = [Image.open(path) for path in patches]
    rows = lgd.predict(tissue_run.student.dir, patches)
    assert [row.image for row in rows] == [str(path) for path in patches]
    assert all(row.usable and row.level == max(row.probabilities, key=row.probabilities.get) for row in rows)
    assert all(sum(row.probabilities.values()) == pytest.approx(1) for row in rows)
    for images in (patches, [str(path) for path in patches], tmp_path, arrays, opened, (image for image in arrays)):
        assert unnamed(lgd.predict(scorer, images)) == unnamed(rows)
    assert [row.image for row in lgd.predict(scorer, [patches[1], arrays[0], opened[2]])] == [
        str(patches[1]),
        "images[1]",
        "images[2]",
    ]
    # The order is that of the caller, and what is named twice has two rows.
    assert [row.image for row in lgd.predict(scorer, patches[::-1] + patches[:1])] == [
        str(path) for path in patches[::-1] + patches[:1]
    ]
    assert unnamed(lgd.predict(scorer, arrays[0])) == unnamed(lgd.predict(scorer, patches[0]))
    assert lgd.predict(scorer, []) == []


def test_a_jpeg_and_its_pixels_score_nearly_alike(tissue_run, tissue):
    paths = sorted((tissue / "HE" / "test").iterdir())[:3]
    of_files = lgd.predict(tissue_run.student.dir, paths)
    of_pixels = lgd.predict(tissue_run.student.dir, [np.asarray(Image.open(path)) for path in paths])
    for one, other in zip(of_files, of_pixels, strict=True):
        assert list(one.probabilities.values()) == pytest.approx([*other.probabilities.values()], abs=0.01)


def test_queries_take_the_same(tissue_run, patches):
    student, store = lgd.load_scorer(tissue_run.student.dir), lgd.Store(tissue_run.latents.dir)
    images = [patches[0], np.asarray(Image.open(patches[0])), Image.open(patches[0])]
    answers = [lgd.query(student, store, image, k=3) for image in images]
    for (answer,) in answers:
        assert answer.neighbours == answers[0][0].neighbours and len(answer.neighbours) == 3
        assert (answer.level, answer.probabilities, answer.vote) == (
            answers[0][0].level,
            answers[0][0].probabilities,
            answers[0][0].vote,
        )
    by_path = lgd.query(tissue_run.student.dir, tissue_run.latents.dir, str(patches[0]), k=3)
    assert by_path == answers[0] == lgd.query(student, store, patches[0], k=3)
    (stored,) = lgd.query(None, tissue_run.latents.dir, keys=[patches[0].stem], k=2)
    assert stored.stored.key == patches[0].stem and len(stored.neighbours) == 2


def test_a_pillow_image_is_taken_as_its_file(tissue_run, patches, tmp_path):
    scorer = lgd.load_scorer(tissue_run.student.dir)
    for orientation in (3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(patches[0]).save(tmp_path / "turned.png", exif=exif)
        Image.open(patches[0]).convert("LA").save(tmp_path / "grey.png")
        for name in ("turned", "grey"):
            path = tmp_path / f"{name}.png"
            of_file, of_image = lgd.predict(scorer, [path, Image.open(path)])
            # Turned before or after it is shrunk, which rounds differently.
            assert list(of_image.probabilities.values()) == pytest.approx([*of_file.probabilities.values()], abs=0.02)
    with pytest.raises(DataError, match=r"^images\[0\]: has pixels of mode CMYK: convert it to 8-bit RGB"):
        lgd.predict(scorer, Image.new("CMYK", (128, 128)))


def test_the_scale_of_images_in_memory_is_that_of_files(tissue_run):
    scorer, image = lgd.load_scorer(tissue_run.student.dir), np.full((100, 100, 3), 200, np.uint8)
    with pytest.raises(DataError, match=r"^images\[0\] is 100 x 100 pixels, and the network was trained on"):
        lgd.predict(scorer, image)
    (row,) = lgd.predict(scorer, image, keep_going=True)
    assert not row.usable and row.level is None and row.notes[0].startswith("is 100 x 100 pixels")
    assert lgd.predict(scorer, image, mpp="unknown")[0].level
    with pytest.raises(DataError, match="has 5 um a pixel"):
        lgd.predict(scorer, image, mpp=5.0)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), r"an array of float32, \(8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"an array of uint8, \(2, 8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"an array of uint8, \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"an array of uint8, \(0, 8, 3\)"),
        ([b"bytes"], "of type bytes"),
        ([None], "of type NoneType"),
    ],
)
def test_what_is_no_image_is_refused(tissue_run, image, words):
    with pytest.raises(ConfigError, match=rf"^images\[0\] is {words}: give a path, a Pillow image, or an array"):
        lgd.predict(tissue_run.student.dir, image)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, and the folder that it is unpacked to."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("lgd", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return path, folder / "site"


def test_a_wheel_holds_the_package_and_its_configs(wheel):
    path, site = wheel
    assert path.name == f"lgd-{lgd.__version__}-py3-none-any.whl"
    assert {one.name.partition("-")[0] for one in site.iterdir()} == {"lgd"}
    assert (site / "lgd" / "py.typed").exists()
    for config in (ROOT / "configs").glob("*.yaml"):
        assert (site / "lgd" / "configs" / config.name).read_bytes() == config.read_bytes()
    assert (site / "lgd" / "models" / "encoders.yaml").exists()
    modules = {str(one.relative_to(ROOT)) for one in (ROOT / "lgd").rglob("*.py")}
    assert {str(one.relative_to(site)) for one in (site / "lgd").rglob("*.py")} == modules


API = """
import json, sys
import numpy as np
from PIL import Image
import lgd

path, student, store = sys.argv[1:]
for _ in range(2):
    images = [path, np.asarray(Image.open(path)), Image.open(path)]
    rows = [lgd.predict(student, image)[0] for image in images]
    answers = [lgd.query(student, store, image, k=2)[0] for image in images]
    print(json.dumps([[row.level, row.probabilities, row.notes] for row in rows]))
    found = [[(one.key, one.level, one.slide, one.distance) for one in answer.neighbours] for answer in answers]
    print(json.dumps(found))
print(lgd.__file__)
"""


def test_a_wheel_works_without_the_checkout(wheel, tissue_run, patches, tmp_path):
    _, site = wheel
    done = python("-c", API, patches[0], tissue_run.student.dir, tissue_run.latents.dir, folder=tmp_path, path=site)
    first, second, third, fourth, where = done.stdout.splitlines()
    assert (first, second) == (third, fourth) and where == str(site / "lgd" / "__init__.py")
    for line in (first, second):
        rows = json.loads(line)
        assert rows[0] == rows[1] == rows[2]
    assert done.stderr == ""
    assert "usage: lgd demo" in python("-m", "lgd", "demo", "--help", folder=tmp_path, path=site).stdout
    # The demo's config is read before its options are checked.
    err = python("-m", "lgd", "demo", "--train.batch", "0", folder=tmp_path, path=site, status=2).stderr
    assert "train.batch" in err and list(tmp_path.iterdir()) == []


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lgd.__version__"}
    assert f"\nversion: {lgd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {lgd.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


COMMIT = "from lgd.base.environment import _commit; print(_commit())"


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, "-C", folder, *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository of somebody else with one commit."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "one")
    return folder


@pytest.mark.parametrize("site", [".", "venv/lib/site-packages"])
def test_the_commit_of_another_repository_is_not_recorded(repository, site):
    shutil.copytree(ROOT / "lgd", repository / site / "lgd")
    assert python("-c", COMMIT, folder=repository, path=repository / site).stdout == "None\n"


def test_the_commit_of_a_checkout_is_recorded(repository, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "lgd", repository / "lgd")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "two")
    commit = git(repository, "rev-parse", "HEAD")
    assert python("-c", COMMIT, folder=tmp_path, path=repository).stdout == f"{commit}\n"
    # As in a hook of another repository.
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    git(other, "commit", "--quiet", "--allow-empty", "-m", "three")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert python("-c", COMMIT, folder=tmp_path, path=repository).stdout == f"{commit}\n"


def test_faiss_is_bounded_to_the_formats_that_are_known():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("cpu", "gpu"):
        (faiss,) = extras[extra]
        assert re.match(rf"faiss-{extra}>=1\.[0-9.]+,<1\.16", faiss)


def test_the_hooks_and_the_workflow_run_the_gates():
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    gates = re.findall(r"\$\(BIN\)/(.*)", check)
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert gates == hooks
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for command in re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE):
        assert f"- run: {command}" in workflow
