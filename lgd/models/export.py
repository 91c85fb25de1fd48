"""A network as a folder: `config.json` says how to build it, `model.safetensors` holds its weights.

`config.json` (`lgd.models.description`) is written last, so a folder that has one is whole.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lgd.base.errors import DataError
from lgd.base.extensions import refuse_unnamed
from lgd.io.digests import sha256
from lgd.io.files import publish, remove
from lgd.io.location import Location, as_location
from lgd.io.remote import open_checked
from lgd.models.description import ModelConfig, StudentConfig, TeacherConfig
from lgd.models.weights import compare_shapes, load_tensors, read_shapes, shapes_of

Built = TypeVar("Built", bound=nn.Module)


class Network(nn.Module, ABC):
    """A network that lies in a folder."""

    @abstractmethod
    def describe(self, **facts: object) -> ModelConfig:
        """What builds it again, beside its weights, with the facts of its training."""


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors by name to a local file; `OSError` for a full disk, as for any file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # What the system said is in its text only.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_model(folder: str | Location, tensors: dict[str, torch.Tensor], describe: Callable[..., ModelConfig]) -> None:
    """Publish weights (by parameter name) and what `describe(weights_sha256=...)` says of their network."""
    folder = as_location(folder)
    remove(folder / "config.json")
    with publish(folder / "model.safetensors") as temporary:
        write_tensors(temporary, tensors)
        weights = sha256(temporary)
    describe(weights_sha256=weights).write(folder / "config.json")


def read_teacher_config(folder: str | Location) -> TeacherConfig:
    """What a teacher's folder says of it."""
    return TeacherConfig.read(as_location(folder) / "config.json")


def read_student_config(folder: str | Location) -> StudentConfig:
    """What a student's folder says of it."""
    return StudentConfig.read(as_location(folder) / "config.json")


def load_weights(
    folder: str | Location, build: Callable[[], Built], config: ModelConfig, code: Collection[str] = ()
) -> Built:
    """The network that `build` makes, with the checked weights of a folder; `DataError` for those of another one.

    Nothing is built where `config` names code that is not in `code`. It is drafted first, without memory for its
    weights, and built only where the file holds those of just this one.
    """
    path, remedy = as_location(folder) / "model.safetensors", "train or copy it again"
    refuse_unnamed(as_location(folder) / "config.json", config.named, code)
    try:
        with torch.device("meta"):
            draft = build()
    except DataError as error:
        raise DataError(f"{as_location(folder) / 'config.json'}: {error}: {config.REMEDY}") from error
    with open_checked(path, config.weights_sha256, None, remedy) as file:
        # The descriptor names the file that was checked, whatever has taken its place meanwhile.
        checked = Path(f"/dev/fd/{file.fileno()}")
        compare_shapes(path, read_shapes(checked, name=path), shapes_of(draft))
        network = build()
        network.load_state_dict(load_tensors(checked))
    return network
