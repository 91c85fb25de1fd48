"""Command lines: whole names, values that are plain data, and text that becomes a path in one place."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lgd.base.arguments import Parser
from lgd.base.errors import ConfigError, DataError
from lgd.cli import main
from lgd.config import Config
from lgd.config_files import add_config_arguments, given_of, load_config

BOMB = "[" + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'lol'] * 9)}]" for i in range(10)) + "]"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
RUN_FOLDERS = {"run.dir": "run", "teacher.dir": "t", "latents.dir": "l", "student.dir": "s", "report.dir": "r"}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train", "--student.epoch", "3"], "lgd train has no option --student.epoch, did you mean --student.epochs?"),
        (["train", "--student.epoch=3"], "lgd train has no option --student.epoch, did you mean --student.epochs?"),
        (["train", "--epochs", "3"], "no option --epochs, did you mean --teacher.epochs or --student.epochs?"),
        (["train", "--resum", "never"], "lgd train has no option --resum, did you mean --resume?"),
        (["train", "--conf", "x.yaml"], "lgd train has no option --conf, did you mean --config?"),
        (["build-shards", "--lay", "bci", "--root", "r", "--out", "o"], "no option --lay, did you mean --layout?"),
        (["build-shards", "--shard_size", "8"], "build-shards has no option --shard_size, did you mean --shard-size?"),
        (["query", "--exclude", "x.png"], "no option --exclude, did you mean --exclude-same-slide?"),
        (["predict", "--zzz\x1b[2J", "x.png"], "lgd predict has no option --zzz\\x1b[2J: see --help"),
    ],
)
def test_an_abbreviated_option_is_refused_with_the_nearest(args, told, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and error[:-1].isprintable()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--data.shards", BOMB], "--data.shards: anchors (&) and aliases (*) are not read"),
        (["--report.also", BOMB], "--report.also: anchors"),
        (["--deepspeed", f"{{a: {BOMB}}}"], "--deepspeed: anchors"),
        (["--deepspeed", "{a: 1, a: 2}"], "--deepspeed: 'a' is given twice"),
        (["--deepspeed", "[1]"], "--deepspeed: [1] should be a mapping"),
        (["--deepspeed", "{a: !!python/name:os.system x}"], "--deepspeed: tags (!) are not read"),
        (["--data.size", "[" * 100_000], "--data.size: no valid YAML"),
        (["--data.size", "9" * 5_000], "--data.size: 9999"),
        (["--data.size", "64.0"], "--data.size: 64.0 should be a whole number"),
        (["--data.size", "true"], "--data.size: True should be a whole number"),
        (["--train.lr", ".inf"], "--train.lr: .inf is too large, or no number"),
        (["--train.lr", "null"], "--train.lr: None should be a number"),
        (["--train.compile", "yes"], "--train.compile: 'yes' should be true or false"),
        (["--latents.views", "2"], "--latents.views: 2 should be one of 1, 8"),
        (["--latents.gallery", "[train, 1]"], "should be a list of texts, such as [train, val]"),
        (["--latents.gallery", "train"], "should be a list of texts, such as [train, val]"),
        (["--run.dir", "a\x1b]0;owned\x07b"], "--run.dir: a text holds a control character (U+001B)"),
        (["--run.dir", "a\nb"], "--run.dir: a text holds a line break"),
        (["--run.dir", "a\udcffb"], "--run.dir: a text holds a control character (U+DCFF)"),
        (["--config", "a\x1b[2Jb.yaml"], "--config a\\x1b[2Jb.yaml: a text holds a control character"),
        (["--run.seed", "-1"], "--run.seed: -1 should be a whole number, at least 0 and less than"),
    ],
)
def test_a_value_that_is_no_plain_data_is_refused_in_a_line(args, told):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=args)
    message = str(caught.value)
    assert told in message and message.isprintable() and len(message) < 400


def test_a_text_stays_as_it_was_typed():
    config = load_config(overrides=["--report.split", "no", "--data.shards", "*a", "--student.encoder=12:30"])
    assert (config.report.split, config.student.encoder) == ("no", "12:30")
    assert config.shard_dirs == [str(Path("*a").absolute())]
    assert load_config(overrides=["--data.shards", "['/a', /b]"]).shard_dirs == ["/a", "/b"]
    assert load_config(overrides=["--train.lr", "1"]).train.lr == 1.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {lr: 0.1}\ntrain: {workers: 0}\n", "line 2: 'train' is given twice, first in line 1"),
        ("deepspeed:\n  a: {b: 1, b: 2}\n", "line 2: 'deepspeed.a.b' is given twice"),
        ("run: {dir: x}\n---\nrun: {dir: y}\n", "line 2: no valid YAML"),
        ("run:\n  dir: &x y\n", "line 2: anchors"),
        ("run: " + "[" * 900_000, "line 1: no valid YAML"),
        ('"ru\\e]0;owned\\a\\e[2Jn": {a: 1}\n', "line 1: a text holds a control character (U+001B)"),
        ("report:\n  split: 1\n", "line 2: report.split: 1 should be put in quotes"),
        ("report:\n  split: true\n", "line 2: report.split: True should be put in quotes"),
        ("train:\n  lr: null\n", "line 2: train.lr: None should be a number"),
        ("1: {a: 1}\n", "line 1: '1' is no name of a field"),
        ("#" * 2**20 + "\n", "has more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_plain_data_is_refused_in_a_line(tmp_path, text, told):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert str(path) in message and told in message and message.isprintable()


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ODD |= st.sampled_from(
    ["~", "s3:/b", "a::b", "", "file://x", "auto", "stop", "lgd", "Flat", "[", "{", "1e5", "-", "~x/y"]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([name for name in Config().as_fields() if "." in name]),
    ODD | st.lists(ODD, max_size=3) | st.dictionaries(st.text(max_size=3), ODD, max_size=2),
)
def test_an_odd_value_in_a_field_is_taken_or_refused_in_a_line(tmp_path, name, value):
    section, _, field = name.partition(".")
    (tmp_path / "odd.yaml").write_text(json.dumps({section: {field: value}}))
    for path, overrides in (
        (tmp_path / "odd.yaml", []),
        (None, [f"--{name}={json.dumps(value)}", f"--{name}={value}"]),
    ):
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            assert not re.search("[\x00-\x1f\x7f-\x9f]", str(error))
        except DataError as error:
            assert "\n" not in str(error)
        else:
            (tmp_path / "kept.yaml").write_text(config.as_yaml())
            assert load_config(tmp_path / "kept.yaml") == config


def test_a_file_is_read_once_and_in_utf_8(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_bytes("run: {dir: /tmp/Müller}".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"some\.yaml is no UTF-8 text"):
        load_config(path)
    path.write_text("run: {dir: /tmp/Müller}")
    assert load_config(path).run.dir == "/tmp/Müller"
    with pytest.raises(ConfigError, match="has more than"):
        load_config("/dev/zero")


def test_options_win_over_files_and_later_files_over_earlier(tmp_path):
    for name, text in (("a", "data: {size: 64, threads: 3}\n"), ("b", "data: {size: 96}\ndeepspeed: {x: 1}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    args = ["--data.lanes=7", f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml", "--train.resume=never"]
    config = load_config(overrides=args)
    assert (config.data.size, config.data.threads, config.data.lanes, config.deepspeed) == (96, 3, 7, {"x": 1})
    parser = Parser()
    add_config_arguments(parser)
    given = given_of(parser.parse(args), "train", overwrite=True, prune=False)
    assert given.verb == "train"
    assert given.fields == {
        "config": [f"{tmp_path}/a.yaml", f"{tmp_path}/b.yaml"],
        "data.lanes": 7,
        "train.resume": "never",
        "overwrite": True,
    }


@pytest.fixture
def home(tissue_run, tmp_path, monkeypatch):
    """A home folder with virtual tissue, shards and a run; its working folder is another."""
    made = tmp_path / "home"
    made.mkdir()
    for name in ("bci", "shards", "run"):
        (made / name).symlink_to(Path(tissue_run.run.dir).parent / name)
    (made / "c.yaml").write_text(tissue_run.as_yaml())
    monkeypatch.setenv("HOME", str(made))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield made
    assert not [path.name for path in Path().iterdir()], "nothing may be called ~"


def test_home_is_found_in_every_field_of_a_run(home):
    fields = {**RUN_FOLDERS, "data.shards": "[~/a, ~/b]", "report.also": "['~/c']", "train.resume": "~/d"}
    fields |= {"teacher.encoder": "~/e", "student.encoder": "~"}
    overrides = [f"--{name}={value if '~' in value else f'~/{value}'}" for name, value in fields.items()]
    config = load_config(overrides=overrides)
    found = [*config.shard_dirs, *config.report.also, config.train.resume, config.teacher.encoder]
    assert found == [str(home / name) for name in "abcde"] and config.student.encoder == str(home)
    assert {name: config.as_fields()[name] for name in RUN_FOLDERS} == {
        name: str(home / value) for name, value in RUN_FOLDERS.items()
    }
    (home / "r.yaml").write_text("run: {dir: ~/lgd-case}\n")
    assert load_config("~/r.yaml").teacher.dir == str(home / "lgd-case" / "teacher")


def test_home_is_found_in_every_path_of_every_verb(home, capsys):
    def lgd(*args):
        assert main([*args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    lgd("synth", "~/drawn", "--pairs", "4", "--size", "64", "--slides", "4", "--workers", "1")
    assert (home / "drawn" / "truth.csv").is_file()
    options = ["--slides", "~/bci/truth.csv", "--split", "group:0.5,0.25,0.25"]
    lgd("build-shards", "--layout", "bci", "--root", "~/bci", "--out", "~/built", *options)
    assert (home / "built" / "manifest.json").is_file()
    lgd("verify", "~/built")
    lgd("verify", "~/run/latents", "--reencode", "1", "--teacher", "~/run/teacher")
    images = str(next((home / "bci" / "HE" / "test").iterdir())).replace(str(home), "~")
    (row,) = json.loads(lgd("predict", "--model", "~/run/student", "--json", images))
    assert row["image"] == images.replace("~", str(home))
    assert len(json.loads(lgd("predict", "--config", "~/c.yaml", "--json", "~/bci/HE/test/*1+.png"))) > 1
    (slide,) = json.loads(lgd("predict", "--model", "~/run/student", "--slides", "~/bci/truth.csv", "--json", images))
    assert slide["patches"] == 1
    lgd("query", "--model", "~/run/student", "--store", "~/run/latents", "--sheet", "~/sheet.png", images)
    assert (home / "sheet.png").is_file()
    lgd("export-latents", "--store", "~/run/latents", "--out", "~/exported")
    assert (home / "exported").is_dir()
    options = ["--config", "~/c.yaml", "--run.dir", "~/other", "--student.dir", "~/new", "--resume", "~/no-checkpoint"]
    assert main(["train", *options]) == 1
    assert f"{home}/no-checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["synth", "~nobody-here/o", "--pairs", "4"],
        ["build-shards", "--layout", "bci", "--root", "~nobody-here/x", "--out", "o"],
        ["build-shards", "--layout", "bci", "--root", "r", "--out", "~nobody-here/x"],
        ["predict", "--model", "~nobody-here/x", "~/bci/HE/test"],
        ["predict", "--model", "~/run/student", "~nobody-here/x.png"],
        ["query", "--store", "~nobody-here/x", "--key", "k"],
        ["query", "--store", "~/run/latents", "--key", "k", "--sheet", "~nobody-here/x.png"],
        ["export-latents", "--store", "~/run/latents", "--out", "~nobody-here/x"],
        ["verify", "~nobody-here/x"],
        ["train", "--config", "~nobody-here/c.yaml"],
        ["train", "--run.dir", "~nobody-here/x"],
        ["train", "--data.shards", "[~nobody-here/x]"],
        ["train", "--student.encoder", "~nobody-here/x"],
        ["train", "--resume", "~nobody-here/x"],
    ],
)
def test_the_home_of_nobody_is_refused(home, capsys, args):
    assert main(args) in (1, 2)
    error = capsys.readouterr().err
    assert "there is no home of ~nobody-here here: write the folder out, or ./~nobody-here" in error


@pytest.mark.parametrize("field", RUN_FOLDERS)
def test_a_job_s_results_do_not_go_with_its_folder(tmp_path, monkeypatch, capsys, field):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}))
    whole = [f"--{name}={tmp_path}/{value}" for name, value in RUN_FOLDERS.items() if name != field]
    assert main(["train", *whole, f"--{field}=runs/x"]) == 2
    error = capsys.readouterr().err
    assert f"{field} is runs/x, and a job of Ray works in a copy of your folder" in error
    assert "the whole path of a folder that all nodes share, or a url" in error
    assert not list(tmp_path.iterdir())
    assert load_config(overrides=[*whole, f"--{field}=s3://bucket/x"]).as_fields()[field] == "s3://bucket/x"
    monkeypatch.delenv(JOB)
    assert load_config(overrides=[*whole, f"--{field}=runs/x"]).as_fields()[field] == str(tmp_path / "runs/x")


@pytest.mark.parametrize(
    "args",
    [
        ["synth", "o", "--pairs", "4"],
        ["build-shards", "--layout", "bci", "--root", "r", "--out", "o"],
        ["export-latents", "--store", "{latents}", "--out", "o"],
        ["query", "--store", "{latents}", "--key", "k", "--sheet", "o"],
        ["train-teacher", "--data.shards", "/s"],
    ],
)
def test_a_job_refuses_other_relative_outputs(tissue_run, tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB, "{}")
    assert main([arg.format(latents=tissue_run.latents.dir) for arg in args]) == 2
    assert "and a job of Ray works in a copy of your folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_refused_by_the_file_and_its_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {{dir: {tmp_path / 'run'}}}\nstudent:\n  epochs: 1\n  method: lgd-nett\n")
    assert main(["train", "--config", str(path)]) == 2
    problem = "student.method is 'lgd-nett': use one of he-only, "
    assert capsys.readouterr().err.startswith(f"lgd: {path}, line 4: {problem}")
    # What the command line gives stands in no file.
    assert main(["train", "--config", str(path), "--student.method", "other"]) == 2
    assert capsys.readouterr().err.startswith("lgd: student.method is 'other': use one of he-only, ")
