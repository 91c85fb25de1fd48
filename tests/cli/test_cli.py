"""The verbs as a user types them: exit status, messages, and nothing half-written."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lgd.cli import VERBS, main
from lgd.store.store import Store

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *args) -> tuple[int, str, str]:
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def pair(root: Path, name: str = "00000_train_1+", size=(64, 64), ihc_size=(64, 64)) -> Path:
    for role, side in (("HE", size), ("IHC", ihc_size)):
        folder = root / role / "train"
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(side, 40).convert("RGB").save(folder / f"{name}.png")
    return root


def drop(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an image\n" * 50)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (drop, ("00001_train_2+.png", "partner")),
        (cut, ("00001_train_2+.png", "truncated")),
        (empty, ("00001_train_2+.png", "empty")),
        (text, ("00001_train_2+.png", "is no JPEG, PNG")),
        (folder, ("00001_train_2+.png", "has no partner")),
    ],
)
def test_a_bad_image_stops_the_build_and_nothing_is_written(tmp_path, capsys, harm, told):
    root = pair(pair(tmp_path / "bci"), "00001_train_2+")
    harm(root / "IHC" / "train" / "00001_train_2+.png")
    status, _, err = run(capsys, "build-shards", "--layout", "bci", "--root", root, "--out", tmp_path / "out")
    assert status == 1
    assert all(word in err for word in told)
    assert "--on-bad skip" in err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    # The remedy that the message names works, and says what it left out.
    options = ["--layout", "bci", "--root", root, "--out", tmp_path / "out", "--on-bad", "skip"]
    assert run(capsys, "build-shards", *options)[0] == 0
    assert "00001_train_2+" in (tmp_path / "out" / "rejected.csv").read_text()


@pytest.mark.parametrize("first", [True, False])
def test_quiet_keeps_notes_and_results_and_hides_the_rest(tmp_path, capsys, monkeypatch, first):
    monkeypatch.setattr("lgd.base.logs.EVERY", 0.0)
    root = pair(pair(tmp_path / "bci"), "00001_train_2+")
    args = ["build-shards", "--layout", "bci", "--root", root, "--out"]
    status, _, err = run(capsys, *args, tmp_path / "loud")
    note = "2 patches have no scale: give --mpp X"
    assert status == 0 and note in err and "2/2" in err
    quiet = ["--quiet", *args, tmp_path / "out"] if first else [*args, tmp_path / "out", "--quiet"]
    status, out, err = run(capsys, *quiet)
    assert status == 0 and "train" in out
    assert [line[: len(note)] for line in err.splitlines()] == [
        note,
        "no patch is in the split test, so nothing can be"[: len(note)],
    ]


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("00000_train_4+", ((64, 64), (64, 64)), "level"),
        ("00000_train_1+", ((64, 64), (64, 48)), "64 x 48"),
    ],
)
def test_a_bad_pair_stops_the_build(tmp_path, capsys, name, sizes, told):
    root = pair(tmp_path / "bci", name, *sizes)
    status, _, err = run(capsys, "build-shards", "--layout", "bci", "--root", root, "--out", tmp_path / "out")
    assert status == 1
    assert name in err and told in err


def test_a_root_without_pairs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "absent"):
        status, _, err = run(capsys, "build-shards", "--layout", "bci", "--root", root, "--out", tmp_path / "out")
        assert status == 1
        assert str(root) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["build-shards", "synth"])
def test_an_output_folder_that_holds_something_else(tmp_path, capsys, verb):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    root = pair(tmp_path / "bci")
    args = {"build-shards": ["--layout", "bci", "--root", root, "--out", out], "synth": [out, "--pairs", "8"]}[verb]
    status, _, err = run(capsys, verb, *args)
    assert status == 1
    assert str(out) in err and "folder" in err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_training_and_caching_do_not_write_into_a_folder_of_something_else(tissue_run, tmp_path, capsys):
    config = Path(tissue_run.run.dir) / "c.yaml"
    config.write_text(tissue_run.as_yaml())
    (tmp_path / "thesis.txt").write_text("years of work")
    for verb, field in (("train-teacher", "teacher.dir"), ("cache-latents", "latents.dir"), ("train", "student.dir")):
        status, _, err = run(capsys, verb, "--config", config, f"--{field}", tmp_path, "--run.dir", tmp_path / "r")
        assert status == 1, verb
        assert "thesis.txt" in err and field in err
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("trian: {batch: 8}", ("trian", "train")),
        ("train: {bacth: 8}", ("bacth", "batch")),
        ("train: {batch: many}", ("train.batch", "many")),
        ("train: {batch: 7, workers: 2}", ("train.batch", "multiple of 2")),
        ("deepspeed: {train_batch_size: 8}", ("deepspeed.train_batch_size", "train:")),
        ("train: [", ("bad.yaml",)),
        ("run: {dir: !!python/object/apply:os.getcwd []}", ("bad.yaml",)),
    ],
)
def test_a_bad_configuration(tmp_path, capsys, yaml, told):
    (tmp_path / "bad.yaml").write_text(yaml)
    status, out, err = run(capsys, "train", "--config", tmp_path / "bad.yaml")
    assert status == 2
    assert all(word in err for word in told)
    assert "Traceback" not in err and not out


@pytest.mark.parametrize(
    "args",
    [
        ["trian"],
        ["train", "--train.batch"],
        ["train", "--no-such-option", "1"],
        ["predict", "x.png"],
        ["query", "x.png", "--model", "m"],
        ["build-shards", "--layout", "tcga", "--root", "r", "--out", "o"],
        ["build-shards", "--layout", "bci", "--root", "r", "--out", "o", "--split", "group:0.9,0.9,0.1"],
        ["train", "--config", "absent.yaml"],
        ["synth"],
        ["synth", "o", "--pairs", "8", "--shortcut", "much"],
    ],
)
def test_a_bad_command_line(capsys, args):
    status, out, err = run(capsys, *args)
    assert status == 2 and "\n" not in err.strip()
    assert err.startswith("lgd: ") and "Traceback" not in err and not out


def test_a_missing_teacher_store_student_and_checkpoint(tissue_run, tmp_path, capsys):
    config = Path(tissue_run.run.dir) / "c.yaml"
    config.write_text(tissue_run.as_yaml())
    absent = tmp_path / "absent"
    for verb, field, remedy in (
        ("cache-latents", "teacher.dir", "lgd train-teacher"),
        ("train", "latents.dir", "lgd cache-latents"),
        ("build-index", "latents.dir", "lgd cache-latents"),
        ("evaluate", "student.dir", "lgd train"),
    ):
        options = ["--config", config, "--run.dir", tmp_path / "r", f"--{field}", absent]
        status, _, err = run(capsys, verb, *options)
        assert status == 1, verb
        assert str(absent) in err and remedy in err
    options = ["--config", config, "--student.dir", tmp_path / "new", "--resume", tmp_path / "no-checkpoint"]
    status, _, err = run(capsys, "train", *options)
    assert status == 1
    assert "no-checkpoint" in err and "train.resume" in err
    assert not absent.exists()


def test_a_store_of_another_teacher(tissue_run, tmp_path, capsys):
    config = Path(tissue_run.run.dir) / "c.yaml"
    config.write_text(tissue_run.as_yaml())
    options = ["--config", config, "--run.dir", tmp_path / "r", "--teacher.dir", tmp_path / "t", "--run.seed", "1"]
    assert run(capsys, "train-teacher", *options)[0] == 0
    store = Path(tissue_run.latents.dir)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for verb in ("cache-latents", "train"):
        status, _, err = run(capsys, verb, *options, "--student.dir", tmp_path / "s")
        assert status == 1
        assert "another recipe" in err and "teacher" in err and "latents.dir" in err
    assert before == {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_more_workers_than_cpus(tissue_run, tmp_path, capsys):
    config = Path(tissue_run.run.dir) / "c.yaml"
    config.write_text(tissue_run.as_yaml())
    options = ["--config", config, "--run.dir", tmp_path / "r", "--teacher.dir", tmp_path / "t"]
    status, _, err = run(capsys, "train-teacher", *options, "--train.workers", "2000", "--train.batch", "2000")
    assert status == 1
    assert "train.workers is 2000" in err and "CPUs" in err
    assert not (tmp_path / "t").exists()


def test_predict_and_query_of_what_is_no_image(tissue_run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("not an image")
    model, store = tissue_run.student.dir, tissue_run.latents.dir
    for image, told in (
        (tmp_path / "text.png", "no JPEG"),
        (tmp_path / "absent.png", "absent.png"),
        (tmp_path / "*.gif", "gif"),
    ):
        for args in (["predict", "--model", model], ["query", "--model", model, "--store", store]):
            status, out, err = run(capsys, *args, image)
            assert status == 1
            assert told in err and not out


def test_json_is_one_document_and_nothing_else(tissue, tissue_run, capsys):
    model, store = tissue_run.student.dir, tissue_run.latents.dir
    status, out, _ = run(capsys, "predict", "--model", model, tissue / "HE" / "test", "--json")
    rows = json.loads(out)
    assert status == 0 and len(rows) == len(list((tissue / "HE" / "test").iterdir()))
    assert all(abs(sum(row["probabilities"].values()) - 1) < 0.01 for row in rows)
    status, out, _ = run(capsys, "query", "--model", model, "--store", store, tissue / "HE" / "test", "--json", "-k", 3)
    assert status == 0
    fields = {"key", "slide", "split", "level", "distance", "duplicate_of"}
    assert all(set(hit) == fields for hit in json.loads(out)[0]["neighbours"])


def test_verify_names_what_is_wrong(tissue_run, tmp_path, capsys):
    for folder_ in (tissue_run.shard_dirs[0], tissue_run.latents.dir):
        assert run(capsys, "verify", folder_)[0] == 0
    copy = tmp_path / "copy"
    shutil.copytree(tissue_run.latents.dir, copy)
    part = next((copy / "parts" / "teacher").glob("*.h5"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    status, _, err = run(capsys, "verify", copy)
    assert status == 1 and part.name in err
    assert run(capsys, "verify", tmp_path)[0] == 1


def test_help_lists_every_verb_and_is_quick():
    done = subprocess.run([sys.executable, "-m", "lgd", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in VERBS)
    # What --help imports must not be what training imports.
    code = "import sys, lgd.cli; print([m for m in ('torch', 'ray', 'transformers', 'faiss') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert verb in capsys.readouterr().out


def test_doctor_reports_the_named_parts(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert all(name in out for name in ("torch", "ray", "deepspeed", "faiss", "gpu"))


def test_a_run_stands_for_its_student_and_its_store(tissue, tissue_run, tmp_path, capsys):
    made = tmp_path / "run"
    made.mkdir()
    (made / "config.yaml").write_text(tissue_run.as_yaml())
    image = next((tissue / "HE" / "test").iterdir())
    answers = []
    for model in (made, tissue_run.student.dir):
        status, out, _ = run(capsys, "predict", "--model", model, "--json", image)
        assert status == 0
        answers.append(out)
    assert answers[0] == answers[1]
    key = Store(tissue_run.latents.dir).parts[0].first
    for asked in (["--model", made, image], ["--store", made, "--key", key]):
        assert run(capsys, "query", *asked, "--json", "-k", 2)[0] == 0
    assert run(capsys, "export-latents", "--store", made, "--out", tmp_path / "exported")[0] == 0


def lgd(args: str, after: str, **environment: str) -> tuple[str, str]:
    """What `lgd ARGS AFTER` prints in a shell, whose `status` file has the exit status of lgd itself."""
    command = f"{shlex.quote(sys.executable)} -m lgd {args} {after}; echo status ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | environment, timeout=300)
    return done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize("form", ["", "--csv", "--json"])
def test_a_reader_that_leaves_ends_a_verb_quietly(tissue, tissue_run, form):
    out, err = lgd(f"predict --model {tissue_run.student.dir} {form} {tissue}/HE/test", "| true")
    assert "status 141" in err and "Traceback" not in err and "ignored" not in err and "roken pipe" not in err
    assert not out


def test_the_first_line_of_help():
    for args in ("--help", "train --help"):
        out, err = lgd(args, "| head -1")
        assert out.startswith("usage: lgd") and out.count("\n") == 1 and err.splitlines()[:-1] == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode(tissue, tissue_run, tmp_path, encoding):
    folder = tmp_path / "Gr\u00f6\u00dfe"
    folder.mkdir()
    (folder / "\u30d7\u00b1.jpg").symlink_to(next((tissue / "HE" / "test").iterdir()))
    command = f"predict --model {tissue_run.student.dir} {shlex.quote(str(folder))}"
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": encoding}
    for form in ("", "--csv", "--json"):
        out, err = lgd(f"{command} {form} 2>&1", "", **environment)
        assert "Error" not in out and r"\u30d7" in out and "status 0" in err
