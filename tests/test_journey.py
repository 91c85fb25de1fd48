"""A patch pair's whole way, by the commands that the README and docs/ show, on virtual tissue and on real patches."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from networks import save_network
from PIL import Image

from lgd.cli import main
from lgd.config_files import load_config
from lgd.io.files import read_json
from lgd.runs.folder import RunDocument
from lgd.scoring.notes import NO_LABELS
from lgd.serve.launch import check_options
from lgd.serve.options import ServeOptions
from lgd.store.store import Store
from tests.support.shades import write_ramp

ROOT = Path(__file__).resolve().parents[1]
# Seconds instead of minutes; Ray and DeepSpeed have tests of their own.
QUICK = ["--train.workers", "0", "--train.engine", "torch", "--teacher.epochs", "1", "--student.epochs", "1"]
QUICK += ["--data.size", "64", "--report.bootstrap", "20"]


def lgd(*args) -> None:
    assert main([str(arg) for arg in args]) == 0, args


def documented_commands(document: str, heading: str) -> list[list[str]]:
    """The `lgd` commands in the first shell block under a heading."""
    section = (ROOT / document).read_text().split(f"# {heading}\n", 1)[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lgd ")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_a_run(path):
    config = load_config(path)
    assert Path(config.run.dir).name == path.stem
    assert config.train.batch % max(config.train.workers, 1) == 0


def test_bci_in_full_is_a_run_on_eight_gpus():
    config = load_config(ROOT / "configs" / "bci.yaml")
    assert (config.train.workers, config.train.precision, config.latents.views) == (8, "bf16", 8)
    assert config.deepspeed["zero_optimization"]["stage"] == 1


def test_the_demo_on_virtual_tissue_and_its_second_run(tmp_path, capsys):
    args = ["demo", "--pairs", "48", "--size", "64", "--run.dir", str(tmp_path / "demo"), *QUICK]
    lgd(*args)
    first = capsys.readouterr()
    for row in ("LGD-Net", "H&E-only", "colour only", "IHC teacher"):
        assert row in first.out
    sheet = re.search(r"contact sheet\s+(\S+)", first.out)
    assert sheet and Path(sheet[1]).stat().st_size > 10_000
    summary = (tmp_path / "demo" / "report" / "summary.md").read_text()
    assert "The tissue is virtual" in summary
    assert list((tmp_path / "demo").rglob("events.out.tfevents*"))
    made = RunDocument.read(tmp_path / "demo" / "run.json").stages
    assert {*made} == {"train-teacher", "cache-latents", "build-index", "train", "evaluate"}
    assert [Path(one.folder).name for one in made["train"]] == ["student", "he-only"]
    assert {one.verb for all_of_a_name in made.values() for one in all_of_a_name} == {"demo"}
    kept = (tmp_path / "demo" / "config.yaml").read_bytes()
    (try_next,) = re.findall(r"^try next +lgd (.*)$", first.out, re.MULTILINE)
    (browse,) = re.findall(r"^in a browser +lgd serve --model (\S+)$", first.out, re.MULTILINE)
    drawn = f"{tmp_path / 'drawn'}"
    assert f"with a slide   lgd synth {drawn} --slides-only 1\n" in first.out
    assert f"               lgd serve --model {browse} --slides {drawn}/HE\n" in first.out
    assert check_options(ServeOptions(model=browse)) == "", "all that the service opens is there"
    lgd(*shlex.split(try_next))
    capsys.readouterr()

    weights = (tmp_path / "demo" / "student" / "model.safetensors").stat().st_mtime_ns
    lgd(*args)
    second = capsys.readouterr()
    for stage in ("synth", "shards", "teacher", "latents", "index", "lgd", "he-only"):
        assert re.search(rf"\[{stage}\] reused, nothing changed", second.err), stage
    assert second.out == first.out
    assert (tmp_path / "demo" / "student" / "model.safetensors").stat().st_mtime_ns == weights

    for command in documented_commands("docs/queries.md", "Predictions and queries"):
        # The key is one of the demo's 720 patches, and these are 48.
        key = Store(tmp_path / "demo" / "latents").parts[0].first
        here = {"configs/demo.yaml": str(tmp_path / "demo" / "config.yaml"), "00001_train_3+": key}
        lgd(*(here.get(arg, arg.replace("runs/demo", str(tmp_path / "demo"))) for arg in command))
    for command in documented_commands("docs/quickstart.md", "4. Score patches and ask queries"):
        lgd(
            *(
                arg.replace("runs/demo", str(tmp_path / "demo")).replace("neighbours", f"{tmp_path}/n")
                for arg in command
            )
        )
    told = capsys.readouterr().out
    assert "vote" in told and "re-encoded 16 rows" in told and "latents: no problems" in told

    # Whatever else is trained and scored in it, the run stays what it was, and its other verbs work.
    other = str(tmp_path / "demo" / "he-only again")
    mine = ["--config", str(tmp_path / "demo" / "config.yaml")]
    lgd("train", *mine, "--student.method", "he-only", "--student.dir", other, "--train.keep", "1")
    lgd(*shlex.split(try_next))
    assert (tmp_path / "demo" / "config.yaml").read_bytes() == kept
    # And so does what a demo with other folders says.
    moved = str(tmp_path / "a student")
    capsys.readouterr()
    lgd(*args, "--student.dir", moved, "--report.split", "train", "--report.queries", "0")
    (try_next,) = re.findall(r"^try next +lgd (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert f"--student.dir '{moved}'" in try_next
    lgd(*shlex.split(try_next))
    assert (tmp_path / "demo" / "config.yaml").read_bytes() == kept

    # Another learning rate is another network: the finished one is not overwritten.
    assert main([*args, "--train.lr", "0.002"]) == 1
    assert f"remove {tmp_path}/demo/teacher, or name another folder as run.dir" in capsys.readouterr().err
    # Where it is removed, the latents of the old teacher are not passed off as those of the new one.
    shutil.rmtree(tmp_path / "demo" / "teacher")
    assert main([*args, "--train.lr", "0.002"]) == 1
    again = capsys.readouterr().err
    assert "[shards] reused" in again and "[teacher] trained" in again
    assert "another recipe" in again and "teacher:" in again and "delete this one" in again


@pytest.mark.parametrize(
    ("document", "headings"),
    [
        ("README.md", ["First five minutes"]),
        ("docs/own-data.md", ["Build, train, evaluate", "Score patches and slides"]),
    ],
)
def test_a_user_with_six_images(document, headings, tissue, tmp_path, monkeypatch, capsys):
    """The documented way from images of one's own, which are virtual here, to scores."""
    text = (ROOT / document).read_text()
    (table,) = re.findall(r"```\n(he,ihc.*?)```", text, re.DOTALL)
    (run,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "pairs.csv").write_text(table)
    (tmp_path / "mine.yaml").write_text(run)
    for line, source in zip(table.splitlines()[1:], sorted((tissue / "HE" / "train").iterdir()), strict=False):
        he, ihc, *_ = line.split(",")
        for name, image in ((he, source), (ihc, tissue / "IHC" / "train" / source.name)):
            Image.open(image).save(tmp_path / "patches" / name)
    write_ramp(tmp_path / "slide.svs", 0.46, height=500, width=500)
    monkeypatch.chdir(tmp_path)
    verbs = []
    for command in (one for heading in headings for one in documented_commands(document, heading)):
        verbs.append(command[0])
        lgd(*command, *(QUICK if "--config" in command else ()))
    assert verbs[4:9] == ["train", "evaluate", "info", "predict", "query"]
    out = capsys.readouterr().out
    assert "lgd predict --model runs/mine IMAGE" in out and "patches/c_he.png" in out
    assert (tmp_path / "neighbours.png").stat().st_size > 5_000 and (tmp_path / "runs/mine/report/summary.md").is_file()
    assert (tmp_path / "scores" / "slide" / "heatmap.png").is_file() == ("own-data" in document)


