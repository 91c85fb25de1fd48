import json
import re
import shutil

import pytest
import torch
from networks import TINY, change_json, save_network
from safetensors.torch import load_file, save_file
from tracing import refused

from lgd.models.backbone import draft, list_fields, load_backbone, new_backbone, run_backbone, traits_of
from lgd.models.export import count_numbers
from lgd.models.pretrained import find_weights, read_settings
from lgd.models.spec import ARCHITECTURES, WITH_CLS


def settings_of(folder) -> dict:
    found = read_settings(folder)
    return {field: value for field, value in found.items() if field in list_fields(found["model_type"])}


def load(folder) -> torch.nn.Module:
    return load_backbone(settings_of(folder), find_weights(folder))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_architecture_takes_all_its_weights_and_gives_a_map_of_any_side(kind, tmp_path):
    folder = save_network(tmp_path, kind)
    backbone = load(folder).eval()
    stored = {bytes(tensor.numpy()) for tensor in load_file(folder / "model.safetensors").values()}
    state = {name: tensor for name, tensor in backbone.state_dict().items() if "hidden_states_norms" not in name}
    own = {name for name, tensor in state.items() if bytes(tensor.numpy()) not in stored}
    assert not own and len(state) > 10
    with torch.inference_mode():
        # Of whole patches, whether they have 14 px or 16.
        for side in (112, 224):
            map_BCHW, cls_BC = run_backbone(backbone, torch.rand(1, 3, side, side))
            channels, _, has_cls, _ = traits_of(backbone)
            assert map_BCHW.shape[:2] == (1, channels) and map_BCHW.shape[2] == map_BCHW.shape[3] > 0
            assert torch.isfinite(map_BCHW).all() and (cls_BC is not None) == has_cls == (kind in WITH_CLS)


@pytest.mark.parametrize("kind", ["dinov2", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32_whatever_they_are_stored_as(kind, dtype, tmp_path):
    folder = save_network(tmp_path, kind, dtype=dtype)
    settings = settings_of(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert not [field for field in settings if "dtype" in field]
    backbone = load_backbone(settings, find_weights(folder))
    floats = [tensor for tensor in backbone.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    stored = {bytes(tensor.float().numpy()) for tensor in load_file(folder / "model.safetensors").values()}
    assert all(bytes(tensor.numpy()) in stored for tensor in floats)
    assert {tensor.dtype for tensor in new_backbone(settings).parameters()} == {torch.float32}


def test_a_network_lives_on_when_its_file_is_cut_off(tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "copy")
    backbone = load(folder)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_shards_are_read_as_one_file_is(tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    one, other = load(tiny_dinov2).state_dict(), load(folder).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_hidden_layers": 3, "out_features": None, "out_indices": None}, "they hold .* numbers, the network "),
        ({"num_hidden_layers": 1, "out_features": None, "out_indices": None}, "they have more layers: 1. tensors"),
        ({"hidden_size": 64}, "they hold .* numbers, the network "),
        ({"hidden_size": 16}, "they have other shapes of .* tensors, such as "),
        ({"mlp_ratio": 1}, "they have other shapes of 6 tensors, such as 'encoder.layer.0.mlp.fc1.bias'"),
        ({"patch_size": 7, "image_size": 112}, "they have other shapes of 1 tensors"),
        ({"use_swiglu_ffn": True}, "they hold 52,736 numbers, the network 53,344"),
    ],
)
def test_weights_that_disagree_with_the_configuration_are_refused_in_one_line(
    tiny_dinov2, tmp_path, capfd, fields, problem
):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "copy")
    change_json(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=f"^its weights do not fit config.json: {problem}.* config.json that came"):
        load(folder)
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_no_numbers_or_lack_some_are_refused(tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.norm1.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"its weights are damaged: tensor '{name}'"):
        load(folder)
    spare = {"head.weight": torch.zeros(1000)}
    save_file({n: t for n, t in (tensors | spare).items() if n != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"they lack 1 tensors, such as '{name}'"):
        load(folder)


ODD = [
    {"hidden_size": "32"},
    {"hidden_size": None},
    {"num_attention_heads": 0},
    {"hidden_act": "evil"},
    {"out_features": ["stage9"]},
    {"out_features": []},
    {"out_indices": [7]},
    {"patch_size": 0},
    {"image_size": "x"},
    {"mlp_ratio": [1]},
    {"dtype": "float16"},
    {"torch_dtype": "bfloat16"},
    {"return_dict": False},
    {"name_or_path": "evil/repo"},
    {"no_such_field": 1},
]


@pytest.mark.parametrize("fields", ODD, ids=str)
def test_fields_that_make_no_network_are_refused_in_one_line(fields):
    with pytest.raises(
        ValueError, match=f"its fields make no network|field '{next(iter(fields))}' is none of"
    ) as caught:
        new_backbone({"model_type": "dinov2", **TINY["dinov2"], **fields})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


LARGE = [
    ("resnet", {"hidden_sizes": [30_000] * 4, "depths": [1] * 4, "layer_type": "basic"}, "'hidden_sizes', 30000"),
    ("dinov2", {"hidden_size": 32_768, "num_hidden_layers": 100, "num_attention_heads": 8}, "'hidden_size', 32768"),
    ("dinov2", {"image_size": 32_768, "patch_size": 1}, "'image_size', 32768"),
    ("convnext", {"hidden_sizes": [8, 8, 8, 30_000], "depths": [1, 1, 1, 97]}, "'hidden_sizes', 30000"),
]


@pytest.mark.parametrize(("kind", "fields", "field"), LARGE)
def test_networks_too_large_are_refused_before_any_memory_is_taken(alone, kind, fields, field):
    told, seconds, peak = alone(
        refused, new_backbone, {"model_type": kind, **fields}, {"model_type": kind, **TINY[kind]}
    )
    assert re.search(f"larger than any encoder: more than 10,000,000,000 .* is {field}", told)
    assert seconds < 1 and peak < 20_000_000


def test_the_largest_encoder_of_today_is_drafted():
    fields = {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 8192}
    _, shapes = draft(json.dumps({"model_type": "dinov3_vit", **fields, "use_gated_mlp": True}))
    assert 6.7e9 < count_numbers(shapes) < 6.8e9


def test_networks_of_too_many_parts_are_refused():
    parts = {"depths": [24] * 4, "focal_levels": [25] * 4, "hidden_sizes": [8] * 4, "focal_windows": [3] * 4}
    with pytest.raises(ValueError, match="larger than any encoder: by its layers in 'depths', 'focal_levels'"):
        new_backbone({"model_type": "focalnet", "embed_dim": 8, **parts})


def test_a_draft_does_not_change_what_a_seed_gives():
    settings = {"model_type": "resnet", **TINY["resnet"], "embedding_size": 24}
    torch.manual_seed(5)
    first = new_backbone(settings).state_dict()
    torch.manual_seed(5)
    again = new_backbone(settings).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_loading_says_nothing_and_leaves_the_loudness_of_transformers(tiny_dinov2, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(tiny_dinov2)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
