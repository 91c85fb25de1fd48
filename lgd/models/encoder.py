"""A backbone by name -> feature map and pooled vector, with its own normalisation.

Presets start from random weights. `hf:ORG/NAME`, timm's names and local folders bring pretrained weights, as
safetensors, which become float32; nothing of them is run. From its specification the same network is built again
without the hub. An image becomes one vector by `pool`: the CLS token, where there is one, or the mean of the map.

`python:package.module:factory` is code outside LGD: called without arguments, `factory` gives a network (`nn.Module`)
that maps RGB, float32 (B, 3, H, W) in 0..255, to a feature map (B, channels, h, w), with the number of its `channels`,
int, as an attribute. It normalises by itself. It is also called for networks whose weights are loaded then, once on the
device "meta".

Nothing here depends on the other images of a batch: presets get GroupNorm, other BatchNorm is frozen.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lgd.base.errors import ConfigError, DataError
from lgd.base.extensions import is_python, load_object
from lgd.models import timm_backbone
from lgd.models.backbone import (
    Features,
    Traits,
    batchnorm_to_groupnorm,
    list_fields,
    load_backbone,
    new_backbone,
    run_backbone,
    traits_of,
)
from lgd.models.known import look_up
from lgd.models.pretrained import NORMALISE, find_folder, find_weights, is_hub, read_normalisation, read_settings
from lgd.models.spec import WITH_CLS, EncoderSpec, Facts

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


NOTHING = Facts()


class Kind(NamedTuple):
    """A kind of encoders, which a name leads to."""

    form: str
    """How such encoders are named."""
    matches: Callable[[str], bool]
    """Whether a name is one of this kind."""
    describe: Callable[[str, Facts], EncoderSpec]
    """The specification of an encoder, of which facts are stated; `ValueError` for one that is not accepted."""
    load: Callable[[EncoderSpec], nn.Module]
    """The network with the weights that it comes with; `ValueError` where they are not its own."""


def _make_spec(name: str, facts: Facts, **fields: object) -> EncoderSpec:
    """A specification of these fields, and of what is stated of the encoder."""
    stated = facts.model_dump(exclude_none=True, exclude={"arguments"})
    default = {"pool": "mean", "size": None, "mpp": None, "licence": None}
    return EncoderSpec.from_json({"name": name} | default | fields | stated)


def _refuse_arguments(facts: Facts) -> None:
    if facts.arguments:
        raise ValueError("arguments are stated, and only timm's networks take any: leave them out")


def _describe_preset(name: str, facts: Facts) -> EncoderSpec:
    _refuse_arguments(facts)
    mean, std = _FROM_SCRATCH_MEAN, _FROM_SCRATCH_STD
    return _make_spec(name, facts, backbone=PRESETS[name], batchnorm="group", mean=mean, std=std)


def _describe_outside(name: str, facts: Facts) -> EncoderSpec:
    _refuse_arguments(facts)
    if facts.mean or facts.std:
        raise ValueError("mean and std are stated, and code outside LGD normalises by itself: leave them out")
    return _make_spec(name, facts, backbone={}, batchnorm="frozen", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _load_outside(spec: EncoderSpec) -> nn.Module:
    network = load_object(spec.name, "the encoder")()
    if not isinstance(network, nn.Module) or not isinstance(getattr(network, "channels", None), int):
        raise ConfigError(
            f"encoder {spec.name} gives a {type(network).__name__}, and should give a torch.nn.Module with the "
            "number of its channels as `channels`, which maps (B, 3, H, W) in 0..255 to (B, channels, h, w)"
        )
    # As all others: of half weights the gradients and their sums over the ranks would be half too.
    return network.float()


def _describe_pretrained(name: str, facts: Facts) -> EncoderSpec:
    _refuse_arguments(facts)
    folder = find_folder(name)
    settings = read_settings(folder)
    # Those of the hub are copied when all else has passed.
    if not is_hub(name):
        find_weights(folder)
    mean, std = (facts.mean, facts.std) if facts.mean and facts.std else read_normalisation(folder)
    kind = str(settings["model_type"])
    fields = list_fields(kind)
    backbone = {field: value for field, value in settings.items() if field in fields}
    own = {"pool": "cls", "size": settings.get("image_size")} if kind in WITH_CLS else {}
    return _make_spec(name, facts, backbone=backbone, batchnorm="frozen", mean=mean, std=std, **own)


def _describe_timm(name: str, facts: Facts) -> EncoderSpec:
    folder = timm_backbone.find_timm_folder(name)
    saved = timm_backbone.read_saved(folder)
    if not name.startswith("timm:"):
        find_weights(folder)
    mean, std = facts.mean or saved.mean, facts.std or saved.std
    if mean is None or std is None:
        raise ValueError(f"config.json states no mean and std: {NORMALISE}")
    settings = timm_backbone.choose_settings(saved.architecture, saved.arguments | facts.arguments)
    traits, _ = timm_backbone.draft_timm(json.dumps(settings))
    own = {"pool": "cls" if traits.has_cls else "mean", "size": settings.get("img_size") or saved.size}
    return _make_spec(name, facts, backbone=settings, batchnorm="frozen", mean=mean, std=std, **own)


def _load_timm(spec: EncoderSpec) -> nn.Module:
    return timm_backbone.load_timm(spec.backbone, find_weights(timm_backbone.find_timm_folder(spec.name, weights=True)))


def _load_pretrained(spec: EncoderSpec) -> nn.Module:
    return load_backbone(spec.backbone, find_weights(find_folder(spec.name, weights=True)))


KINDS = (
    Kind(", ".join(PRESETS), lambda name: name in PRESETS, _describe_preset, lambda spec: new_backbone(spec.backbone)),
    Kind("python:package.module:factory", is_python, _describe_outside, _load_outside),
    Kind("timm:NAME, timm:hf-hub:ORG/NAME", timm_backbone.is_timm, _describe_timm, _load_timm),
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


def describe(name: str, stated: Facts = NOTHING) -> EncoderSpec:
    """The specification of an encoder; `stated` is what the run's config says of it.

    Raises `ConfigError` for an unknown name and `DataError` for one that cannot be had or is not accepted.
    """
    kind = find_kind(name)
    with name_errors(name):
        return kind.describe(name, stated.over(look_up(name)))


class Encoded(NamedTuple):
    """What an encoder makes of images."""

    map_BCHW: torch.Tensor
    """The last feature map; of a transformer the tokens of the patches."""
    pooled_BD: torch.Tensor
    """One vector an image, by the encoder's `pool`. Of `cls+mean` the last C numbers are the mean of the map."""


