"""What is kept of a run: its config.yaml for ever, and every stage's record in run.json."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lgd.base.errors import DataError
from lgd.cli import main
from lgd.config_files import Given, load_config
from lgd.io.files import read_json
from lgd.runs.folder import Cached, RunDocument, command, note_changes, record
from lgd.shards.shard_set import ShardSet

FACTS = Cached(digest="0" * 64, rows=3)


@pytest.fixture
def config(tissue_config, tmp_path, change):
    """A run with nothing in its folder, over the shards of `tissue_config`."""
    run, folders = str(tmp_path / "run"), ("teacher", "latents", "student", "report")
    return change(tissue_config, run={"dir": run}, **{name: {"dir": f"{run}/{name}"} for name in folders})


@pytest.fixture
def run(tissue_run, tmp_path):
    """A copy of a finished run, of which nothing is recorded yet."""
    folder = tmp_path / "run"
    shutil.copytree(tissue_run.run.dir, folder, ignore=shutil.ignore_patterns("checkpoints", "*.yaml", "run.json"))
    text = tissue_run.as_yaml().replace(tissue_run.run.dir, str(folder))
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml")


def add_record(config, *rest):
    record(config, ShardSet.open(config.shard_dirs), *rest)


def stages(config):
    return RunDocument.read(Path(config.run.dir) / "run.json").stages


def test_records_of_two_processes_are_all_kept(config, tmp_path):
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    code = """
import sys, time
from pathlib import Path
from lgd.shards.shard_set import ShardSet
from lgd.config_files import load_config
from lgd.runs.folder import Cached
from lgd.runs.folder import record
name, other, folder = sys.argv[1:]
config = load_config(f"{folder}/c.yaml", ["--report.split", name])
shards = ShardSet.open(config.shard_dirs)
(Path(folder) / name).touch()
while not (Path(folder) / other).exists():
    time.sleep(0.001)
for number in range(40):
    record(config, shards, f"{name}{number}", Cached(digest="0" * 64, rows=number), config.run.dir)
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen([*command, *names, str(tmp_path)]) for names in (("one", "two"), ("two", "one"))]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    kept = stages(config)
    assert set(kept) == {f"{name}{number}" for name in ("one", "two") for number in range(40)}
    assert all(kept[f"{name}{number}"][0].facts.rows == number for name in ("one", "two") for number in range(40))
    # One of them has written config.yaml, and the other differs from it.
    winner = load_config(Path(config.run.dir) / "config.yaml").report.split
    for name in ("one", "two"):
        differing = {} if name == winner else {"report.split": name}
        assert all(kept[f"{name}{number}"][0].differing == differing for number in range(40))


def test_the_first_stage_writes_the_run_and_no_later_one_does(config, change):
    add_record(config, "train-teacher", FACTS, config.teacher.dir)
    path = Path(config.run.dir) / "config.yaml"
    first = path.read_bytes()
    assert load_config(path) == config
    other = change(config, report={"split": "val"}, student={"dir": "/x y/s"})
    given = Given("train", {"student.dir": "/x y/s", "config": ["c.yaml"]})
    add_record(other, "train", FACTS, other.student.dir, given)
    assert path.read_bytes() == first
    (made,) = stages(config)["train"]
    assert (made.folder, made.verb, made.given) == ("/x y/s", "train", given.fields)
    assert made.differing == {"report.split": "val", "student.dir": "/x y/s"}
    assert command(config, "evaluate") == f"lgd evaluate --config {path}"
    assert command(other, "evaluate") == f"lgd evaluate --config {path} --student.dir '/x y/s' --report.split val"
    # Of one folder the newest record is kept, of several each.
    add_record(config, "train", FACTS, config.student.dir)
    add_record(other, "train", replace_rows(4), other.student.dir)
    assert [(one.folder, one.facts.rows) for one in stages(config)["train"]] == [
        (config.student.dir, 3),
        (other.student.dir, 4),
    ]


def replace_rows(rows):
    return FACTS.model_copy(update={"rows": rows})


def test_a_stage_tells_in_which_fields_earlier_ones_had_other_values(config, change):
    assert note_changes(config, "train") == ""
    add_record(config, "train-teacher", FACTS, config.teacher.dir)
    longer = change(config, latents={"map": 3})
    add_record(longer, "cache-latents", FACTS, config.latents.dir)
    assert note_changes(longer, "train") == ""
    # On these nothing earlier depends.
    assert (
        note_changes(change(longer, student={"epochs": 9}, report={"split": "val"}, train={"keep": 9}), "train") == ""
    )
    note = note_changes(change(config, data={"size": 96}), "train")
    assert note == (
        "note: data.size is 96 and was 64 for train-teacher, latents.map is 2 and was 3 for cache-latents; run.json "
        "has each stage's values"
    )
    assert "latents.map is 2 and was 3 for cache-latents" in note_changes(config, "build-index")
    moved = change(config, teacher={"dir": "/elsewhere", "epochs": 7}, train={"lr": 0.5})
    assert note_changes(moved, "cache-latents") == (
        f"note: teacher.dir is /elsewhere and was {config.teacher.dir} for train-teacher; run.json has each stage's "
        "values"
    )
    # A long one is cut in its middle, and says so.
    far = change(config, teacher={"dir": f"/{'x' * 5000}/teacher"})
    assert re.search(r"teacher.dir is /x+ \[... \d+ characters ...\] x+/teacher and was", note_changes(far, "train"))
    many = change(config, train={"lr": 0.5, "clip": 2.0, "batch": 4, "warmup": 0.0}, run={"seed": 3})
    assert "and 3 more; run.json" in note_changes(many, "train")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"environment": {}, "teacher": {}}', "field format is None, it should be lgd-run/1"),
        (b'{"format": "lgd-run/2"}', "this version of lgd reads format 1 only"),
        (b'{"format": "lgd-run/1", "stages": {}, "digest": "0"}', "its digest is not that of its content"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"", "is not valid JSON"),
    ],
)
def test_a_record_that_cannot_be_read_is_never_lost(config, tmp_path, capsys, content, told):
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "run.json").write_bytes(content)
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["train-teacher", "--config", str(tmp_path / "c.yaml")]) == 1
    error = capsys.readouterr().err
    assert f"{folder}/run.json" in error and told in error and error.count("\n") == 1
    assert "move it elsewhere to keep what it says, and the next stage begins another" in error
    with pytest.raises(DataError, match=r"run\.json"):
        add_record(config, "train", FACTS, config.student.dir)
    assert (folder / "run.json").read_bytes() == content
    assert not Path(config.teacher.dir).exists(), "told before hours of work"