@pytest.fixture(scope="module")
def real_run(real_data, tmp_path_factory):
    """The documented commands on real patches, with folders of the test's own; returns the run's folder."""
    folder = tmp_path_factory.mktemp("real")
    for command in documented_commands("docs/shards.md", "On real patches"):
        args = [
            arg.replace("$BCI", str(real_data)).replace("neighbours.png", str(folder / "neighbours.png"))
            for arg in command
        ]
        args = [str(folder / arg) if arg.startswith(("shards/", "runs/")) else arg for arg in args]
        args = [str(ROOT / arg) if arg.startswith("configs/") else arg for arg in args]
        if "--config" in args:
            shards = json.dumps([str(folder / "shards" / name) for name in ("bci-tiles", "bci-thumbs")])
            args += ["--run.dir", str(folder / "runs" / "bci-sample"), "--data.shards", shards, *QUICK]
        lgd(*args)
    return folder


def test_the_documented_journey_on_real_patches(real_run):
    run = real_run / "runs" / "bci-sample"
    summary = (run / "report" / "summary.md").read_text()
    for caveat in (
        "whole slide",
        "slides of",
        "may be inflated",
        "background is grey",
        "registered only approximately",
        "independent design",
    ):
        assert caveat in summary
    for name in ("confusion.png", "reliability.png", "queries.png"):
        assert (run / "report" / name).stat().st_size > 5_000
    assert (real_run / "neighbours.png").stat().st_size > 10_000
    manifest = read_json(real_run / "shards" / "bci-tiles" / "manifest.json")
    assert sum(split["samples"] for split in manifest["splits"].values()) == 32
    for folder in ("shards/bci-tiles", "shards/bci-thumbs", "runs/bci-sample/latents"):
        lgd("verify", real_run / folder)


