"""Checkpoints that are complete or absent, and know no world size, ZeRO stage or engine.

    DIR/checkpoints/step-00000500/weights.safetensors    float32, by parameter name
    DIR/checkpoints/step-00000500/moments.safetensors    AdamW's, by parameter name
    DIR/checkpoints/step-00000500/state.json             step, inputs, digests; its appearance commits

The folder is filled under a temporary name, flushed, and renamed.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lgd.config import DataError
from lgd.files import publish, read_json, sha256, sync, write_json
from lgd.train.engine import Moments

FORMAT = "lgd-checkpoint/1"
_TENSORS = ("weights.safetensors", "moments.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a run needs to go on."""

    step: int
    position: int
    """The plan's position after that step."""
    inputs: str
    """Digest of what the run depends on (`tasks.inputs_digest`)."""
    skipped: list[int]
    """Numbers of the bad samples that were skipped so far."""
    weights: dict[str, torch.Tensor]
    moments: Moments


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish a checkpoint under `folder` and remove all but the newest `keep`."""
    from safetensors.torch import save_file

    name = f"step-{checkpoint.step:08d}"
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        flat = {f"{p}|{m}": t for p, pair in checkpoint.moments.items() for m, t in pair.items()}
        for file, tensors in zip(_TENSORS, (checkpoint.weights, flat), strict=True):
            with publish(temporary / file) as path:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                "step": checkpoint.step,
                "position": checkpoint.position,
                "inputs": checkpoint.inputs,
                "skipped": checkpoint.skipped,
                "sha256": {file: sha256(temporary / file) for file in _TENSORS},
            },
        )
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(temporary, folder / name)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return folder / name


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def problems(path: Path) -> list[str]:
    """What is wrong with one checkpoint."""
    state: Any = read_json(path / "state.json")
    kinds = {"format": str, "step": int, "position": int, "inputs": str, "skipped": list, "sha256": dict}
    whole = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    if not whole or state["format"] != FORMAT or state["sha256"].keys() != set(_TENSORS):
        return [f"{path / 'state.json'} is not a checkpoint of format {FORMAT}"]
    return [
        f"{path / file} is missing or does not match its digest: delete {path} to go on from an older one"
        for file in _TENSORS
        if not (path / file).is_file() or sha256(path / file) != state["sha256"][file]
    ]


def load(path: Path, inputs: str) -> Checkpoint:
    """Read a checkpoint; one that is damaged, or of a run with other inputs, is refused."""
    from safetensors.torch import load_file

    if not (path / "state.json").is_file():
        raise DataError(f"train.resume: {path} is not a complete checkpoint ({path / 'state.json'} is missing)")
    found = problems(path)
    if found:
        raise DataError("\n".join(found))
    state = read_json(path / "state.json")
    if state["inputs"] != inputs:
        raise DataError(
            f"checkpoint {path} is of a run with other shards, teacher, store or settings: "
            "go on with the same ones, name another folder, or start anew with --train.resume never"
        )
    moments: Moments = {}
    for key, tensor in load_file(path / "moments.safetensors").items():
        parameter, moment = key.rsplit("|", 1)
        moments.setdefault(parameter, {})[moment] = tensor
    return Checkpoint(
        step=state["step"],
        position=state["position"],
        inputs=inputs,
        skipped=state["skipped"],
        weights=load_file(path / "weights.safetensors"),
        moments=moments,
    )


def find(folder: Path, resume: str, inputs: str) -> Checkpoint | None:
    """The checkpoint that `train.resume` (auto or a path) means, or None where there is none yet."""
    if resume != "auto":
        return load(Path(resume), inputs)
    done = complete(folder)
    return load(done[-1], inputs) if done else None
