"""Backbones of timm, by the name of their architecture and the arguments of its constructor, as plain values.

timm is not part of an ordinary installation (`pip install 'lgd[encoders]'`). It only builds networks here: what a
folder or the hub states is read and checked as all else is (`lgd.models.pretrained`), and weights are safetensors.
"""

import contextlib
import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import load_file
from torch import nn

from lgd.base.records import Record
from lgd.models.backbone import Features, Traits, check_loaded, drafting, explain_library
from lgd.models.export import Shapes, read_shapes, shapes_of
from lgd.models.pretrained import CONFIG, NORMALISE, find_folder, read_object, shorten
from lgd.models.spec import Mean, Size, Std, check_arguments, refuse_code

INSTALL = "install the extra: pip install 'lgd[encoders]'"
_OWN = "timm:"
_HUB = "timm:hf-hub:"

# A class cannot stand in JSON: these arguments are the names of classes, of these.
_CLASSES = {
    "mlp_layer": ("timm.layers", ("GatedMlp", "GluMlp", "Mlp", "SwiGLU", "SwiGLUPacked")),
    "act_layer": ("torch.nn", ("GELU", "Hardswish", "Mish", "ReLU", "ReLU6", "SiLU", "Tanh")),
}
# For networks without a size of their own; any does.
_ANY_SIDE = 224


class _Preprocessing(Record):
    model_config = ConfigDict(extra="ignore")
    mean: Mean | None = None
    std: Std | None = None
    input_size: tuple[int, int, Size] | None = Field(None, strict=False)
    fixed_input_size: bool = False
    global_pool: str | None = None


class Saved(NamedTuple):
    """What the config.json of a folder says, as timm writes it."""

    architecture: str
    arguments: dict[str, object]
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    size: int | None


def is_timm(name: str) -> bool:
    """Whether a name is one of timm's encoders, or of a folder that timm wrote."""
    if name.startswith(_OWN):
        return True
    if not (Path(name) / CONFIG).is_file():
        return False
    with contextlib.suppress(ValueError):
        found = read_object(Path(name) / CONFIG, "")
        return "architecture" in found and "model_type" not in found
    return False


def find_timm_folder(name: str, *, weights: bool = False) -> Path:
    """The folder of an encoder, or the copy of a repository with its description or its weights too."""
    return find_folder(find_hub_name(name), weights=weights)


def find_hub_name(name: str) -> str:
    """The name of the repository that one of timm's own names stands for; other names are given back."""
    if not name.startswith(_OWN) or name.startswith(_HUB):
        return name
    return f"{_HUB}{_find_repository(name.removeprefix(_OWN))}"


def _find_repository(name: str) -> str:
    """The repository of the hub that holds the weights of one of timm's own names."""
    import_timm()
    from timm.models import get_pretrained_cfg, is_model

    if not is_model(name.partition(".")[0]):
        raise ValueError("timm knows no such network: use timm:NAME, timm:hf-hub:ORG/NAME, or a folder that timm wrote")
    with explain_library("timm has no weights of that name"):
        found = get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        raise ValueError("timm has no weights of that name on the hub: add one of its tags, as in NAME.TAG")
    return str(found.hf_hub_id)


def read_saved(folder: Path) -> Saved:
    """What `config.json` says; `ValueError` for code and for what is no description of timm's."""
    found = read_object(folder / CONFIG, "copy the encoder again, whole")
    refuse_code(found)
    if not isinstance(found.get("architecture"), str):
        raise ValueError(f"{CONFIG}: field 'architecture' is missing: timm did not write it")
    # Older versions wrote both as one object.
    arguments = found.get("model_args", {})
    try:
        said = _Preprocessing.from_json(found.get("pretrained_cfg", found))
        if not isinstance(arguments, dict):
            raise ValueError("field 'model_args' should be an object")
    except ValueError as error:
        raise ValueError(f"{CONFIG}: {error}: {NORMALISE}") from error
    side = said.input_size[-1] if said.input_size else None
    defaults: dict[str, object] = {} if said.global_pool is None else {"global_pool": said.global_pool}
    if said.fixed_input_size and side:
        defaults["img_size"] = side
    if arguments.get("in_chans", 3) != 3:
        raise ValueError(f"{CONFIG}: field 'in_chans' is {arguments['in_chans']!r:.80}: an encoder sees RGB")
    stated = {name: value for name, value in arguments.items() if value is not None and name != "in_chans"}
    arguments = defaults | stated
    return Saved(str(found["architecture"]), arguments, said.mean, said.std, side)


