"""`efficiency`: what LGD-Net costs beside virtual staining, the customary way to a score that needs only the H&E.

A is `lgd predict` on one patch: decoded to the input size, scored by the full LGD-Net. B decodes the patch at its own
size (1024 px in BCI), paints its IHC with the generator of most virtual staining, the 9-block ResNet of Johnson et al.
2016 as pix2pix and CycleGAN have it, shrinks that to the input size, and has the IHC teacher score it. Both keep what
they make in memory, and run with the same threads and precision. Weights are random on both sides: cost
does not depend on them. Neither is said to score better.

Most of the difference is the size of what is read. A generator must work at full resolution, because the membranes that
it paints are 1 to 2 px wide, while LGD-Net never paints them. So that this fools nobody, the facts hold LGD-Net at the
full size too, beside parameters, FLOPs, latency and peak memory of every part (beside the weights). FLOPs are those of
convolutions and matrix products, counted by PyTorch; one multiply-add is two FLOPs; decoding has none.

A round lasts about `--seconds` a side, and at least one patch: on a CPU that is one patch of B, for half a minute of a
core. Nothing is left on disk.
"""

import contextlib
import copy
import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lgd.base.target import find_target
from lgd.config_sections import Latents
from lgd.models.description import LatentSizes
from lgd.models.encoder import build_encoder
from lgd.models.methods import PROPOSED
from lgd.models.student import HallucinatingStudent, Student
from lgd.models.teacher import Teacher
from lgd.scoring.predict import Scorer
from lgd.shards.image import decode
from tools.bench.inputs import NOT_TRAINED, Inputs
from tools.bench.measure import Outcome, Rate, Settings, alternate, timed
from tools.bench.staining import FORMATS, VirtualStaining
from tools.bench.training import settle

logger = logging.getLogger(f"lgd.{__name__}")

MARK = 1.0
"""That LGD-Net is faster at all: nothing more was asked."""
_STATUS, _PEAK_STARTS_ANEW = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def networks(settings: Settings) -> tuple[Student, Teacher]:
    """The full LGD-Net, both encoders `--model`, and the teacher on it; the sizes of the config's defaults."""
    latents, teacher = Latents(), Teacher(build_encoder(settings.model), target=find_target("her2"))
    student = HallucinatingStudent(
        morphology=build_encoder(settings.model),
        target=find_target("her2"),
        ordinal=None,
        staining=None,
        hallucination=build_encoder(settings.model),
        latents={"teacher": LatentSizes(dim=teacher.dim, map=latents.map)},
        nuclei_grid=latents.nuclei_grid,
        membrane_grid=latents.membrane_grid,
    )
    return student.eval(), teacher.eval()


def parameters(model: nn.Module) -> int:
    """How many weights and biases a network has."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, height: int, width: int) -> int:
    """FLOPs of one RGB image; nothing is computed for them."""
    # Shapes are all that is counted, and the device "meta" has nothing else.
    shapes, image_13HW = copy.deepcopy(model).to("meta"), torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(image_13HW)
    return int(counter.get_total_flops())


def peak_mb(call: Callable[[], Any]) -> float | None:
    """Most memory that a call adds to what was held, in MB: a GPU's, or else the process's; None if not on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not _STATUS.exists():
        call()
        return None
    # What the allocator keeps of memory that was freed would be taken again and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    _PEAK_STARTS_ANEW.write_text("5")
    before_kb = _status_kb("VmRSS")
    call()
    return (_status_kb("VmHWM") - before_kb) * 1024 / 1e6


def _status_kb(name: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(name))


def times(call: Callable[[], Any], count: int) -> Rate:
    """The rate of so many calls, of one patch each."""

    def all_of_them() -> int:
        for _ in range(count):
            call()
        settle()
        return count

    return timed(all_of_them)


