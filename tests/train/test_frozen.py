"""Pretrained encoders as teachers, as they are: through the store, the index, training, queries and a report."""

import contextlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lgd import comparisons, pipeline
from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.cli.contents import check
from lgd.io.files import exists
from lgd.models.description import TeacherConfig
from lgd.models.encoder import build_encoder
from lgd.models.known import stated_in
from lgd.models.teacher import FrozenTeacher, Probe, load_teacher
from lgd.report.ablation import AblateOptions
from lgd.report.ablation_table import AblationDocument
from lgd.report.caveats import probe_caveat
from lgd.retrieval.queries import query
from lgd.shards.builder import build
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_all, read_labels
from lgd.store.probe import find_probe, probe_path
from lgd.store.store import Store
from lgd.stream.plan import World
from lgd.train.launch import train_under
from lgd.train.prepare import Prepared
from lgd.train.tasks import StudentTask, inputs_of

EXAMPLES = Path(__file__).parents[1] / "examples"
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed: make test-encoders"
)


def save_with_transformers(folder: Path, kind: str) -> str:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    more = {"intermediate_size": 64} if kind == "vit" else {}
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **more)).save_pretrained(folder)
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal))
    return str(folder)


def save_with_timm(folder: Path, name: str, **sizes) -> str:
    import timm

    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=0, **sizes)
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    return str(folder)


MAKE = {
    "dinov2": lambda folder: save_with_transformers(folder, "dinov2"),
    "vit": lambda folder: save_with_transformers(folder, "vit"),
    "timm vit": lambda folder: save_with_timm(
        folder, "vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=4, reg_tokens=2, img_size=64
    ),
    "timm convnext": lambda folder: save_with_timm(folder, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 24)),
    "python": lambda folder: "python:mine:tiny",
}
TEACHERS = [
    ("dinov2", "cls+mean", 64),
    ("vit", None, 32),
    pytest.param("timm vit", None, 48, marks=needs_timm),
    pytest.param("timm convnext", None, 24, marks=needs_timm),
    ("python", None, 24),
]


