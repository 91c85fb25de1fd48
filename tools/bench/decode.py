"""`decode`: scaled JPEG decoding against a full decode and the fastest antialiased resize, and what a teacher notices.

A is `lgd.shards.image.decode` to the input size, B a full decode by the same library and the fastest resize that was
found here, one thread each. A teacher then sees the IHC both ways. Its facts also hold the time of each resize, and
rate and bytes of the formats that a shard set can be built in.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from PIL import Image

from lgd.base.errors import DataError
from lgd.models.teacher import Teacher, load_teacher
from lgd.shards.pairs import PatchPair, find_pairs
from tools.bench.formats import formats
from tools.bench.inputs import HER2, Inputs, draw
from tools.bench.loader import count_for, pixels
from tools.bench.measure import Outcome, Rate, Ratio, Settings, alternate, timed
from tools.bench.teacher import train_teacher

logger = logging.getLogger(f"lgd.{__name__}")

Decoder = Callable[[bytes, int], np.ndarray]
"""JPEG bytes and a side -> (side, side, 3) uint8."""


def _full(content: bytes) -> np.ndarray:
    return cast(np.ndarray, simplejpeg.decode_jpeg(content))


def _pillow(resample: Image.Resampling, gap: float | None = None) -> Decoder:
    def resized(content: bytes, size: int) -> np.ndarray:
        image = Image.fromarray(_full(content))
        return np.array(image.resize((size, size), resample, reducing_gap=gap))

    return resized


def _reduce(content: bytes, size: int) -> np.ndarray:
    image = Image.fromarray(_full(content))
    return np.array(image.reduce((image.width // size, image.height // size)))


def _numpy(content: bytes, size: int) -> np.ndarray:
    full = _full(content)
    step = full.shape[0] // size
    # Sums of strided rows, then of strided columns: five times as fast as a mean over a reshaped array.
    rows = sum((full[first::step].astype(np.uint16) for first in range(1, step)), full[::step].astype(np.uint16))
    both = sum((rows[:, first::step] for first in range(1, step)), rows[:, ::step])
    mean: np.ndarray = (both + step * step // 2) // (step * step)
    return mean.astype(np.uint8)


def _torch(content: bytes, size: int) -> np.ndarray:
    image = torch.from_numpy(_full(content)).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


RESIZES: dict[str, Decoder] = {
    "torch uint8 bilinear, antialiased": _torch,
    "Pillow bilinear": _pillow(Image.Resampling.BILINEAR),
    "Pillow bilinear, reducing_gap 1": _pillow(Image.Resampling.BILINEAR, 1.0),
    "Pillow box": _pillow(Image.Resampling.BOX),
}
# These shrink by whole factors only.
MEANS: dict[str, Decoder] = {"Pillow reduce": _reduce, "numpy area mean": _numpy}


def times(contents: Sequence[bytes], size: int, passes: int) -> dict[str, float]:
    """Milliseconds an image of every way to `size`, and of what no way is spared; the best of some passes."""
    header = simplejpeg.decode_jpeg_header(contents[0])
    whole = header[0] % size == 0 and header[1] % size == 0 and header[0] == header[1]
    ways: dict[str, Callable[[bytes], Any]] = {
        "scaled decode": lambda content: pixels(content, size),
        "scaled decode to an eighth": lambda content: simplejpeg.decode_jpeg(content, min_height=1, min_width=1),
        "full decode alone": _full,
    }
    ways |= {
        name: lambda content, way=way: way(content, size)  # type: ignore[misc]
        for name, way in (RESIZES | MEANS if whole else RESIZES).items()
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(passes):
        for name, way in ways.items():
            began = time.perf_counter()
            for content in contents:
                way(content)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began) / len(contents))
    return best


def fastest(found: dict[str, float]) -> str:
    """The name of the fastest resize."""
    return min((name for name in RESIZES | MEANS if name in found), key=lambda name: found[name])


def speed(contents: Sequence[bytes], settings: Settings, resize: str) -> Ratio:
    """Scaled decodes a second by full decodes with a resize."""

    def rate(way: Decoder, samples: int) -> Rate:
        def work() -> int:
            for number in range(samples):
                way(contents[number % len(contents)], settings.size)
            return samples

        return timed(work)

    other = (RESIZES | MEANS)[resize]
    counts = [settings.batch * count_for(rate(way, 2 * len(contents)), settings) for way in (pixels, other)]
    return alternate(
        "decode",
        f"scaled decode / full decode + {resize}",
        1.6,
        lambda: rate(pixels, counts[0]),
        lambda: rate(other, counts[1]),
        settings.rounds,
    )


def latents(teacher: Teacher, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The teacher's pooled latents (n, D), centred and raw, and its predicted levels (n,)."""
    centred, levels = [], []
    with torch.no_grad():
        for image in images:
            out = teacher(torch.from_numpy(image).permute(2, 0, 1)[None].float())
            centred.append(out["pooled"][0])
            levels.append(int(out["logits"][0].argmax()))
    pooled = torch.stack(centred)
    return {"centred": pooled.numpy(), "raw": (pooled + teacher.pooled_mean).numpy(), "levels": np.array(levels)}


