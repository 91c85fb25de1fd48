import functools
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import change_json, save_network
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import lgd
from lgd.base.errors import ConfigError, DataError
from lgd.base.target import find_target
from lgd.io.digests import digest_of
from lgd.models.encoder import PRESETS, Encoder, build_encoder
from lgd.models.export import save_model
from lgd.models.spec import EncoderSpec
from lgd.models.student import Student
from tools.bench.inputs import NOT_TRAINED


def images(count: int, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved_resnet(tmp_path_factory):
    """A pretrained network as transformers saves it, with statistics that a batch's own would differ from."""
    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(3)
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_have_no_batch_statistics(name):
    encoder = build_encoder(name)
    channels = PRESETS[name].get("hidden_sizes", [2048])[-1]
    assert encoder.channels == channels
    assert not [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.inference_mode():
        out = encoder(images(1)).map_BCHW
    assert out.shape == (1, channels, 2, 2)


@pytest.mark.parametrize("name", ["resnet10", "saved"])
def test_an_image_does_not_see_the_rest_of_its_batch(name, saved_resnet):
    encoder = build_encoder(str(saved_resnet) if name == "saved" else name).train()
    with torch.no_grad():
        alone, among = encoder(images(4)[:1]).map_BCHW, encoder(images(4)).map_BCHW[:1]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, encoder(images(4)[1:2]).map_BCHW, atol=1e-2)


@pytest.mark.parametrize("name", ["resnet10", "saved"])
def test_specification_and_weights_make_the_same_network(name, saved_resnet, tmp_path):
    encoder = build_encoder(str(saved_resnet) if name == "saved" else name).eval()
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    again = Encoder(EncoderSpec.from_json(json.loads(json.dumps(encoder.spec.as_json()))))
    again.load_state_dict(load_file(tmp_path / "w.safetensors"))
    with torch.no_grad():
        one, other = encoder(images(2)), again.eval()(images(2))
        assert all(map(torch.equal, one, other))


def test_a_local_folder_brings_weights_and_normalisation(saved_resnet):
    encoder = build_encoder(str(saved_resnet))
    there = load_file(saved_resnet / "model.safetensors")
    mine = encoder.backbone.state_dict()
    name = "embedder.embedder.convolution.weight"
    assert torch.equal(mine[name], there[f"resnet.{name}"])
    assert encoder.spec.mean == (0.1, 0.2, 0.3) and encoder.spec.std == (0.4, 0.5, 0.6)

    # What the network is given is (rgb / 255 - mean) / std.
    rgb = images(2)
    normal = (rgb / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(rgb).map_BCHW, encoder.backbone(normal).feature_maps[-1])


def test_pretrained_batchnorm_stays_frozen_in_training(saved_resnet):
    encoder = build_encoder(str(saved_resnet)).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(module.training for module in norms) and encoder.backbone.training
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    encoder(images(2)).map_BCHW.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.named_buffers())


def test_unknown_encoders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'resnet11' is not known: use one of resnet10"):
        build_encoder("resnet11")
    with pytest.raises(DataError, match=f"encoder {tmp_path}: config.json is missing"):
        build_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "depths": [1], "hidden_sizes": [8]}))
    with pytest.raises(DataError, match=f"encoder {tmp_path}: model.safetensors is missing"):
        build_encoder(str(tmp_path))


def test_weights_of_another_network_are_refused(saved_resnet, tmp_path):
    folder = shutil.copytree(saved_resnet, tmp_path / "copy")
    change_json(folder / "config.json", depths=[1, 2])
    with pytest.raises(DataError, match=f"encoder {folder}: its weights do not fit config.json: they hold"):
        build_encoder(str(folder))


@pytest.mark.parametrize(
    "content", [None, '{"image_mean": [0.1,0.1', "{}", '{"image_mean": [0, 0, 0], "image_std": [0, 0, 0]}']
)
def test_without_a_sound_preprocessor_nothing_is_guessed(saved_resnet, tmp_path, content):
    folder = shutil.copytree(saved_resnet, tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(DataError, match=f"encoder {folder}: preprocessor_config.json.*: copy it from where"):
        build_encoder(str(folder))


def test_a_network_stored_in_half_precision_is_float32_and_stays_so(tmp_path):
    encoder = build_encoder(str(save_network(tmp_path, dtype=torch.float16)))
    again = Encoder(EncoderSpec.from_json(encoder.spec.as_json()))
    assert not [field for field in encoder.spec.backbone if "dtype" in field]
    for network in (encoder, again):
        assert {tensor.dtype for tensor in network.state_dict().values() if tensor.is_floating_point()} == {
            torch.float32
        }
        assert network(images(1, 56)).pooled_BD.dtype == torch.float32


def test_an_unknown_architecture_is_told_in_one_line(tiny_dinov2, tmp_path):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "copy")
    change_json(folder / "config.json", model_type="clip")
    with pytest.raises(DataError, match="field 'model_type' is 'clip', which is not supported as an encoder") as caught:
        build_encoder(str(folder))
    assert "\n" not in str(caught.value) and "Backbone" not in str(caught.value) and len(str(caught.value)) < 400


