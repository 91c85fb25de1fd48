import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from lgd.errors import ConfigError, DataError
from lgd.models.encoder import PRESETS, Encoder, build_encoder


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
        out = encoder(images(1))
    assert out.shape == (1, channels, 2, 2)


@pytest.mark.parametrize("name", ["resnet10", "saved"])
def test_an_image_does_not_see_the_rest_of_its_batch(name, saved_resnet):
    encoder = build_encoder(str(saved_resnet) if name == "saved" else name).train()
    with torch.no_grad():
        alone, among = encoder(images(4)[:1]), encoder(images(4))[:1]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, encoder(images(4)[1:2]), atol=1e-2)


@pytest.mark.parametrize("name", ["resnet10", "saved"])
def test_specification_and_weights_make_the_same_network(name, saved_resnet, tmp_path):
    encoder = build_encoder(str(saved_resnet) if name == "saved" else name).eval()
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    again = Encoder(json.loads(json.dumps(encoder.spec)))
    again.load_state_dict(load_file(tmp_path / "w.safetensors"))
    with torch.no_grad():
        assert torch.equal(encoder(images(2)), again.eval()(images(2)))


def test_a_local_folder_brings_weights_and_normalisation(saved_resnet):
    encoder = build_encoder(str(saved_resnet))
    there = load_file(saved_resnet / "model.safetensors")
    mine = encoder.backbone.state_dict()
    name = "embedder.embedder.convolution.weight"
    assert torch.equal(mine[name], there[f"resnet.{name}"])
    assert encoder.spec["mean"] == [0.1, 0.2, 0.3] and encoder.spec["std"] == [0.4, 0.5, 0.6]

    # What the network is given is (rgb / 255 - mean) / std.
    rgb = images(2)
    normal = (rgb / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(rgb), encoder.backbone(normal).feature_maps[-1])


def test_pretrained_batchnorm_stays_frozen_in_training(saved_resnet):
    encoder = build_encoder(str(saved_resnet)).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(module.training for module in norms) and encoder.backbone.training
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    encoder(images(2)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.named_buffers())


def test_unknown_encoders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'resnet11' is not known: use one of resnet10"):
        build_encoder("resnet11")
    with pytest.raises(DataError, match="its configuration cannot be loaded"):
        build_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "depths": [1], "hidden_sizes": [8]}))
    with pytest.raises(DataError, match="its weights cannot be loaded"):
        build_encoder(str(tmp_path))


def test_weights_of_another_network_are_refused(saved_resnet, tmp_path):
    config = json.loads((saved_resnet / "config.json").read_text()) | {"depths": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved_resnet / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="its weights cannot be loaded .they lack 2 of"):
        build_encoder(str(tmp_path))
