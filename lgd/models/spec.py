"""An encoder's specification: what a model's `config.json` may say of its network, and how far it is believed.

A few bytes of JSON can ask for terabytes, hours, or somebody's Python. So a specification is plain numbers and text
within the bounds below, of an architecture that LGD knows, before any library sees it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, Strict, ValidationInfo, field_validator

from lgd.base.extensions import is_python
from lgd.base.records import Line, Record
from lgd.config_sections import Pool

ARCHITECTURES = """
beit bit convnext convnextv2 dinov2 dinov2_with_registers dinov3_convnext dinov3_vit focalnet pvt_v2 resnet swin swinv2
vit
""".split()
"""Architectures of transformers whose feature maps a test compares with those of the whole network."""
WITH_CLS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
"""Those that give a CLS token beside the tokens of the patches."""

# The largest encoders today have 40 layers, widths of 8,192 (DINOv3, 6.7 billion parameters) and images of 4,096 px.
MOST_LAYERS = 100
_MOST_SIZE = 32_768
_MOST_ENTRIES = 256

_MOST_WINDOW = 512

LAYERS = re.compile(r"(layers|depths?|blocks|stages|levels|convs)$")
"""Fields whose numbers say how often a part is repeated."""
_WINDOWS = re.compile(r"(patch|kernel|window|stride|dilation|padding)")
_MAY_BE_NEGATIVE = ("out_indices", "semantic_loss_ignore_index")
_TIMM_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,99}")
# These load files, or make another thing than the network.
_NOT_ARGUMENTS = """
pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict pretrained_filter_fn pretrained_model_args
checkpoint_path cache_dir model_name scriptable exportable no_jit features_only feature_cfg feature_cls out_indices
kwargs_filter model_cfg pruned in_chans device dtype
""".split()
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")

Triple = tuple[float, float, float]
# Of RGB in 0..1: those of 0..255, zeros and tiny deviations would give numbers that no network was trained with.
_Mean = Annotated[float, Field(ge=0, le=1)]
_Std = Annotated[float, Field(ge=0.001, le=10)]
Mean = Annotated[tuple[_Mean, _Mean, _Mean], Strict(False)]
Std = Annotated[tuple[_Std, _Std, _Std], Strict(False)]
Size = Annotated[int, Field(ge=1, le=_MOST_SIZE)]
EncoderMpp = Annotated[float, Field(gt=0, le=100)]


class Facts(Record):
    """What a run's config, or LGD's table of encoders, states of an encoder; None where it states nothing."""

    pool: Pool | None = None
    mean: Mean | None = None
    std: Std | None = None
    size: Size | None = None
    mpp: EncoderMpp | None = None
    licence: Line | None = None
    arguments: dict[str, object] = Field(default_factory=dict)
    """Of the network's constructor in timm, as plain values."""

    def over(self, others: "Facts") -> "Facts":
        """These facts, and the others where these state nothing."""
        stated = {field: value for field, value in self if value is not None}
        return others.model_copy(update=stated | {"arguments": others.arguments | self.arguments})


class EncoderSpec(Record):
    """Everything of an encoder but its weights; the same network is built from it again, without the hub."""

    name: Line
    """As the user named it: a preset, hf:ORG/NAME, a folder, or code outside LGD."""
    backbone: dict[str, object]
    """The architecture (`model_type`) and the fields of its configuration in transformers; empty for code."""
    batchnorm: Literal["group", "frozen"]
    """Batch norms become group norms, or keep their stored statistics."""
    mean: Mean
    std: Std
    """Of RGB in 0..1, by channel."""
    pool: Pool
    """How an image becomes one vector."""
    size: Size | None
    """Pixels a side of the images that it was made for."""
    mpp: EncoderMpp | None
    """Micrometres a pixel of the images that it was made for."""
    licence: Line | None
    """Terms that its weights come with."""

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, settings: dict[str, object], known: ValidationInfo) -> dict[str, object]:
        if is_python(known.data.get("name", "")):
            if settings:
                raise ValueError("it should be empty, since the encoder is code of its own")
            return settings
        check_sizes(settings)
        refuse_code(settings)
        if "architecture" in settings:
            check_arguments(settings)
        else:
            check_architecture(settings)
        for field, value in settings.items():
            if isinstance(value, dict):
                raise ValueError(f"{field!r:.80} is an object: it may be a number, a text or a list of them")
        return settings


