"""A backbone by name -> feature map, with its own normalisation.

Presets start from random weights and need no download. `hf:HUB_ID` and local folders load pretrained weights
through transformers' AutoBackbone. A specification is plain JSON, from which the same network is built again
without the hub.

Nothing here depends on the other images of a batch: presets get GroupNorm, pretrained BatchNorm is frozen.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgd.errors import ConfigError, DataError

# For random weights. On ImageNet's scale a white background is +2.4, and training left its first plateau later
# (virtual H&E, one seed: 0.39 against 0.55 of the training patches after 10 epochs).
_FROM_SCRATCH_MEAN, _FROM_SCRATCH_STD = (0.6, 0.6, 0.6), (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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


def describe(name: str) -> dict[str, Any]:
    """The specification of an encoder: everything but its weights, as JSON.

    Raises `ConfigError` for an unknown name and `DataError` when pretrained weights cannot be had.
    """
    if name in PRESETS:
        return {
            "name": name,
            "backbone": PRESETS[name],
            "batchnorm": "group",
            "mean": list(_FROM_SCRATCH_MEAN),
            "std": list(_FROM_SCRATCH_STD),
        }
    if not (name.startswith("hf:") or Path(name).is_dir()):
        raise ConfigError(
            f"encoder {name!r} is not known: use one of {', '.join(PRESETS)}, hf:HUB_ID or a local folder"
        )
    from transformers import AutoConfig, AutoImageProcessor

    source = name.removeprefix("hf:")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DataError(f"encoder {name}: its configuration cannot be loaded ({error})") from error
    try:
        processor = AutoImageProcessor.from_pretrained(source)
        mean, std = list(processor.image_mean), list(processor.image_std)
    except (OSError, ValueError):
        mean, std = list(_IMAGENET_MEAN), list(_IMAGENET_STD)
    return {"name": name, "backbone": config.to_diff_dict(), "batchnorm": "frozen", "mean": mean, "std": std}


class Encoder(nn.Module):
    """RGB in 0..255 -> the last feature map of a backbone."""

    def __init__(self, spec: dict[str, Any], backbone: nn.Module | None = None) -> None:
        """Build from a specification; `backbone` brings pretrained weights."""
        super().__init__()
        self.spec = spec
        self.backbone: Any = _from_spec(spec) if backbone is None else backbone
        if spec["batchnorm"] == "group":
            _batchnorm_to_groupnorm(self.backbone)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", 255 * torch.tensor(spec["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec["std"]).view(1, 3, 1, 1), persistent=False)
        self.channels: int = list(self.backbone.channels)[-1]  # type: ignore[arg-type]

    def forward(self, rgb_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in 0..255, any dtype -> (B, channels, h, w)."""
        dtype = next(self.backbone.parameters()).dtype
        normal_B3HW = (rgb_B3HW.float() - self.mean.float()) / self.std.float()
        return self.backbone(normal_B3HW.to(dtype)).feature_maps[-1]

    def train(self, mode: bool = True) -> "Encoder":
        """Pretrained BatchNorm keeps its statistics, whatever the mode."""
        super().train(mode)
        if self.spec["batchnorm"] == "frozen":
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
        return Encoder(spec, _pretrained(name.removeprefix("hf:")))
    except (OSError, ValueError) as error:
        raise DataError(f"encoder {name}: its weights cannot be loaded ({error})") from error


def _pretrained(source: str) -> nn.Module:
    """A backbone with the weights of a hub id or a local folder; `ValueError` when some of them are not there."""
    from transformers import AutoBackbone, AutoConfig

    # AutoBackbone.from_pretrained asks the hub even about a local folder (transformers 5.23).
    with torch.device("meta"):
        kind: Any = type(AutoBackbone.from_config(AutoConfig.from_pretrained(source)))
    backbone, found = kind.from_pretrained(source, output_loading_info=True)
    # A backbone may norm its output where the whole network does not: such norms start as the identity.
    shapes = backbone.state_dict()
    lacking = [name for name in found["missing_keys"] if shapes[name].ndim > 1]
    if lacking:
        raise ValueError(f"they lack {len(lacking)} of {len(shapes)} tensors, such as {lacking[0]}")
    return backbone


def _from_spec(spec: dict[str, Any]) -> nn.Module:
    from transformers import AutoBackbone, AutoConfig

    settings = dict(spec["backbone"])
    return AutoBackbone.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


def _batchnorm_to_groupnorm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = 8 if child.num_features % 8 == 0 else 1
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _batchnorm_to_groupnorm(child)
