"""Checkpoints that are complete or absent, and know no world size, ZeRO stage or engine.

    DIR/checkpoints/step-00000500/weights.safetensors    float32, by parameter name
    DIR/checkpoints/step-00000500/moments.safetensors    AdamW's, by parameter name and moment
    DIR/checkpoints/step-00000500/state.json             step, inputs, digests; its appearance commits

The folder is filled under a temporary name, flushed, and renamed; at a url `state.json` is uploaded last. The newest
are kept, and the one with the best validation score. There is no random state: every draw is keyed by seed, step and
sample.
"""

import re
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, JsonValue, model_validator
from safetensors.torch import load_file

from lgd.base.errors import DataError
from lgd.base.records import Count, Many, Record, Xxh3
from lgd.io.digests import digest_of, format_diff, xxh3
from lgd.io.documents import Document
from lgd.io.files import exists, list_folder, publish, remove_folder
from lgd.io.folders import discard_folder, publish_folder
from lgd.io.location import Location
from lgd.io.remote import open_checked
from lgd.models.export import write_tensors
from lgd.stream.plan import World
from lgd.train.batch import gather, require_same
from lgd.train.engine import Moments

Tensors = Literal["weights", "moments"]
_TENSORS: tuple[Tensors, ...] = ("weights", "moments")
_STATE = "state.json"
_SHARED = (
    "Put the folder of the run where all nodes find the same files, on a shared disk or at a url; one that is shared "
    "shows them to all within a minute, and the same command goes on"
)


class Best(Record):
    """The best validation so far."""

    step: Count = 0
    """0 before the first."""
    score: float | None = None
    stale: Count = 0
    """Validations since."""

    def after(self, step: int, score: float) -> "Best":
        """The best one, when another validation is known. NaN never is."""
        if score > (float("-inf") if self.score is None else self.score):
            return Best(step=step, score=score)
        return Best(step=self.step, score=self.score, stale=self.stale + 1)


class Progress(Record):
    """How far a run has come."""

    step: Annotated[int, Field(ge=0, lt=2**40)]
    position: Count
    """The plan's position after that step."""
    inputs: dict[str, JsonValue]
    """What the run depends on (`tasks.inputs_of`)."""
    skipped: Many[Count]
    """Numbers of the bad samples that were skipped so far."""
    best: Best

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.position < self.step or self.best.step > self.step:
            raise ValueError(f"position {self.position} and best step {self.best.step} do not fit step {self.step}")
        return self


class State(Progress, Document):
    """state.json."""

    FORMAT: ClassVar[str] = "lgd-checkpoint/2"
    ABSENT: ClassVar[str] = "it is no complete checkpoint; use another one"
    REMEDY: ClassVar[str] = "delete the folder to go on from an older one"

    xxh3: Annotated[dict[Tensors, Xxh3], Field(min_length=2)]
    """Of the files beside."""


class Checkpoint(NamedTuple):
    """What a run needs to go on."""

    progress: Progress
    weights: dict[str, torch.Tensor]
    moments: Moments


def save(folder: Location, checkpoint: Checkpoint, keep: int) -> Location:
    """Publish a checkpoint under `folder` and remove all but the newest `keep` and the best."""
    progress = checkpoint.progress
    path = folder / name_step(progress.step)
    with publish_folder(path, _STATE) as temporary:
        digests: dict[Tensors, str] = {}
        for name, tensors in zip(_TENSORS, (checkpoint.weights, checkpoint.moments), strict=True):
            with publish(temporary / f"{name}.safetensors") as written:
                write_tensors(written, tensors)
                with written.open("rb") as content:
                    digests[name] = xxh3(content)
        fields = {name: getattr(progress, name) for name in Progress.model_fields}
        State(**fields, xxh3=digests).write(temporary / _STATE)
    prune(folder, progress.best, keep)
    return path


