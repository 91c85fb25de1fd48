"""What this machine has and lacks, each with its remedy."""

import os
import platform
import shutil
from dataclasses import dataclass

from lgd.base.environment import version_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """ok, lacks (a part cannot be used) or broken (nothing works)."""
    detail: str


def examine(gpu: bool) -> list[Finding]:
    """Look at everything that the framework uses; `gpu` also runs a bf16 step and a FAISS search on the GPU."""
    findings = [
        Finding(name="python", state="ok", detail=f"{platform.python_version()} on {platform.platform()}"),
        Finding(name="machine", state="ok", detail=f"{os.cpu_count()} CPUs, {_memory()}, {_disk()}"),
    ]
    findings += [_package(name, needed=True) for name in ("torch", "webdataset", "h5py", "simplejpeg", "transformers")]
    findings += [_ray(), _faiss()]
    if not version_of("torch"):
        # The rest is asked through it.
        return findings
    findings += [_deepspeed(), _device()]
    if gpu:
        findings += [_bf16_step(), _faiss_gpu()]
    return findings


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.0f} GiB memory"


def _disk() -> str:
    return f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"


def _package(package: str, needed: bool) -> Finding:
    version = version_of(package)
    state = "ok" if version else ("broken" if needed else "lacks")
    return Finding(name=package, state=state, detail=version or f"not installed: pip install {package}")


def _ray() -> Finding:
    version = version_of("ray")
    if version:
        return Finding(name="ray", state="ok", detail=version)
    return Finding(
        name="ray", state="lacks", detail="not installed: pip install 'ray[default,train]', or train.workers 0"
    )


def _deepspeed() -> Finding:
    from lgd.train.deepspeed_engine import deepspeed_problem

    problem = deepspeed_problem()
    if problem:
        return Finding(name="deepspeed", state="lacks", detail=f"{problem}; training uses the torch engine")
    return Finding(name="deepspeed", state="ok", detail=version_of("deepspeed") or "")


def _faiss() -> Finding:
    cpu, gpu = version_of("faiss-cpu"), version_of("faiss-gpu")
    if cpu and gpu:
        detail = "faiss-cpu and faiss-gpu are both installed and overwrite each other: uninstall both, install one"
        return Finding(name="faiss", state="broken", detail=detail)
    if not (cpu or gpu):
        return Finding(name="faiss", state="lacks", detail="not installed: pip install 'lgd[cpu]' or 'lgd[gpu]'")
    return Finding(name="faiss", state="ok", detail=f"faiss-cpu {cpu}" if cpu else f"faiss-gpu {gpu}")


def _device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(name="gpu", state="lacks", detail="no CUDA device: everything runs on the CPU, more slowly")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding(name="gpu", state="ok", detail=", ".join(names))


def _bf16_step() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(name="bf16 step", state="lacks", detail="no CUDA device to try it on")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        detail = f"{torch.cuda.get_device_name()} emulates it: set train.precision to fp32, or use a GPU from Ampere on"
        return Finding(name="bf16 step", state="lacks", detail=detail)
    layer = torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    try:
        layer(torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return Finding(name="bf16 step", state="broken", detail=str(error).splitlines()[0])
    return Finding(name="bf16 step", state="ok", detail="forward and backward ran")


def _faiss_gpu() -> Finding:
    import numpy as np

    try:
        import faiss
    except ImportError:
        return Finding(name="faiss on GPU", state="lacks", detail="not installed: pip install 'lgd[gpu]'")
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return Finding(name="faiss on GPU", state="lacks", detail="FAISS sees no GPU: pip install 'lgd[gpu]'")
    vectors = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    try:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(64))
        index.add(vectors)
        found = index.search(vectors[:5], 1)[1][:, 0]
    except RuntimeError as error:
        return Finding(name="faiss on GPU", state="broken", detail=str(error).splitlines()[0])
    if (found == np.arange(5)).all():
        return Finding(name="faiss on GPU", state="ok", detail="a search ran")
    return Finding(name="faiss on GPU", state="broken", detail="a search gave wrong answers")
