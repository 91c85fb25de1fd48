"""Backbones of transformers: built of a specification's fields, and given weights, both only as far as they check.

A network is drafted first, without memory for its weights: that takes at most a second or two for the largest, and
shows its size and the shapes of its tensors.
"""

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from lgd.models.export import Shapes, count_numbers, read_shapes, shapes_of
from lgd.models.pretrained import shorten
from lgd.models.spec import LAYERS, WITH_CLS, list_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# DINOv3's largest has 6.7 billion.
_MOST_PARAMETERS = 10_000_000_000
# A draft's calls of torch: 1.1 billion parameters in 40 layers take 4,000, in about a second.
_MOST_CALLS = 10_000
# A backbone may norm its output where the whole network does not: such norms start as the identity.
_OUTPUT_NORMS = "hidden_states_norms."


class Features(NamedTuple):
    """What a backbone gives."""

    map_BCHW: torch.Tensor
    """Its last feature map; of a transformer the tokens of the patches."""
    cls_BC: torch.Tensor | None
    """The CLS token, where it has one."""


class Traits(NamedTuple):
    """What must be known of a backbone to use it."""

    channels: int
    patch: int | None
    """Pixels a side of the patches that an image is cut into; None where any size does."""
    has_cls: bool
    side: int | None = None
    """Pixels a side of the only images that it takes; None where there are others."""


def traits_of(network: Any) -> Traits:
    """The traits of a backbone of transformers."""
    kind, config = network.config.model_type, network.config
    if kind in WITH_CLS:
        return Traits(config.hidden_size, config.patch_size, has_cls=True)
    return Traits(list(network.channels)[-1], config.patch_size if kind == "beit" else None, has_cls=False)


def run_backbone(network: Any, normal_B3HW: torch.Tensor) -> Features:
    """Normalised images -> what a backbone of transformers gives."""
    config = network.config
    if config.model_type not in WITH_CLS:
        return Features(network(normal_B3HW).feature_maps[-1], None)
    options = {}
    height, width = normal_B3HW.shape[-2:]
    if config.model_type == "vit":
        # The others do it unasked.
        options["interpolate_pos_encoding"] = (height, width) != (config.image_size, config.image_size)
    tokens_BNC = network(normal_B3HW, **options).last_hidden_state
    # Registers lie between the CLS token and the patches.
    first, rows = 1 + getattr(config, "num_register_tokens", 0), height // config.patch_size
    return Features(tokens_BNC[:, first:].transpose(1, 2).unflatten(2, (rows, -1)), tokens_BNC[:, 0])


def batchnorm_to_groupnorm(module: nn.Module) -> None:
    """Replace all batch norms inside, which would let an image see the rest of its batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = 8 if child.num_features % 8 == 0 else 1
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            batchnorm_to_groupnorm(child)


def new_backbone(settings: Mapping[str, object]) -> nn.Module:
    """A backbone with random weights; `ValueError` where the fields make none, or one too large."""
    draft(json.dumps(settings))
    config = _make_config(settings)
    auto, options = _find_class(config.model_type)
    network: nn.Module = auto.from_config(config, trust_remote_code=False, **options)
    return network


def _find_class(kind: str) -> tuple[Any, dict[str, bool]]:
    """The class that builds networks of an architecture, which transformers does not annotate, and its options."""
    from transformers import AutoBackbone, AutoModel

    if kind not in WITH_CLS:
        return AutoBackbone, {}
    # A backbone would give the patches' tokens alone, and a plain ViT is none.
    return AutoModel, {"add_pooling_layer": False} if kind == "vit" else {}


def load_backbone(settings: Mapping[str, object], files: list[Path]) -> nn.Module:
    """A backbone with the weights of safetensors files, in float32; `ValueError` where they are not its own."""
    stored = {name: shape for path in files for name, shape in read_shapes(path).items()}
    kind, shapes = draft(json.dumps(settings))
    needed = {name: shape for name, shape in shapes.items() if not name.startswith(_OUTPUT_NORMS)}
    if count_numbers(needed) > count_numbers(stored):
        raise ValueError(
            f"its weights do not fit config.json: they hold {count_numbers(stored):,} numbers, the network "
            f"{count_numbers(needed):,}: use the config.json that came with them"
        )
    # Copies: the file may be replaced or cut off while the network lives.
    tensors = {name: tensor.clone() for path in files for name, tensor in load_file(path).items()}
    with _quiet(), explain_library("its weights cannot be loaded"):
        backbone, found = kind.from_pretrained(
            None,
            config=_make_config(settings),
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            use_safetensors=True,
            **_find_class(str(settings["model_type"]))[1],
        )
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    check_loaded(backbone, needed, found["missing_keys"], mismatched, found["unexpected_keys"])
    return cast(nn.Module, backbone.float())


def list_fields(kind: str) -> set[str]:
    """The fields of an architecture's configuration that its network depends on."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    if kind not in CONFIG_MAPPING:
        raise ValueError(f"field 'model_type' is {kind!r}, which transformers {__version__} lacks: install a newer one")
    own, general = (inspect.signature(one.__init__).parameters for one in (CONFIG_MAPPING[kind], PreTrainedConfig))
    names = {name for name in own.keys() - general.keys() if not name.startswith("_")}
    return names | {"model_type", "out_features", "out_indices"}