# What a folder may bring beside its weights; the canary appears when any of it runs.
def _pickle(folder, code):
    from pickle import dumps

    class Evil:
        def __reduce__(self):
            return exec, (code,)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(dumps(Evil()))


TRAPS = {
    "auto_map of an unknown type": lambda folder, code: change_json(
        folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoBackbone": "evil.Model"}
    ),
    "auto_map of a known type": lambda folder, code: change_json(
        folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoBackbone": "evil.Model"}
    ),
    "auto_map of another repository": lambda folder, code: change_json(
        folder / "config.json", auto_map={"AutoBackbone": "evil/repo--evil.Model"}
    ),
    "auto_map of a preprocessor": lambda folder, code: change_json(
        folder / "preprocessor_config.json", image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Evil"}
    ),
    "kernel of the hub": lambda folder, code: change_json(folder / "config.json", attn_implementation="evil/kernel"),
    "pickled weights": _pickle,
}


@pytest.fixture
def trap(tiny_dinov2, tmp_path):
    """A folder with code in it, and the canary that the code would leave."""
    folder, canary = shutil.copytree(tiny_dinov2, tmp_path / "trap"), tmp_path / "ran"
    code = f"open({str(canary)!r}, 'w')"
    (folder / "evil.py").write_text(f"{code}\nclass Config: pass\nclass Model: pass\nclass Evil: pass\n")
    return folder, code, canary


@pytest.mark.parametrize("kind", TRAPS)
def test_code_in_a_folder_is_refused_and_never_run(kind, trap, monkeypatch):
    folder, code, canary = trap
    TRAPS[kind](folder, code)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(DataError, match=f"encoder {folder}: .*(never run|never read)"):
        build_encoder(str(folder))
    assert not canary.exists()


def test_code_and_adapters_that_nothing_names_are_left_alone(trap, tiny_dinov2):
    folder, _, canary = trap
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/repo"}))
    one, other = build_encoder(str(folder)).state_dict(), build_encoder(str(tiny_dinov2)).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other) and not canary.exists()


ASK = """
import sys
from lgd.cli import main
from lgd.models.encoder import build_encoder
for folder in sys.argv[1:-1]:
    try:
        build_encoder(folder)
    except ValueError as error:
        print("refused", error)
print("status", main(["predict", "--model", sys.argv[-1], "image.png"]))
print("left on standard input:", sys.stdin.readline())
"""


def test_nothing_is_asked_on_a_terminal(trap, tmp_path):
    """Neither by an encoder's folder nor by a trained model whose own config.json names code."""
    folder, code, canary = trap
    TRAPS["auto_map of an unknown type"](folder, code)
    known = shutil.copytree(folder, tmp_path / "known")
    change_json(known / "config.json", model_type="dinov2")
    student = Student(
        morphology=build_encoder("resnet10"),
        target=find_target("her2"), ordinal=None, staining=None, hallucination=None, latents={},
        nuclei_grid=1, membrane_grid=1,
    )  # fmt: skip
    model = tmp_path / "model"
    facts = NOT_TRAINED | {"method": "he-only", "size": 64, "teachers": ()}
    save_model(model, student.state_dict(), functools.partial(student.describe, **facts))
    document = json.loads((model / "config.json").read_text())
    names_code = {"model_type": "bert", "name_or_path": str(folder), "auto_map": {"AutoBackbone": "evil.Model"}}
    document["morphology"]["backbone"] = names_code
    del document["digest"]
    (model / "config.json").write_text(json.dumps(document | {"digest": digest_of(document)}))
    shutil.copy(folder / "evil.py", model)
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")

    main, terminal = pty.openpty()
    os.write(main, b"y\n")
    child = subprocess.Popen(
        [sys.executable, "-c", ASK, str(folder), str(known), str(model)],
        stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(lgd.__file__).parents[1])},
    )  # fmt: skip
    os.close(terminal)
    said = b""
    try:
        while some := os.read(main, 4096):
            said += some
    except OSError:  # Linux says so when the other side is closed.
        pass
    assert child.wait(60) == 0, said.decode()
    text = said.decode().replace("\r\n", "\n")
    assert text.count("refused encoder") == 2 and "status 1" in text
    assert f"lgd: {model / 'config.json'}: " in text and "names code" in text.split("refused")[-1]
    assert "[y/N]" not in text and "left on standard input: y" in text and not canary.exists()
