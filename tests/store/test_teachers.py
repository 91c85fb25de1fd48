"""Latents of several teachers in one store: added one by one, taught together, queried each by its name."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from filling import contents_of
from networks import save_network

from lgd import pipeline
from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.cli.contents import check
from lgd.cli.facts import describe
from lgd.config_files import load_config
from lgd.io.location import as_location
from lgd.models.description import StudentConfig
from lgd.models.loading import load_student
from lgd.models.losses import Lesson, hallucination_loss
from lgd.models.methods import LgdNet
from lgd.models.teacher import FrozenTeacher, Teacher, load_teacher
from lgd.retrieval.queries import BIASED, query
from lgd.runs.folder import note_changes, read_stages
from lgd.shards.shard_set import ShardSet
from lgd.store import supervision
from lgd.store.cache import cache_latents
from lgd.store.probe import find_probe
from lgd.store.store import Store
from lgd.train.tasks import StudentTask


def shards_of(config):
    return ShardSet.open(config.shard_dirs).shards


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = save_network(tmp_path_factory.mktemp("vit") / "vit", "vit", image_size=64, patch_size=16)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return str(folder)


@pytest.fixture
def second(tissue_run, change, tmp_path, vit):
    """The run of `tissue_run` with a copy of its store, whose teacher now is a frozen encoder of another name."""
    shutil.copytree(tissue_run.latents.dir, tmp_path / "latents")
    teacher = {"name": "vit", "dir": str(tmp_path / "teacher-vit"), "source": "frozen", "encoder": vit}
    student = {"dir": str(tmp_path / "student"), "epochs": 0.5}
    folders = {name: {"dir": str(tmp_path / name)} for name in ("run", "latents", "report")}
    return change(tissue_run, teacher=teacher, student=student, **folders)


def test_a_second_teacher_is_added_without_the_first(second, monkeypatch):
    """The first one's forward is never called, its bytes stay, and no domain target is measured again."""
    folder, calls = Path(second.latents.dir), {Teacher: 0, FrozenTeacher: 0}
    before, first = contents_of(folder), Store(folder)
    forward = Teacher.forward

    def counting(self, images):
        calls[type(self)] += len(images)
        return forward(self, images)

    pipeline.train_teacher(second)
    with monkeypatch.context() as patched:
        patched.setattr(Teacher, "forward", counting)
        for measure in ("nuclei_grid", "membrane_grid"):
            patched.setattr(supervision, measure, lambda *_: pytest.fail("a target was measured again"))
        made, computed, pruned = cache_latents(second, shards_of(second), workers=0)
    # Beside the rows the two fixed images.
    assert (computed, pruned) == (len(made.parts), 0) and calls == {Teacher: 0, FrozenTeacher: made.rows + 2}
    after = contents_of(folder)
    assert {name: after[name] for name in before} == before and len(after) == 1.5 * len(before)
    assert made.document.teachers["teacher"] == first.document.teachers["teacher"]
    assert made.sources.teachers == {"teacher": first.sources.teachers["teacher"], "vit": second.teacher.dir}
    # A student of the first teacher does not depend on what else the store holds.
    assert Store(folder).digest_of(shards_of(second)) == first.digest_of(shards_of(second))
    assert Store(folder).parts[0].layout["pooled"].shape == first.parts[0].layout["pooled"].shape
    assert made.parts[0].layout["pooled"].shape == (1, 32) and made.teacher == "vit"
    assert cache_latents(second, shards_of(second), workers=0).computed == 0
    assert (made.verify(), check(as_location(folder), reencode=4)[1]) == ([], [])
    facts = describe(as_location(folder))
    assert facts["latents_of_vit"].startswith("32 numbers") and "latents_of_teacher" in facts


@pytest.fixture
def both(second, change):
    """The same, its second teacher cached, and both teaching the student; the ViT first."""
    pipeline.train_teacher(second)
    pipeline.cache_latents(second)
    return change(second, student={"teachers": ["vit", "teacher"], "hallucination": "auto"})


