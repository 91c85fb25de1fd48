import dataclasses
from pathlib import Path

import pytest

from lgd.base.errors import ConfigError, OnBad
from lgd.base.plain_yaml import read_yaml
from lgd.cli import main
from lgd.config import Config
from lgd.config_files import load_config
from lgd.config_sections import Data, Train
from lgd.io.digests import digest_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def load(tmp_path, text, *overrides):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data:\n  sise: 64\n", "some.yaml, line 2: there is no field data.sise, did you mean data.size?"),
        ("studnt:\n  epochs: 3\n", "some.yaml, line 1: there is no section studnt, did you mean student?"),
        ("data:\n  qqqq: 64\n", "data.threads"),
        ("data: 3\n", "section data is 3"),
        ("train:\n", "section train is None"),
        ("[1, 2]\n", "holds no sections"),
        ("data: [\n", "some.yaml, line 2: no valid YAML"),
        ("data:\n  size: !!python/name:os.getcwd\n", "some.yaml, line 2: tags (!) are not read"),
        ("data:\n  size: big\n", "some.yaml, line 2: data.size: 'big' should be a whole number"),
        ("latents:\n  views: 2\n", "some.yaml, line 2: latents.views: 2 should be one of 1, 8"),
        ("data:\n  size: 8\n", "some.yaml, line 2: data.size: 8 should be a whole number, at least 32"),
        ("teacher:\n  epochs: 0\n", "teacher.epochs: 0 should be a number, more than 0"),
        ("student:\n  nuclei_weight: -1\n", "student.nuclei_weight: -1 should be a number, at least 0"),
        ("train:\n  clip: -1\n", "train.clip: -1 should be a number, at least 0"),
        ("train:\n  patience: -1\n", "train.patience: -1 should be a whole number, at least 0"),
        ("run:\n  dir: https://host/run\n", "run.dir is https://host/run, and nothing can be written there"),
        ("student:\n  dir: http://host/he\n", "student.dir is http://host/he, and nothing"),
        ("train:\n  batch: 6\n  workers: 2\n  accumulate: 2\n", "train.batch 6 does not divide into train.workers 2"),
        ("deepspeed:\n  bf16: {enabled: true}\n", "deepspeed.bf16 is set"),
        ("deepspeed:\n  torch_autocast: {enabled: true}\n", "deepspeed.torch_autocast is set"),
        ("deepspeed:\n  gradient_clipping: 1\n", "deepspeed.gradient_clipping is set"),
        ("train:\n  engine: torch\ndeepspeed:\n  wall_clock_breakdown: true\n", "train.engine is torch"),
    ],
)
def test_a_wrong_file_is_told_by_file_or_field(tmp_path, text, told):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert told in str(caught.value)


def test_a_wrong_option_is_told_without_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no option --data\.sise, did you mean --data\.size\?"):
        load_config(overrides=["--data.sise", "4"])
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "data:\n  size: 64\n", "--data.size=big")
    assert str(caught.value) == "--data.size: 'big' should be a whole number, at least 32"


def test_numbers_that_python_gives_have_the_same_bounds():
    with pytest.raises(ConfigError, match=r"^train\.batch: 0 should be a whole number, at least 1$"):
        Config(train=Train(batch=0))
    with pytest.raises(ConfigError, match="stain_jitter: 0.5 should be a number, at least 0 and less than"):
        Config(data=Data(stain_jitter=0.5))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml cannot be read \(No such file"):
        load_config(tmp_path / "gone.yaml")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    config = load(tmp_path, "data:\n  size: 96\n  threads: 3\n", "--data.size=128", "--train.lr", "1e-4")
    assert (config.data.size, config.data.threads, config.data.lanes) == (128, 3, Config().data.lanes)
    assert config.train.lr == 1e-4


def test_deepspeed_is_passed_on_as_it_is(tmp_path):
    config = load(tmp_path, "deepspeed:\n  zero_optimization: {stage: 2, overlap_comm: true}\n")
    assert config.deepspeed == {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    config = load_config(overrides=["--deepspeed", '{"zero_optimization": {"stage": 3}}'])
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


def test_folders_default_to_places_under_the_run(tmp_path):
    config = load(tmp_path, f"run:\n  dir: {tmp_path}/r\nlatents:\n  dir: {tmp_path}/shared\n")
    assert config.shard_dirs == [str(tmp_path / "r" / "shards")]
    assert [config.teacher.dir, config.latents.dir] == [f"{tmp_path}/r/teacher", f"{tmp_path}/shared"]
    two = load(tmp_path, "data:\n  shards: [/a, 's3://bucket/b']\n")
    assert two.shard_dirs == ["/a", "s3://bucket/b"]


@pytest.mark.parametrize("value", ["stop", "skip:3"])
def test_bad_samples_meet_a_named_policy(value):
    assert load_config(overrides=[f"--data.on_bad={value}"]).data.on_bad == {"stop": OnBad(), "skip:3": OnBad(3)}[value]


@pytest.mark.parametrize("value", ["skip", "skip:0", "skip:-1", "go"])
def test_a_policy_without_a_budget_is_refused(value):
    with pytest.raises(ConfigError, match=r"data\.on_bad.*use stop, or skip:N"):
        load_config(overrides=[f"--data.on_bad={value}"])


@pytest.mark.parametrize("policy", [OnBad(), OnBad(3)])
def test_a_policy_is_written_as_it_is_read(policy):
    assert OnBad.parse(str(policy)) == policy
    config = Config(data=Data(on_bad=policy))
    assert config.as_fields()["data.on_bad"] == str(policy) and f"on_bad: {policy}\n" in config.as_yaml()


def test_yaml_reads_back_as_the_same_run(tmp_path):
    config = load(
        tmp_path, "data:\n  shards: [/a, /b]\ntrain:\n  lr: 0.3\ndeepspeed:\n  zero_optimization: {stage: 1}\n"
    )
    assert load(tmp_path, config.as_yaml()) == config
    fields = dataclasses.asdict(config)
    fields["data"]["on_bad"] = "stop"
    assert read_yaml(config.as_yaml()).value == fields


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).run.dir


def test_there_are_shipped_configs():
    assert CONFIGS


def test_every_field_has_its_help():
    import docstring_parser

    for section in dataclasses.fields(Config):
        if section.name != "deepspeed":
            kind = section.type
            described = {p.arg_name for p in docstring_parser.parse_from_object(kind).params if p.description}
            assert described == {f.name for f in dataclasses.fields(kind)}, section.name


@pytest.mark.parametrize("folder", ["s3://", "s3:///", "s3:///runs"])
def test_a_run_at_a_url_without_a_bucket_is_refused(folder, capsys):
    assert main(["train", "--config", str(CONFIGS[0].with_name("demo.yaml")), f"--run.dir={folder}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lgd: s3://") and "names no bucket or host: write s3://NAME/FOLDER" in error


def test_a_run_of_defaults_depends_on_the_same_numbers_when_it_is_read_back(tmp_path):
    """20 and 20.0 are equal, and have other digests."""
    kept = load(tmp_path, load_config().as_yaml())
    assert digest_of(kept.as_fields()) == digest_of(load_config().as_fields())
