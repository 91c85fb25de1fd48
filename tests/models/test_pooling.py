"""The CLS token and the mean, of encoders of transformers."""

import json
import shutil

import pytest
import torch
from networks import TINY, change_json, save_network
from transformers import AutoBackbone, AutoModel

from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.config_files import load_config
from lgd.models.description import LatentSizes
from lgd.models.encoder import Encoder, build_encoder
from lgd.models.known import stated_in
from lgd.models.losses import Lesson
from lgd.models.methods import LgdNet
from lgd.models.spec import WITH_CLS, EncoderSpec, Facts
from lgd.models.student import HallucinatingStudent
from lgd.models.teacher import Teacher


def images(side: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=WITH_CLS)
def folder(request, tmp_path_factory):
    more = {"num_register_tokens": 2} if request.param == "dinov3_vit" else {}
    side = {"image_size": 112, "patch_size": 16}
    return save_network(tmp_path_factory.mktemp(request.param), request.param, **side, **more)


def normalise(rgb: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    return (rgb / 255 - mean) / std


@pytest.mark.parametrize("side", [112, 160])
def test_map_and_cls_are_those_of_the_whole_network(folder, side):
    rgb, whole = images(side), AutoModel.from_pretrained(folder).eval()
    interpolate = {"interpolate_pos_encoding": True} if whole.config.model_type == "vit" else {}
    encoder = build_encoder(str(folder)).eval()
    assert encoder.spec.pool == "cls" and encoder.spec.size == 112 and encoder.dim == encoder.channels == 32
    with torch.no_grad():
        tokens = whole(normalise(rgb), **interpolate).last_hidden_state
        map_BCHW, pooled_BD = encoder(rgb)
        torch.testing.assert_close(pooled_BD, tokens[:, 0])
        patches = (side // 16) ** 2
        torch.testing.assert_close(map_BCHW.flatten(2).transpose(1, 2), tokens[:, -patches:])
        if whole.config.model_type != "vit":
            backbone = AutoBackbone.from_config(whole.config).eval()
            backbone.load_state_dict(whole.state_dict())
            torch.testing.assert_close(map_BCHW, backbone(normalise(rgb)).feature_maps[-1])


def test_each_way_to_pool(folder):
    encoders = {pool: build_encoder(str(folder), Facts(pool=pool)).eval() for pool in ("cls", "mean", "cls+mean")}
    with torch.no_grad():
        out = {pool: encoder(images(64)) for pool, encoder in encoders.items()}
    maps = [one.map_BCHW for one in out.values()]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    assert torch.equal(out["mean"].pooled_BD, maps[0].mean(dim=(2, 3)))
    assert torch.equal(out["cls+mean"].pooled_BD, torch.cat([out["cls"].pooled_BD, out["mean"].pooled_BD], dim=1))
    assert not torch.allclose(out["cls"].pooled_BD, out["mean"].pooled_BD, atol=1e-3)
    assert [encoder.dim for encoder in encoders.values()] == [32, 32, 64]


def test_an_encoder_without_a_cls_token_pools_by_mean_only():
    assert build_encoder("resnet10").spec.pool == "mean"
    with pytest.raises(DataError, match="encoder resnet10 has no CLS token, and `pool` is cls: set it to mean"):
        build_encoder("resnet10", Facts(pool="cls"))


def test_an_image_that_is_not_made_of_whole_patches_is_refused(folder):
    encoder = build_encoder(str(folder))
    with pytest.raises(DataError, match="patches of 16 px, and 72 x 72 px are not .*: set data.size to 64 or 80"):
        encoder(images(72))


def test_layers_before_the_last_are_no_encoder(tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "copy")
    change_json(folder / "config.json", out_features=["stage1"], out_indices=[1])
    with pytest.raises(DataError, match="field 'out_features' names other layers than the last: remove it"):
        build_encoder(str(folder))


def test_what_the_config_states_goes_before_the_files(tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"preprocessor_config.json is missing: .* or state mean and std"):
        build_encoder(str(folder))
    given = ["--teacher.mean=[0.5, 0.4, 0.3]", "--teacher.std=[0.2, 0.2, 0.1]", "--teacher.mpp=0.5"]
    config = load_config(overrides=[f"--teacher.encoder={folder}", "--teacher.pool=mean", *given])
    spec = build_encoder(config.teacher.encoder, stated_in(config, "teacher")).spec
    assert (spec.mean, spec.std, spec.mpp, spec.pool) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 0.5, "mean")
    assert build_encoder(str(tiny_dinov2)).spec.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--teacher.mean=[0.5, 0.5, 0.5]"], "give both teacher.mean and teacher.std"),
        (["--student.std=[0.5, 0.5, 0.5]"], "give both student.mean and student.std"),
        (["--teacher.mean=[124, 116, 104]", "--teacher.std=[1, 1, 1]"], "teacher: field 'mean.0'"),
        (["--teacher.mean=[0.5, 0.5]", "--teacher.std=[1, 1]"], "teacher: field 'mean.2'"),
        (["--teacher.mean=white", "--teacher.std=[1, 1, 1]"], "'white' should be a list of numbers"),
        (["--teacher.mpp=-1"], "teacher: field 'mpp'"),
        (["--teacher.pool=max"], "'max' should be one of cls, mean, cls.mean"),
    ],
)
def test_a_wrong_statement_is_told_by_its_field(given, problem):
    with pytest.raises(ConfigError, match=problem):
        stated_in(load_config(overrides=given), "teacher")