def _make_config(settings: Mapping[str, object]) -> "PreTrainedConfig":
    """The configuration of transformers; `ValueError` names a field that it does not know."""
    from transformers import CONFIG_MAPPING, __version__

    kind = str(settings["model_type"])
    strange = sorted(settings.keys() - list_fields(kind))
    if strange:
        raise ValueError(f"field {strange[0]!r:.80} is none of {kind} in transformers {__version__}")
    fields: dict[str, Any] = {field: value for field, value in settings.items() if field != "model_type"}
    with explain_library("its fields make no network"):
        config: PreTrainedConfig = CONFIG_MAPPING[kind](**fields)
    for field in ("out_features", "out_indices") if kind in WITH_CLS and kind != "vit" else ():
        last = {"out_features": [f"stage{config.num_hidden_layers}"], "out_indices": [config.num_hidden_layers]}[field]
        if list(getattr(config, field)) != last:
            raise ValueError(
                f"its fields make no network (field {field!r} names other layers than the last: remove it)"
            )
    return config


@functools.lru_cache(8)
def draft(settings: str) -> tuple[Any, Shapes]:
    """The class and the shapes of a backbone, of settings as JSON, without any memory for its weights.

    Raises `ValueError` where the settings make no network, or one that is too large.
    """
    fields = json.loads(settings)
    config = _make_config(fields)
    auto, options = _find_class(config.model_type)
    with drafting(fields, "its fields make no network"):
        network = auto.from_config(config, trust_remote_code=False, **options)
    with explain_library("its fields make no network"):
        channels = config.model_type in WITH_CLS or list(network.channels)
    if not channels:
        raise ValueError("its fields make no network (no feature map is named in 'out_features')")
    return type(network), shapes_of(network)


@contextlib.contextmanager
def drafting(fields: Mapping[str, object], problem: str) -> Iterator[None]:
    """Build a network of these fields without any memory for its weights; `ValueError` where that fails or grows too
    large.
    """
    budget = _Budget()
    try:
        with torch.device("meta"), budget:
            yield
    except Exception as error:
        if not budget.spent:
            raise ValueError(f"{problem} ({shorten(error)})") from error
        raise ValueError(f"its network would be larger than any encoder: {_explain_size(fields, budget)}") from error


def _explain_size(fields: Mapping[str, object], budget: "_Budget") -> str:
    """What made a draft too large."""
    if budget.parameters <= _MOST_PARAMETERS:
        return f"by its layers in {', '.join(repr(field) for field in fields if LAYERS.search(field)):.200}"
    sizes = [
        (number, field)
        for field, value in fields.items()
        for number in list_values(field, value)
        if isinstance(number, int | float) and not isinstance(number, bool)
    ]
    largest, field = max(sizes)
    return f"more than {_MOST_PARAMETERS:,} parameters; its largest field is {field!r:.80}, {largest}"


class _Budget(TorchFunctionMode):
    """Stops a draft as soon as the network has become too large."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters = self.calls = 0

    @property
    def spent(self) -> bool:
        return self.parameters > _MOST_PARAMETERS or self.calls > _MOST_CALLS

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.calls += 1
        # A tensor made of none is new; the others are what a new one is filled with.
        sources = (*args, *kwargs.values())
        if isinstance(out, torch.Tensor) and not any(isinstance(one, torch.Tensor) for one in sources):
            self.parameters += out.numel()
        if self.spent:
            raise ValueError("the network is too large")
        return out


def check_loaded(
    backbone: nn.Module, needed: Shapes, lacking: Iterable[str], mismatched: list[str], unexpected: Iterable[str]
) -> None:
    """`ValueError` where weights were missing, of another shape, left over, or no numbers."""
    learnt = {name for name, _ in backbone.named_parameters()} | {name for name in needed if "running_" in name}
    missing = [name for name in lacking if name in learnt & needed.keys() and "mask_token" not in name]
    layers = {_mask_numbers(name) for name in needed}
    beyond = [name for name in unexpected if _mask_numbers(name) in layers]
    for names, problem in ((missing, "lack"), (mismatched, "have other shapes of"), (beyond, "have more layers:")):
        if names:
            raise ValueError(
                f"its weights do not fit config.json: they {problem} {len(names)} tensors, such as "
                f"{min(names)!r:.120}: use the config.json that came with them"
            )
    for name, tensor in backbone.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its weights are damaged: tensor {name!r} holds values that are no finite numbers")


def _mask_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


@contextlib.contextmanager
def explain_library(problem: str) -> Iterator[None]:
    """Whatever a library raises about data becomes a `ValueError` of one line: its types differ by version."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{problem} ({shorten(error)})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables and bars of transformers: what matters in them is raised."""
    from transformers import utils

    logging: Any = utils.logging
    with contextlib.ExitStack() as undo:
        undo.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
