"""`lgd teachers`: teachers compared by what they know and by what students make of them."""

from pathlib import Path

import numpy as np
import pytest

from lgd.cli import main
from lgd.io.files import read_json
from lgd.labels.predictions import Predictions
from lgd.report.ablation import read_kept
from lgd.report.probed import pooled_latents, score_by_probe
from lgd.report.teacher_rows import read_rows
from lgd.report.teachers import effective_rank
from lgd.report.teachers_table import TeachersDocument
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store.probe import make_probe
from lgd.store.store import Store

NAMES = ["label", "several", "pairs", "random"]
SPLIT = {"split": "group:0.5,0.25,0.25"}


@pytest.fixture(scope="module")
def run(tissue_config, change, tmp_path_factory):
    """A run in folders of its own, in which nothing is trained."""
    folder = tmp_path_factory.mktemp("teachers")
    parts = {name: {"dir": str(folder / name)} for name in ("teacher", "latents", "student", "report")}
    parts["teacher"] |= {"epochs": 0.5}
    parts["student"] |= {"epochs": 0.5}
    return change(tissue_config, run={"dir": str(folder)}, **parts)


@pytest.fixture
def shards(tissue, tmp_path):
    """`shards(labelled=1)`: those of `run`, built with other options."""

    def make(**options):
        asked = {"slides": str(tissue / "truth.csv"), **SPLIT, "shard_size": 8, "mpp": 0.46} | options
        build(ShardOptions(layout="bci", root=str(tissue), out=str(tmp_path / "shards"), **asked))
        return str(tmp_path / "shards")

    return make


def ask(run, folder, *more):
    config = folder / "config.yaml"
    config.write_text(run.as_yaml())
    return main(["teachers", "--config", str(config), *more])


def kappa(said: Predictions) -> float:
    return said.measures.score(said.label, said.output)["kappa"]


def test_teachers_are_compared_on_the_same_patches(run, shards, tmp_path, capsys):
    fewer = shards(labelled=1)
    asked = ("--compare", ",".join(NAMES), "--seeds", "2", "--fewer", fewer)
    assert ask(run, tmp_path, *asked) == 0
    folder = Path(run.run.dir) / "teachers"
    document = TeachersDocument.read(folder / "teachers.json")
    assert capsys.readouterr().out.endswith((folder / "teachers.md").read_text() + "\n")
    assert list(document.teachers) == NAMES and document.metric == "kappa" and document.patches == 20
    assert sum(document.labelled_fewer.values()) < sum(document.labelled.values()) == 5
    own = ShardSet.open(run.shard_dirs)
    training, scored = own.of_split("train"), own.of_split("test")
    patches, labels = read_rows(ShardSet.open([fewer]).of_split("train"))
    of_key = {key: -1 if label is None else label for key, label in zip(patches.keys, labels, strict=True)}
    left_m = np.array([of_key[key] for key in read_rows(training)[0].keys])
    for name, judged in document.teachers.items():
        assert bool(judged.learns) is (name != "random") and len({*judged.weights}) == 2

        def said(what, at=folder / name):
            return [read_kept(at / f"{what}-{seed}.npz", what, own.target)[0] for seed in range(2)]

        students = {what: [kappa(one) for one in said(what)] for what in ("distil", "lgd")}
        assert judged.lgd.value == pytest.approx(np.mean(students["lgd"]))
        assert judged.gain.value == pytest.approx(np.mean(students["lgd"]) - np.mean(students["distil"]))
        assert judged.teacher.value == pytest.approx(np.mean([kappa(one) for one in said("seed")]))
        stores = [Store(run.latents.dir, teachers=(f"{name}_seed_{seed}",)) for seed in range(2)]
        assert judged.rank == pytest.approx([effective_rank(pooled_latents(store, training)) for store in stores])
        assert (folder / name / "fewer-0").exists() is ("label" in judged.learns)
        if "label" in judged.learns:
            after = said("fewer")
        else:
            probes = [make_probe(store, training, left_m) for store in stores]
            assert {sum(probe.patches.values()) for probe in probes} == {int((left_m >= 0).sum())}
            both = zip(stores, probes, said("lgd"), strict=True)
            after = [score_by_probe(store, probe, own, scored, like) for store, probe, like in both]
        assert judged.fewer.value == pytest.approx(np.mean([kappa(one) for one in after]))
        assert all(1 <= rank <= 20 for rank in judged.own_rank) and all(0 <= share <= 1 for share in judged.hubs)
        assert max(judged.tells + judged.tells_beyond + judged.explained) < 1
    # Again: nothing is trained, and the numbers are the same.
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(kept) == 2 * (3 * len(NAMES) + 2)
    before = (folder / "teachers.json").read_bytes()
    assert ask(run, tmp_path, *asked) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == kept
    assert (folder / "teachers.json").read_bytes() == before
    facts = [stage["facts"] for stage in read_json(Path(run.run.dir) / "run.json")["stages"]["teachers"]]
    assert facts[-1] == {"teachers": NAMES, "seeds": 2, "split": "test"}


def test_the_effective_rank_counts_directions():
    normal = np.random.default_rng(0).normal(size=(20_000, 8))
    for count in (1, 3, 8):
        assert effective_rank(normal * (np.arange(8) < count)) == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            ["--compare", "blood"],
            "--compare names 'blood': use label, stain, several, parts, pairs, random, or an encoder",
        ),
        (["--compare", "label,label"], "name each teacher once"),
        (["--compare", "stain", "--latents.staining", "none"], "names stain, and the second stain shows none"),
        (["--compare", "label", "--teacher.encoder", "hf:a/b"], "set teacher.encoder to a preset"),
        (["--seeds", "0"], "--seeds 0: use at least 1"),
    ],
)
def test_what_cannot_be_compared_is_one_message(run, tmp_path, capsys, asked, why):
    before = {*Path(run.run.dir).rglob("*")}
    assert ask(run, tmp_path, *asked) == 2
    assert why in capsys.readouterr().err and {*Path(run.run.dir).rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"split": "group:0.6,0.2,0.2"}, "its split train has other patches than the run, such as"),
        ({"target": "other.yaml"}, "its target is another than that of the run"),
    ],
)
def test_fewer_labels_are_of_the_same_patches(run, shards, tmp_path, capsys, monkeypatch, options, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("name: grade\nkind: ordinal\nclasses: ['0', 1+, 2+, 3+]\n")
    fewer, before = shards(**options), {*Path(run.run.dir).rglob("*")}
    assert ask(run, tmp_path, "--fewer", fewer) == 1
    assert why in capsys.readouterr().err and not {*Path(run.run.dir).rglob("*")} - before - {
        Path(run.run.dir) / "teachers"
    }
