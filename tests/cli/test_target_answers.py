"""A number from the set to the answers, and sets whose labels are none of their target."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.cli import main
from lgd.cli.contents import check
from lgd.cli.facts import describe
from lgd.config_files import load_config
from lgd.retrieval.index import build_index
from lgd.retrieval.queries import query
from lgd.scoring.notes import NO_NUMBER
from lgd.scoring.predict import load_scorer, predict, score_shards
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store.cache import cache_latents
from lgd.store.store import Store
from lgd.tissue.synth import synthesise
from lgd.tissue.synth_options import SynthOptions
from lgd.train.launch import train_under

KI67 = find_target("ki67")


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory):
    """32 pairs of virtual tissue whose nuclei are stained, of 8 slides and two centers."""
    folder = tmp_path_factory.mktemp("nuclei") / "tissue"
    synthesise(SynthOptions(out=str(folder), pairs=32, size=96, slides=8, workers=1, stain="nuclei", centers=2))
    return folder


@pytest.fixture(scope="module")
def number_run(nuclei):
    """A run that was taught their percentages for some steps."""
    shards = nuclei.parent / "shards"
    build(ShardOptions(layout="csv", root=str(nuclei), out=str(shards), target="ki67", split="keep:0.3"))
    options = {
        "run.dir": nuclei.parent / "run",
        "data.shards": shards,
        "data.size": 32,
        "data.threads": 1,
        "teacher.epochs": 0.5,
        "latents.map": 2,
        "student.epochs": 0.5,
        "train.workers": 0,
        "train.engine": "torch",
        "train.batch": 4,
    }
    config = load_config(overrides=[f"--{name}={value}" for name, value in options.items()])
    train_under(config, "teacher")
    opened = ShardSet.open(config.shard_dirs).shards
    store = cache_latents(config, opened, workers=0).store
    build_index(store, opened, "Flat", ["train"], recall=0.99, seed=0)
    train_under(config, "student")
    return config


@pytest.fixture(scope="module")
def truth(nuclei):
    """Key -> percent."""
    with (nuclei / "pairs.csv").open(newline="") as stream:
        return {Path(row["he"]).stem: row["label"] for row in csv.DictReader(stream)}


def ask(capsys, *args):
    capsys.readouterr()
    assert main([*map(str, args)]) == 0
    return capsys.readouterr().out


def test_a_value_has_its_word_unit_and_four_digits(number_run, nuclei, capsys, tmp_path):
    images = sorted((nuclei / "HE" / "test").iterdir())
    command = ["predict", "--model", number_run.student.dir, nuclei / "HE" / "test"]
    rows = json.loads(ask(capsys, *command, "--json"))
    found = predict(number_run.student.dir, images)
    assert [list(row) for row in rows] == [["image", "value", "unit", "probabilities", "interval", "notes"]] * len(rows)
    for row, prediction in zip(rows, found, strict=True):
        assert 0 <= prediction.label == prediction.level <= 100 and prediction.probabilities == {}
        assert row["value"] == float(f"{prediction.label:.4g}") and row["unit"] == "%" and row["probabilities"] is None
    flat = list(csv.DictReader(io.StringIO(ask(capsys, *command, "--csv"))))
    assert [list(row) for row in flat] == [["image", "value", "unit", "interval", "notes"]] * len(rows)
    assert [float(row["value"]) for row in flat] == [row["value"] for row in rows]
    head, *lines = ask(capsys, *command).splitlines()
    assert head.split()[:3] == ["image", "value", "unit"]
    assert [line.split()[1] for line in lines] == [str(row["value"]) for row in rows], "no digit that is not known"
    table = tmp_path / "slides.csv"
    table.write_text("key,slide\n" + "".join(f"{path.stem},S\n" for path in images))
    (slide,) = json.loads(ask(capsys, *command, "--json", "--slides", table))
    mean = np.mean([prediction.label for prediction in found])
    assert slide["value"] == float(f"{mean:.4g}") and (slide["slide"], slide["patches"]) == ("S", len(images))


def test_neighbours_vote_by_their_mean(number_run, nuclei, truth, capsys):
    image = sorted((nuclei / "HE" / "test").iterdir())[0]
    command = ["query", "--model", number_run.student.dir, "--store", number_run.latents.dir, "-k", "3", image]
    (answer,) = json.loads(ask(capsys, *command, "--json"))
    assert [*answer][:4] == ["image", "value", "unit", "probabilities"] and answer["probabilities"] is None
    values = [hit["value"] for hit in answer["neighbours"]]
    expected = [float(truth[hit["key"]]) if truth[hit["key"]] else None for hit in answer["neighbours"]]
    assert values == [one if one is None else pytest.approx(one, rel=1e-6) for one in expected]
    known = [value for value in values if value is not None]
    mean = pytest.approx(np.mean(known), rel=1e-3)
    none = {"shares": None, "entropy_bits": None}
    assert answer["vote"] == {"value": mean, "unit": "%", **none, "labelled": len(known)}
    rows = list(csv.DictReader(io.StringIO(ask(capsys, *command, "--csv"))))
    assert float(rows[0]["vote"]) == answer["vote"]["value"] and rows[0]["vote_share"] == ""
    *hits, vote = ask(capsys, *command).splitlines()[1:]
    assert f"mean of {len(known)}" in vote and f" {answer['vote']['value']} " in vote
    assert all(f" {value} " in line for value, line in zip(values, hits, strict=True) if value is not None)


@pytest.mark.parametrize("option", ["--label", "--level"])
def test_a_filter_by_ranges_keeps_their_ends(number_run, truth, capsys, option):
    store = Store(number_run.latents.dir)
    gallery = [part for part in store.parts if part.split == "train"]
    keys = [key.decode() for part in gallery for key in part.array("key")]
    known = sorted(float(truth[key]) for key in keys if truth[key])
    low, middle, high = known[2], known[5], known[-3]
    ranges = f":{low!r},{middle!r}:{middle!r},{high!r}:"
    command = ["query", "--store", number_run.latents.dir, "--key", keys[0], "-k", 24, f"{option}={ranges}", "--json"]
    (answer,) = json.loads(ask(capsys, *command))
    wanted = {key for key in keys[1:] if truth[key] and not low < float(truth[key]) < high}
    wanted |= {key for key in keys[1:] if truth[key] and float(truth[key]) == middle}
    assert {hit["key"] for hit in answer["neighbours"]} == wanted


@pytest.mark.parametrize("text", ["12", "high:", "20:10", ":", "nan:", "1:2:3", "", "2+"])
def test_a_range_that_is_none_is_refused(number_run, capsys, text):
    key = Store(number_run.latents.dir).parts[0].array("key")[0].decode()
    command = ["query", "--store", number_run.latents.dir, "--key", key, f"--label=10:20,{text}"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"--label {text}: Ki67 is a number from 0 to 100; give ranges LOW:HIGH" in err and err.count("\n") == 1


def test_a_range_that_nothing_has_is_named(number_run):
    store = Store(number_run.latents.dir)
    with pytest.raises(DataError, match="holds no latent of value :-9 or -5:-1: widen the filters"):
        query(None, store, keys=[store.parts[0].array("key")[0].decode()], labels=[":-9", "-5:-1"])


def test_a_folder_says_its_target_and_values(number_run):
    shards, student = Path(number_run.shard_dirs[0]), Path(number_run.student.dir)
    for folder in (shards, Path(number_run.latents.dir), student):
        assert describe(folder)["target"] == "Ki67: a number from 0 to 100, in %"
    values = describe(shards)["values"]
    assert values["train"] == describe(student)["values"] and values["train"].startswith("mean ")
    assert check(shards)[1] == check(Path(number_run.latents.dir))[1] == []


def test_scores_of_a_split_have_values_centers_and_scanners(number_run, truth):
    scorer = load_scorer(number_run.student.dir)
    found, _ = score_shards(scorer, ShardSet.open(number_run.shard_dirs).of_split("test"), threads=1)
    expected = [float(truth[key]) if truth[key] else np.nan for key in found.keys]
    np.testing.assert_allclose(found.label, expected)
    assert found.output.shape == (len(found.keys), 1) and {*found.sites} == {"center", "scanner"}
    assert set(found.sites["center"]) <= {"center-1", "center-2"}


def test_a_number_that_is_not_finite_is_no_answer(number_run, nuclei):
    """A network that diverged: its infinity is no end of the range."""
    scorer = load_scorer(number_run.student.dir)
    scorer.model.head.bias.data.fill_(np.inf)
    (row,) = predict(scorer, sorted((nuclei / "HE" / "test").iterdir())[0])
    assert row.label is None and NO_NUMBER.format("value") in row.notes


def test_labels_of_another_target_are_not_scored(number_run, tissue_run):
    scorer, shards = load_scorer(number_run.student.dir), ShardSet.open(tissue_run.shard_dirs).of_split("test")
    with pytest.raises(DataError, match="has labels of HER2, and the network .* was taught Ki67: score it on a set of"):
        score_shards(scorer, shards, threads=1)


def test_labels_of_two_targets_do_not_mix(number_run, tissue_run):
    with pytest.raises(DataError, match="data.shards has labels of 2 targets:") as caught:
        ShardSet.open([*number_run.shard_dirs, *tissue_run.shard_dirs])
    assert "Ki67 (a number from 0 to 100)" in str(caught.value) and "HER2 (0, 1+, 2+, 3+)" in str(caught.value)


@pytest.mark.parametrize("label", ["101", "-1", "nan", "inf", "1e999", "12,5,3", "3+"])
def test_a_value_that_is_none_names_its_row(nuclei, tmp_path, capsys, label):
    for stain in ("HE", "IHC"):
        shutil.copy(next((nuclei / stain / "train").iterdir()), tmp_path / f"{stain}.png")
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    table.write_text(f'he,ihc,label\nHE.png,IHC.png,"{label}"\n')
    args = ["build-shards", "--layout", "csv", "--root", str(table), "--out", str(out), "--target", "ki67"]
    assert main(args) == 1
    err = capsys.readouterr().err
    reason = "use a number from 0 to 100, or leave it empty; --target says what labels are of"
    assert f"pairs.csv row 2: label is '{label}': {reason}" in err and "Traceback" not in err
    assert not out.exists()


def write_labels(folder, tissue, labels):
    """A CSV of some training pairs, each of a slide of its own."""
    rows = ["he,ihc,label,slide,split"]
    for label, path in zip(labels, sorted((tissue / "HE" / "train").iterdir()), strict=False):
        for stain in ("HE", "IHC"):
            shutil.copy(tissue / stain / "train" / path.name, folder / f"{stain}-{path.name}")
        rows.append(f"HE-{path.name},IHC-{path.name},{label},s{len(rows)},train")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return ["build-shards", "--layout", "csv", "--root", str(folder), "--out", str(folder / "out")]


@pytest.mark.parametrize(
    ("labels", "target", "count", "told"),
    [
        (["a", "a", "c"], "class", 1, {"a": 1, "b": 0, "c": 1, "unknown": 1}),
        (["a", "a", "c"], "class", 2, "--labelled 2: train has 1 slides of label c: use fewer"),
        (["", "", ""], "class", 1, "--labelled 1: no slide of train has a label: leave it out"),
        (["5", "7", ""], "ki67", 1, {"known": 1, "unknown": 2}),
        (["5", "7", ""], "ki67", 3, "--labelled 3: train has 2 slides with a value: use fewer"),
        (["", "", ""], "ki67", 1, "--labelled 1: no slide of train has a label: leave it out"),
    ],
)
def test_labels_of_some_slides_are_kept(nuclei, tmp_path, capsys, labels, target, count, told):
    """A class that no slide has needs none."""
    if target == "class":
        target = str(tmp_path / "class.yaml")
        Path(target).write_text("name: A\nkind: class\nclasses: [a, b, c]\n")
    args = [*write_labels(tmp_path, nuclei, labels), "--target", target, "--labelled", str(count), "--split", "keep"]
    assert main(args) == (2 if isinstance(told, str) else 0)
    if isinstance(told, str):
        assert capsys.readouterr().err.splitlines()[-1] == f"lgd: {told}"
    else:
        assert ShardSet.open([tmp_path / "out"]).count_labels("train") == told


def test_a_set_of_another_target_is_another_set(nuclei, number_run, tmp_path, capsys):
    """A target that states another range is not the one of OUT either."""
    args = ["build-shards", "--layout", "csv", "--root", str(nuclei), "--out", number_run.shard_dirs[0]]
    args += ["--split", "keep:0.3", "--target"]
    own = tmp_path / "own.yaml"
    own.write_text("name: Ki67\nkind: number\nunit: '%'\nrange: [-1, 101]\nstains: nuclei\n")
    assert main([*args, str(own)]) == 1
    assert "already holds another shard set (other target): remove it" in capsys.readouterr().err
    assert main([*args, "ki67"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["split", "samples", "known", "unknown", "shards", "MB"]
    assert table[-1].startswith("reused, nothing changed")
    assert main([*args, "ki-67"]) == 2
    assert capsys.readouterr().err.startswith("lgd: --target ki-67: name a YAML file, or one of her2")
