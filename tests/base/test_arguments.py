"""Command lines in plain words: what is missing, unknown or misplaced, and what to type instead."""

import pytest

from lgd.cli import VERBS, main

JARGON = ("unrecognized", "expected one", "expected at least", "invalid", "are required", "argument -", "explicit")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "c.yaml"], "c.yaml: the file of a run is given as --config c.yaml"),
        (
            ["evaluate", "runs/x/config.yml"],
            "runs/x/config.yml: the file of a run is given as --config runs/x/config.yml",
        ),
        (["train", "--config"], "--config needs a value: write --config=FILE"),
        (["train", "--train.batch", "--train.lr", "1"], "--train.batch needs a value: write --train.batch=BATCH"),
        (["query", "--key"], "--key needs a value: write --key=KEY"),
        (["train", "--train.batch", "x"], "--train.batch: 'x' should be a whole number"),
        (["query", "-k", "three", "x.png"], "-k: 'three' should be a whole number"),
        (["synth", "a", "--pairs", "many"], "--pairs: 'many' should be a whole number"),
        (
            ["build-shards", "--layout", "tcga", "--root", "r", "--out", "o"],
            "--layout is 'tcga': use one of bci, mist, csv",
        ),
        (["build-shards", "--layout", "bci"], "lgd build-shards needs --root and --out: see lgd build-shards --help"),
        (["synth"], "lgd synth needs DIR: see lgd synth --help"),
        (["predict", "--model", "m"], "lgd predict needs IMAGE: see lgd predict --help"),
        (["synth", "a", "b"], "lgd synth takes DIR only: leave out 'b'"),
        (["doctor", "now"], "lgd doctor takes options only: leave out 'now'"),
        (["train", "-config", "c.yaml"], "lgd train has no option -config, did you mean --config?"),
        (["train", "--overwrite=yes"], "--overwrite takes no value: leave out =yes"),
        (["predict", "--model", "m", "--json", "--csv", "x.png"], "--json and --csv are two formats: give one"),
        (["query", "--store", "s"], "name what to ask for: IMAGE ..., or stored patches by --key"),
        (["query", "--key", "k"], "name the feature store: --store DIR"),
        (["predict", "x.png"], "name the student: --model DIR (its folder or its run's), or --config FILE"),
        (["--verbose", "train"], "the verb comes first, and --verbose is an option"),
        (["predcit", "x.png"], "lgd has no verb 'predcit', did you mean predict?"),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(args, message, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"lgd: {message}") and err.count("\n") == 1 and not out
    assert not any(word in err for word in JARGON)


def test_images_come_in_any_place_and_may_begin_with_a_dash(tissue, tissue_run, tmp_path, monkeypatch, capsys):
    first, second, *_ = sorted((tissue / "HE" / "test").iterdir())
    (tmp_path / "-odd.jpg").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    for args in ([first, "--csv", second], ["--csv", "--", "-odd.jpg", second], [first, second, "--csv"]):
        assert main(["predict", "--model", tissue_run.student.dir, *map(str, args)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_a_verb_s_own_options(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: lgd {verb} ") and len(lines[1]) == 0, "the usage is one line"
    if verb in ("predict", "query", "info", "verify", "doctor"):
        assert len(lines) <= 30
    if verb in ("predict", "query"):
        assert "lgd train --help" in " ".join(lines[-2:]) and "--student.encoder" not in " ".join(lines)
    if verb == "train":
        heads = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert heads == ["options:", *(f"{name}:" for name in (*SECTIONS, "deepspeed"))]
        own = lines[lines.index("options:") : lines.index("run:")]
        assert [any(name in line for line in own) for name in ("--overwrite", "--resume", "--config")] == [True] * 3


SECTIONS = ("run", "data", "teacher", "latents", "student", "train", "report")
