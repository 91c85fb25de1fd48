"""One shard + the frozen teacher -> one part. Caching resumes part by part.

The teacher sees the IHC exactly as training decodes it. Domain targets are computed from the same images at
native resolution, before any shrinking: a 1+ membrane is 1.4 px wide at 0.46 um/px.
"""

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lgd import distribute
from lgd.config import Config, DataError
from lgd.data.image import RESIZE
from lgd.data.shards import Shard, decode, open_shards
from lgd.data.stream import Reader, Sample, in_batches, stream
from lgd.files import exclusive, exists, is_remote, list_folder, place
from lgd.models.export import read_model_config
from lgd.stain.targets import TARGET_SETTINGS
from lgd.store.latents import Store, commit
from lgd.store.parts import part_writer
from lgd.store.sidecar import is_complete, part_name

SHARDS_AT_ONCE = 2
"""Shards that a worker has in hand: while the rows of one are hashed and written, the next is decoded already."""

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
    with tqdm(total=total, unit=" patches", desc="caching", disable=None if missing else True) as bar:
        here = bar.update if workers == 0 else None
        make = functools.partial(Cacher, config, recipe, here)
        done = distribute.map_with(make, missing, workers=workers, what="train.workers", at_once=SHARDS_AT_ONCE)
        for rows in done:
            # A worker is elsewhere: its patches are counted when its part is done.
            bar.update(0 if here else rows)


class Supervision:
    """The teacher, loaded once, and the domain targets: what a recipe makes of samples."""

    def __init__(self, folder: str, recipe: dict[str, Any]) -> None:
        """`folder` is the teacher's; raises `DataError` for another teacher, or arithmetic that is not had here."""
        import torch

        from lgd.models.teacher import load_teacher

        self.recipe = recipe
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if recipe["precision"] == "bf16" and not (self.device == "cuda" and torch.cuda.is_bf16_supported()):
            raise DataError("latents.precision is bf16, but there is no GPU here that has it: set it to fp32")
        teacher, config = load_teacher(folder)
        if config["weights_sha256"] != recipe["teacher"]:
            raise DataError(f"{folder} holds another teacher than the one that made the store: name that by --teacher")
        self.teacher = teacher.to(self.device)

    def rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The teacher's latents and the domain targets of samples of a `NativeReader`, float32."""
        ihc_BHW3 = np.stack([sample.images["ihc@size"] for sample in samples])
        return _teacher_rows(ihc_BHW3, self.teacher, self.recipe) | _target_rows(samples, self.recipe, self.device)


class Cacher:
    """Turns shards into parts; it may be called from several threads."""

    def __init__(self, config: Config, recipe: dict[str, Any], tick: Callable[[int], Any] | None = None) -> None:
        """`tick(n)` is told of n patches more."""
        self.config, self.recipe, self.tick = config, recipe, tick
        self.supervision = Supervision(config.teacher.dir, recipe)
        self._turn, self._stopping = threading.Lock(), threading.Event()

    def __call__(self, shard: Shard) -> int:
        """Write the shard's part; returns its rows."""
        config, recipe = self.config, self.recipe
        reader = NativeReader([shard], ("he", "ihc"), recipe["size"])
        batches = in_batches(range(shard.samples), config.latents.batch)
        with part_writer(place(config.latents.dir), shard, recipe) as writer:
            for samples, _ in stream(reader, batches, threads=config.data.threads, prefetch=2):
                # The other shard's thread waits here with its images decoded.
                with self._turn:
                    rows = self.supervision.rows(samples)
                writer.add(stored(rows, samples, shard, recipe["dtype"], writer.rounding))
                if self.tick:
                    self.tick(len(samples))
                if self._stopping.is_set():
                    raise InterruptedError(f"{shard.path}: caching was stopped")
        reader.close()
        return shard.samples

    def stop(self) -> None:
        """End the calls in other threads after the batch that they are at."""
        self._stopping.set()


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


@dataclass(frozen=True, kw_only=True)
class Reencoded:
    """What `reencoded` found."""

    rows: int
    differences: dict[str, dict[str, float]]
    """Of each dataset, as `differences` gives them."""
    allowed: dict[str, float]
    """The largest relative difference of each dataset that rounding and arithmetic explain."""

    def problems(self, store: Store) -> list[str]:
        """The datasets that differ by more."""
        return [
            f"{store.folder}: {name} differs from what its teacher and targets give by {numbers['relative']:.2g} of a "
            f"row's length, more than {self.allowed[name]:.2g}: its shards or its teacher are others than it states"
            for name, numbers in self.differences.items()
            if numbers["relative"] > self.allowed[name]
        ]


def reencoded(store: Store, count: int, teacher: str = "", seed: int = 0) -> Reencoded:
    """Run teacher and targets again on `count` rows, drawn over the whole store, and compare them with what is stored.

    Raises `DataError` when the shards, or the teacher, are not where they were; `teacher` names another folder of it.
    """
    folders = store.document["sources"]["shards"]
    of_tar = {shard.sha256: shard for folder in folders for shard in open_shards(folder)[1]}
    lost = [part.name for part in store.parts if part.tar_sha256 not in of_tar]
    if lost:
        raise DataError(f"the shards in {', '.join(folders)} changed since {store.folder} was made ({lost[0]})")
    supervision = Supervision(teacher or store.document["sources"]["teacher"], store.recipe)
    reader = NativeReader([of_tar[part.tar_sha256] for part in store.parts], ("he", "ihc"), store.recipe["size"])
    numbers_n = np.sort(np.random.default_rng(seed).choice(reader.total, min(count, reader.total), replace=False))
    found: dict[str, dict[str, float]] = {}
    for samples, _ in stream(reader, in_batches(numbers_n.tolist(), 16), threads=os.cpu_count() or 1):
        for name, full in supervision.rows(samples).items():
            there = np.stack([store.parts[sample.shard].array(name)[sample.row] for sample in samples])
            before = found.setdefault(name, {"absolute": 0.0, "relative": 0.0})
            found[name] = {what: max(number, before[what]) for what, number in differences(there, full).items()}
    reader.close()
    # Other neighbours in a batch, other threads and another device change sums in their last digits.
    arithmetic = 0.05 if store.recipe["precision"] == "bf16" else 1e-3
    rounding = store.document["rounding"]
    allowed = {name: arithmetic + 2 * rounding[name]["relative"] for name in found}
    return Reencoded(rows=len(numbers_n), differences=found, allowed=allowed)


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