def cost(call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """What a call costs: `ms` of time and of CPU, and memory.

    The first call warms up, and the following are timed; where it alone lasts longer than `seconds`, it is the one.
    """
    rates: list[Rate] = []
    memory = peak_mb(lambda: rates.append(times(call, 1)))
    count = round(seconds / rates[0].seconds)
    rate = times(call, count) if count else rates[0]
    return {"ms": 1e3 / rate.a_second, "cpu_ms": rate.cpu_ms, "peak_mb": memory}


@contextlib.contextmanager
def computing(threads: int) -> Iterator[None]:
    """The whole machine for one patch, on both sides: so many threads for PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Patches a second of LGD-Net by those of virtual staining followed by the teacher."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16")
    with computing(settings.workers), bf16:
        return _run(settings, inputs, device)


def _run(settings: Settings, inputs: Inputs, device: str) -> Outcome:
    size, seconds, content = settings.size, settings.seconds, inputs.contents[0]
    student, teacher = networks(settings)
    ours = Scorer(
        model=student.to(device),
        config=student.describe(method=PROPOSED, weights_sha256="0" * 64, size=size, teachers=(), **NOT_TRAINED),
        device=device,
        role="he",
    )
    theirs = VirtualStaining(teacher, size, device)
    height, width = decode(content, "patch").shape[:2]

    logger.info(f"[bench] the generator on {width} x {height} px, in two memory formats")
    painting, taken = _lay_out(theirs, content, seconds)
    facts = {
        "lgd_net": _our_parts(ours, content, size, seconds),
        "virtual_staining": _their_parts(theirs, content, seconds, painting[taken]),
    }
    counts = {side: max(1, round(1e3 * seconds / fact["sum_of_parts_ms"])) for side, fact in facts.items()}
    ratio = alternate(
        "efficiency",
        f"LGD-Net on the H&E at {size} px / 9-block generator at {height} px, then the teacher; patches a second",
        MARK,
        lambda: times(lambda: ours.score(decode(content, "patch", size)[None]), counts["lgd_net"]),
        lambda: times(lambda: theirs.classify(theirs.paint(decode(content, "patch"))), counts["virtual_staining"]),
        settings.rounds,
    )
    facts["lgd_net"]["latency_ms"] = 1e3 / ratio.detail["median_a"]
    facts["virtual_staining"]["latency_ms"] = 1e3 / ratio.detail["median_b"]
    facts["virtual_staining"]["generator_by_memory_format"] = painting | {"taken": taken}
    full = cost(lambda: ours.score(decode(content, "patch")[None]), seconds)
    facts["lgd_net_at_the_generators_size"] = {
        "gflops": flops(student, height, width) / 1e9,
        "latency_ms": full["ms"],
        "cpu_ms": full["cpu_ms"],
        "peak_mb": full["peak_mb"],
    }
    facts["times_as_much"] = _times_as_much(facts)
    return Outcome(ratios=[ratio], facts=facts | _setting(settings, inputs, device))


def _lay_out(theirs: VirtualStaining, content: bytes, seconds: float) -> tuple[dict[str, Any], str]:
    """Lay the generator out in the faster memory format; returns the cost of both, and its name."""
    he_HW3, found = decode(content, "patch"), {}
    for name, memory_format in FORMATS.items():
        theirs.lay_out(memory_format)
        found[name] = cost(lambda: theirs.paint(he_HW3), seconds)
    # On a CPU it is one call: how long that takes depends on who else computes, its CPU time hardly.
    judged = "ms" if theirs.device == "cuda" else "cpu_ms"
    taken = min(found, key=lambda name: found[name][judged])
    theirs.lay_out(FORMATS[taken])
    return found, taken


def _our_parts(ours: Scorer, content: bytes, size: int, seconds: float) -> dict[str, Any]:
    he_1SS3 = decode(content, "patch", size)[None]
    return _whole(
        decode=cost(lambda: decode(content, "patch", size), seconds),
        network=cost(lambda: ours.score(he_1SS3), seconds) | _sizes(ours.model, size, size),
    )


def _their_parts(theirs: VirtualStaining, content: bytes, seconds: float, painting: dict[str, Any]) -> dict[str, Any]:
    height, width = decode(content, "patch").shape[:2]
    white_13HW = torch.full((1, 3, height, width), 255.0, device=theirs.device)
    return _whole(
        decode=cost(lambda: decode(content, "patch"), seconds),
        generator=painting | _sizes(theirs.generator, height, width),
        classifier=cost(lambda: theirs.classify(white_13HW), seconds)
        | _sizes(theirs.teacher, theirs.size, theirs.size),
    )


def _sizes(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    return {"parameters": parameters(model), "gflops": flops(model, height, width) / 1e9}


def _whole(**parts: dict[str, Any]) -> dict[str, Any]:
    """A side's parts, and their sums: what it needs in all."""
    sums = {name: sum(part.get(name, 0) for part in parts.values()) for name in ("parameters", "gflops", "ms")}
    sums["sum_of_parts_ms"] = sums.pop("ms")
    peaks = [part["peak_mb"] for part in parts.values() if part["peak_mb"] is not None]
    return sums | {"peak_mb": max(peaks, default=None), "parts": parts}


def _times_as_much(facts: dict[str, Any]) -> dict[str, float]:
    """Virtual staining's cost by LGD-Net's, beside the ratio itself, and by that of LGD-Net on as many pixels."""
    ours, theirs, full = (facts[name] for name in ("lgd_net", "virtual_staining", "lgd_net_at_the_generators_size"))
    found = {name: theirs[name] / ours[name] for name in ("parameters", "gflops")}
    return found | {f"{name}_at_the_generators_size": theirs[name] / full[name] for name in ("gflops", "latency_ms")}


def _setting(settings: Settings, inputs: Inputs, device: str) -> dict[str, Any]:
    return {
        "model": f"LGD-Net, both encoders {settings.model}; teacher {settings.model}; random weights on both sides",
        "input": inputs.described() | {"side": settings.size, "patches": "one, again and again"},
        "precision": settings.precision,
        "flops": "2 a multiply-add, of convolutions and matrix products",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": {"computing": torch.get_num_threads()},
        "load": list(os.getloadavg()),
    }
