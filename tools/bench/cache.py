"""`cache`: what caching reaches of a bare loop that decodes, runs the teacher and computes the targets.

A is `lgd.store.cache.Cacher` over real shards, as `lgd cache-latents` runs it without workers: read, check, decode,
teacher, targets, write. B does decode, forward pass and targets of the same bytes from memory, in as many threads,
and writes nothing. Whole patches and tiles of a quarter of their side are measured apart. On a GPU both run the teacher
and the targets there, a batch at a time.
"""

import contextlib
import functools
import itertools
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lgd.base.target import find_target
from lgd.config import Config
from lgd.config_files import load_config
from lgd.models.encoder import build_encoder
from lgd.models.export import save_model
from lgd.models.teacher import Teacher, load_teacher
from lgd.ray_jobs.mapping import map_with
from lgd.shards.archive import Shard, read_sample
from lgd.shards.builder import build
from lgd.shards.image import decode
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.stain.targets import membrane_grid, nuclei_grid
from lgd.store.cache import SHARDS_AT_ONCE, Cacher
from lgd.store.document import PATCHES, TEACHER, part_name, read_sidecar
from lgd.store.recipes import recipe_of
from tools.bench.inputs import NOT_TRAINED, Inputs
from tools.bench.measure import Outcome, Rate, Ratio, Settings, alternate, steady

MARK = 0.95
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 4 if DEVICE == "cpu" else 16
"""Patches in a forward pass: on a CPU few, so that many are counted."""
_SHARDS = 1
"""Shards for every thread."""

Patch = tuple[bytes, bytes, float | None]
"""H&E, IHC, and micrometres a pixel."""


def teacher_in(folder: Path, size: int) -> Path:
    """An untrained teacher, which costs what a trained one costs."""
    torch.manual_seed(0)
    teacher = Teacher(build_encoder("resnet10"), target=find_target("her2"))
    describe = functools.partial(teacher.describe, size=size, **NOT_TRAINED)
    save_model(folder, dict(teacher.state_dict()), describe)
    return folder


def config_for(settings: Settings, teacher: Path, shards: Path, out: Path) -> Config:
    """A run that caches with as many threads as the bare loop has."""
    options = {
        "run.dir": out / "run",
        "data.shards": shards,
        "data.size": settings.size,
        "data.threads": settings.workers,
        "teacher.dir": teacher,
        "latents.dir": out / "latents",
        "latents.batch": BATCH,
        "train.workers": 0,
    }
    return load_config(overrides=[f"--{name}={value}" for name, value in options.items()])


def patches_of(shards: Sequence[Shard]) -> list[list[Patch]]:
    """The batches that caching makes of the shards, as encoded bytes."""
    batches = []
    for shard in shards:
        file, index = shard.open()
        with file:
            samples = [read_sample(file, index, row, shard, ("he", "ihc")) for row in range(len(index))]
        patches = [(bytes(images["he"]), bytes(images["ihc"]), meta.mpp) for meta, images in samples]
        batches += [patches[start : start + BATCH] for start in range(0, len(patches), BATCH)]
    return batches


def _on_device(images: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).to(DEVICE).permute(0, 3, 1, 2)


class Bare:
    """Decode, forward pass and targets, and nothing else."""

    def __init__(self, config: Config, batches: Sequence[list[Patch]]) -> None:
        self.config, self.batches = config, batches
        self.teacher = load_teacher(config.teacher.dir)[0].to(DEVICE)
        self._turn = threading.Lock()

    def rows(self, patches: Sequence[Patch]) -> dict[str, np.ndarray]:
        """The latents and targets of a batch, as they are stored."""
        latents, mpp = self.config.latents, patches[0][2]
        decoded = [[decode(content, "", None) for content in patch[:2]] for patch in patches]
        small = [decode(ihc, "", self.config.data.size) for _, ihc, _ in patches]
        # On a CPU one by one, since a batch at native resolution falls out of every cache and takes twice as long.
        step = 1 if DEVICE == "cpu" else len(patches)
        with contextlib.nullcontext() if DEVICE == "cpu" else self._turn:
            native = [
                [_on_device([images[stain] for images in decoded[first : first + step]]) for stain in (0, 1)]
                for first in range(0, len(decoded), step)
            ]
            with torch.inference_mode():
                out = self.teacher(_on_device(small))
                found = {
                    "pooled": out["pooled"][:, None],
                    "map": F.adaptive_avg_pool2d(out["map"], latents.map)[:, None],
                    "nuclei": torch.cat([nuclei_grid(he, latents.nuclei_grid, mpp) for he, _ in native]),
                    "membrane": torch.cat([membrane_grid(ihc, latents.membrane_grid, mpp) for _, ihc in native]),
                }
            return {name: array.cpu().numpy().astype(latents.dtype) for name, array in found.items()}

    def ticks(self, count: int) -> Iterator[int]:
        """Compute `count` batches in threads, each a batch of its own; yields for every patch that is done."""
        counter: Iterator[int] = itertools.count()
        done: queue.SimpleQueue[int] = queue.SimpleQueue()

        def work() -> None:
            while (number := next(counter)) < count:
                self.rows(self.batches[number % len(self.batches)])
                done.put(number)

        threads = [threading.Thread(target=work) for _ in range(self.config.data.threads)]
        for thread in threads:
            thread.start()
        for _ in range(count):
            number = done.get()
            yield from [number] * len(self.batches[number % len(self.batches)])
        for thread in threads:
            thread.join()


