"""Teachers that learn from the grids of the domain targets: without labels, or beside them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_loop import assert_same_curve, rank_main

from lgd import pipeline
from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.cli.contents import check
from lgd.cli.facts import as_lines, describe
from lgd.config_files import load_config
from lgd.models.encoder import build_encoder
from lgd.models.teacher import Teacher, load_teacher
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store import supervision
from lgd.store.cache import fill_targets
from lgd.store.probe import find_probe
from lgd.store.store import Store
from lgd.stream.plan import World
from lgd.stream.reader import Reader
from lgd.train import checkpoint
from lgd.train.finished import validate
from lgd.train.launch import train_under
from lgd.train.prepare import Prepared
from lgd.train.tasks import TeacherTask
from tests.support.forks import run_ranks
from tests.support.sockets import free_ports


@pytest.fixture
def learner(tissue_config, change, tmp_path):
    """`learner(["membranes"])`: a run whose teacher learns that, in folders of its own."""

    def make(learns, config=tissue_config, **teacher):
        parts = {name: {"dir": str(tmp_path / name)} for name in ("run", "teacher", "latents", "student", "report")}
        parts["teacher"] |= {"learns": learns, "epochs": 1.0} | teacher
        parts["student"] |= {"epochs": 0.5}
        return change(config, **parts)

    return make


@pytest.fixture
def unlabelled(change, tmp_path, tissue):
    """`unlabelled(config)`: a run over pairs without a label: eight in train, four in val."""
    pairs = shutil.copytree(tissue, tmp_path / "tissue") / "pairs.csv"
    names = [path.name for path in sorted((tissue / "HE" / "train").iterdir())[:12]]
    rows = [f"HE/train/{name},IHC/train/{name},{'train' if n < 8 else 'val'}" for n, name in enumerate(names)]
    pairs.write_text("\n".join(["he,ihc,split", *rows]) + "\n")
    build(ShardOptions(layout="csv", root=str(pairs), out=str(tmp_path / "shards"), shard_size=4))
    return lambda config: change(config, data={"shards": [str(tmp_path / "shards")]})


def lines_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_no_target_is_measured_twice_and_none_needs_a_teacher(learner, monkeypatch):
    """From membranes to a report: the store is filled in two goes, and its levels are a probe's."""
    config, measured = learner(["membranes"]), []
    real = supervision.membrane_grid
    monkeypatch.setattr(supervision, "membrane_grid", lambda *given: measured.append(1) or real(*given))
    pipeline.train_teacher(config)
    shards = ShardSet.open(config.shard_dirs)
    total = sum(shard.samples for shard in shards.shards)
    assert len(measured) == total and not (Path(config.latents.dir) / "store.json").exists()
    pipeline.train_teacher(config)
    pipeline.cache_latents(config)
    assert len(measured) == total
    store = Store(config.latents.dir)
    assert (store.verify(), check(store.folder, reencode=3)[1]) == ([], [])
    assert find_probe(store, shards.of_split("train")).slides > 1
    # The same numbers as a store that is filled in one go has.
    whole = replace(config, latents=replace(config.latents, dir=f"{config.latents.dir}-whole"))
    pipeline.cache_latents(whole)
    assert Store(whole.latents.dir).document == store.document

    pipeline.build_index(config)
    pipeline.train_student(replace(config, student=replace(config.student, distil_weight=1.0)))
    table = pipeline.evaluate(config)
    assert "IHC teacher, probe" in table
    report = json.loads((Path(config.report.dir) / "metrics.json").read_text())
    assert any("it learnt membranes, and no label" in caveat for caveat in report["caveats"])


LESSONS = [["membranes"], ["nuclei", "membranes"], ["label", "membranes"], ["parts"], ["pairs"], ["membranes", "parts"]]


