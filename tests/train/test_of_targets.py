"""Runs of other targets than HER2, from files to answers: a number, classes, two of them, and an ordinal of five."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch

import lgd
from lgd import pipeline
from lgd.base.errors import ConfigError, DataError
from lgd.base.labels import as_labels
from lgd.base.target import find_target
from lgd.cli import main
from lgd.config_files import load_config
from lgd.io.files import read_json
from lgd.models.description import StudentConfig
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.stain.nuclear import positive_grid
from lgd.store.parts import read_all, read_labels
from lgd.store.store import Store
from lgd.stream.reader import Reader
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions

FILES = {
    "tissue": "name: tissue type\nkind: class\nclasses: [solid, glandular, mixed]\n",
    "status": "name: Ki67 status\nkind: ordinal\nclasses: [low, high]\nstains: nuclei\n",
    "grade": "name: grade\nkind: ordinal\nclasses: [one, two, three, four, five]\nword: grade\n",
}
WORDS = {"ki67": "value", "tissue": "label", "status": "label", "grade": "grade"}


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory):
    """48 pairs of virtual tissue with a nuclear stain, of two centers."""
    folder = tmp_path_factory.mktemp("nuclei") / "tissue"
    synthesise(SynthOptions(out=str(folder), pairs=48, size=64, slides=24, centers=2, stain="nuclei", workers=1))
    return folder


def relabel(folder, name, classes):
    """pairs.csv with the percentages as classes of as many patches each; some labels stay unknown."""
    rows = list(csv.DictReader(io.StringIO((folder / "pairs.csv").read_text())))
    percents = [float(row["label"] or 0) for row in rows]
    ends = np.quantile(percents, np.linspace(0, 1, len(classes) + 1)[1:-1])
    for number, (row, percent) in enumerate(zip(rows, percents, strict=True)):
        row["label"] = "" if number % 12 == 5 else classes[int(np.searchsorted(ends, percent, side="right"))]
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module", params=WORDS)
def run(request, nuclei, tmp_path_factory):
    """A finished run of a target: its name, configuration and shards."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    root, target = nuclei, name
    if name in FILES:
        (folder / "target.yaml").write_text(FILES[name])
        target = str(folder / "target.yaml")
        root = relabel(nuclei, name, find_target(target).classes)
    split = {"split": "group:0.5,0.3,0.2", "salt": "3"}
    build(ShardOptions(layout="csv", root=str(root), out=str(folder / "shards"), target=target, **split))
    options = {
        "run.dir": folder / "run", "data.shards": folder / "shards", "data.size": 32, "data.threads": 1,
        "teacher.epochs": 1, "latents.map": 2, "latents.nuclei_grid": 2, "latents.membrane_grid": 2,
        "student.epochs": 1, "student.hallucination": "shared", "student.distil_weight": 1.0,
        "student.contrast_weight": 0.1, "student.pairs": "within-level", "train.workers": 0, "train.engine": "torch",
        "train.batch": 8, "report.bootstrap": 10, "report.queries": 2,
    }  # fmt: skip
    config = load_config(overrides=[f"--{field}={value}" for field, value in options.items()])
    for stage in ("train_teacher", "cache_latents", "build_index", "train_student", "evaluate"):
        getattr(pipeline, stage)(config)
    return name, config, ShardSet.open(config.shard_dirs)


def test_a_run_follows_its_target(run):
    name, config, shards = run
    target, made = shards.target, StudentConfig.read_folder(config.student.dir)
    assert made.training.target == target and (made.training.values is not None) == target.is_number
    assert sum(made.training.labels.values()) == sum(shard.samples for shard in shards.of_split("train"))
    report = read_json(f"{config.report.dir}/metrics.json")
    names = {*report["models"][0]["by_patch"]["metrics"]}
    assert ("mae" in names) == target.is_number and ("kappa" in names) != target.is_number
    assert ("within_one" in names) == (name == "grade")
    summary = Path(config.report.dir, "summary.md").read_text()
    assert target.name in summary and "HER2" not in summary and "2+" not in summary and "center-1" in summary