def _cosines(a_nD: np.ndarray, b_nD: np.ndarray) -> dict[str, float]:
    norms_n = np.linalg.norm(a_nD, axis=1) * np.linalg.norm(b_nD, axis=1)
    cosines_n = (a_nD * b_nD).sum(axis=1) / norms_n
    low, median = np.percentile(cosines_n, [1, 50])
    return {"median": float(median), "percentile_1": float(low), "least": float(cosines_n.min())}


def noticed(
    teacher: Teacher, pairs: Sequence[PatchPair], size: int, references: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How alike a teacher finds scaled decodes and each of the resizes: cosines, and the share of equal predictions."""
    contents = [pair.images[1].read_bytes() for pair in pairs]
    levels = np.array([-1 if pair.label is None else pair.label for pair in pairs])
    scaled = latents(teacher, [pixels(content, size) for content in contents])
    found: dict[str, dict[str, Any]] = {}
    for name in references:
        full = latents(teacher, [(RESIZES | MEANS)[name](content, size) for content in contents])
        right = (full["levels"] == levels)[levels >= 0]
        found[name] = {
            "cosine": {kind: _cosines(scaled[kind], full[kind]) for kind in ("centred", "raw")},
            "same_predictions": float((scaled["levels"] == full["levels"]).mean()),
            "predicted": {text: int((full["levels"] == level).sum()) for level, text in enumerate(HER2.classes)},
            "accuracy": float(right.mean()) if len(right) else None,
        }
    return found


def _subjects(settings: Settings, inputs: Inputs) -> list[PatchPair]:
    """The IHC patches to compare: the given ones where a teacher of such images is given, else drawn ones."""
    if settings.images and settings.teacher:
        return find_pairs("bci", settings.images, HER2)[0][: settings.patches]
    folder = inputs.folder / "subjects"
    draw(folder, range(settings.patches), settings)
    return find_pairs("bci", folder, HER2)[0]


def _teacher(settings: Settings, inputs: Inputs) -> tuple[Teacher, dict[str, Any]]:
    if settings.teacher:
        return load_teacher(settings.teacher)[0], {"folder": settings.teacher}
    logger.info("[bench] training a teacher on virtual tissue")
    folder, facts = train_teacher(settings, inputs.folder)
    return load_teacher(folder)[0], facts


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Scaled decodes a second by full decodes and resizes, and what a trained teacher notices of it."""
    contents = {"he": inputs.contents, "ihc": [pair.images[1].read_bytes() for pair in inputs.pairs]}
    if any(content[:2] != b"\xff\xd8" for content in contents["he"] + contents["ihc"]):
        raise DataError(f"{settings.images}: decode compares ways to decode JPEG; give --images a folder of JPEG files")
    few = {role: some[:16] for role, some in contents.items()}
    passes = max(1, round(settings.seconds))
    found = {role: times(some, settings.size, passes) for role, some in few.items()}
    resize = fastest(found["he"])
    ratio = speed(contents["he"], settings, resize)

    teacher, trained = _teacher(settings, inputs)
    subjects = _subjects(settings, inputs)
    logger.info(f"[bench] comparing the latents of {len(subjects)} patches")
    # Also against a resize that averages whole blocks, which is what scaled decoding comes nearest to.
    alike = noticed(teacher, subjects, settings.size, sorted({resize, "Pillow box"}))
    centred = alike[resize]["cosine"]["centred"]
    ratios = [
        ratio,
        Ratio(
            name="decode: cosine",
            compared=f"teacher's centred latents of both, median of {len(subjects)} (spread: least to median)",
            value=centred["median"],
            mark=0.999,
            detail={"spread": [centred["least"], centred["median"]]},
        ),
        Ratio(
            name="decode: predictions",
            compared=f"share of {len(subjects)} patches whose level the teacher predicts alike",
            value=alike[resize]["same_predictions"],
            mark=0.99,
        ),
    ]
    facts = {
        "input": inputs.described(),
        "ms_an_image": found,
        "resize": resize,
        # Where this is near 1, hardly anything is left for scaling to save: entropy decoding needs every byte.
        "eighth_of_scaled": {
            role: ms["scaled decode to an eighth"] / ms["scaled decode"] for role, ms in found.items()
        },
        "teacher": trained,
        "latents": {"patches": len(subjects), "against": alike},
        "formats": formats(inputs.pairs[:2], settings),
    }
    return Outcome(ratios=ratios, facts=facts)