def test_two_teachers_teach_one_student_and_are_queried_by_name(both, change, tissue_run, tissue):
    pipeline.build_index(both)
    pipeline.train_student(both)
    config = StudentConfig.read_folder(both.student.dir)
    names = {name: layer.recipe.weights_sha256 for name, layer in Store(both.latents.dir).document.teachers.items()}
    assert {one.name: one.weights_sha256 for one in config.teachers} == names
    assert [*config.latents] == ["vit", "teacher"] and config.latents["vit"].dim == 32
    # A foundation model is not copied into the student.
    assert config.hallucination is None
    student, _ = load_student(both.student.dir)
    with torch.inference_mode():
        out = student(torch.zeros(1, 3, 64, 64))
    assert {name for name in out if name.startswith(("pooled", "query", "map"))} == {
        *("pooled", "query", "map", "pooled@teacher", "query@teacher", "map@teacher")
    }
    line = json.loads(Path(both.student.dir, "log.jsonl").read_text().splitlines()[-1])
    assert line["hallucination"] > 0 and line["hallucination_map"] > 0

    (image,) = sorted((tissue / "HE" / "test").iterdir())[:1]
    answers = {
        name: query(both.student.dir, both.latents.dir, str(image), k=3, teacher=name)[0].neighbours
        for name in (None, "vit", "teacher")
    }
    assert answers[None] == answers["vit"]
    assert [hit.distance for hit in answers["vit"]] != [hit.distance for hit in answers["teacher"]]
    (key,) = query(None, both.latents.dir, keys=[answers["vit"][0].key], k=1, teacher="vit")
    assert len(key.neighbours) == 1
    with pytest.raises(DataError, match=r"holds no latents of 'uni', only of teacher, vit: name one of these"):
        query(both.student.dir, both.latents.dir, str(image), k=3, teacher="uni")
    with pytest.raises(DataError, match=r"are of another teacher \(.*than this student hallucinates \(teacher, "):
        query(tissue_run.student.dir, both.latents.dir, str(image), k=3, teacher="vit")
    pipeline.build_index(change(both, latents={"bias": 3.0}))
    for name in ("vit", "teacher"):
        (answer,) = query(both.student.dir, both.latents.dir, str(image), k=3, teacher=name)
        assert answer.notes[-1] == BIASED
    assert "LGD-Net" in pipeline.evaluate(both)


def test_losses_of_several_teachers_weigh_alike(both):
    random = torch.Generator().manual_seed(0)
    shapes = {"pooled": (2, 8), "pooled@b": (2, 6), "map": (2, 8, 2, 2), "nuclei": (2, 2, 2), "membrane": (2, 2, 2, 3)}
    out = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()} | {"logits": torch.zeros(2, 4)}
    stored = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    terms = LgdNet(both, find_target("her2")).losses(out, Lesson(label_B=torch.tensor([0, 1]), stored=stored))
    each = [hallucination_loss(out[name], stored[name], "smooth-l1") for name in ("pooled", "pooled@b")]
    torch.testing.assert_close(terms["hallucination"], (each[0] + each[1]) / 2)
    torch.testing.assert_close(terms["hallucination_map"], hallucination_loss(out["map"], stored["map"], "smooth-l1"))


def test_soft_levels_are_those_of_the_first_teacher(both, tissue_run, change):
    """By its head where labels taught it, and else by its probe, whichever teacher the run names."""
    shards, training = ShardSet.open(both.shard_dirs), ShardSet.open(both.shard_dirs).of_split("train")
    for run_s in (both.teacher, tissue_run.teacher):
        config = replace(change(both, student={"distil_weight": 1.0}), teacher=run_s)
        assert StudentTask(config, shards).find_probe(shards) == find_probe(
            Store(both.latents.dir, teachers=["vit"]), training
        )
        task = StudentTask(change(config, student={"teachers": ["teacher", "vit"]}), ShardSet.open(config.shard_dirs))
        assert task.find_probe(shards) is None and task.method.teacher_dir == tissue_run.teacher.dir
        pooled_nD = torch.tensor(task.store.parts[0].array("pooled")[:, 0]).float()
        teacher, _ = load_teacher(tissue_run.teacher.dir)
        torch.testing.assert_close(task.method.soft_labels(pooled_nD), teacher.logits_of(pooled_nD))


