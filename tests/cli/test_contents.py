"""What a folder is (`lgd info`), and `lgd verify` of networks and runs; other kinds have tests of their own."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.cli.contents import check, find_kind
from lgd.cli.facts import as_lines, describe
from lgd.config_files import find_in_run, load_config
from lgd.io.digests import digest_of
from lgd.models.description import StudentConfig
from lgd.runs.folder import Cached, record
from lgd.shards.shard_set import ShardSet
from lgd.train.checkpoint import State


@pytest.fixture
def student(tissue_run, tmp_path):
    return shutil.copytree(tissue_run.student.dir, tmp_path / "student")


def test_a_whole_network_has_no_problems(tissue_run):
    assert check(Path(tissue_run.teacher.dir)) == ("teacher", [], [])
    assert check(Path(tissue_run.student.dir)) == ("student", [], [])


def test_damaged_weights_and_checkpoints_are_found(student):
    damaged = [student / "model.safetensors", next(student.glob("checkpoints/*/moments.safetensors"))]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    what, problems, _ = check(student)
    assert what == "student" and len(problems) == 2
    assert all(str(path) in problem for path, problem in zip(damaged, problems, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", "1"),
        ("kind", "nurse"),
        ("method", "guess"),
        ("weights_sha256", "../../victim/x"),
        ("size", 0),
        ("latents", {"teacher": {"dim": 10**9, "map": 4}}),
        ("morphology", {}),
        ("teachers", [{"name": "teacher"}]),
        ("training", None),
        ("surprise", 1),
    ],
)
def test_an_odd_field_of_a_network_is_named(student, field, value):
    path = student / "config.json"
    fields = {name: old for name, old in json.loads(path.read_text()).items() if name != "digest"} | {field: value}
    path.write_text(json.dumps(fields | {"digest": digest_of(fields)}))
    try:
        _, problems, _ = check(student)
    except DataError as error:
        problems = [str(error)]
    assert len(problems) == 1 and "config.json" in problems[0] and field in problems[0]


@pytest.mark.faults
def test_every_flipped_bit_of_a_network_s_and_a_checkpoint_s_document_is_caught(student, fault_count):
    dice = random.Random(0)
    state = next(student.glob("checkpoints/*/state.json"))
    for path, read in (
        (student / "config.json", lambda: StudentConfig.read_folder(student)),
        (state, lambda: State.read(state)),
    ):
        whole, expected = path.read_bytes(), read()
        for _ in range(fault_count(200)):
            content, place = bytearray(whole), dice.randrange(len(whole))
            content[place] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
            try:
                # A blank may become another one.
                assert read() == expected
            except DataError as error:
                assert str(path) in str(error)
            path.write_bytes(whole)
            assert read() == expected


def test_every_kind_of_folder_is_known(tissue_run):
    checkpoint = next(Path(tissue_run.student.dir).glob("checkpoints/*"))
    folders = {
        "shard folder": tissue_run.shard_dirs[0],
        "feature store": tissue_run.latents.dir,
        "teacher": tissue_run.teacher.dir,
        "student": tissue_run.student.dir,
        "checkpoint": checkpoint,
    }
    assert {kind: find_kind(Path(folder)) for kind, folder in folders.items()} == {kind: kind for kind in folders}


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("a.txt", "is a file: name the folder"), ("empty", "is no shard folder (manifest")],
)
def test_what_is_none_of_them_gets_one_message(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=re.escape(message)):
        find_kind(tmp_path / name)


def make_run(folder, **sections):
    folder.mkdir()
    config = load_config(overrides=[f"--{name}={value}" for name, value in {"run.dir": folder, **sections}.items()])
    (folder / "config.yaml").write_text(config.as_yaml())
    return folder


def test_a_run_has_one_student_and_one_store(tissue_run, tmp_path):
    run = make_run(tmp_path / "run", **{"student.dir": tmp_path / "run" / "mine"})
    with pytest.raises(DataError, match=r"run is a run, and .*run/mine holds none of its student yet: run lgd train"):
        find_in_run(run, "student")
    for name in ("mine", "student", "he-only"):
        shutil.copytree(tissue_run.student.dir, run / name)
    shutil.copytree(tissue_run.latents.dir, run / "latents")
    assert (find_in_run(run, "student"), find_in_run(run, "latents")) == (run / "mine", run / "latents")
    # A folder that is no run is what was asked for.
    for folder in (run / "he-only", tmp_path, tmp_path / "absent"):
        assert find_in_run(folder, "student") == folder
    # Where a run was copied or moved, its own networks are below it.
    moved = shutil.copytree(run, tmp_path / "moved")
    assert find_in_run(moved, "student") == moved / "mine"
    elsewhere = make_run(tmp_path / "other", **{"student.dir": run / "mine"})
    assert find_in_run(elsewhere, "student") == run / "mine"
    (moved / "config.yaml").unlink()
    (moved / "run.json").write_text("{}")
    assert find_in_run(moved, "student") == moved / "student"


def test_ten_lines_say_what_a_folder_is(tissue_run):
    checkpoint = next(Path(tissue_run.student.dir).glob("checkpoints/*"))
    expected = {
        tissue_run.shard_dirs[0]: ("shard folder", "target HER2", "train 20", "tissue virtual"),
        tissue_run.latents.dir: ("feature store", "train 20", "a map of 2 x 2", "Flat over 20 latents"),
        tissue_run.teacher.dir: ("teacher", "resnet10, images of 64 px", "20 patches (20 labelled) of 128 x 128 px"),
        tissue_run.student.dir: ("student", "lgd, taught by the latents of teacher", "0.46 um/px"),
        checkpoint: ("checkpoint", "step", "position", "skipped none"),
    }
    for folder, words in expected.items():
        lines = as_lines(describe(Path(folder)))
        text = "\n".join(lines)
        assert len(lines) <= 10 and lines[0].startswith(words[0]) and lines[0].endswith(str(folder))
        assert all(" ".join(word.split()) in " ".join(text.split()) for word in words), text


def test_a_small_he_is_said(small_he_shards):
    lines = as_lines(describe(small_he_shards))
    assert len(lines) <= 10 and any("H&E jpg (and at 64 x 64 px), IHC jpg" in line for line in lines)


def test_a_run_lists_its_stages_and_how_to_go_on(tissue_run, tmp_path, change):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {seed: 0}")
    assert describe(folder)["stages"] is None
    (folder / "config.yaml").unlink()
    config = change(tissue_run, run={"dir": str(folder)}, student={"dir": str(folder / "student")})
    shards = ShardSet.open(config.shard_dirs)
    record(config, shards, "cache-latents", Cached(digest="0" * 64, rows=48), str(folder / "latents"))
    description = describe(folder)
    assert description["cache-latents"] == f"{folder}/latents (rows 48)" and "try_next" not in description
    shutil.copytree(tissue_run.student.dir, folder / "student")
    assert describe(folder)["try_next"] == f"lgd predict --model '{folder}' IMAGE"


def test_json_is_one_document(tissue_run, capsys):
    for folder in (tissue_run.shard_dirs[0], tissue_run.latents.dir, tissue_run.student.dir):
        assert main(["info", folder, "--json"]) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert document["folder"] == folder and document["format"].startswith("lgd-") and not err


@pytest.mark.parametrize("name", ["manifest.json", "store.json", "state.json", "run.json", "config.json"])
def test_a_broken_document_is_named(tmp_path, capsys, name):
    (tmp_path / name).write_text("{")
    assert main(["info", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert name in err and err.count("\n") == 1 and not out


def test_info_of_a_url(tissue_run, s3_server):
    s3_server.create_bucket(Bucket="info")
    for path in Path(tissue_run.shard_dirs[0]).glob("manifest.json"):
        s3_server.upload_file(str(path), "info", f"shards/{path.name}")
    assert main(["info", "s3://info/shards"]) == 0
