"""A backbone by name -> feature map, with its own normalisation.

Presets start from random weights and need no download. `hf:ORG/NAME` and local folders bring pretrained weights, as
safetensors, of the architectures in `lgd.models.spec`. From its specification the same network is built again without
the hub. Nothing of a folder or a specification is run, and its weights become float32 whatever they are stored as.

Nothing here depends on the other images of a batch: presets get GroupNorm, pretrained BatchNorm is frozen.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgd.errors import ConfigError, DataError
from lgd.models.backbone import list_fields, load_backbone, new_backbone
from lgd.models.pretrained import find_folder, find_weights, read_normalisation, read_settings
from lgd.models.spec import EncoderSpec

# For random weights. On ImageNet's scale a white background is +2.4, and training left its first plateau later
# (virtual H&E, one seed: 0.39 against 0.55 of the training patches after 10 epochs).
_FROM_SCRATCH_MEAN, _FROM_SCRATCH_STD = (0.6, 0.6, 0.6), (0.5, 0.5, 0.5)

PRESETS: dict[str, dict[str, Any]] = {
    "resnet10": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 128],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "resnet18": {
        "model_type": "resnet",
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    },
    "resnet50": {"model_type": "resnet"},
    "convnext-tiny": {
        "model_type": "convnext",
        "hidden_sizes": [96, 192, 384, 768],
        "depths": [3, 3, 9, 3],
    },
}


def describe(name: str) -> EncoderSpec:
    """The specification of an encoder.

    Raises `ConfigError` for an unknown name and `DataError` for one that cannot be had or is not accepted.
    """
    spec: dict[str, Any] = {"name": name, "pool": "mean", "size": None, "mpp": None, "licence": None}
    if name in PRESETS:
        normalisation = {"mean": _FROM_SCRATCH_MEAN, "std": _FROM_SCRATCH_STD}
        return EncoderSpec.from_json(spec | {"backbone": PRESETS[name], "batchnorm": "group"} | normalisation)
    if not (name.startswith("hf:") or Path(name).is_dir()):
        raise ConfigError(
            f"encoder {name!r} is not known: use one of {', '.join(PRESETS)}, hf:ORG/NAME or a local folder"
        )
    folder = find_folder(name)
    try:
        settings = read_settings(folder)
        # Those of the hub are copied when all else has passed.
        if not name.startswith("hf:"):
            find_weights(folder)
        mean, std = read_normalisation(folder)
        fields = list_fields(settings["model_type"])
        backbone = {field: value for field, value in settings.items() if field in fields}
        spec |= {"backbone": backbone, "batchnorm": "frozen", "mean": mean, "std": std}
        return EncoderSpec.from_json(spec)
    except ValueError as error:
        raise DataError(f"encoder {name}: {error}") from error


class Encoder(nn.Module):
    """RGB in 0..255 -> the last feature map of a backbone."""

    def __init__(self, spec: EncoderSpec, backbone: nn.Module | None = None) -> None:
        """Build from a specification; `backbone` brings pretrained weights.

        Raises `DataError` for a specification of no network, or of one too large.
        """
        super().__init__()
        self.spec = spec
        self.backbone: Any = _new_backbone(spec) if backbone is None else backbone
        if spec.batchnorm == "group":
            _batchnorm_to_groupnorm(self.backbone)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.channels: int = list(self.backbone.channels)[-1]  # type: ignore[arg-type]

    def forward(self, rgb_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in 0..255, any dtype -> (B, channels, h, w)."""
        dtype = next(self.backbone.parameters()).dtype
        normal_B3HW = (rgb_B3HW.float() - self.mean.float()) / self.std.float()
        return self.backbone(normal_B3HW.to(dtype)).feature_maps[-1]

    def train(self, mode: bool = True) -> "Encoder":
        """Pretrained BatchNorm keeps its statistics, whatever the mode."""
        super().train(mode)
        if self.spec.batchnorm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def build_encoder(name: str) -> Encoder:
    """An encoder with its pretrained weights, or with random ones for a preset."""
    spec = describe(name)
    if name in PRESETS:
        return Encoder(spec)
    try:
        backbone = load_backbone(spec.backbone, find_weights(find_folder(name, weights=True)))
    except ValueError as error:
        raise DataError(f"encoder {name}: {error}") from error
    return Encoder(spec, backbone)


def _new_backbone(spec: EncoderSpec) -> nn.Module:
    try:
        return new_backbone(spec.backbone)
    except ValueError as error:
        raise DataError(f"encoder {spec.name}: {error}") from error


def _batchnorm_to_groupnorm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = 8 if child.num_features % 8 == 0 else 1
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _batchnorm_to_groupnorm(child)
