"""The GPU that this process computes on, or that it has none; and float32 that is float32 there."""

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

from lgd.base.environment import count_cpus
from lgd.base.errors import DataError

_exact, _lock = list[tuple[bool, str]](), threading.Lock()
"""For each block of `exact_float32` that runs: what the first one found."""


def find_device(number: int | None = 0) -> str:
    """`cuda`, or `cpu` for a process without GPUs, and for one that they are hidden from.

    Raises `DataError` where there is a GPU, or this process was given one, and it cannot be used: what takes an hour on
    it takes a week on the CPU, and would do so without a word. The GPU of this number is tried; None tries none.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return "cpu"
    has_build = bool(torch.version.cuda or torch.version.hip)
    # Who installs PyTorch for CPUs beside a GPU of their own has chosen so.
    present = has_build and any(Path("/dev").glob("nvidia[0-9]*"))
    if not torch.cuda.is_available() and visible is None and not present:
        # PyTorch takes all CPUs of the machine, of which a container may have a share.
        torch.set_num_threads(min(torch.get_num_threads(), count_cpus()))
        return "cpu"
    count = torch.cuda.device_count()
    try:
        # One that is listed may still be of no use: this PyTorch may have no code for its kind.
        if number is not None or not count:
            torch.ones(1, device=f"cuda:{number or 0}").add(1).item()
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().splitlines()[0]
    else:
        return "cuda"
    if not has_build:
        problem = f"PyTorch {torch.__version__} is a build for CPUs; install one for CUDA"
    elif number and number >= count > 0:
        problem = f"this is process {number} on it, and it has {count}; start fewer processes"
    given = f"CUDA_VISIBLE_DEVICES is {visible}" if visible else "there is a GPU"
    raise DataError(
        f"{given} on {platform.node()}, but it cannot be used: {problem}. To compute on the CPU, set "
        "CUDA_VISIBLE_DEVICES= (empty); a node of Ray is started with that and --num-gpus 0"
    )


def keep_memory() -> None:
    """Let glibc keep what tensors free, for the next ones.

    By default it gives much of it back at each step, and a step of a small network on a CPU waits for 2,000 faults.
    """
    with contextlib.suppress(AttributeError):  # Other C libraries lack it.
        library = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD at its most: smaller ones are not mapped each for itself. M_TRIM_THRESHOLD.
        library.mallopt(-3, 32 << 20)
        library.mallopt(-1, 2**31 - 1)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, and whatever else PyTorch may be set to in place of float32; in any thread.

    TF32, cuDNN's default, moves a latent by 2e-3 of its length (H200), and by another bit in another batch: it is for
    training, and not for what is stored, scored or compared.
    """
    import torch

    cudnn = torch.backends.cudnn
    with _lock:
        _exact.append(_exact[0] if _exact else (cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _lock:
            allowed, precision = _exact.pop()
            if not _exact:
                cudnn.allow_tf32 = allowed
                torch.set_float32_matmul_precision(precision)
