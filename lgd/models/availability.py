"""Whether a run's encoders can be had and used, and what is taken from where: found before hours are spent."""

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from lgd.base.errors import ConfigError, DataError
from lgd.base.extensions import is_python
from lgd.config import Config
from lgd.models import timm_backbone
from lgd.models.encoder import PRESETS, Encoder, describe, name_errors
from lgd.models.known import find_known, stated_in
from lgd.models.pretrained import check_hub, is_hub
from lgd.models.spec import EncoderSpec
from lgd.shards.manifest import Shape

logger = logging.getLogger(__name__)

Section = Literal["teacher", "student"]
_SCALE_DIFFERS = 1.15


def check_encoder(config: Config, section: Section, shapes: Sequence[Shape] = ()) -> str:
    """What a run's encoder is, and what is taken from where, in one line. Nothing large is copied or built.

    Raises `DataError` or `ConfigError` for one that cannot be had, or that does not take the run's images.
    """
    name, stated = getattr(config, section).encoder, stated_in(config, section)
    spec = describe(name, stated)
    if is_python(name):
        return f"{name}: code outside LGD, pooled by mean"
    with torch.device("meta"):
        encoder = Encoder(spec)
    encoder.check_size(config.data.size, config.data.size)
    if name in PRESETS:
        return f"{name}: a preset, which starts from random weights"
    with name_errors(name):
        where = timm_backbone.find_hub_name(name) if timm_backbone.is_timm(name) else name
        if is_hub(where):
            check_hub(where)
    parts = [_describe(spec, encoder), _trace_sources(name, spec, {one for one, value in stated if value})]
    if encoder.traits.patch and spec.size and spec.size != config.data.size:
        parts.append(
            f"it was made for images of {spec.size} px and sees {config.data.size} px (data.size): its position "
            "embeddings are interpolated"
        )
    return "; ".join(parts + _compare_scales(spec, shapes, config.data.size))


def _describe(spec: EncoderSpec, encoder: Encoder) -> str:
    numbers = [f"{encoder.dim} numbers by pool {spec.pool}"]
    numbers += [f"patches of {encoder.traits.patch} px"] if encoder.traits.patch else []
    for field in ("mean", "std"):
        numbers.append(f"{field} {', '.join(f'{value:g}' for value in getattr(spec, field))}")
    numbers += [f"made for {spec.size} px"] if spec.size else []
    numbers += [f"{spec.mpp:g} um/px"] if spec.mpp else ["its scale is not known"]
    return f"{spec.name}: {', '.join(numbers)}; licence: {spec.licence or 'not known, look it up'}"


def _trace_sources(name: str, spec: EncoderSpec, stated: set[str]) -> str:
    """Which facts are from where."""
    row = find_known(name)
    known = row.facts.model_dump(exclude_none=True) if row else {}
    tabled = [field for field, value in known.items() if value not in (None, {}) and field not in stated]
    stated_by = [f"from the config: {', '.join(sorted(stated))}"] if stated else []
    if row and tabled:
        stated_by.append(f"from LGD's table ({row.source}; {row.checked}): {', '.join(tabled)}")
        stated_by.append(f"{row.gate} there")
    return "; ".join([*stated_by, "all else from its files"])


def check_packages(spec: EncoderSpec) -> None:
    """`DataError` where what builds a network again is not installed."""
    if "architecture" in spec.backbone:
        with name_errors(spec.name):
            timm_backbone.import_timm()


def _compare_scales(spec: EncoderSpec, shapes: Sequence[Shape], size: int) -> list[str]:
    """What to say where an encoder sees patches at another scale than it was made for."""
    shape = next((one for one in shapes if one.mpp), None)
    if spec.mpp is None or shape is None or shape.mpp is None:
        return []
    seen = shape.mpp * min(shape.width, shape.height) / size
    if 1 / _SCALE_DIFFERS < seen / spec.mpp < _SCALE_DIFFERS:
        return []
    return [
        f"it was made for {spec.mpp:g} um/px, and sees the patches at {seen:.2g} um/px: data.size "
        f"{round(size * seen / spec.mpp)} would be its scale"
    ]


def report_encoders(config: Config, sections: Sequence[Section], shapes: Sequence[Shape]) -> None:
    """Log what is known of a run's encoders; raises as `check_encoder`."""
    for section in sections:
        line = check_encoder(config, section, shapes)
        if getattr(config, section).encoder not in PRESETS:
            logger.info("%s.encoder %s", section, line)


def find_problem(config: Config, section: Section) -> tuple[bool, str]:
    """Whether an encoder can be used, and what it is or why not."""
    try:
        return True, check_encoder(config, section)
    except (ConfigError, DataError) as error:
        return False, str(error)
