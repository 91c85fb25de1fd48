"""The preregistered study: its seeds, its rule, and all of it at a size of minutes."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from lgd.io.files import read_json
from lgd.metrics import Interval
from tests.support.studies import run_here
from tools.studies import preregistered
from tools.studies.preregistered import LEAST, PAGE, Endpoint, find_seeds, judge, read_within


def test_the_seeds_are_bytes_of_the_page():
    digest, seeds = hashlib.sha256(PAGE.read_bytes()).digest(), find_seeds(PAGE.read_bytes(), development=False)
    assert seeds.trainings.start == int.from_bytes(digest[:4], "big") % 2**31 and len(seeds.trainings) == 5
    assert seeds.worlds["more"] == int.from_bytes(digest[4:8], "big") % 2**31
    assert find_seeds(PAGE.read_bytes() + b" ", development=False) != seeds
    assert find_seeds(b"a", development=True) == find_seeds(b"b", development=True) != seeds


def endpoint(value, low, lower):
    """Of these lower limits at 95 and 97.5 %."""
    return Endpoint("", *(Interval(value=value, low=one, high=value + 1) for one in (low, lower)))


NULL = [endpoint(0.0, -0.1, -0.2)] * 3
WEAK, STRONG = (0.01, -0.01), (0.02, 0.01)


@pytest.mark.parametrize(("labels", "transfer"), itertools.product(["none", "weak", "strong"], repeat=2))
def test_holm_over_the_two(labels, transfer):
    """Weak is 95 % alone, and needs the other one to be strong."""
    limits = {"none": (-0.01, -0.02), "weak": WEAK, "strong": STRONG}
    found = {
        "labels": [endpoint(0.1, *limits[labels])],
        "transfer": [endpoint(0.1, *STRONG), endpoint(0.1, *limits[transfer]), endpoint(0.1, *STRONG)],
        "null": NULL,
    }
    strong = "strong" in (labels, transfer)
    expected = {"labels": labels == "strong" or (labels == "weak" and strong)}
    expected["transfer"] = transfer == "strong" or (transfer == "weak" and strong)
    assert judge(found) == expected


def test_small_gains_and_a_null_world_that_gains_do_not_count():
    strong = {"labels": [endpoint(0.1, *STRONG)], "transfer": [endpoint(0.1, *STRONG)] * 3, "null": NULL}
    assert judge(strong) == {"labels": True, "transfer": True}
    for name, least in LEAST.items():
        small = strong | {name: [endpoint(least - 1e-6, *STRONG)] * len(strong[name])}
        assert judge(small) == {other: other != name for other in LEAST}
    for null in (endpoint(0.1, 0.01, -0.1), Endpoint("", *[Interval(value=None, low=None, high=None)] * 2)):
        assert judge(strong | {"null": [*NULL[:2], null]}) == {"labels": True, "transfer": False}


def test_the_question_is_what_the_level_does_not_say(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text("key,h_score,level\na,1,0\nb,3,0\nc,10,2\nd,14,2\n")
    assert read_within(path).answers == {"a": -1, "b": 1, "c": -2, "d": 2}


def list_networks(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("**/model.safetensors")}


@pytest.mark.faults
def test_the_study_at_a_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preregistered, "run_all", run_here)
    monkeypatch.setattr(preregistered, "JOBS", 0)
    monkeypatch.setattr(preregistered, "OF_DRY_RUN", 1)
    monkeypatch.setattr(preregistered, "PROBED", 20)
    monkeypatch.setattr(preregistered, "TISSUE", "--pairs 120 --slides 40 --size 64 --test 0.3 --coupling 1")
    monkeypatch.setattr(preregistered, "LABELS", "--split keep:0.1 --labelled 3 --mpp 0.46 --shard-size 32")
    fields = {"teacher.epochs": 1, "student.epochs": 1, "data.size": 64, "report.bootstrap": 20}
    monkeypatch.setattr(preregistered, "EPOCHS", fields)
    assert preregistered.run(["--development", "--out", str(tmp_path)]) == 0
    out, document = capsys.readouterr().out, read_json(tmp_path / "preregistered.json")
    assert out.endswith((tmp_path / "preregistered.md").read_text() + "\n")
    assert document["holds"].keys() == LEAST.keys()
    assert [len(document[name]) for name in ("labels", "transfer", "null")] == [1, 3, 3]
    for one in itertools.chain(document["transfer"], document["labels"]):
        assert one["at_97"]["low"] <= one["at_95"]["low"] <= one["at_95"]["value"]
    assert len([*Path(tmp_path).glob("*/run/teachers/stain/grids-*/model.safetensors")]) == 2
    before, networks = (tmp_path / "preregistered.md").read_bytes(), list_networks(tmp_path)
    monkeypatch.setattr(preregistered, "TEACHERS", "stain")
    assert preregistered.run(["--development", "--out", str(tmp_path), "--long"]) == 0
    assert (tmp_path / "preregistered.md").read_bytes().replace(b" --long", b"") == before
    # The long form finds what was trained.
    assert len([*tmp_path.glob("*/run/teachers/teachers.md")]) == 2 and list_networks(tmp_path) == networks
    assert np.isfinite(document["labels"][0]["at_95"]["value"])
