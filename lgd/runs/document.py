"""run.json of a run's folder: what each stage was given, where it ran, and what it made (`lgd-run/1`)."""

import contextlib
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue

import lgd
from lgd.doctor import version_of
from lgd.metrics import Interval
from lgd.records import Count, Document, Line, Many, Record, Sha256

_PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "h5py", "transformers")

Number = Annotated[float, Field(allow_inf_nan=False)]


class Environment(Record):
    """Versions, commit, host and device of a stage."""

    lgd: Line
    commit: Line | None
    python: Line
    torch: Line | None
    deepspeed: Line | None
    ray: Line | None
    webdataset: Line | None
    h5py: Line | None
    transformers: Line | None
    host: Line
    device: Line

    @classmethod
    def here(cls) -> "Environment":
        """Of this process."""
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        versions = {name: version_of(name) for name in _PACKAGES}
        python, host = platform.python_version(), platform.node()
        return cls(lgd=lgd.__version__, commit=_commit(), python=python, host=host, device=device, **versions)


class Trained(Record):
    """What training a teacher or a student came to."""

    weights_sha256: Sha256
    inputs: Sha256
    steps: Count
    engine: Line
    workers: Count
    validation: dict[Line, Number]


class Cached(Record):
    """What filling the feature store came to."""

    digest: Sha256
    rows: Count


class Indexed(Record):
    """What building the index came to."""

    factory: Line
    rows: Count
    recall_at_10: Number
    digest: Sha256


class Evaluated(Record):
    """What an evaluation came to: metrics by the models' names."""

    split: Line
    by_patch: dict[Line, dict[Line, Interval]]


class Ablated(Record):
    """What `lgd ablate` was asked for."""

    seeds: Count
    full: bool
    split: Line


Facts = Trained | Cached | Indexed | Evaluated | Ablated


class Stage(Record):
    """A stage that ended well."""

    folder: Line
    """What it made; a later stage of this name that makes the same takes this one's place."""
    verb: Line
    """The verb that was called; empty where Python called."""
    given: dict[Line, JsonValue]
    """Fields of the command line, and its `config` files."""
    differing: dict[Line, JsonValue]
    """Fields that are not as in config.yaml."""
    environment: Environment
    shards: dict[Line, Sha256]
    """Digests of the shard folders' manifests."""
    facts: Facts


class RunDocument(Document):
    """run.json: the stages by their names, of each name the newest last."""

    FORMAT: ClassVar = "lgd-run/1"
    ABSENT: ClassVar = "finish a stage of the run first"
    REMEDY: ClassVar = "move it elsewhere to keep what it says, and the next stage begins another"

    stages: dict[Line, Many[Stage]]


@functools.cache
def _commit() -> str | None:
    """The commit of lgd's own checkout; None elsewhere, such as for a wheel inside another project's repository."""
    package = Path(lgd.__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        top = _run_git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() == package.parent:
            # Who installs into the folder of a repository does not track what is installed there.
            _run_git(package, "ls-files", "--error-unmatch", "__init__.py")
            return _run_git(package, "rev-parse", "HEAD")
    return None


def _run_git(folder: Path, *args: str) -> str:
    # A hook of git runs with variables that name the hook's repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
