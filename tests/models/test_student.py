import functools
import json
import time

import pytest
import torch

from lgd.base.errors import DataError
from lgd.base.target import find_target
from lgd.io.digests import digest_of, sha256
from lgd.models.description import LatentSizes, StudentConfig
from lgd.models.encoder import build_encoder
from lgd.models.export import load_weights, save_model
from lgd.models.loading import load_student, student_from
from lgd.models.methods import METHODS
from lgd.models.query_map import QueryMap
from lgd.models.student import HallucinatingStudent, Student
from lgd.models.teacher import Teacher, load_teacher
from tools.bench.inputs import NOT_TRAINED


def student(method="lgd", own=True, latent_map=2, dim=24) -> Student:
    torch.manual_seed(0)
    hallucination = build_encoder("resnet10") if own and method != "he-only" else None
    return METHODS[method].network(
        morphology=build_encoder("resnet10"),
        target=find_target("her2"),
        ordinal=None,
        staining=None,
        hallucination=hallucination,
        latents={"teacher": LatentSizes(dim=dim, map=latent_map)},
        nuclei_grid=4,
        membrane_grid=3,
    )


def finish(model: Student) -> Student:
    """The student with a map for queries, where it gives latents."""
    if isinstance(model, HallucinatingStudent):
        model.query_map = QueryMap(model.streams, 24)
        model.query_map.weight.normal_(generator=torch.Generator().manual_seed(2))
    return model


IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("own", [True, False])
def test_lgd_gives_levels_latents_and_grids(own):
    model = student(own=own)
    out = model(IMAGES)
    shapes = {name: tuple(tensor.shape) for name, tensor in out.items()}
    assert shapes == {
        "logits": (3, 4),
        "features": (3, model.morphology.channels),
        "pooled": (3, 24),
        "streams": (3, model.morphology.channels + 48),
        "map": (3, 24, 2, 2),
        "gate": (3, model.morphology.channels),
        "nuclei": (3, 4, 4),
        "membrane": (3, 3, 3, 3),
    }
    assert all(torch.isfinite(tensor).all() for tensor in out.values())
    assert (out["nuclei"] >= 0).all() and (out["membrane"] >= 0).all()
    assert ((out["gate"] > 0) & (out["gate"] < 1)).all()
    assert out["streams"].shape[1] == model.streams and not out["streams"].requires_grad
    assert torch.equal(out["streams"][:, -24:], out["pooled"])


def described(model, method="he-only"):
    """What is said of a student that was not trained."""
    return functools.partial(model.describe, method=method, size=64, teachers=(), **NOT_TRAINED)


def test_the_map_is_left_out_where_none_is_cached():
    assert "map" not in student(latent_map=0)(IMAGES)


@pytest.mark.parametrize("method", ["two-stream", "distil"])
def test_the_baselines_of_two_streams_are_the_same_network_without_what_they_are_not_taught(method):
    model, full = student(method), student()
    assert set(model(IMAGES)) == {"logits", "features", "gate"}
    names, all_names = (dict(m.named_parameters()) for m in (model, full))
    assert {name: p.shape for name, p in names.items()} == {
        name: p.shape for name, p in all_names.items() if not name.startswith(("nuclei_head", "membrane_head"))
    }
    same = student_from(described(model, method)(weights_sha256="0" * 64))
    same.load_state_dict(model.state_dict())
    assert torch.equal(same(IMAGES)["logits"], model(IMAGES)["logits"])


def test_he_only_gives_levels_and_has_no_hallucination():
    model = student("he-only")
    out = model(IMAGES)
    assert set(out) == {"logits", "features"}
    assert torch.equal(model.head(out["features"]), out["logits"])
    assert not [name for name, _ in model.named_parameters() if "latent" in name or "hallucination" in name]


@pytest.mark.parametrize("own", [True, False])
def test_every_weight_learns(own):
    """A parameter without a gradient would stop the synchronisation of ranks."""
    model = student(own=own)
    out = model(IMAGES)
    sum((out[name] ** 2).mean() for name in ("logits", "pooled", "map", "nuclei", "membrane")).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("method", "own"), [("lgd", True), ("lgd", False), ("he-only", False)])
def test_a_folder_gives_the_same_student_again(method, own, tmp_path):
    model = finish(student(method, own)).eval()
    save_model(tmp_path, model.state_dict(), described(model, method))
    again, config = load_student(tmp_path)
    assert not again.training and config.method == method
    with torch.no_grad():
        before, after = model(IMAGES), again(IMAGES)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_map_adds_what_queries_compare_and_changes_nothing_else():
    before, after = student().eval()(IMAGES), finish(student()).eval()(IMAGES)
    query = after.pop("query")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert query.shape == (3, 24) and not query.requires_grad


