"""The verbs that look: what a folder is, what is wrong with it, what this machine has."""

import platform
import shutil
from argparse import Namespace
from typing import Literal

from lgd.base.arguments import Parser, typed
from lgd.base.device import find_device
from lgd.base.environment import count_cpus, measure_memory, version_of
from lgd.base.errors import DataError, require
from lgd.base.text import print_json, print_lines
from lgd.cli.verb import Run, Verb, add_code_argument
from lgd.config import Config
from lgd.config_files import add_config_arguments, config_of, given_of
from lgd.io.location import as_location

_FOLDER = "a run, shards, a feature store, a trained network or a checkpoint"


def _add_info(parser: Parser) -> Run:
    parser.add_argument("folder", metavar="DIR", help=f"{_FOLDER}; or a slide")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument(
        "--mpp", type=typed(float | None), metavar="X", help="micrometres per pixel of a slide that does not say them"
    )
    parser.add_argument("--preview", default="", metavar="PNG", help="draw a slide and the outline of its tissue there")

    def run(namespace: Namespace) -> None:
        from lgd.cli.facts import as_lines, describe
        from lgd.cli.slide_facts import describe_slide, is_meant_as_slide

        if is_meant_as_slide(namespace.folder):
            description = describe_slide(namespace.folder, namespace.mpp, namespace.preview)
        else:
            require(not namespace.preview and namespace.mpp is None, "--mpp and --preview are for slides")
            description = describe(as_location(namespace.folder))
        if namespace.json:
            print_json(description)
        else:
            print_lines(*as_lines(description))

    return run


def _add_verify(parser: Parser) -> Run:
    parser.add_argument("folder", metavar="DIR", help=_FOLDER)
    parser.add_argument(
        "--reencode", type=typed(int), default=0, metavar="N", help="rows of a store to run the teacher on again"
    )
    parser.add_argument("--teacher", default="", metavar="DIR", help="the teacher's folder, if it is not where it was")
    add_code_argument(parser)

    def run(namespace: Namespace) -> None:
        from lgd.cli.contents import check

        folder = as_location(namespace.folder)
        kind, problems, notes = check(folder, namespace.reencode, namespace.teacher, namespace.code)
        print_lines(*notes)
        if problems:
            raise DataError(f"{kind} {folder} has {len(problems)} problem(s):", *problems)
        print_lines(f"{kind} {folder}: no problems")

    return run


def _add_doctor(parser: Parser) -> Run:
    parser.add_argument("--gpu", action="store_true", help="try a bf16 step and a FAISS search on the GPU")
    add_config_arguments(parser, listed=False)

    def run(namespace: Namespace) -> None:
        findings = _examine(namespace.gpu)
        # Without a run there are no encoders to look for.
        if len(given_of(namespace).fields):
            findings |= _find_encoders(config_of(namespace))
        print_lines(*(f"{state:7} {name:13} {detail}" for name, (state, detail) in findings.items()))
        if any(state == "broken" for state, _ in findings.values()):
            raise DataError("something is broken: see the lines above")

    return run


_Finding = tuple[Literal["ok", "lacks", "broken"], str]
"""Whether a part is there, cannot be used, or keeps everything from working; and what to say of it."""


