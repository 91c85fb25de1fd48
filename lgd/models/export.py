"""A network as a folder: `config.json` says how to build it, `model.safetensors` holds its weights.

`config.json` is written last, so a folder that has one is whole.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgd.errors import DataError
from lgd.files import exists, place, publish, read_json, remove, sha256, write_json
from lgd.remote import fetch

FORMAT = "lgd-model/1"


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


def save_model(folder: str | Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Publish weights (by parameter name) and the description of the network that they belong to."""
    folder = place(folder)
    remove(folder / "config.json")
    with publish(folder / "model.safetensors") as temporary:
        write_tensors(temporary, tensors)
        weights = sha256(temporary)
    write_json(folder / "config.json", {"format": FORMAT, **config, "weights_sha256": weights})


def read_model_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """The description of the network in a folder; `kind` is teacher or student."""
    folder = place(folder)
    verb = {"teacher": "lgd train-teacher", "student": "lgd train"}[kind]
    if not exists(folder / "config.json"):
        raise DataError(f"{folder} holds no trained {kind} ({folder / 'config.json'} is missing): run {verb} first")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("kind") != kind:
        raise DataError(f"{folder / 'config.json'} does not describe a {kind} of format {FORMAT}")
    return config


def load_weights(folder: str | Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Load and check the weights of a folder into a network."""
    from safetensors.torch import load_file

    path = fetch(place(folder) / "model.safetensors", config["weights_sha256"])
    if not path.is_file() or sha256(path) != config["weights_sha256"]:
        raise DataError(f"{path} is missing or does not match the digest in config.json: train or copy it again")
    model.load_state_dict(load_file(path))
