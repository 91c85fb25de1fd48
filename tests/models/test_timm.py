"""Encoders of timm, with seeded random weights in folders as timm saves them."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from networks import change_json
from safetensors.torch import load_file, save_file

from lgd.base.errors import DataError
from lgd.models.encoder import Encoder, build_encoder, describe
from lgd.models.spec import EncoderSpec, Facts

timm = pytest.importorskip("timm", reason="timm is not installed: make test-encoders")

TINY = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4, "reg_tokens": 2, "img_size": 64},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 56, "use_fc_norm": False},
    "vit_small_patch16_dinov3": {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)},
    "resnet10t": {},
}
CLS = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")


def save_timm(folder: Path, name: str, **more) -> Path:
    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=0, **TINY.get(name, {}), **more)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module", params=TINY)
def saved(request, tmp_path_factory):
    return request.param, save_timm(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_timm(tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224")


def images(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalise(encoder: Encoder, rgb: torch.Tensor) -> torch.Tensor:
    """(rgb / 255 - mean) / std, in the order that gives the same last digit."""
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (encoder.spec.mean, encoder.spec.std))
    return (rgb - mean) / std


def test_the_map_is_that_of_the_network_as_timm_loads_it(saved):
    name, folder = saved
    encoder = build_encoder(str(folder)).eval()
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    rgb = images(encoder.spec.size)
    with torch.no_grad():
        map_BCHW, pooled_BD = encoder(rgb)
        expected = whole.forward_features(normalise(encoder, rgb))
    assert map_BCHW.shape[1] == encoder.channels == encoder.dim and pooled_BD.shape == (2, encoder.dim)
    if name in CLS:
        torch.testing.assert_close(pooled_BD, expected[:, 0], rtol=1e-4, atol=1e-5)
        patches = expected[:, whole.num_prefix_tokens :].transpose(1, 2)
        torch.testing.assert_close(map_BCHW.flatten(2), patches, rtol=1e-4, atol=1e-5)
    else:
        # Swin gives its channels last.
        expected = expected.permute(0, 3, 1, 2) if "swin" in name else expected
        torch.testing.assert_close(map_BCHW, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(pooled_BD, map_BCHW.mean(dim=(2, 3)))
    assert encoder.spec.pool == ("cls" if name in CLS else "mean")


def test_the_cls_token_of_a_vit_is_what_timm_gives(vit):
    encoder = build_encoder(str(vit)).eval()
    whole = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(encoder(images(64)).pooled_BD, whole(normalise(encoder, images(64))))
        both = build_encoder(str(vit), Facts(pool="cls+mean")).eval()(images(64))
    assert both.pooled_BD.shape == (2, 96) and torch.equal(both.pooled_BD[:, 48:], both.map_BCHW.mean(dim=(2, 3)))


def test_the_same_network_is_built_again_without_its_folder(saved, tmp_path):
    name, folder = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    encoder = build_encoder(str(copy)).eval()
    spec, weights = json.loads(json.dumps(encoder.spec.as_json())), encoder.state_dict()
    shutil.rmtree(copy)
    again = Encoder(EncoderSpec.from_json(spec)).eval()
    again.load_state_dict(weights)
    rgb = images(encoder.spec.size)
    with torch.no_grad():
        assert all(map(torch.equal, encoder(rgb), again(rgb)))
    assert spec["backbone"]["architecture"] == name and spec["backbone"]["num_classes"] == 0


def test_other_sizes_are_taken_in_whole_patches_only(vit):
    encoder = build_encoder(str(vit)).eval()
    with torch.no_grad():
        assert encoder(images(96)).map_BCHW.shape == (2, 48, 6, 6)
    with pytest.raises(DataError, match="patches of 16 px, and 72 x 72 px .*: set data.size to 64 or 80"):
        encoder(images(72))
    fixed = build_encoder(str(vit), Facts(arguments={"dynamic_img_size": False}))
    with pytest.raises(DataError, match="takes images of 64 px only, .*: set data.size to 64"):
        fixed(images(96))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_become_float32(vit, tmp_path, dtype):
    folder = shutil.copytree(vit, tmp_path / "copy")
    half = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    encoder = build_encoder(str(folder))
    state = encoder.backbone.network.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in half.items())


def test_classes_are_named(tmp_path):
    from timm.layers import SwiGLUPacked

    plain = {**TINY["vit_tiny_patch16_224"], "mlp_ratio": 4}
    torch.manual_seed(3)
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **plain, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU
    )
    stated = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
    timm.models.save_for_hf(
        network, tmp_path, safe_serialization=True, model_args={**plain, "mlp_layer": None, "act_layer": None}
    )
    with pytest.raises(DataError, match="its weights do not fit config.json"):
        build_encoder(str(tmp_path))
    encoder = build_encoder(str(tmp_path), Facts(arguments=stated)).eval()
    assert encoder.spec.backbone["mlp_layer"] == "SwiGLUPacked"
    with torch.no_grad():
        expected = network.eval()(normalise(encoder, images(64)))
        torch.testing.assert_close(encoder(images(64)).pooled_BD, expected)
    with pytest.raises(DataError, match="its arguments make no network"):
        build_encoder(str(tmp_path), Facts(arguments={"mlp_layer": "os.system"}))


def _lack(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.1.norm1.weight"]
    save_file(tensors | {"head.weight": torch.zeros(10_000)}, folder / "model.safetensors")


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": torch.zeros(1)}))


def _set(**fields):
    return lambda folder: change_json(folder / "config.json", **fields)


WRONG = {
    "a tensor lacks": (_lack, "they lack 1 tensors, such as 'blocks.1.norm1.weight'"),
    "pickled weights": (_pickle, "model.safetensors is missing: .* never read"),
    "code": (_set(auto_map={"AutoModel": "evil.M"}), "field 'auto_map' names code"),
    "another network": (_set(model_args={"depth": 3, "embed_dim": 48, "num_heads": 4, "img_size": 64}), "do not fit"),
    "a file": (_set(architecture="/etc/passwd"), "is '/etc/passwd', which is no name of one of timm's networks"),
    "a repository": (_set(architecture="hf-hub:evil/repo"), "which is no name of one of timm's networks"),
    "an unknown one": (_set(architecture="no_such_network"), "make no network"),
    "weights elsewhere": (_set(model_args={"checkpoint_path": "/x"}), "argument 'checkpoint_path' cannot be set"),
    "another source": (_set(model_args={"pretrained_cfg": "x"}), "argument 'pretrained_cfg' cannot be set"),
    "too many layers": (_set(model_args={"depth": 10**6}), "field 'depth' holds 1000000: an encoder has 0 to 100"),
    "too wide": (
        _set(model_args={"depth": 90, "embed_dim": 30_000, "num_heads": 4}), "larger than any encoder: .*'embed_dim'"
    ),
    "no mean": (_set(pretrained_cfg={"input_size": [3, 64, 64]}), "states no mean and std: copy it from"),
    "a mean of 0 to 255": (_set(pretrained_cfg={"mean": [124, 116, 104], "std": [1, 1, 1]}), "field 'mean.0'"),
    "grey": (_set(model_args={"in_chans": 1}), "field 'in_chans' is 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_accepted_is_told_in_one_line(vit, tmp_path, kind, monkeypatch):
    folder = shutil.copytree(vit, tmp_path / "copy")
    spoil, problem = WRONG[kind]
    spoil(folder)
    monkeypatch.setattr("pickle.load", lambda *_: pytest.fail("a pickle was read"))
    with pytest.raises(DataError, match=f"^encoder {folder}: .*{problem}") as caught:
        build_encoder(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_names_of_timm_lead_to_its_repositories():
    from lgd.models.timm_backbone import find_hub_name

    assert find_hub_name("timm:resnet10t.c3_in1k") == "timm:hf-hub:timm/resnet10t.c3_in1k"
    assert find_hub_name("timm:hf-hub:org/name@1") == "timm:hf-hub:org/name@1"
    with pytest.raises(DataError, match="encoder timm:resnet11: timm knows no such network"):
        describe("timm:resnet11")