def test_a_broken_config_yaml_is_told_before_the_work(config, tmp_path, capsys):
    Path(config.run.dir).mkdir()
    (Path(config.run.dir) / "config.yaml").write_text("run: {dir: x}\nrun: {dir: y}\n")
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["train-teacher", "--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert "config.yaml, line 2: 'run' is given twice" in error and "correct it or move it away" in error


def test_a_report_of_another_split_leaves_the_run_as_it_was(run, change):
    base = ["--config", str(Path(run.run.dir).parent / "c.yaml")]
    kept = Path(run.run.dir) / "config.yaml"
    assert main(["build-index", *base]) == 0
    assert main(["evaluate", *base, "--report.split", "val", "--report.queries", "0"]) == 0
    assert load_config(kept).report.split == "test"
    made = stages(run)
    (report,) = made["evaluate"]
    assert report.given["report.split"] == "val" == report.facts.split == report.differing["report.split"]
    assert made["build-index"][0].facts.rows == 20 and made["build-index"][0].verb == "build-index"
    assert set(report.facts.by_patch) >= {"LGD-Net", "IHC teacher"}
    # The command in the report is the whole truth.
    text = (Path(run.report.dir) / "summary.md").read_text()
    (told,) = re.findall(r"^    lgd evaluate (.*)$", text, re.MULTILINE)
    assert told == f"--config {kept} --report.split val --report.queries 0"
    assert load_config(overrides=told.split()) == change(run, report={"split": "val", "queries": 0})


def test_a_run_keeps_answering_after_other_students_were_trained_in_it(run, tissue, capsys):
    images = str(tissue / "HE" / "test")
    base = ["--config", str(Path(run.run.dir).parent / "c.yaml")]
    kept = ["--config", str(Path(run.run.dir) / "config.yaml")]
    assert main(["build-index", *base]) == 0
    he_only = str(Path(run.run.dir) / "he-only")
    options = ["--student.method", "he-only", "--student.dir", he_only, "--student.epochs", "1"]
    assert main(["train", *base, *options]) == 0
    capsys.readouterr()
    assert main(["query", *kept, images]) == 0
    assert main(["predict", *kept, images]) == 0
    capsys.readouterr()
    # Where a student is not what or where config.yaml says, the option that made it so is told.
    assert main(["query", *kept, "--student.dir", he_only, images]) == 1
    error = capsys.readouterr().err
    assert f"the student {he_only} hallucinates no latents (H&E-only)" in error
    assert (
        f"`lgd train --student.method he-only --student.dir {he_only} --student.epochs 1.0` of this run made" in error
    )
    absent = str(Path(run.run.dir) / "absent")
    assert main(["predict", *kept, "--student.dir", absent, images]) == 1
    error = capsys.readouterr().err
    assert "holds no trained student" in error and absent in error and f"give --student.dir {he_only}" in error


def test_the_teacher_s_folder_is_told_to_the_next_stage(tissue_run, tmp_path, capsys):
    text = tissue_run.as_yaml().replace(tissue_run.run.dir, str(tmp_path / "run"))
    (tmp_path / "c.yaml").write_text(text)
    base, teacher = ["--config", str(tmp_path / "c.yaml")], tissue_run.teacher.dir
    assert main(["train-teacher", *base, "--teacher.dir", teacher]) == 0
    # The run has it, the file that it was begun with has not.
    assert main(["cache-latents", *base]) == 1
    error = capsys.readouterr().err
    assert f"teacher.dir is {tmp_path}/run/teacher and was {teacher} for train-teacher" in error
    assert f"`lgd train-teacher --teacher.dir {teacher}` of this run made one in {teacher}" in error
    assert main(["cache-latents", "--config", str(tmp_path / "run" / "config.yaml")]) == 0


def test_the_record_is_a_typed_document(config):
    add_record(config, "train", FACTS, config.student.dir)
    document = json.loads((Path(config.run.dir) / "run.json").read_text())
    assert [*document] == ["format", "stages", "digest"] and document["format"] == "lgd-run/1"
    (made,) = document["stages"]["train"]
    assert set(made["environment"]) >= {"lgd", "commit", "python", "torch", "ray", "host", "device"}
    assert made["shards"] == {config.shard_dirs[0]: read_json(f"{config.shard_dirs[0]}/manifest.json")["digest"]}
    assert not [path for path in Path(config.run.dir).iterdir() if path.name.endswith(".tmp")]
    assert replace(config) == load_config(Path(config.run.dir) / "config.yaml")