class Encoder(nn.Module):
    """RGB in 0..255 -> the last feature map of a backbone, and one vector."""

    def __init__(self, spec: EncoderSpec, backbone: nn.Module | None = None) -> None:
        """Build from a specification; `backbone` brings pretrained weights.

        Raises `DataError` for a specification of no network, or of one too large.
        """
        super().__init__()
        self.spec = spec
        if backbone is None:
            with name_errors(spec.name):
                # Where it came from may be gone.
                backbone = _build_backbone(spec)
        self.backbone = backbone
        self.is_outside = is_python(spec.name)
        if spec.batchnorm == "group":
            batchnorm_to_groupnorm(self.backbone)
        self.mean = nn.Buffer(255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        outside: Any = backbone
        self.traits = Traits(outside.channels, None, False) if self.is_outside else _find_traits(backbone)
        self.channels = self.traits.channels
        """Of the map."""
        self.dim = self.channels * (1 + (spec.pool == "cls+mean"))
        """Of the pooled vector."""
        if spec.pool != "mean" and not self.traits.has_cls:
            raise DataError(f"encoder {spec.name} has no CLS token, and `pool` is {spec.pool}: set it to mean")

    def forward(self, rgb_B3HW: torch.Tensor) -> Encoded:
        """(B, 3, H, W) in 0..255, any dtype -> the map (B, channels, h, w) and the pooled vector (B, dim).

        Raises `DataError` for images of a size that the network does not take whole.
        """
        map_BCHW, cls_BC = self._run(rgb_B3HW)
        if self.spec.pool == "mean":
            return Encoded(map_BCHW, map_BCHW.mean(dim=(2, 3)))
        assert cls_BC is not None
        if self.spec.pool == "cls":
            return Encoded(map_BCHW, cls_BC)
        return Encoded(map_BCHW, torch.cat([cls_BC, map_BCHW.mean(dim=(2, 3))], dim=1))

    def _run(self, rgb_B3HW: torch.Tensor) -> Features:
        if self.is_outside:
            map_BCHW: torch.Tensor = self.backbone(rgb_B3HW.float())
            if map_BCHW.ndim != 4 or map_BCHW.shape[1] != self.channels:
                shape = tuple(map_BCHW.shape)
                raise ConfigError(f"encoder {self.spec.name} gives {shape}, and should give (B, {self.channels}, h, w)")
            return Features(map_BCHW, None)
        self.check_size(*rgb_B3HW.shape[-2:])
        dtype = next(self.backbone.parameters()).dtype
        normal_B3HW = ((rgb_B3HW.float() - self.mean.float()) / self.std.float()).to(dtype)
        if isinstance(self.backbone, timm_backbone.TimmBackbone):
            found: Features = self.backbone(normal_B3HW)
            return found
        return run_backbone(self.backbone, normal_B3HW)

    def check_size(self, height: int, width: int) -> None:
        """`DataError` for images of which the network would not see all, or nothing."""
        patch, side = self.traits.patch, self.traits.side
        if side and (height, width) != (side, side):
            raise DataError(
                f"encoder {self.spec.name} takes images of {side} px only, and these have {width} x {height} px: set "
                f"data.size to {side}"
            )
        if patch and (height % patch or width % patch):
            below = min(height, width) // patch * patch
            fits = " or ".join(str(fit) for fit in (below, below + patch) if fit >= 32)
            raise DataError(
                f"encoder {self.spec.name} cuts images into patches of {patch} px, and {width} x {height} px are not "
                f"made of whole ones: set data.size to {fits}"
            )

    def train(self, mode: bool = True) -> "Encoder":
        """Pretrained BatchNorm keeps its statistics, whatever the mode."""
        super().train(mode)
        if self.spec.batchnorm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _build_backbone(spec: EncoderSpec) -> nn.Module:
    if is_python(spec.name):
        return _load_outside(spec)
    return timm_backbone.new_timm(spec.backbone) if "architecture" in spec.backbone else new_backbone(spec.backbone)


def _find_traits(backbone: Any) -> Traits:
    if isinstance(backbone, timm_backbone.TimmBackbone):
        return backbone.traits
    return traits_of(backbone)


def build_encoder(name: str, stated: Facts = NOTHING) -> Encoder:
    """An encoder with its pretrained weights, or with random ones for a preset; `stated` as in `describe`."""
    spec = describe(name, stated)
    with name_errors(name):
        return Encoder(spec, find_kind(name).load(spec))


@contextlib.contextmanager
def name_errors(name: str) -> Iterator[None]:
    """A `ValueError` becomes a `DataError` that names the encoder."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise DataError(f"encoder {name}: {error}") from error
