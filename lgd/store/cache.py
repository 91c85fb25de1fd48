"""One shard + the frozen teacher -> one part. Caching resumes part by part.

The teacher sees the IHC exactly as training decodes it. Domain targets are computed from the same images at
native resolution, before any shrinking: a 1+ membrane is 1.4 px wide at 0.46 um/px.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lgd import distribute
from lgd.config import Config, DataError
from lgd.data.image import RESIZE
from lgd.data.shards import Shard, decode
from lgd.data.stream import Reader, Sample, in_batches, stream
from lgd.files import exclusive, exists, is_remote, list_folder, place
from lgd.models.export import read_model_config
from lgd.stain.targets import TARGET_SETTINGS
from lgd.store.latents import Store, commit
from lgd.store.parts import is_complete, part_name, part_writer

SHARDS_AT_ONCE = 2
"""Shards that a worker has in hand, at least: while a part is hashed and written, the next shard is decoded already."""

_OURS = {"store.json", "parts", "index", ".lock", ".owner.json"}


def recipe_of(config: Config) -> dict[str, Any]:
    """Everything that the stored numbers depend on, beside the shards."""
    teacher = read_model_config(config.teacher.dir, "teacher")
    latents = config.latents
    return {
        "teacher": teacher["weights_sha256"],
        "encoder": teacher["encoder"],
        "size": teacher["size"],
        "resize": RESIZE,
        "precision": latents.precision,
        "views": latents.views,
        "dtype": latents.dtype,
        "map": latents.map,
        "nuclei_grid": latents.nuclei_grid,
        "membrane_grid": latents.membrane_grid,
        "targets": TARGET_SETTINGS,
    }


def cache_latents(config: Config, shards: Sequence[Shard], workers: int) -> tuple[Store, int]:
    """Fill the store of a run; returns it and the number of parts that had to be computed.

    Raises `DataError` while another process caches into the same local folder.
    """
    folder, recipe = place(config.latents.dir), recipe_of(config)
    if exists(folder / "store.json"):
        store = Store(folder, recipe)
        if not _missing(folder, recipe, shards):
            if {part.name for part in store.parts} == {part_name(shard) for shard in shards}:
                return store, 0
    else:
        # A killed `publish` leaves its temporary file.
        strangers = [name for name in list_folder(folder) if name not in _OURS and not name.endswith(".tmp")]
        if strangers:
            raise DataError(
                f"{folder} holds something else than a feature store ({strangers[0]}): name another folder as "
                "latents.dir"
            )
    with contextlib.nullcontext() if is_remote(folder) else exclusive(folder, "caching"):
        missing = _missing(folder, recipe, shards)
        _fill(config, recipe, missing, workers)
        sources = {
            "shards": sorted({str(shard.path.absolute().parent) for shard in shards}),
            "teacher": str(Path(config.teacher.dir).absolute()),
        }
        return commit(folder, recipe, shards, sources), len(missing)


def _missing(folder: Path, recipe: dict[str, Any], shards: Sequence[Shard]) -> list[Shard]:
    """The shards without a complete part, each tar once."""
    by_tar = {shard.sha256: shard for shard in shards}
    return [shard for shard in by_tar.values() if not is_complete(folder, shard, recipe)]


def _fill(config: Config, recipe: dict[str, Any], missing: Sequence[Shard], workers: int) -> None:
    """Compute parts, behind a bar with patches a second and the time left."""
    total = sum(shard.samples for shard in missing)
    at_once = shards_at_once(config, -(-len(missing) // max(1, workers)))
    with tqdm(total=total, unit=" patches", desc="caching", disable=None if missing else True) as bar:
        here = bar.update if workers == 0 else None
        make = functools.partial(Cacher, config, recipe, at_once, here)
        done = distribute.map_with(make, missing, workers=workers, what="train.workers", at_once=at_once)
        for rows in done:
            # A worker is elsewhere: its patches are counted when its part is done.
            bar.update(0 if here else rows)


def shards_at_once(config: Config, shards: int) -> int:
    """Shards that a worker has in hand of so many that it gets: one a thread where each computes its own."""
    return min(max(SHARDS_AT_ONCE, config.data.threads), max(1, shards))


class Cacher:
    """Loads the teacher once, and turns shards into parts; it may be called from several threads."""

    def __init__(
        self, config: Config, recipe: dict[str, Any], at_once: int, tick: Callable[[int], Any] | None = None
    ) -> None:
        """`at_once` threads call it; `tick(n)` is told of n patches more."""
        import torch

        from lgd.models.teacher import load_teacher

        self.config, self.recipe, self.tick = config, recipe, tick
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if recipe["precision"] == "bf16" and not (self.device == "cuda" and torch.cuda.is_bf16_supported()):
            raise DataError("latents.precision is bf16, but there is no GPU here that has it: set it to fp32")
        self.teacher = load_teacher(config.teacher.dir)[0].to(self.device)
        self._stopping, self._cores = threading.Event(), torch.get_num_threads()
        if self.device == "cuda":
            # One batch after the other; the next ones wait decoded.
            hands, turns, self._ahead = SHARDS_AT_ONCE, 1, 2
            self._readers = config.data.threads
        else:
            # The shards in hand share the cores, which many threads in one operation leave idle between operations.
            hands, turns, self._ahead = at_once, at_once, 0
            self._readers = max(1, config.data.threads // at_once)
            torch.set_num_threads(max(1, self._cores // at_once))
        self._hand, self._turn = threading.Semaphore(hands), threading.Semaphore(turns)

    def __call__(self, shard: Shard) -> int:
        """Write the shard's part; returns its rows."""
        config, recipe = self.config, self.recipe
        reader = NativeReader([shard], ("he", "ihc"), recipe["size"])
        batches = in_batches(range(shard.samples), config.latents.batch)
        with self._hand, part_writer(place(config.latents.dir), shard, recipe) as writer:
            for samples, _ in stream(reader, batches, threads=self._readers, prefetch=self._ahead):
                with self._turn:
                    rows = self.rows(samples)
                writer.add(stored(rows, samples, shard, recipe["dtype"], writer.rounding))
                if self.tick:
                    self.tick(len(samples))
                if self._stopping.is_set():
                    raise InterruptedError(f"{shard.path}: caching was stopped")
        reader.close()
        return shard.samples

    def stop(self) -> None:
        """End the calls in other threads after the batch that they are at."""
        import torch

        self._stopping.set()
        torch.set_num_threads(self._cores)

    def rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The teacher's latents and the domain targets of each sample, float32."""
        ihc_BHW3 = np.stack([sample.images["ihc@size"] for sample in samples])
        return _teacher_rows(ihc_BHW3, self.teacher, self.recipe) | _target_rows(samples, self.recipe, self.device)