def refuse_code(settings: object) -> None:
    """`ValueError` where JSON names code, at any depth."""
    for field, value in _walk_fields(settings):
        if field in _CODE and value:
            raise ValueError(
                f"field {field!r} names code of its own ({value!r:.120}), which is never run: choose an encoder that "
                "needs none, or take the field out where the architecture is one of transformers' own"
            )
        # A name with a slash is a kernel of the hub: compiled code and Python.
        if "_implementation" in field and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"field {field!r:.80} names code of the hub ({value!r:.120}), which is never run: take the field out"
            )


def check_architecture(settings: Mapping[str, object]) -> None:
    """`ValueError` for an architecture that LGD does not know as an encoder."""
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        problem = "is missing" if kind is None else f"is {kind!r:.80}, which is not supported as an encoder"
        raise ValueError(f"field 'model_type' {problem}: choose an encoder of {', '.join(ARCHITECTURES)}")


def check_arguments(settings: Mapping[str, object]) -> None:
    """`ValueError` where settings of one of timm's networks are no plain arguments, or change what it is."""
    name = settings.get("architecture")
    if not (isinstance(name, str) and _TIMM_NAME.fullmatch(name)):
        raise ValueError(f"field 'architecture' is {name!r:.80}, which is no name of one of timm's networks")
    check_sizes(settings)
    for field, value in settings.items():
        if field in _NOT_ARGUMENTS or not field.isidentifier() or isinstance(value, dict):
            raise ValueError(f"argument {field!r:.80} cannot be set: leave it out")
    if settings.get("num_classes") != 0:
        raise ValueError("argument 'num_classes' should be 0: an encoder has no classifier")


def check_sizes(settings: Mapping[str, object]) -> None:
    """`ValueError` where a field asks for an absurd network or is no plain value; objects are passed over."""
    for field, value in settings.items():
        if isinstance(value, dict):
            continue
        numbers = [number for number in list_values(field, value) if isinstance(number, int | float)]
        least = -_MOST_SIZE if field in _MAY_BE_NEGATIVE else 0
        most = MOST_LAYERS if LAYERS.search(field) else _MOST_WINDOW if _WINDOWS.search(field) else _MOST_SIZE
        for number in numbers:
            if not least <= number <= most:
                raise ValueError(f"field {field!r:.80} holds {number!r:.40}: an encoder has {least} to {most} there")
        if LAYERS.search(field) and sum(numbers) > MOST_LAYERS:
            raise ValueError(f"field {field!r:.80} states {sum(numbers)} layers: an encoder has {MOST_LAYERS} at most")
        if field == "num_channels" and value != 3:
            raise ValueError(f"field {field!r} is {value!r:.80}: an encoder sees RGB, which is 3 channels")


def list_values(field: str, value: object) -> list[object]:
    """The plain values of a field, of a list or of a list of lists."""
    values = [value]
    for _ in range(3):
        values = [one for some in values for one in (some if isinstance(some, list | tuple) else [some])]
        if len(values) > _MOST_ENTRIES:
            raise ValueError(f"field {field!r:.80} has more than {_MOST_ENTRIES} entries")
    for one in values:
        if not (one is None or isinstance(one, bool | int | float | str)):
            raise ValueError(f"field {field!r:.80} is too deeply nested")
        if isinstance(one, str) and len(one) > _MOST_ENTRIES:
            raise ValueError(f"field {field!r:.80} has a text of {len(one)} letters")
    return values


def _walk_fields(settings: object) -> Iterator[tuple[str, object]]:
    """Every named field of plain JSON, at any depth."""
    left = [settings]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