def test_another_teacher_of_a_name_that_is_there_is_refused(second, change):
    before = contents_of(Path(second.latents.dir))
    twin = change(second, teacher={"name": "teacher"})
    pipeline.train_teacher(twin)
    with pytest.raises(DataError, match="was made by another recipe") as error:
        pipeline.cache_latents(twin)
    assert "name these latents otherwise than teacher (teacher.name)" in "\n".join(map(str, error.value.args))
    assert contents_of(Path(second.latents.dir)) == before


def test_of_a_teacher_that_has_fewer_shards_only_these_are_seen(second, change):
    shards = shards_of(second)
    pipeline.train_teacher(second)
    few = cache_latents(second, shards[:1], workers=0).store
    whole = Store(second.latents.dir)
    assert (len(few.parts), len(whole.parts)) == (1, len(shards)) and whole.verify() == []
    with pytest.raises(DataError, match=r"lacks latents of vit for \d+ of \d+ shards"):
        few.parts_of(shards)
    # The rest is added; and what no shard of the run has goes from both.
    assert cache_latents(second, shards, workers=0).computed == len(shards) - 1
    left, _, pruned = cache_latents(second, shards[:1], workers=0, prune=True)
    assert (len(left.parts), len(Store(second.latents.dir).parts), pruned) == (1, 1, len(shards) - 1)
    assert left.verify() == []


def test_a_further_teacher_that_was_trained_again_since_is_refused(both, change):
    third = change(
        both, teacher={"name": "third", "dir": f"{both.teacher.dir}-3"}, student={"teachers": ["third", "vit"]}
    )
    pipeline.train_teacher(third)
    pipeline.cache_latents(third)
    shutil.rmtree(both.teacher.dir)
    pipeline.train_teacher(change(both, teacher={"mean": [0.4] * 3, "std": [0.2] * 3}))
    config = json.loads(Path(both.teacher.dir, "config.json").read_text())
    assert config["encoder"]["mean"] == [0.4] * 3
    with pytest.raises(DataError, match=r"the latents of vit in .* are of another teacher than .* holds now"):
        pipeline.train_student(third)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher.name=patches"], "teacher.name, or one of student.teachers, is 'patches'"),
        (["--teacher.name=../x"], "is '../x': use up to 64 letters, digits and _"),
        (["--student.teachers=[a, a]"], "student.teachers names a twice"),
    ],
)
def test_names_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config(overrides=options)


def test_only_a_preset_is_copied_into_the_student(tissue_run, second, change):
    student, (teacher, _) = LgdNet(tissue_run, find_target("her2")).build(), load_teacher(tissue_run.teacher.dir)
    for one, other in zip(student.hallucination.parameters(), teacher.encoder.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad
    with pytest.raises(ConfigError, match=r"student.hallucination is own, and teacher.encoder is .*: only a preset"):
        pipeline.train_student(change(second, student={"hallucination": "own"}))
    assert load_config(overrides=["--teacher.name=uni2"]).teacher.dir.endswith("/teacher-uni2")


def test_a_stage_is_compared_with_what_its_own_teacher_was_given(second, tissue_run, change):
    first = change(second, teacher=asdict(tissue_run.teacher))
    for config in (first, second):
        pipeline.train_teacher(config)
        pipeline.cache_latents(config)
    assert len(read_stages(second.run.dir)["cache-latents"]) == 2
    assert [note_changes(config, "build-index") for config in (first, second)] == ["", ""]
    assert "latents.dtype is float32 and was float16" in note_changes(
        change(first, latents={"dtype": "float32"}), "train"
    )