def test_a_student_of_before_the_map_is_refused_with_the_remedy(tmp_path):
    model = student()
    save_model(tmp_path, model.state_dict(), described(model, "lgd"))
    with pytest.raises(
        DataError, match=r"2 tensors differ, such as 'query_map.bias' .*or train again where an older lgd"
    ):
        load_student(tmp_path)


def test_other_weights_are_refused(tmp_path):
    model = student("he-only")
    save_model(tmp_path, model.state_dict(), described(model))
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = StudentConfig.read_folder(tmp_path)
    with pytest.raises(DataError, match=r"model\.safetensors does not match its digest"):
        load_weights(tmp_path, lambda: student_from(config), config)


@pytest.mark.parametrize(
    ("backbone", "problem"),
    [
        ({"hidden_sizes": [60_000] * 4}, "field 'morphology.backbone': field 'hidden_sizes' holds 60000"),
        ({"depths": [1, 1, 1, 3_000_000]}, "field 'morphology.backbone': field 'depths' holds 3000000"),
        ({"hidden_sizes": [30_000] * 4}, "its network would be larger than any encoder"),
        ({"hidden_sizes": [9_000] * 4}, "does not hold the weights of the network in config.json"),
        (
            {"depths": [1, 1, 1, 2]},
            "does not hold the weights of the network in config.json: 6 tensors differ, such as",
        ),
        ({"auto_map": {"AutoBackbone": "evil.Model"}}, "field 'morphology.backbone': field 'auto_map' names code"),
        ({"dtype": "float16"}, "field 'dtype' is none of resnet"),
        ({"model_type": "timm_backbone", "backbone": "hf-hub:evil/repo"}, "field 'model_type' is 'timm_backbone'"),
        (None, "field 'morphology.backbone'"),
    ],
)
def test_a_network_of_another_kind_than_its_weights_is_refused_before_it_is_built(backbone, problem, tmp_path):
    """Whoever wrote the folder can make its digest fit."""
    model = student("he-only")
    save_model(tmp_path, model.state_dict(), described(model))
    fields = StudentConfig.read_folder(tmp_path).as_json()
    spec = fields["morphology"]
    spec["backbone"] = backbone and spec["backbone"] | backbone
    document = {"format": StudentConfig.FORMAT, **fields}
    (tmp_path / "config.json").write_text(json.dumps(document | {"digest": digest_of(document)}))
    start = time.process_time()
    with pytest.raises(DataError, match=f"^{tmp_path}/(config.json: .*|model.safetensors ){problem}"):
        load_student(tmp_path)
    assert time.process_time() - start < 5


def test_weights_that_are_no_safetensors_are_told_by_the_name_of_their_file(tmp_path):
    model = student("he-only")
    save_model(tmp_path, model.state_dict(), described(model))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    fields = StudentConfig.read_folder(tmp_path).as_json() | {"weights_sha256": sha256(path)}
    StudentConfig.from_json(fields).write(tmp_path / "config.json")
    with pytest.raises(DataError, match=f"^{path} is no safetensors file, or cut off"):
        load_student(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="config.json is missing: it holds no trained student; run lgd train first"):
        load_student(tmp_path)
    model = student("he-only")
    save_model(tmp_path, model.state_dict(), described(model))
    with pytest.raises(DataError, match="config.json: field .kind.: should be .teacher."):
        load_teacher(tmp_path)


def test_a_loaded_teacher_is_frozen(tmp_path):
    model = Teacher(build_encoder("resnet10"), target=find_target("her2"))
    save_model(tmp_path, model.state_dict(), functools.partial(model.describe, size=64, **NOT_TRAINED))
    teacher, _ = load_teacher(tmp_path)
    assert not [name for name, module in teacher.named_modules() if module.training]
    assert not [p for p in teacher.parameters() if p.requires_grad]
    assert not teacher(IMAGES)["pooled"].requires_grad


def test_latents_are_relative_to_their_mean_and_levels_are_not():
    teacher = Teacher(build_encoder("resnet10"), target=find_target("her2")).requires_grad_(False).eval()
    before = teacher(IMAGES)
    pooled, place = before["pooled"].mean(0), before["map"].mean((0, 2, 3))
    teacher.centre(pooled, place)
    after = teacher(IMAGES)
    torch.testing.assert_close(after["pooled"], before["pooled"] - pooled)
    torch.testing.assert_close(after["map"], before["map"] - place[:, None, None])
    assert torch.equal(after["logits"], before["logits"])
    torch.testing.assert_close(teacher.logits_of(after["pooled"]), after["logits"])
    teacher.centre(after["pooled"].mean(0), after["map"].mean((0, 2, 3)))
    assert teacher(IMAGES)["pooled"].mean(0).abs().max() < 1e-5