@pytest.fixture
def frozen(tissue_config, change, tmp_path, monkeypatch):
    """`frozen(kind, pool)`: a run whose teacher is a frozen encoder, in folders of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("mine", None)

    def make(kind, pool=None, **student):
        folder = tmp_path / "encoder"
        folder.mkdir(exist_ok=True)
        parts = {name: {"dir": str(tmp_path / name)} for name in ("run", "teacher", "latents", "student", "report")}
        parts["teacher"] |= {"source": "frozen", "encoder": MAKE[kind](folder), "pool": pool}
        parts["student"] |= {"epochs": 0.5, "hallucination": "shared"} | student
        return change(tissue_config, **parts)

    return make


@pytest.mark.parametrize(("kind", "pool", "dim"), TEACHERS)
def test_a_frozen_encoder_teaches_a_student(frozen, tissue, kind, pool, dim):
    config = frozen(kind, pool)
    encoder = build_encoder(config.teacher.encoder, stated_in(config, "teacher"))
    pipeline.train_teacher(config)
    teacher, described = load_teacher(config.teacher.dir, config.code)
    assert isinstance(teacher, FrozenTeacher) and teacher.dim == dim
    assert (described.source, described.steps, described.epochs, described.engine) == ("frozen", 0, 0, "none")
    assert described.pool == encoder.spec.pool and described.training.labelled == 0
    stored = load_file(Path(config.teacher.dir) / "model.safetensors")
    if kind != "python":
        # Its factory draws weights of its own at each call.
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(stored[f"encoder.{name}"], tensor), name
    assert not [name for name in stored if name.startswith("head")]

    # The latents of the training split are relative to their mean.
    pipeline.cache_latents(config)
    store = Store(config.latents.dir)
    training = ShardSet.open(config.shard_dirs).of_split("train")
    pooled = torch.cat([torch.tensor(part.array("pooled")[:, 0]).float() for part in store.parts_of(training)])
    assert pooled.shape == (20, dim) and pooled.mean(dim=0).abs().max() < 1e-3 * pooled.abs().max() + 1e-3
    assert store.recipe.teacher.source == "frozen" and store.recipe.teacher.pool == encoder.spec.pool

    pipeline.build_index(config)
    pipeline.train_student(config)
    again = load_file(Path(config.teacher.dir) / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    image = next((tissue / "HE" / "test").iterdir())
    answers = query(config.student.dir, config.latents.dir, [str(image)], k=2)
    assert len(answers[0].neighbours) == 2


def test_a_probe_of_its_stored_latents_is_its_row_in_a_report(frozen, change, caplog):
    config = frozen("dinov2")
    caplog.set_level("INFO")
    for stage in (pipeline.train_teacher, pipeline.cache_latents, pipeline.build_index, pipeline.train_student):
        stage(config)
    assert "a probe for the level was fitted on 20 labelled training patches of" in caplog.text
    # Its network is not asked: the latents and the labels of the store are enough.
    shutil.move(Path(config.teacher.dir) / "model.safetensors", Path(config.teacher.dir) / "elsewhere")
    table = pipeline.evaluate(config)
    (row,) = [line for line in table.splitlines() if line.startswith("IHC teacher, probe")]
    assert row.split()[3:5] == ["20", "5"]
    report = json.loads((Path(config.report.dir) / "metrics.json").read_text())
    store, shards = Store(config.latents.dir), ShardSet.open(config.shard_dirs)
    probe = find_probe(store, shards.of_split("train"))
    assert probe_caveat(probe, None, find_target("her2")) in report["caveats"]
    assert [one["minus"] for one in report["differences"]] == ["colour only", "IHC teacher, probe"]
    parts = store.parts_of(shards.of_split("test"))
    pooled_nD = torch.from_numpy(read_all(parts, "pooled")[:, 0]).float()
    said_n, level_n = probe.network().logits_of(pooled_nD).argmax(dim=1).numpy(), read_labels(parts)
    (model,) = [one for one in report["models"] if one["name"] == "IHC teacher, probe"]
    assert model["by_patch"]["metrics"]["accuracy"]["value"] == pytest.approx((said_n == level_n).mean())
    # Without it, or with one of other rows, nothing is scored.
    probe_path(store).unlink()
    with pytest.raises(DataError, match="probe/teacher.json is missing.*run lgd cache-latents"):
        pipeline.evaluate(config)
    pipeline.cache_latents(config)
    assert find_probe(store, shards.of_split("train")) == probe


def test_nothing_of_it_is_ever_trained(frozen):
    config = frozen("dinov2", "mean")
    teacher = FrozenTeacher(build_encoder(config.teacher.encoder), target=find_target("her2")).train()
    assert not teacher.training and not any(one.training for one in teacher.modules())
    assert not [name for name, one in teacher.named_parameters() if one.requires_grad]
    assert not teacher(torch.zeros(1, 3, 64, 64))["pooled"].requires_grad
    with pytest.raises(ConfigError, match="student.distil_weight and student.contrast_weight to 0"):
        teacher.logits_of(torch.zeros(1, 32))


@pytest.fixture
def unlabelled(change, tmp_path, tissue):
    """`unlabelled(config)`: a run over six pairs without a label."""
    pairs = shutil.copytree(tissue, tmp_path / "tissue") / "pairs.csv"
    names = [path.name for path in sorted((tissue / "HE" / "train").iterdir())[:6]]
    rows = [f"HE/train/{name},IHC/train/{name},train" for name in names]
    pairs.write_text("\n".join(["he,ihc,split", *rows]) + "\n")
    build(ShardOptions(layout="csv", root=str(pairs), out=str(tmp_path / "shards"), shard_size=8))
    return lambda config: change(config, data={"shards": [str(tmp_path / "shards")]})


def test_it_needs_no_labels_and_is_reused(frozen, change, unlabelled):
    config = unlabelled(frozen("vit"))
    assert train_under(config, "teacher") and not train_under(config, "teacher", overwrite=False)
    # Neither what training depends on nor what nothing is trained with.
    assert not train_under(change(config, train={"lr": 0.5}, teacher={"epochs": 3}), "teacher", overwrite=False)
    described = TeacherConfig.read_folder(config.teacher.dir)
    assert described.training.labels["unknown"] == 6
    with pytest.raises(DataError, match="--overwrite"):
        train_under(change(config, teacher={"pool": "mean"}), "teacher", overwrite=False)


LEVELS_TEACH = [{"distil_weight": 1.0}, {"contrast_weight": 0.5}, {"method": "distil", "distil_weight": 1.0}]


@pytest.mark.parametrize("student", LEVELS_TEACH)
def test_a_probe_gives_the_levels_that_teach_a_student(frozen, student):
    config = frozen("vit", **student)
    train_under(config, "teacher")
    pipeline.cache_latents(config)
    assert train_under(config, "student")
    store, shards = Store(config.latents.dir), ShardSet.open(config.shard_dirs)
    task = StudentTask(config, ShardSet.open(config.shard_dirs))
    inputs = inputs_of(task, shards)
    assert inputs["task"]["probe"] == find_probe(store, shards.of_split("train")).digest
    with contextlib.closing(Prepared(shards, task, World())) as run:
        assert isinstance(run.learner.task.method.labeller, Probe)
        batch = next(run.batches.draw(0, 1)).micro[0]
        naive = run.learner.task.method.labeller
        expected_B4 = batch.stored["pooled"] @ naive.weight.T + naive.bias
        torch.testing.assert_close(run.learner.task.method.soft_labels(batch.stored["pooled"]), expected_B4)
    probe_path(store).unlink()
    with pytest.raises(DataError, match="run lgd cache-latents"):
        train_under(config, "student", overwrite=True)


def test_a_student_that_no_level_teaches_needs_no_probe(frozen):
    config = frozen("vit")
    train_under(config, "teacher")
    pipeline.cache_latents(config)
    probe_path(Store(config.latents.dir)).unlink()
    assert train_under(config, "student")


def test_pruning_leaves_no_probe_of_rows_that_are_gone(frozen, unlabelled):
    config = frozen("vit")
    other = unlabelled(config)
    train_under(config, "teacher")
    pipeline.cache_latents(config)
    path, before = probe_path(Store(config.latents.dir)), find_probe(*probe_place(config))
    pipeline.cache_latents(other)
    assert find_probe(*probe_place(config)) == before, "another run's rows do not concern it"
    pipeline.cache_latents(other, prune=True)
    assert not path.exists() and check(Path(config.latents.dir))[1] == []
    pipeline.cache_latents(config)
    assert find_probe(*probe_place(config)) == before
    pipeline.cache_latents(config, prune=True)
    assert find_probe(*probe_place(config)) == before and check(Path(config.latents.dir))[1] == []


def probe_place(config):
    return Store(config.latents.dir), ShardSet.open(config.shard_dirs).of_split("train")


@pytest.mark.parametrize("student", LEVELS_TEACH)
def test_without_any_label_nothing_gives_levels(frozen, unlabelled, student):
    config = unlabelled(frozen("vit", **student))
    train_under(config, "teacher")
    pipeline.cache_latents(config)
    assert not exists(probe_path(Store(config.latents.dir)))
    with pytest.raises(ConfigError, match=r"labels of fewer than two levels .*student.contrast_weight to 0"):
        train_under(config, "student")
    assert not Path(config.student.dir).exists()


def test_random_weights_are_no_teacher(frozen, change):
    config = change(frozen("vit"), teacher={"encoder": "resnet10"})
    with pytest.raises(ConfigError, match="teacher.encoder is resnet10, whose weights are random: name a pretrained"):
        train_under(config, "teacher")


def test_methods_are_compared_by_its_probe(frozen):
    config = frozen("vit", epochs=0.3)
    table = comparisons.ablate(config, AblateOptions(seeds=1))
    assert "| IHC teacher, probe |" in table and "| label distillation |" in table and "| IHC teacher |" not in table
    document = AblationDocument.read(Path(config.run.dir) / "ablation" / "ablation.json")
    assert any(caveat.startswith("IHC teacher, probe: no label taught the teacher") for caveat in document.caveats)
    assert -1 < document.explained_by_levels <= 1


def test_a_student_that_cannot_be_had_is_told_before_the_teacher(frozen, change, tmp_path):
    (tmp_path / "other").mkdir()
    config = change(frozen("vit"), student={"encoder": str(tmp_path / "other")})
    with pytest.raises(DataError, match=f"encoder {tmp_path / 'other'}: config.json is missing"):
        train_under(config, "teacher")
    assert not Path(config.teacher.dir).exists()
