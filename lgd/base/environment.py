"""Where a stage runs: versions of packages, the commit of our own checkout, host, device, CPUs and memory."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import lgd
from lgd.base.records import Line, Record

# Of cgroups 2 and 1, as a container sees its own.
_MEMORY_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


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
        packages = ("torch", "deepspeed", "ray", "webdataset", "h5py", "transformers")
        versions = {name: version_of(name) for name in packages}
        python, host = platform.python_version(), platform.node()
        return cls(lgd=lgd.__version__, commit=_commit(), python=python, host=host, device=device, **versions)


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def count_cpus() -> int:
    """The CPUs that this process may use: those that it is bound to, or a container's share where that is less."""
    from joblib import cpu_count

    return int(cpu_count())


def measure_memory() -> int:
    """The bytes of memory that this process may use: the machine's, or a container's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(limit.read_text()))
    return total


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