def test_pairs_without_levels_are_packed_cached_and_queried(real_data, real_run, tmp_path, capsys):
    rows = [f"HE/{name}.png,IHC/{name}.png" for name in ("ER", "HER2", "Ki67", "PR")]
    table = tmp_path / "mist" / "pairs.csv"
    table.parent.mkdir()
    for role in ("HE", "IHC"):
        (table.parent / role).symlink_to(real_data / "mist-multistain" / role)
    table.write_text("he,ihc\n" + "\n".join(rows) + "\n")
    split = ["--split", "group:1,0,0"]
    lgd("build-shards", "--layout", "csv", "--root", table, "--out", tmp_path / "shards", *split)
    run = real_run / "runs" / "bci-sample"
    options = ["--run.dir", tmp_path / "run", "--data.shards", tmp_path / "shards", "--teacher.dir", run / "teacher"]
    config = ["--config", ROOT / "configs" / "bci-sample.yaml", *options, *QUICK]
    lgd("cache-latents", *config)
    lgd("build-index", *config)
    capsys.readouterr()
    image = real_data / "mist-multistain" / "HE" / "HER2.png"
    asked = ["--model", run / "student", "--store", tmp_path / "run" / "latents", "-k", 4, "--mpp", "unknown"]
    lgd("query", *asked, "--json", image)
    (answer,) = json.loads(capsys.readouterr().out)
    assert {hit["key"] for hit in answer["neighbours"]} == {"ER", "HER2", "Ki67", "PR"}
    assert all(hit["level"] is None for hit in answer["neighbours"])
    distances = [hit["distance"] for hit in answer["neighbours"]]
    assert distances == sorted(distances) and np.isfinite(distances).all()


