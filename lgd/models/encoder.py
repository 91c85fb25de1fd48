"""A backbone by name -> feature map, with its own normalisation.

Presets start from random weights. `hf:ORG/NAME` and local folders bring pretrained weights, as safetensors, which
become float32; nothing of them is run. From its specification the same network is built again without the hub.

`python:package.module:factory` is code outside LGD: called without arguments, `factory` gives a network (`nn.Module`)
that maps RGB, float32 (B, 3, H, W) in 0..255, to a feature map (B, channels, h, w), with the number of its `channels`,
int, as an attribute. It normalises by itself. It is also called for networks whose weights are loaded then, once on the
device "meta".

Nothing here depends on the other images of a batch: presets get GroupNorm, other BatchNorm is frozen.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lgd.base.errors import ConfigError, DataError
from lgd.base.extensions import is_python, load_object
from lgd.models.backbone import list_fields, load_backbone, new_backbone
from lgd.models.pretrained import find_folder, find_weights, read_normalisation, read_settings
from lgd.models.spec import EncoderSpec

# For random weights. On ImageNet's scale a white background is +2.4, and training left its first plateau later
# (virtual H&E, one seed: 0.39 against 0.55 of the training patches after 10 epochs).
_FROM_SCRATCH_MEAN, _FROM_SCRATCH_STD = (0.6, 0.6, 0.6), (0.5, 0.5, 0.5)

_BASIC = {"model_type": "resnet", "layer_type": "basic"}
PRESETS: dict[str, dict[str, object]] = {
    "resnet10": {**_BASIC, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
    "resnet18": {**_BASIC, "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "resnet50": {"model_type": "resnet"},
    "convnext-tiny": {"model_type": "convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]},
}


class Kind(NamedTuple):
    """A kind of encoders, which a name leads to."""

    form: str
    """How such encoders are named."""
    matches: Callable[[str], bool]
    """Whether a name is one of this kind."""
    describe: Callable[[str], EncoderSpec]
    """The specification of an encoder; `ValueError` for one that is not accepted."""
    load: Callable[[EncoderSpec], nn.Module]
    """The network with the weights that it comes with; `ValueError` where they are not its own."""


def _make_spec(name: str, **fields: object) -> EncoderSpec:
    return EncoderSpec.from_json({"name": name, "pool": "mean", "size": None, "mpp": None, "licence": None} | fields)


def _describe_preset(name: str) -> EncoderSpec:
    return _make_spec(name, backbone=PRESETS[name], batchnorm="group", mean=_FROM_SCRATCH_MEAN, std=_FROM_SCRATCH_STD)


def _describe_outside(name: str) -> EncoderSpec:
    return _make_spec(name, backbone={}, batchnorm="frozen", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _load_outside(spec: EncoderSpec) -> nn.Module:
    network = load_object(spec.name, "the encoder")()
    if not isinstance(network, nn.Module) or not isinstance(getattr(network, "channels", None), int):
        raise ConfigError(
            f"encoder {spec.name} gives a {type(network).__name__}, and should give a torch.nn.Module with the "
            "number of its channels as `channels`, which maps (B, 3, H, W) in 0..255 to (B, channels, h, w)"
        )
    return network


def _describe_pretrained(name: str) -> EncoderSpec:
    folder = find_folder(name)
    settings = read_settings(folder)
    # Those of the hub are copied when all else has passed.
    if not name.startswith("hf:"):
        find_weights(folder)
    mean, std = read_normalisation(folder)
    fields = list_fields(str(settings["model_type"]))
    backbone = {field: value for field, value in settings.items() if field in fields}
    return _make_spec(name, backbone=backbone, batchnorm="frozen", mean=mean, std=std)


def _load_pretrained(spec: EncoderSpec) -> nn.Module:
    return load_backbone(spec.backbone, find_weights(find_folder(spec.name, weights=True)))


KINDS = (
    Kind(", ".join(PRESETS), lambda name: name in PRESETS, _describe_preset, lambda spec: new_backbone(spec.backbone)),
    Kind("python:package.module:factory", is_python, _describe_outside, _load_outside),
    Kind(
        "hf:ORG/NAME or a local folder",
        lambda name: name.startswith("hf:") or Path(name).is_dir(),
        _describe_pretrained,
        _load_pretrained,
    ),
)
"""The kinds of encoders; the first that matches a name has it."""


def find_kind(name: str) -> Kind:
    """The kind of an encoder; `ConfigError` for a name of none."""
    for kind in KINDS:
        if kind.matches(name):
            return kind
    raise ConfigError(f"encoder {name!r} is not known: use one of {', '.join(kind.form for kind in KINDS)}")


def describe(name: str) -> EncoderSpec:
    """The specification of an encoder.

    Raises `ConfigError` for an unknown name and `DataError` for one that cannot be had or is not accepted.
    """
    kind = find_kind(name)
    with _naming(name):
        return kind.describe(name)


class Encoder(nn.Module):
    """RGB in 0..255 -> the last feature map of a backbone."""

    def __init__(self, spec: EncoderSpec, backbone: nn.Module | None = None) -> None:
        """Build from a specification; `backbone` brings pretrained weights.

        Raises `DataError` for a specification of no network, or of one too large.
        """
        super().__init__()
        self.spec = spec
        if backbone is None:
            with _naming(spec.name):
                # Where it came from may be gone.
                backbone = _load_outside(spec) if is_python(spec.name) else new_backbone(spec.backbone)
        self.backbone = backbone
        self.is_outside = is_python(spec.name)
        if spec.batchnorm == "group":
            _batchnorm_to_groupnorm(self.backbone)
        self.mean = nn.Buffer(255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        channels: Any = backbone.channels
        self.channels: int = channels if self.is_outside else list(channels)[-1]

    def forward(self, rgb_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in 0..255, any dtype -> (B, channels, h, w)."""
        if self.is_outside:
            map_BCHW: torch.Tensor = self.backbone(rgb_B3HW.float())
            if map_BCHW.ndim != 4 or map_BCHW.shape[1] != self.channels:
                shape = tuple(map_BCHW.shape)
                raise ConfigError(f"encoder {self.spec.name} gives {shape}, and should give (B, {self.channels}, h, w)")
            return map_BCHW
        dtype = next(self.backbone.parameters()).dtype
        normal_B3HW = (rgb_B3HW.float() - self.mean.float()) / self.std.float()
        last_BCHW: torch.Tensor = self.backbone(normal_B3HW.to(dtype)).feature_maps[-1]
        return last_BCHW

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
    with _naming(name):
        return Encoder(spec, find_kind(name).load(spec))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """A `ValueError` becomes a `DataError` that names the encoder."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise DataError(f"encoder {name}: {error}") from error


def _batchnorm_to_groupnorm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = 8 if child.num_features % 8 == 0 else 1
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _batchnorm_to_groupnorm(child)