@pytest.mark.parametrize("facts", [Facts(mean=(0.5,) * 3, std=(0.5,) * 3), Facts(arguments={"depth": 1})], ids=str)
def test_code_outside_lgd_normalises_by_itself(facts):
    with pytest.raises(DataError, match="leave them out"):
        build_encoder("python:mine:make_encoder", facts)


def test_a_latent_of_cls_and_mean_is_hallucinated_with_a_map_of_half_its_width(folder, tmp_path):
    """The map's target is what the pooled latent ends with: its mean."""
    encoder = build_encoder(str(folder), Facts(pool="cls+mean"))
    teacher = Teacher(encoder, target=find_target("her2")).eval()
    with torch.no_grad():
        out = teacher(images(64))
        teacher.centre(out["pooled"].mean(dim=0), out["map"].mean(dim=(0, 2, 3)))
        out = teacher(images(64))
    assert out["pooled"].shape == (2, 64) and out["map"].shape == (2, 32, 4, 4)
    torch.testing.assert_close(out["pooled"][:, 32:], out["map"].mean(dim=(2, 3)), rtol=1e-4, atol=1e-6)
    student = HallucinatingStudent(
        morphology=build_encoder("resnet10"),
        target=find_target("her2"), ordinal=None, staining=None, hallucination=None,
        latents={"teacher": LatentSizes(dim=64, map=4)},
        nuclei_grid=2, membrane_grid=2,
    )  # fmt: skip
    hallucinated = student(images(64))
    stored = {
        "pooled": out["pooled"], "map": out["map"], "nuclei": torch.zeros(2, 2, 2), "membrane": torch.zeros(2, 2, 2, 3)
    }  # fmt: skip
    config = load_config(overrides=["--student.hallucination=shared"])
    label_B = torch.tensor([0, 1])
    terms = LgdNet(config, find_target("her2")).losses(
        hallucinated, Lesson(label_B=label_B, stored=stored, negatives=None)
    )
    again = terms["hallucination_map"].sum()
    again.backward()
    gradient = student.adaptors[0].to_latent_map.weight.grad
    assert torch.isfinite(again) and not gradient[:32].any() and gradient[32:].any()


def test_a_student_reads_the_cls_token_of_its_encoder(folder):
    encoder = build_encoder(str(folder)).eval()
    student = HallucinatingStudent(
        morphology=encoder,
        target=find_target("her2"),
        ordinal=None,
        staining=None,
        hallucination=None,
        latents={"teacher": LatentSizes(dim=8, map=2)},
        nuclei_grid=2,
        membrane_grid=2,
    ).eval()
    with torch.no_grad():
        assert torch.equal(student(images(64))["features"], encoder(images(64)).pooled_BD)


def test_a_plain_vit_of_older_transformers_takes_its_weights(tmp_path):
    """Phikon's file names its tensors as they were named before transformers 5."""
    from safetensors.torch import load_file, save_file

    folder = save_network(tmp_path / "new", "vit", image_size=112, patch_size=16)
    encoder = build_encoder(str(folder))
    tensors = load_file(folder / "model.safetensors")
    assert any(".attention." in name for name in tensors)
    old = {name if name.startswith("vit.") else f"vit.{name}": tensor for name, tensor in tensors.items()}
    save_file(old | {"classifier.weight": torch.zeros(3, 32)}, folder / "model.safetensors")
    again = build_encoder(str(folder))
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images(112)).pooled_BD, again.eval()(images(112)).pooled_BD)


def test_a_specification_without_cls_may_not_pool_by_it():
    fields = {"name": "x", "batchnorm": "group", "mean": [0.5] * 3, "std": [0.5] * 3, "size": None, "mpp": None}
    spec = EncoderSpec.from_json(
        fields | {"backbone": {"model_type": "resnet", **TINY["resnet"]}, "pool": "cls+mean", "licence": None}
    )
    with pytest.raises(DataError, match="has no CLS token"):
        Encoder(spec)
    assert json.dumps(spec.as_json())