def test_its_answers_are_of_its_target(run, nuclei, capsys):
    name, config, shards = run
    images, target = sorted((nuclei / "HE" / "test").iterdir())[:3], shards.target
    rows = lgd.predict(config.student.dir, images)
    answers = lgd.query(config.student.dir, config.latents.dir, images, k=3)
    for row, answer in zip(rows, answers, strict=True):
        if target.is_number:
            assert 0 <= row.label <= 100 and row.probabilities == {}
            values = [hit.label for hit in answer.neighbours if hit.label is not None]
            assert answer.vote.label == (pytest.approx(np.mean(values)) if values else None)
        else:
            assert row.label in target.classes and list(row.probabilities) == list(target.classes)
            assert {hit.label for hit in answer.neighbours} <= {*target.classes, None}
    assert main(["predict", "--model", config.run.dir, "--csv", str(images[0])]) == 0
    (cells,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(cells)[:2] == ["image", WORDS[name]] and ("unit" in cells) == target.is_number
    if not target.is_number:
        assert sum(float(cells[one]) for one in target.classes) == pytest.approx(1, abs=1e-3)


def test_its_store_has_its_labels_and_the_stain_that_fits(run):
    name, config, shards = run
    store = Store(config.latents.dir)
    parts, split = store.parts_of(shards.shards), shards.shards
    reader = Reader(split, ("ihc",))
    metas = [reader.read(number) for number in range(reader.total)]
    stored = read_labels(parts)
    np.testing.assert_array_equal(stored, as_labels(shards.target, [one.label for one in metas]))
    assert ("positive" in parts[0].layout) == (name in ("ki67", "status")) and "membrane" not in parts[0].layout
    if "positive" in parts[0].layout:
        grid = read_all(parts, "positive")
        for row, one in list(enumerate(metas))[::9]:
            image = torch.from_numpy(one.images["ihc"].copy())[None].permute(0, 3, 1, 2)
            np.testing.assert_allclose(grid[row], positive_grid(image, 2, one.meta.mpp)[0], atol=1e-3)


@pytest.mark.parametrize("run", ["tissue"], indirect=True)
def test_a_teacher_of_a_stain_that_is_not_there_is_refused(run, change):
    learns = change(run[1], teacher={"learns": ["positive"], "dir": "nowhere"})
    with pytest.raises(ConfigError, match="second stain shows none: set latents.staining to nuclei"):
        pipeline.train_teacher(learns)


@pytest.mark.parametrize("run", ["ki67"], indirect=True)
def test_a_metric_of_another_kind_is_refused(run, change):
    config = change(run[1], train={"patience": 1, "metric": "kappa"}, student={"dir": "nowhere"})
    with pytest.raises(DataError, match="train.metric is kappa, and the values are a number from 0 to 100: use auto"):
        pipeline.train_student(config)


@pytest.mark.parametrize("run", ["ki67"], indirect=True)
def test_labels_of_two_targets_are_refused_and_sets_without_labels_are_not(run, tissue_config, nuclei, tmp_path):
    _, config, shards = run
    with pytest.raises(DataError, match=r"labels of 2 targets:\n.*Ki67 \(a number from 0 to 100\)"):
        ShardSet.open([*config.shard_dirs, *tissue_config.shard_dirs])
    unlabelled = tmp_path / "pairs.csv"
    rows = [f"{nuclei}/{stain}" for stain in ("HE", "IHC")]
    images = sorted(path.relative_to(nuclei / "HE") for path in (nuclei / "HE").glob("*/*.png"))[:4]
    lines = [f"HE/{path},IHC/{path},train" for path in images]
    (tmp_path / "HE").symlink_to(rows[0])
    (tmp_path / "IHC").symlink_to(rows[1])
    unlabelled.write_text("\n".join(["he,ihc,split", *lines, ""]))
    build(ShardOptions(layout="csv", root=str(unlabelled), out=str(tmp_path / "none"), mpp=0.46))
    both = ShardSet.open([str(tmp_path / "none"), *config.shard_dirs])
    assert both.target == shards.target and both.shards[0].target == shards.target
    assert both.count_labels("train")["unknown"] == shards.count_labels("train")["unknown"] + 4
