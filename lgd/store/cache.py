"""One shard + the frozen teacher -> one part. Caching resumes part by part.

The teacher sees the IHC exactly as training decodes it. Domain targets are computed from the same images at
native resolution, before any shrinking: a 1+ membrane is 1.4 px wide at 0.46 um/px.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lgd import distribute
from lgd.config import Config, DataError
from lgd.data.shards import Shard, decode
from lgd.data.stream import Reader, in_batches, stream
from lgd.models.export import read_model_config
from lgd.stain.targets import TARGET_SETTINGS
from lgd.store.latents import Store, check_recipe, commit, is_complete, part_name, write_part


def recipe_of(config: Config) -> dict[str, Any]:
    """Everything that the stored numbers depend on, beside the shards."""
    teacher = read_model_config(config.teacher.dir, "teacher")
    latents = config.latents
    return {
        "teacher": teacher["weights_sha256"],
        "encoder": teacher["encoder"],
        "size": teacher["size"],
        "views": latents.views,
        "dtype": latents.dtype,
        "map": latents.map,
        "nuclei_grid": latents.nuclei_grid,
        "membrane_grid": latents.membrane_grid,
        "targets": TARGET_SETTINGS,
    }


def cache_latents(config: Config, shards: Sequence[Shard], workers: int) -> tuple[Store, int]:
    """Fill the store of a run; returns it and the number of parts that had to be computed."""
    folder, recipe = Path(config.latents.dir), recipe_of(config)
    if (folder / "store.json").is_file():
        check_recipe(folder / "store.json", Store(folder).document["recipe"], recipe)
    elif folder.is_dir():
        # A killed `publish` leaves its temporary file.
        strangers = [p.name for p in folder.iterdir() if not re.fullmatch(r"parts|index|\.store\.json\..*", p.name)]
        if strangers:
            raise DataError(
                f"{folder} holds something else than a feature store ({strangers[0]}): name another folder as "
                "latents.dir"
            )
    missing = [shard for shard in shards if not is_complete(folder, shard, recipe)]
    make = functools.partial(_cacher, folder, recipe, config)
    total = sum(shard.samples for shard in missing)
    with tqdm(total=total, unit="patch", desc="caching", disable=not missing) as bar:
        for rows in distribute.map_with(make, missing, workers=workers, what="train.workers"):
            bar.update(rows)
    if not missing and (folder / "store.json").is_file():
        store = Store(folder)
        if {part.sidecar["name"] for part in store.parts} == {part_name(shard) for shard in shards}:
            return store, 0
    return commit(folder, recipe, shards), len(missing)


def _cacher(folder: Path, recipe: dict[str, Any], config: Config) -> Callable[[Shard], int]:
    """Load the teacher once, and give the function that turns a shard into its part."""
    import torch

    from lgd.models.teacher import load_teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_teacher(config.teacher.dir)[0].to(device)

    def one(shard: Shard) -> int:
        write_part(folder, shard, recipe, part_arrays(shard, teacher, recipe, config))
        return shard.samples

    return one


def part_arrays(shard: Shard, teacher: Any, recipe: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """The datasets of a shard's part, one row a sample."""
    reader = NativeReader([shard], ("he", "ihc"), recipe["size"])
    columns: dict[str, list[np.ndarray]] = {}
    keys: list[bytes] = []
    slides: list[bytes] = []
    levels: list[int] = []
    batches = in_batches(range(shard.samples), config.latents.batch)
    for samples, _ in stream(reader, batches, threads=config.data.threads, prefetch=2):
        keys += [sample.key.encode() for sample in samples]
        slides += [(sample.meta["slide"] or "").encode() for sample in samples]
        levels += [sample.level for sample in samples]
        rows = _teacher_rows(np.stack([s.images["ihc@size"] for s in samples]), teacher, recipe)
        rows |= _target_rows(samples, recipe)
        for name, full in rows.items():
            with np.errstate(over="ignore"):
                array = full.astype(recipe["dtype"])
            if not np.isfinite(array).all():
                bad = samples[int(np.argmax(~np.isfinite(array.reshape(len(array), -1)).all(axis=1)))]
                raise DataError(
                    f"{shard.path}, {bad.key}: {name} is not finite as {recipe['dtype']}: train the teacher anew, or "
                    "set latents.dtype to float32"
                )
            columns.setdefault(name, []).append(array)
    reader.close()
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    arrays["level"] = np.array(levels, np.int8)
    arrays["slide"] = np.array(slides, f"S{max(1, *map(len, slides))}")
    arrays["key"] = np.array(keys, f"S{max(map(len, keys))}")
    return arrays


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
    with torch.inference_mode():
        for view in range(recipe["views"]):
            out = teacher(d4(ihc_B3HW, torch.full((len(ihc_B3HW),), view, device=device)))
            pooled.append(out["pooled"])
            if recipe["map"]:
                maps.append(F.adaptive_avg_pool2d(out["map"], recipe["map"]))
    rows = {"pooled": torch.stack(pooled, dim=1).float().cpu().numpy()}
    if maps:
        rows["map"] = torch.stack(maps, dim=1).float().cpu().numpy()
    return rows


def _target_rows(samples: Sequence[Any], recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    """`nuclei` (B, g, g) from the H&E and `membrane` (B, m, m, 3) from the IHC, at native resolution."""
    import torch

    from lgd.stain.targets import membrane_grid, nuclei_grid

    def batch_of(run: Sequence[Any], role: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([sample.images[role] for sample in run])).permute(0, 3, 1, 2)

    nuclei, membrane = [], []
    # Neighbours of one size and scale go through together; sizes may differ within a shard.
    for (_, mpp), group in itertools.groupby(samples, lambda s: (s.images["he"].shape, s.meta["mpp"])):
        run = list(group)
        nuclei.append(nuclei_grid(batch_of(run, "he"), recipe["nuclei_grid"], mpp).numpy())
        membrane.append(membrane_grid(batch_of(run, "ihc"), recipe["membrane_grid"], mpp).numpy())
    return {"nuclei": np.concatenate(nuclei), "membrane": np.concatenate(membrane)}