@pytest.mark.parametrize("learns", LESSONS)
def test_what_it_learns_is_what_its_loss_and_its_document_say(learner, learns):
    config = learner(learns)
    pipeline.train_teacher(config)
    terms = {"label": "level", "membranes": "membrane", "nuclei": "nuclei", "parts": "joint", "pairs": "joint"}
    grids = bool({"membranes", "nuclei"} & {*learns})
    for line in lines_of(config.teacher.dir):
        assert line["loss"] == pytest.approx(sum(line[terms[name]] for name in learns), rel=1e-5)
        assert not {*terms.values()} - {terms[name] for name in learns} & line.keys()
    teacher, described = load_teacher(config.teacher.dir)
    labelled = "label" in learns
    assert [*described.learns] == learns and described.source == "trained" and described.gives_labels is labelled
    assert (described.training.labelled > 0) is labelled and (teacher.head is not None) is labelled
    assert ("loss" in described.validation) is (grids and not labelled)
    assert ("kappa" in described.validation) is labelled
    kept = load_file(Path(config.teacher.dir) / "model.safetensors")
    assert not [name for name in kept if "grid" in name or "joint" in name]
    out = teacher(torch.zeros(2, 3, 64, 64))
    assert {*out} == {"map", "pooled"} | ({"logits"} if labelled else set())
    (line,) = [line for line in as_lines(describe(Path(config.teacher.dir))) if line.startswith("learnt")]
    assert line.split(None, 1)[1] == ", ".join(learns)


@pytest.mark.parametrize("learns", ["membranes", "pairs"])
def test_all_pairs_teach_it_and_no_label_is_needed(learner, unlabelled, learns):
    config = unlabelled(learner([learns]))
    pipeline.train_teacher(config)
    described = load_teacher(config.teacher.dir)[1]
    assert described.training.labels["unknown"] == 8 and ("loss" in described.validation) is (learns == "membranes")
    assert not train_under(config, "teacher", overwrite=False)
    with pytest.raises(DataError, match="leave label out of teacher.learns"):
        train_under(replace(config, teacher=replace(config.teacher, learns=["label", learns])), "teacher")
    with pytest.raises(DataError, match="learns from levels only"):
        train_under(replace(config, teacher=replace(config.teacher, learns=["label"])), "teacher")


@pytest.mark.faults
@pytest.mark.parametrize("learns", [["membranes", "nuclei"], ["parts", "membranes"], ["pairs"]])
def test_two_processes_train_the_teacher_of_one(learner, change, tmp_path, learns):
    """Rows of the store, an uneven validation split, its loss, and images that are compared, over two ranks."""
    one = change(learner(learns), train={"batch": 12, "accumulate": 3, "evaluate_every": 2})
    two = change(one, teacher={"dir": str(tmp_path / "two")})
    pipeline.train_teacher(one)
    (port,) = free_ports(1)
    run_ranks(rank_main, 2, 2, port, two, ShardSet.open(two.shard_dirs), "teacher")
    assert_same_curve(*(lines_of(config.teacher.dir) for config in (one, two)), tolerance=1e-4)
    made = [load_teacher(config.teacher.dir)[1] for config in (one, two)]
    assert made[0].inputs == made[1].inputs and [each.workers for each in made] == [1, 2]
    assert made[0].validation == pytest.approx(made[1].validation, rel=1e-4)


