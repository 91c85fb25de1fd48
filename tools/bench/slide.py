"""`slide`: tiles a second of a whole slide, against a bare loop of reading, resizing and the forward pass.

A is `score_slide` from the file to all that it leaves: the tissue, the tiles, the parts, the map, GeoJSON and features.
B reads the same tiles by OpenSlide in as many threads, resizes them by Pillow's bilinear filter and runs the network in
batches of the same size, and keeps what it says. The slide is a mosaic of the H&E patches of `--images`, or drawn ones.
"""

import functools
import itertools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lgd.base.threads import map_ordered_prefetch
from lgd.models.description import StudentConfig
from lgd.models.encoder import build_encoder
from lgd.models.student import Sizes, Student
from lgd.scoring.predict import Scorer
from lgd.scoring.slides import THREADS, score_slide
from lgd.scoring.tile_scorer import BATCH
from lgd.shards.image import decode
from lgd.tissue.pyramid import write_pyramid
from tools.bench.inputs import HER2, Inputs
from tools.bench.measure import Outcome, Rate, Settings, alternate, cpu_seconds

MARK = 0.9
_MPP, _TILE_MPP = 0.46, 0.5


def draw_slide(inputs: Inputs, path: Path, side: int) -> None:
    """A mosaic of the patches, on glass, as a pyramid."""
    images = [decode(content, "patch", None) for content in inputs.contents]
    (height, width), glass = images[0].shape[:2], side // 16
    pixels = np.full((side, side, 3), 240, np.uint8)
    chosen = itertools.cycle(images)
    for y in range(glass, side - glass, height):
        for x in range(glass, side - glass, width):
            room = min(height, side - glass - y), min(width, side - glass - x)
            pixels[y : y + room[0], x : x + room[1]] = next(chosen)[: room[0], : room[1]]
    write_pyramid(path, pixels, _MPP)


def build_student(encoder: str, size: int) -> tuple[Student, Callable[..., StudentConfig]]:
    """An untrained student whose patches had the size of its input, and what describes it (but for its weights)."""
    sizes = Sizes(target=HER2, ordinal=None, latents={}, nuclei_grid=1, membrane_grid=1, staining=None)
    model = Student(morphology=build_encoder(encoder), hallucination=None, **sizes).eval()
    shape = {"width": size, "height": size, "mpp": _TILE_MPP, "samples": 1}
    training = {"target": HER2.as_json(), "marker": None, "labels": {"0": 1, "unknown": 0}, "shapes": [shape]}
    facts = {"size": size, "temperature": 1.0, "inputs": "0" * 64, "steps": 0, "validation": {}, "epochs": 0.0}
    facts |= {"training": training | {"virtual": True, "shards": []}, "skipped": 0, "engine": "torch", "workers": 1}
    facts |= {"versions": {}, "method": "he-only", "teachers": [], "kind": "student"}
    return model, functools.partial(model.describe, **facts)


def make_scorer(settings: Settings) -> Scorer:
    """An untrained student that reads tiles at full scale."""
    model, describe = build_student(settings.model, settings.size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Scorer(model=model.to(device), config=describe(weights_sha256="0" * 64), device=device, role="he")


def score_bare(scorer: Scorer, path: Path, xy_n2: Sequence[tuple[int, int]], side: int, threads: int) -> np.ndarray:
    """Probabilities of the tiles, (n, K)."""
    from openslide import OpenSlide

    size = scorer.config.size

    def read(place: tuple[int, int]) -> np.ndarray:
        image = slide.read_region(place, level, (math.ceil(wide),) * 2).convert("RGB")
        box = (0, 0, wide, wide)
        return np.asarray(image if wide == size else image.resize((size, size), Image.Resampling.BILINEAR, box))

    with OpenSlide(path) as slide, ThreadPoolExecutor(threads) as pool:
        level = slide.get_best_level_for_downsample(side / size * 1.02)
        wide = size * _TILE_MPP / _MPP / slide.level_downsamples[level]
        batch = BATCH["cpu" if scorer.device == "cpu" else "cuda"]
        tiles = map_ordered_prefetch(pool, read, xy_n2, count=2 * batch)
        found = []
        while some := list(itertools.islice(tiles, batch)):
            found.append(scorer.score(np.stack(some))["output"])
    return np.concatenate(found)


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Tiles a second, both ways."""
    path, out = inputs.folder / "slide.tif", inputs.folder / "slide-scores"
    draw_slide(inputs, path, settings.slide)
    scorer = make_scorer(settings)

    def ours() -> Rate:
        shutil.rmtree(out, ignore_errors=True)
        cpu, began = cpu_seconds(), time.perf_counter()
        score = score_slide(scorer, path, out)
        return Rate(score.tiles, time.perf_counter() - began, cpu_seconds() - cpu)

    ours()
    rows = np.loadtxt(out / "slide" / "tiles.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2, 6, 7, 8, 9))
    xy_n2, side = [(int(x), int(y)) for x, y in rows[:, :2]], int(rows[0, 2])

    def bare() -> Rate:
        cpu, began = cpu_seconds(), time.perf_counter()
        score_bare(scorer, path, xy_n2, side, THREADS)
        return Rate(len(xy_n2), time.perf_counter() - began, cpu_seconds() - cpu)

    differ = float(abs(score_bare(scorer, path, xy_n2, side, THREADS) - rows[:, 3:]).max())
    assert differ < 0.01, f"the bare loop gives other probabilities, by {differ}"
    compared = "a slide scored, from its file to all that is left / read, resize and forward pass"
    ratio = alternate("slide", compared, MARK, ours, bare, settings.rounds)
    facts = {"tiles": len(xy_n2), "side": settings.slide, "pixels": settings.size, "largest_difference": differ}
    return Outcome(ratios=[ratio], facts=facts | {"encoder": settings.model, "threads": THREADS})