class Product:
    """Caching as it is used."""

    def __init__(self, config: Config, shards: Sequence[Shard]) -> None:
        self.config, self.shards = config, shards

    def ticks(self) -> Iterator[int]:
        """Cache all shards; yields for each patch, as their batches are done."""
        done: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        shutil.rmtree(self.config.latents.dir, ignore_errors=True)
        cacher = Cacher(self.config, recipe_of(self.config, find_target("her2")), SimpleNamespace(update=done.put))

        def work() -> None:
            try:
                list(map_with(lambda: cacher, self.shards, workers=0, option_name="", at_once=SHARDS_AT_ONCE))
            except BaseException as error:  # noqa: BLE001 - raised by the thread that reads
                done.put(error)

        thread = threading.Thread(target=work)
        thread.start()
        left = sum(shard.samples for shard in self.shards)
        while left:
            ready = done.get()
            if isinstance(ready, BaseException):
                raise ready
            yield from [1] * ready
            left -= ready
        thread.join()


def compare(bare: Bare, shards: Sequence[Shard]) -> int:
    """Compare the parts that were cached last with the bare loop's rows, on a CPU bit for bit; returns how many."""
    batches = iter(bare.batches)
    for shard in shards:
        found = [bare.rows(next(batches)) for _ in range(0, shard.samples, BATCH)]
        there: dict[str, np.ndarray] = {}
        for layer in (PATCHES, TEACHER):
            folder, name = Path(bare.config.latents.dir) / "parts" / layer, part_name(shard)
            whole = (folder / f"{name}.h5").read_bytes()
            for field, entry in read_sidecar(folder, name).datasets.items():
                there[field] = np.ndarray(entry.shape, entry.dtype, whole, entry.offset)
        for field in found[0]:
            wanted = np.concatenate([rows[field] for rows in found])
            same = np.array_equal if DEVICE == "cpu" else functools.partial(np.allclose, rtol=1e-2, atol=1e-3)
            assert same(there[field], wanted), f"{shard.name}: {field} is not what the bare loop computes"
    return sum(shard.samples for shard in shards)


def _head(settings: Settings) -> int:
    """Patches at the beginning, and as many at the end, when not all threads have something to do."""
    return 2 * BATCH * settings.workers


def measured(name: str, settings: Settings, teacher: Path, shards: Path, out: Path) -> tuple[Ratio, dict[str, Any]]:
    """The ratio over one shard set, and its facts."""
    config, opened = config_for(settings, teacher, shards, out), ShardFolder.open(shards).shards
    product, bare = Product(config, opened), Bare(config, patches_of(opened))
    head = _head(settings)
    count = sum(shard.samples for shard in opened) - 2 * head
    list(product.ticks())
    compared = compare(bare, opened)

    def ours() -> Rate:
        return steady(product.ticks(), 1, head, count)

    def theirs() -> Rate:
        return steady(bare.ticks(len(bare.batches)), 1, head, count)

    ratio = alternate(name, "caching / bare decode + teacher + targets", MARK, ours, theirs, settings.rounds)
    pixels = decode(bare.batches[0][0][1], "", None).shape
    facts = {
        "patches_a_round": count,
        "shards": len(opened),
        "pixels": f"{pixels[1]}x{pixels[0]}",
        "rows_compared": compared,
    }
    return ratio, facts


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Cached patches a second by those of a bare loop, of whole patches and of tiles."""
    folder = inputs.folder / "cache"
    inputs.pairs  # noqa: B018 - draws them
    images = settings.images or str(inputs.folder / "drawn")
    teacher = teacher_in(folder / "teacher", settings.size)
    ratios, facts = [], {"input": inputs.described(), "teacher": "resnet10, untrained", "batch": BATCH}
    shown = settings.cached + 2 * _head(settings)
    for name, pairs, tile in (("cache", shown, 0), ("cache: tiles", -(-shown // 2), settings.side // 4)):
        some = Inputs(replace(settings, images=images, pairs=pairs), folder / name.replace(": ", "-"))
        shards = some.folder / "cached"
        size = max(BATCH, pairs * (16 if tile else 1) // (_SHARDS * settings.workers))
        options = ShardOptions(layout="bci", root=str(some.files), out=str(shards), shard_size=size)
        build(replace(options, tile=tile, image="jpeg:95") if tile else options)
        ratio, facts[name] = measured(name, settings, teacher, shards, some.folder)
        ratios.append(ratio)
    return Outcome(ratios=ratios, facts=facts)