def choose_settings(architecture: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """The settings of a network that takes images of any size, where the architecture allows it."""
    settings = {"architecture": architecture, **arguments, "num_classes": 0}
    sides = settings.get("img_size")
    if isinstance(sides, list) and len(set(sides)) == 1:
        settings["img_size"] = sides[0]
    check_arguments(settings)
    if "dynamic_img_size" not in arguments:
        with contextlib.suppress(ValueError):
            flexible = settings | {"dynamic_img_size": True}
            draft_timm(json.dumps(flexible))
            return flexible
    draft_timm(json.dumps(settings))
    return settings


class TimmBackbone(nn.Module):
    """A network of timm: normalised images -> its last feature map, and its CLS token where it has one."""

    def __init__(self, network: nn.Module, traits: Traits) -> None:
        super().__init__()
        self.network = network
        self.traits = traits

    def forward(self, normal_B3HW: torch.Tensor) -> Features:
        return _run(self.network, normal_B3HW)


def _run(network: Any, normal_B3HW: torch.Tensor) -> Features:
    prefix = {"return_prefix_tokens": True} if _has_prefix(network) else {}
    (last,) = network.forward_intermediates(
        normal_B3HW, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True, **prefix
    )
    map_BCHW, first_BNC = last if prefix else (last, None)
    return Features(map_BCHW, None if first_BNC is None or not _has_cls(network) else first_BNC[:, 0])


def _has_prefix(network: Any) -> bool:
    return _takes_tokens(network) and getattr(network, "num_prefix_tokens", 0) > 0


def _has_cls(network: Any) -> bool:
    # Registers alone are prefix tokens too.
    return _has_prefix(network) and getattr(network, "cls_token", None) is not None


def new_timm(settings: Mapping[str, object]) -> TimmBackbone:
    """A backbone with random weights; `ValueError` where the settings make none, or one too large."""
    traits, _ = draft_timm(json.dumps(settings))
    with explain_library("its arguments make no network"):
        return TimmBackbone(_create(settings), traits)


def load_timm(settings: Mapping[str, object], files: list[Path]) -> TimmBackbone:
    """A backbone with the weights of safetensors files, in float32; `ValueError` where they are not its own."""
    stored = {name: shape for path in files for name, shape in read_shapes(path).items()}
    _, needed = draft_timm(json.dumps(settings))
    backbone = new_timm(settings)
    mismatched = [name for name in needed.keys() & stored.keys() if needed[name] != stored[name]]
    # Copies: the file may be replaced or cut off while the network lives. A classifier's are left.
    tensors = {
        name: tensor.clone()
        for path in files
        for name, tensor in load_file(path).items()
        if name in needed and name not in mismatched
    }
    backbone.network.load_state_dict(tensors, strict=False)
    lacking, unexpected = needed.keys() - stored.keys(), stored.keys() - needed.keys()
    check_loaded(backbone.network, needed, lacking, mismatched, unexpected)
    return backbone.float()


@functools.lru_cache(8)
def draft_timm(settings: str) -> tuple[Traits, Shapes]:
    """The traits and the shapes of a backbone, of settings as JSON, without any memory for its weights.

    Raises `ValueError` where the settings make no network of feature maps, or one that is too large.
    """
    fields = json.loads(settings)
    import_timm()
    with drafting(fields, "its arguments make no network"):
        network = _create(fields)
    patches = getattr(network, "patch_embed", None)
    own = getattr(patches, "img_size", None)
    side = own[0] if own else _ANY_SIDE
    with explain_library("it gives no feature map"), torch.no_grad():
        map_BCHW, cls_BC = _run(network.eval(), torch.empty(1, 3, side, side, device="meta"))
        _, channels, height, _ = map_BCHW.shape
    fixed = own is not None and getattr(patches, "strict_img_size", False) is True
    fixed = fixed and not getattr(patches, "dynamic_img_pad", False) and not getattr(network, "dynamic_img_size", False)
    # Convolutions and windows take any side; where patches are tokens, a rim would be lost.
    patch = side // height if _takes_tokens(network) else None
    return Traits(channels, patch, cls_BC is not None, side if fixed else None), shapes_of(network)


def _takes_tokens(network: Any) -> bool:
    return "return_prefix_tokens" in inspect.signature(network.forward_intermediates).parameters


def _create(settings: Mapping[str, object]) -> Any:
    """A network with random weights, which depends on the settings alone."""
    from timm.models import create_model

    arguments = {name: value for name, value in settings.items() if name != "architecture"}
    for name, (module, classes) in _CLASSES.items():
        if (value := arguments.get(name)) in classes:
            arguments[name] = getattr(importlib.import_module(module), str(value))
    # timm would take defaults from the network's usual weights, which change with its version.
    plain = {"num_classes": 0, "input_size": (3, _ANY_SIDE, _ANY_SIDE)}
    return create_model(str(settings["architecture"]), pretrained=False, pretrained_cfg=plain, **arguments)


def import_timm() -> None:
    """`ValueError` with the remedy where timm cannot be imported."""
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"it needs {error.name}, which is not installed: {INSTALL}") from error
    # torchvision of another torch fails in many ways.
    except Exception as error:
        raise ValueError(f"it needs timm, which cannot be imported ({shorten(error)}): {INSTALL}") from error