def _examine(gpu: bool) -> dict[str, _Finding]:
    """Look at everything that the framework uses; `gpu` also runs a bf16 step and a FAISS search on the GPU."""
    memory, disk = measure_memory(), shutil.disk_usage(".").free
    sizes = f"{memory / 2**30:.0f} GiB memory, {disk / 2**30:.0f} GiB free here"
    found: dict[str, _Finding] = {
        "python": ("ok", f"{platform.python_version()} on {platform.platform()}"),
        "machine": ("ok", f"{count_cpus()} CPUs, {sizes}"),
    }
    for name in ("torch", "webdataset", "h5py", "simplejpeg", "transformers"):
        version = version_of(name)
        found[name] = ("ok", version) if version else ("broken", f"not installed: pip install {name}")
    ray, problem = version_of("ray"), "not installed: pip install 'ray[default,train]', or train.workers 0"
    found["ray"] = ("ok", ray) if ray else ("lacks", problem)
    timm = version_of("timm")
    found["timm"] = ("ok", timm) if timm else ("lacks", "for encoders of timm: pip install 'lgd[encoders]'")
    openslide = version_of("openslide-python")
    found["openslide"] = ("ok", openslide) if openslide else ("lacks", "for slides: pip install 'lgd[slides]'")
    fastapi = version_of("fastapi") if version_of("fastapi-offline") else None
    found["fastapi"] = ("ok", fastapi) if fastapi else ("lacks", "for lgd serve: pip install 'lgd[serve]'")
    onnx = version_of("onnxruntime") if version_of("onnxscript") else None
    found["onnx"] = ("ok", onnx) if onnx else ("lacks", "for lgd export-onnx: pip install 'lgd[onnx]'")
    found["faiss"] = _find_faiss()
    # The rest is asked through torch.
    if version_of("torch"):
        found |= {"deepspeed": _find_deepspeed(), "gpu": _find_device()}
        if gpu and found["gpu"][0] == "ok":
            found["bf16 step"] = _try_bf16_step()
            if found["faiss"][0] == "ok":
                found["faiss on GPU"] = _try_faiss_gpu()
    return found


def _find_encoders(config: Config) -> dict[str, _Finding]:
    """Whether the encoders of a run can be had: packages, files, and access to the hub."""
    from lgd.models.availability import find_problem
    from lgd.models.pretrained import describe_hub, is_hub

    found: dict[str, _Finding] = {}
    names = (config.teacher.encoder, config.student.encoder)
    if any(name.startswith("timm:") or is_hub(name) for name in names):
        found["hub"] = ("ok", describe_hub())
    for section in ("teacher", "student"):
        works, text = find_problem(config, section)
        found[f"{section}.encoder"] = ("ok" if works else "broken", text)
    return found


def _find_deepspeed() -> _Finding:
    from lgd.train.deepspeed_engine import deepspeed_problem

    problem = deepspeed_problem()
    return ("lacks", f"{problem}; training uses the torch engine") if problem else ("ok", version_of("deepspeed") or "")


def _find_faiss() -> _Finding:
    cpu, gpu = version_of("faiss-cpu"), version_of("faiss-gpu")
    if cpu and gpu:
        problem = "faiss-cpu and faiss-gpu are both installed and overwrite each other: uninstall both, install one"
        return "broken", problem
    if not (cpu or gpu):
        return "lacks", "not installed: pip install 'lgd[cpu]' or 'lgd[gpu]'"
    return "ok", f"faiss-cpu {cpu}" if cpu else f"faiss-gpu {gpu}"


def _find_device() -> _Finding:
    import torch

    try:
        if find_device() == "cpu":
            return "lacks", "no CUDA device: everything runs on the CPU, more slowly"
    except DataError as error:
        return "broken", str(error)
    return "ok", ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


def _try_bf16_step() -> _Finding:
    import torch

    if not torch.cuda.is_bf16_supported(including_emulation=False):
        device = torch.cuda.get_device_name()
        return "lacks", f"{device} emulates it: set train.precision to fp32, or use a GPU from Ampere on"
    layer = torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    try:
        layer(torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return "broken", str(error).splitlines()[0]
    return "ok", "forward and backward ran"


def _try_faiss_gpu() -> _Finding:
    import numpy as np

    from lgd.retrieval.search import import_faiss

    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return "lacks", "FAISS sees no GPU: pip install 'lgd[gpu]'"
    vectors = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    try:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(64))
        index.add(vectors)
        found = index.search(vectors[:5], 1)[1][:, 0]
    except RuntimeError as error:
        return "broken", str(error).splitlines()[0]
    return ("ok", "a search ran") if (found == np.arange(5)).all() else ("broken", "a search gave wrong answers")


VERBS = {
    "info": Verb("what a run, shard folder, feature store, network, checkpoint or slide is", _add_info),
    "verify": Verb("check one of these end to end", _add_verify),
    "doctor": Verb("what this machine has and lacks", _add_doctor),
}