def lay_out_as_mist(root, pairs):
    """Copy pairs (slide, H&E, IHC) as MIST publishes them, without labels: slides lie in train and val."""
    for number, (slide, *images) in enumerate(pairs):
        for letter, image in zip("AB", images, strict=True):
            folder = root / f"{'val' if number % 4 == 3 else 'train'}{letter}"
            folder.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(folder / f"{slide}_{number // 4}_{number % 4}.jpg", quality=95)


def pairs_of_virtual_tissue(tissue):
    slides = dict(line.split(",")[:2] for line in (tissue / "truth.csv").read_text().splitlines()[1:])
    for he in sorted((tissue / "HE").glob("*/*")):
        yield slides[he.stem], Image.open(he), Image.open(tissue / "IHC" / he.parent.name / he.name)


def pairs_of_real_tissue(real_data):
    """Each real pair as a slide, cut into four patches."""
    folder = real_data / "mist-multistain"
    for number, he in enumerate(sorted((folder / "HE").iterdir())):
        images = Image.open(he), Image.open(folder / "IHC" / he.name)
        for x, y in ((0, 0), (254, 0), (0, 254), (254, 254)):
            yield f"100M20040{number:02d}", *(image.crop((x, y, x + 254, y + 254)) for image in images)


@pytest.mark.parametrize("kind", ["virtual", "real"])
def test_pairs_without_labels_from_files_to_queries(kind, request, tmp_path, monkeypatch, capsys):
    """The documented commands, on pairs arranged as MIST publishes them; the encoder has random weights."""
    if kind == "virtual":
        lay_out_as_mist(tmp_path / "HER2" / "TrainValAB", pairs_of_virtual_tissue(request.getfixturevalue("tissue")))
    else:
        lay_out_as_mist(tmp_path / "HER2" / "TrainValAB", pairs_of_real_tissue(request.getfixturevalue("real_data")))
    save_network(tmp_path / "encoder", "dinov2", image_size=64, patch_size=16)
    monkeypatch.chdir(tmp_path)
    here = {
        "configs/unlabelled.yaml": str(ROOT / "configs" / "unlabelled.yaml"),
        "group:0.8,0.1,0.1": "group:0.6,0.1,0.3",
    }
    quick = [*QUICK, "--teacher.encoder", "./encoder", "--student.encoder", "resnet10", "--train.batch", "4"]
    quick += ["--report.queries", "2"]
    said, asked = {}, tmp_path / "HER2" / "TrainValAB" / "valA"
    for verb, *args in documented_commands("docs/shards.md", "Pairs without labels, from files to queries"):
        lgd(verb, *(here.get(arg, arg) for arg in args), *(quick if "--config" in args else ()))
        said[verb] = capsys.readouterr()
        # Each row of a sheet takes a second.
        for path in sorted(asked.iterdir())[2:]:
            path.unlink()
    assert "taken as it is, and centred" in said["train-teacher"].err
    assert "no patch of the split `train` has a label" in said["train"].err
    head, *rows, chance = said["evaluate"].out.splitlines()
    assert head.startswith("vectors") and "accuracy" not in head and chance.startswith("by chance")
    assert {row.partition(",")[0] for row in rows} == {"LGD-Net"}
    summary = (tmp_path / "runs/unlabelled/report/summary.md").read_text()
    assert (
        "No patch of the training split had a label" in summary and "Slides or source patches that ask: only" in summary
    )
    assert not any(word in summary for word in ("kappa", "Retrieval by level", "same level", "0 of 3+", "– |"))
    assert ("MIST's two stains are neighbouring sections" in summary) and "Retrieval of the own IHC" in summary
    assert not [one for one in (tmp_path / "runs/unlabelled/report").iterdir() if one.name == "confusion.png"]
    assert "lgd query --model runs/unlabelled IMAGE" in said["info"].out
    told = NO_LABELS.format("level")
    assert said["predict"].out.count(told) == said["query"].out.count("no neighbour has a level") == 2
    assert (tmp_path / "neighbours.png").stat().st_size > 5_000
