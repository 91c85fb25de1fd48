"""A method and an encoder outside the package (tests/examples/mine.py) go through every verb, and only when named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgd.base.errors import ConfigError, DataError
from lgd.base.extensions import load_object, refuse_unnamed
from lgd.base.target import find_target
from lgd.cli import main
from lgd.io.files import read_json
from lgd.models.encoder import Encoder, build_encoder, describe
from lgd.models.loading import load_student
from lgd.models.methods import find_method
from lgd.models.spec import EncoderSpec
from lgd.models.teacher import load_teacher
from lgd.report.ablation import variants
from lgd.scoring.predict import load_scorer

EXAMPLES = Path(__file__).parent / "examples"
METHOD, ENCODER = "python:mine:Focal", "python:mine:tiny"


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield


@pytest.fixture(scope="module")
def run(tissue_config, change, tmp_path_factory):
    """The options of a run of the example, by the command line, up to its student."""
    folder = tmp_path_factory.mktemp("outside")
    folders = {part: {"dir": str(folder / part)} for part in ("teacher", "latents", "student", "report")}
    config = change(tissue_config, run={"dir": str(folder)}, **folders)
    config = change(
        config,
        teacher={"epochs": 1, "encoder": ENCODER},
        student={"epochs": 1, "encoder": ENCODER, "method": METHOD},
        report={"queries": 2},
    )
    file = folder / "given.yaml"
    file.write_text(config.as_yaml())
    for verb in ("train-teacher", "cache-latents", "build-index", "train"):
        assert main([verb, "--config", str(file)]) == 0
    return config, str(file)


def test_they_go_through_every_verb(run, tissue, capsys):
    config, file = run
    capsys.readouterr()
    assert main(["evaluate", "--config", file]) == 0
    assert "focal LGD-Net" in capsys.readouterr().out
    report = read_json(Path(config.report.dir) / "metrics.json")
    assert "focal LGD-Net, mapped latents, whitened" in json.dumps(report)

    assert main(["ablate", "--config", file, "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "| focal LGD-Net |" in out and "| LGD-Net |" in out

    images = [str(path) for path in sorted((tissue / "HE" / "test").iterdir())[:2]]
    for options in (["--config", file], ["--model", config.student.dir, "--code", METHOD, "--code", ENCODER]):
        assert main(["predict", *options, "--json", *images]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [Path(row["image"]).name for row in rows] == [Path(image).name for image in images]
        store = ["--store", config.latents.dir]
        assert main(["query", *options, *store, "--json", "-k", "3", *images]) == 0
        assert len(json.loads(capsys.readouterr().out)) == 2
    for folder in (config.student.dir, config.teacher.dir):
        assert main(["verify", folder, "--code", METHOD, "--code", ENCODER]) == 0


def test_they_are_named_by_what_they_made(run):
    config, _ = run
    student = read_json(Path(config.student.dir) / "config.json")
    assert (student["method"], student["morphology"]["name"]) == (METHOD, ENCODER)
    assert student["morphology"]["backbone"] == {}
    model, _ = load_student(config.student.dir, (METHOD, ENCODER))
    assert type(model).__name__ == "Deeper" and model.morphology.channels == 24
    assert len(model.adaptors[0].to_latent) == 4


def test_a_model_that_names_code_is_refused_and_nothing_of_it_runs(run, tissue, tmp_path):
    config, _ = run
    trap, canary = tmp_path / "trap", tmp_path / "canary"
    trap.mkdir()
    (trap / "mine.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(trap), os.environ.get("PYTHONPATH", "")])}
    image = str(next((tissue / "HE" / "test").iterdir()))

    def lgd(*args):
        command = [sys.executable, "-m", "lgd", *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    model = ["--model", config.student.dir]
    for args in (
        ["predict", *model, image],
        ["predict", *model, "--code", ENCODER, image],
        ["query", *model, "--store", config.latents.dir, image],
        ["verify", config.student.dir],
        ["verify", config.latents.dir, "--reencode", "2"],
        ["verify", config.run.dir],
    ):
        done = lgd(*args)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "names python:mine:" in done.stderr and "give --code python:mine:" in done.stderr
        assert not canary.exists(), args
    # What the user named is run, and this one has no such class.
    done = lgd("predict", *model, "--code", METHOD, "--code", ENCODER, image)
    assert done.returncode == 2 and "has no Focal" in done.stderr and canary.exists()


def test_a_rival_that_names_code_is_refused_unless_it_is_named(run, tissue_run, change, tmp_path, capsys):
    config, _ = run
    file = tmp_path / "config.yaml"
    rivals = change(tissue_run, run={"dir": str(tmp_path)}, report={"dir": str(tmp_path), "also": [config.student.dir]})
    file.write_text(rivals.as_yaml())
    assert main(["evaluate", "--config", str(file)]) == 1
    assert f"field method names {METHOD}" in capsys.readouterr().err
    assert main(["evaluate", "--config", str(file), "--code", METHOD, "--code", ENCODER]) == 0
    assert "focal LGD-Net" in capsys.readouterr().out


def test_the_teachers_encoder_is_code_too(run):
    config, _ = run
    with pytest.raises(DataError, match=f"field encoder names {ENCODER}"):
        load_teacher(config.teacher.dir)
    with pytest.raises(DataError, match=f"field encoder names {ENCODER}"):
        load_scorer(config.teacher.dir, "teacher", code=[METHOD])
    assert load_teacher(config.teacher.dir, [ENCODER])[0].dim == 24


def test_a_teacher_of_ones_own_is_not_copied_into_the_student(run):
    config, _ = run
    assert find_method(METHOD)(config, find_target("her2")).build().hallucination is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("python:", "write python:package.module:name"),
        ("python:mine", "write python:package.module:name"),
        ("python:mine:Focal:more", "write python:package.module:name"),
        ("python:../mine:Focal", "write python:package.module:name"),
        ("python:mine:Focal()", "write python:package.module:name"),
        ("python:no.such.module:Focal", "module no.such.module cannot be imported .ModuleNotFoundError"),
        ("python:broken:Focal", "module broken cannot be imported .ZeroDivisionError: division by zero"),
        ("python:mine:Absent", "has no Absent"),
    ],
)
def test_a_name_of_nothing_is_refused(name, problem, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"student.method is .*{problem}"):
        load_object(name, "student.method")


def test_a_class_of_something_else_is_no_method():
    for name in (ENCODER, "python:mine:Tiny", "python:lgd.models.methods:Method"):
        with pytest.raises(ConfigError, match=f"student.method is {name}, which is no method"):
            find_method(name)


def test_two_methods_of_one_title_are_not_compared(tissue_run, change, tmp_path, monkeypatch):
    (tmp_path / "twin.py").write_text("from lgd.models.methods import LgdNet\nclass Twin(LgdNet):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="two methods are called 'LGD-Net': give python:twin:Twin another title"):
        variants(change(tissue_run, student={"method": "python:twin:Twin"}), full=False)


def test_what_gives_no_network_is_no_encoder():
    for name in ("python:mine:not_an_encoder", "python:torch.nn:Identity"):
        with pytest.raises(ConfigError, match=f"encoder {name} gives a .*, and should give a torch.nn.Module"):
            build_encoder(name)


def test_an_encoder_of_another_shape_than_it_states_is_told():
    encoder = build_encoder(ENCODER)
    encoder.channels = 7
    with pytest.raises(ConfigError, match=rf"encoder {ENCODER} gives \(1, 24, 2, 2\), and should give \(B, 7, h, w\)"):
        encoder(torch.zeros(1, 3, 32, 32))


def test_an_encoder_is_built_again_from_its_specification():
    encoder = build_encoder(ENCODER)
    again = Encoder(describe(ENCODER))
    again.load_state_dict(encoder.state_dict())
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(again(image).map_BCHW, encoder(image).map_BCHW)
    assert encoder(image).map_BCHW.shape == (2, 24, 4, 4)


def test_a_specification_of_code_has_no_other_backbone():
    fields = describe("resnet10").as_json()
    with pytest.raises(ValueError, match="'backbone': it should be empty"):
        EncoderSpec.from_json(fields | {"name": ENCODER})
    with pytest.raises(ValueError, match="'backbone': field 'model_type' is missing"):
        EncoderSpec.from_json(describe(ENCODER).as_json() | {"name": "resnet10"})


def test_only_what_the_user_named_may_run():
    names = {"method": METHOD, "morphology": "resnet10", "hallucination": ENCODER}
    refuse_unnamed("config.json", names, {METHOD, ENCODER})
    with pytest.raises(DataError, match="config.json: field hallucination names python:mine:tiny"):
        refuse_unnamed("config.json", names, {METHOD, "python:mine:other"})


def test_a_folder_named_like_code_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES, tmp_path / "python:mine:tiny")
    assert describe(ENCODER).backbone == {}
