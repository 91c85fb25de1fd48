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
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from lgd.models.export import Shapes, count_numbers, read_shapes, shapes_of
from lgd.models.pretrained import shorten
from lgd.models.spec import LAYERS, list_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# DINOv3's largest has 6.7 billion.
_MOST_PARAMETERS = 10_000_000_000
# A draft's calls of torch: 1.1 billion parameters in 40 layers take 4,000, in about a second.
_MOST_CALLS = 10_000
# A backbone may norm its output where the whole network does not: such norms start as the identity.
_OUTPUT_NORMS = "hidden_states_norms."


def new_backbone(settings: Mapping[str, object]) -> nn.Module:
    """A backbone with random weights; `ValueError` where the fields make none, or one too large."""
    draft(json.dumps(settings))
    network: nn.Module = _auto_backbone().from_config(_make_config(settings), trust_remote_code=False)
    return network


def _auto_backbone() -> Any:
    # transformers does not annotate it.
    from transformers import AutoBackbone

    return AutoBackbone


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
    with _quiet(), _errors_of_transformers("its weights cannot be loaded"):
        backbone, found = kind.from_pretrained(
            None,
            config=_make_config(settings),
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    _check_loaded(backbone, needed, found["missing_keys"], mismatched, found["unexpected_keys"])
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
    with _errors_of_transformers("its fields make no network"):
        return CONFIG_MAPPING[kind](**fields)


@functools.lru_cache(8)
def draft(settings: str) -> tuple[Any, Shapes]:
    """The class and the shapes of a backbone, of settings as JSON, without any memory for its weights.

    Raises `ValueError` where the settings make no network, or one that is too large.
    """
    fields = json.loads(settings)
    auto, config, budget = _auto_backbone(), _make_config(fields), _Budget()
    try:
        with torch.device("meta"), budget:
            network = auto.from_config(config, trust_remote_code=False)
        shapes, channels = shapes_of(network), list(network.channels)
    except Exception as error:
        if not budget.spent:
            raise ValueError(f"its fields make no network ({shorten(error)})") from error
        raise ValueError(f"its network would be larger than any encoder: {_explain_size(fields, budget)}") from error
    if not channels:
        raise ValueError("its fields make no network (no feature map is named in 'out_features')")
    return type(network), shapes


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


def _check_loaded(
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
def _errors_of_transformers(problem: str) -> Iterator[None]:
    """Whatever it raises about data becomes a `ValueError` of one line: the types differ by field and version."""
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