def test_its_validation_is_the_mean_loss_of_the_grids(learner):
    """A naive twin, one patch after the other; and the best of it is the network that is kept."""
    config = learner(["nuclei", "membranes"], epochs=3.0)
    config = replace(config, train=replace(config.train, patience=5))
    shards = ShardSet.open(config.shard_dirs)
    fill_targets(config, shards.shards, workers=0)
    run = Prepared(shards, TeacherTask(config, shards), World())
    val = shards.of_split("val")
    levels, logits, _, _, scores = validate(run.learner, val)
    assert logits.shape == (0, 4) and len(levels) == 0
    reader, parts, losses = Reader(val, ("ihc",), config.data.size), run.learner.task.store.parts_of(val), []
    model = run.learner.engine.model.eval()
    for number in range(reader.total):
        sample = reader.read(number)
        with torch.no_grad():
            out = model(torch.from_numpy(sample.images["ihc"].copy())[None].permute(0, 3, 1, 2))
        stored = {
            name: torch.tensor(parts[sample.shard].array(name)[sample.row])[None].float()
            for name in ("nuclei", "membrane")
        }
        huber = torch.nn.functional.smooth_l1_loss
        losses.append(
            float(huber(out["nuclei"], torch.log1p(stored["nuclei"])) + huber(out["membrane"], stored["membrane"]))
        )
    assert scores == {"loss": pytest.approx(np.mean(losses), rel=1e-4)}
    run.close()
    pipeline.train_teacher(config)
    best = checkpoint.State.read(checkpoint.complete(Path(config.teacher.dir) / "checkpoints")[-1] / "state.json").best
    assert best.score < 0 and load_teacher(config.teacher.dir)[1].validation["loss"] == pytest.approx(
        -best.score, rel=1e-4
    )


def test_targets_of_other_settings_are_refused_or_measured_anew(learner, change, tissue_run):
    config = learner(["membranes"])
    with pytest.raises(DataError, match="lacks the domain targets of .*: run lgd train-teacher"):
        train_under(config, "teacher")
    pipeline.train_teacher(config)
    other = change(config, latents={"membrane_grid": 3})
    with pytest.raises(DataError, match="is of other settings, or of another"):
        train_under(other, "teacher")
    with pytest.raises(DataError, match="of other inputs"):
        pipeline.train_teacher(other)
    # A finished store is another run's: its targets are not measured anew.
    finished = change(other, latents={"dir": tissue_run.latents.dir})
    with pytest.raises(DataError, match="was made by another recipe") as error:
        pipeline.train_teacher(finished)
    assert "membrane_grid: 4 in the store, 3 asked for" in "\n".join(map(str, error.value.args))


def test_requests_that_cannot_be_met_are_one_message(learner):
    with pytest.raises(ConfigError, match="teacher.learns is membranes, and a frozen teacher .* learns nothing"):
        config = learner(["membranes"], source="frozen", encoder="hf:some/where")
        TeacherTask(config, ShardSet.open(config.shard_dirs))
    for teacher, why in (
        ({"learns": ["parts", "pairs"]}, "teacher.learns is parts, pairs: an image is compared with one other"),
        ({"learns": ["parts"], "source": "random"}, "a random teacher .* learns nothing"),
        ({"learns": ["label"], "source": "random", "encoder": "hf:some/where"}, "only a preset .* random weights"),
        ({"learns": ["label"], "source": "frozen"}, "or to random for a control"),
    ):
        with pytest.raises(ConfigError, match=why):
            TeacherTask(learner(**teacher), ShardSet.open(config.shard_dirs))
    waiting = learner(["pairs"])
    waiting = replace(waiting, train=replace(waiting.train, patience=2))
    with pytest.raises(DataError, match="learns pairs nothing is measured on the split `val`: set it to 0"):
        train_under(waiting, "teacher")
    for asked, why in (("[]", "teacher.learns"), ("[blood]", "teacher.learns")):
        with pytest.raises(ConfigError, match=why):
            load_config(overrides=[f"--teacher.learns={asked}"])
    assert load_config(overrides=["--teacher.learns=[membranes, nuclei]"]).teacher.learns == ["membranes", "nuclei"]
    assert load_config(overrides=[]).teacher.learns == ["label"]


def test_more_heads_change_nothing_of_the_first_weights():
    """A teacher of labels starts from the weights that it always started from."""
    made = []
    for grids in ({}, {"nuclei": 4, "membrane": 2}):
        torch.manual_seed(1)
        made.append(Teacher(build_encoder("resnet10"), ("label",), grids, target=find_target("her2")).state_dict())
    plain, heads = made
    assert all(torch.equal(tensor, heads[name]) for name, tensor in plain.items())
    assert {name.split(".")[1] for name in heads.keys() - plain.keys()} == {"nuclei", "membrane"}