def prune(folder: Location, best: Best, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best, and what a kill has left of a save or a removal."""
    whole = complete(folder)
    for name in list_folder(folder):
        if re.fullmatch(r"\.step-.*\.tmp|step-.*", name) and folder / name not in whole:
            remove_folder(folder / name)
    for old in whole[:-keep]:
        if old.name != name_step(best.step):
            discard_folder(old, _STATE)


def name_step(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"step-{step:08d}"


def complete(folder: Location) -> list[Location]:
    """Complete checkpoints under `folder`, oldest first."""
    names = [name for name in list_folder(folder) if name.startswith("step-")]
    return [folder / name for name in names if exists(folder / name / _STATE)]


def problems(path: Location) -> list[str]:
    """The first thing that is wrong with one checkpoint, if there is any."""
    try:
        state = State.read(path / _STATE)
        for name in _TENSORS:
            _open_tensors(path, name, state).close()
    except DataError as error:
        return [str(error)]
    return []


def _open_tensors(path: Location, name: Tensors, state: State) -> BinaryIO:
    """A file of a checkpoint; `DataError` for one that is missing or damaged."""
    file, digest = path / f"{name}.safetensors", state.xxh3[name]
    return open_checked(file, digest, None, f"delete {path} to go on from an older one")


def load(path: Location, inputs: dict[str, JsonValue]) -> Checkpoint:
    """Read a checkpoint; `DataError` for one that is damaged, or of a run with other inputs, with the difference."""
    state = State.read(path / _STATE)
    if state.inputs != inputs:
        raise DataError(
            f"checkpoint {path} is of another run:",
            *format_diff(state.inputs, inputs, "in the checkpoint"),
            "Go on with the same inputs, name another folder, or start anew with --train.resume never",
        )
    tensors = {}
    for name in _TENSORS:
        with _open_tensors(path, name, state) as opened:
            # The descriptor names the file that was checked, whatever has taken its place meanwhile.
            tensors[name] = load_file(Path(f"/dev/fd/{opened.fileno()}"))
    return Checkpoint(state, **tensors)


def find(folder: Location, inputs: dict[str, JsonValue], world: World) -> Checkpoint | None:
    """The newest complete checkpoint under `folder`, or None where there is none yet; every rank calls this.

    Rank 0 looks: on other nodes a listing may be older.
    """
    done = gather([path.name for path in complete(folder)] if world.rank == 0 else [], world)
    if not done:
        return None
    found = load_alike(folder / done[-1], inputs, world)
    # One that was adopted comes without the best of its run.
    if name_step(found.progress.best.step) in done:
        return found
    return found._replace(progress=found.progress.model_copy(update={"best": Best()}))


def load_alike(path: Location, inputs: dict[str, JsonValue], world: World) -> Checkpoint:
    """`load` on every rank, which all call this; raises `DataError` on all where one cannot, or reads another one."""
    read: Checkpoint | Exception
    try:
        read = load(path, inputs)
        # That of the tensors too, by their digests.
        digest = digest_of(read.progress.as_json())
        mine = f"step {read.progress.step}, position {read.progress.position}, digest {digest[:16]}"
    except (DataError, OSError) as error:
        read, mine = error, "; ".join(line.strip() for line in str(error).splitlines())
    require_same(mine, f"the ranks do not read the same checkpoint {path}", _SHARED, world)
    if isinstance(read, Exception):
        raise read
    return read


def adopt(folder: Location, path: Location, inputs: dict[str, JsonValue], alone: bool = False) -> None:
    """Make the checkpoint at `path` the newest one under `folder`, or the only one if `alone`: later ones (all others)
    are removed, a foreign one is copied.

    Raises `DataError`, and changes nothing, for one that is incomplete, damaged, or of a run with other inputs.
    """
    if not exists(path / _STATE):
        raise DataError(f"train.resume: {path} is not a complete checkpoint ({path / _STATE} is missing)")
    found = load(path, inputs)
    own = folder / name_step(found.progress.step)
    kept = complete(folder)
    for other in kept:
        if other.name > own.name or (alone and other != path):
            discard_folder(other, _STATE)
    if path != own:
        save(folder, found, keep=len(kept) + 1)