def stored(
    rows: dict[str, np.ndarray], samples: Sequence[Sample], shard: Shard, dtype: str, rounding: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The rows in the stored type, with level, key and slide; what the type loses is added to `rounding`.

    Raises `DataError` with the key for what is not finite.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, full in rows.items():
        with np.errstate(over="ignore"):
            arrays[name] = full.astype(dtype)
        finite = np.isfinite(arrays[name].reshape(len(full), -1)).all(axis=1)
        if not finite.all():
            bad = samples[int(np.argmin(finite))]
            raise DataError(
                f"{shard.path}, {bad.key}: {name} is not finite as {dtype}: train the teacher anew, or set "
                "latents.dtype to float32"
            )
        there = rounding.setdefault(name, {"absolute": 0.0, "relative": 0.0})
        for what, number in differences(arrays[name], full).items():
            there[what] = max(there[what], number)
    arrays["level"] = np.array([sample.level for sample in samples], np.int8)
    arrays["slide"] = np.array([(sample.meta["slide"] or "").encode() for sample in samples], "S")
    arrays["key"] = np.array([sample.key.encode() for sample in samples], "S")
    return arrays


def differences(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The largest difference of two arrays, and the largest length of a row's difference by that of the row of b."""
    a_nd, b_nd = (np.asarray(array, np.float64).reshape(len(array), -1) for array in (a, b))
    length_n = np.linalg.norm(b_nd, axis=1)
    relative_n = np.linalg.norm(a_nd - b_nd, axis=1) / np.where(length_n > 0, length_n, 1)
    return {"absolute": float(np.abs(a_nd - b_nd).max()), "relative": float(relative_n.max())}


class NativeReader(Reader):
    """Reads images at native resolution, and the IHC also at the teacher's size, decoded as in training."""

    def __init__(self, shards: Sequence[Shard], roles: Sequence[str], size: int) -> None:
        super().__init__(shards, roles, size=None)
        self.teacher_size = size

    def decode(
        self, content: bytes | memoryview, what: str, role: str, out: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        images = {role: decode(content, what, None)}
        if role == "ihc":
            images["ihc@size"] = decode(content, what, self.teacher_size)
        return images


def _teacher_rows(ihc_BHW3: np.ndarray, teacher: Any, recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    """`pooled` (B, views, D) and, when maps are stored, `map` (B, views, D, m, m), float32."""
    import torch
    from torch.nn import functional as F

    from lgd.data.augment import d4

    device = next(teacher.parameters()).device
    ihc_B3HW = torch.from_numpy(ihc_BHW3).to(device).permute(0, 3, 1, 2)
    pooled, maps = [], []
    half = torch.autocast(device.type, torch.bfloat16, enabled=recipe["precision"] == "bf16")
    with torch.inference_mode(), half:
        for view in range(recipe["views"]):
            out = teacher(d4(ihc_B3HW, torch.full((len(ihc_B3HW),), view)))
            pooled.append(out["pooled"])
            if recipe["map"]:
                maps.append(F.adaptive_avg_pool2d(out["map"], recipe["map"]))
    rows = {"pooled": torch.stack(pooled, dim=1).float().cpu().numpy()}
    if maps:
        rows["map"] = torch.stack(maps, dim=1).float().cpu().numpy()
    return rows


def _target_rows(samples: Sequence[Sample], recipe: dict[str, Any], device: str) -> dict[str, np.ndarray]:
    """`nuclei` (B, g, g) from the H&E and `membrane` (B, m, m, 3) from the IHC, at native resolution."""
    import torch

    from lgd.stain.targets import membrane_grid, nuclei_grid

    def batch_of(run: Sequence[Sample], role: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([sample.images[role] for sample in run])).to(device).permute(0, 3, 1, 2)

    nuclei, membrane = [], []
    # Neighbours of one size and scale go through together; sizes may differ within a shard.
    for (_, mpp), group in itertools.groupby(samples, lambda s: (s.images["he"].shape, s.meta["mpp"])):
        run = list(group)
        nuclei.append(nuclei_grid(batch_of(run, "he"), recipe["nuclei_grid"], mpp).cpu().numpy())
        membrane.append(membrane_grid(batch_of(run, "ihc"), recipe["membrane_grid"], mpp).cpu().numpy())
    return {"nuclei": np.concatenate(nuclei), "membrane": np.concatenate(membrane)}
