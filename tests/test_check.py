"""`lgd verify` of networks and whole runs; of shards, stores and checkpoints their own tests tell."""

import json
import random
import shutil
from pathlib import Path

import pytest

from lgd.check import check
from lgd.errors import DataError
from lgd.files import digest_of
from lgd.models.export import read_student_config
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
        ("latent_dim", 10**9),
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
        (student / "config.json", lambda: read_student_config(student)),
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
