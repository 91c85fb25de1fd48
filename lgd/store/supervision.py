"""Shards + the frozen teacher -> the rows of a store, as its recipe says.

The teacher sees the IHC exactly as training decodes it. Domain targets are computed from the same images at
native resolution, before any shrinking: a 1+ membrane is 1.4 px wide at 0.46 um/px.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from lgd.base.device import exact_float32, find_device
from lgd.base.environment import count_cpus
from lgd.base.errors import DataError
from lgd.models.student import STAININGS
from lgd.models.teacher import load_teacher
from lgd.shards.archive import Shard
from lgd.shards.image import decode
from lgd.stain.nuclear import positive_grid
from lgd.stain.targets import membrane_grid, nuclei_grid
from lgd.store.document import Recipe, Rounding, TargetsRecipe
from lgd.store.store import Store
from lgd.stream.plan import d4
from lgd.stream.reader import Encoded, Reader, Sample, in_batches

_FORWARD = {"cpu": 4, "cuda": 64}
"""Images in a forward pass of the teacher. More fall out of a processor's cache: 13 instead of 7 ms each (256 px,
resnet10). Always as many: in a pass of another number an image has other last bits (1e-6; ResNets, one or three on a
CPU), and those of a store would depend on `latents.batch` and on where its shards end.
"""


class TargetSupervision:
    """The domain targets: what their recipe makes of samples."""

    def __init__(self, targets: TargetsRecipe) -> None:
        self.targets, self.device = targets, find_device()
        self.at_once = 1
        """Samples of which `rows` is best given a multiple."""

    def reader(self, shards: Sequence[Shard], targets: bool = True) -> Reader:
        """A reader for `prepare`; where the recipe has no targets no image is read."""
        return Reader(shards, ("he", "ihc") if self.targets.nuclei_grid else ())

    def prepare(self, reader: Reader, number: int) -> Sample:
        """Read one sample of a `reader`, in any thread: its images are then `ihc`, uint8 of the teacher's size, and the
        targets `nuclei` (g, g) from the H&E and `membrane` (m, m, 3) or `positive` (m, m, 2) from the IHC, float32.

        On a GPU the native images stand for the targets, which `rows` works out of many at once; elsewhere they are
        dropped here: those of a batch would take gigabytes, and a thread a sample is as quick.
        """
        sample = reader.read(number)
        if "he" not in sample.images:
            return sample
        images = {name: sample.images["he" if name == "nuclei" else "ihc"] for name in self._targets}
        if "teacher_ihc" in sample.images:
            images["ihc"] = sample.images["teacher_ihc"]
        if self.device == "cpu":
            images |= {name: measure(images[name][None], sample.meta.mpp)[0] for name, measure in self._targets.items()}
        return replace(sample, images=images)

    @functools.cached_property
    def _targets(self) -> dict[str, Callable[[np.ndarray, float | None], np.ndarray]]:
        """What measures the targets of uint8 images (B, H, W, 3) of one scale."""
        grids = self.targets
        if grids.nuclei_grid is None or grids.membrane_grid is None:
            return {}
        kinds = {"nuclei": (nuclei_grid, grids.nuclei_grid)}
        if stained := STAININGS[grids.staining or "membranes"]:
            kinds[stained] = (positive_grid if stained == "positive" else membrane_grid, grids.membrane_grid)

        def measure(name: str, image_BHW3: np.ndarray, mpp: float | None) -> np.ndarray:
            of, grid = kinds[name]
            found: np.ndarray = (
                of(torch.from_numpy(image_BHW3).to(self.device).permute(0, 3, 1, 2), grid, mpp).cpu().numpy()
            )
            return found

        return {name: functools.partial(measure, name) for name in kinds}

    def rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The rows of prepared samples, float32: the targets, where they are to be made."""
        with exact_float32():
            return {name: self.measure(name, samples) for name in self._targets if name in samples[0].images}

    def measure(self, name: str, samples: Sequence[Sample]) -> np.ndarray:
        """A target of prepared samples; of native images those of one size and scale together."""
        found = [sample.images[name] for sample in samples]
        if self.device != "cpu":
            alike: dict[tuple[object, ...], list[int]] = {}
            for place, sample in enumerate(samples):
                alike.setdefault((sample.images[name].shape, sample.meta.mpp), []).append(place)
            for places in alike.values():
                image_BHW3 = np.stack([found[place] for place in places])
                for place, target in zip(
                    places, self._targets[name](image_BHW3, samples[places[0]].meta.mpp), strict=True
                ):
                    found[place] = target
        return np.stack(found)


class Supervision(TargetSupervision):
    """The teacher, loaded once, and the domain targets: what a recipe makes of samples."""

    def __init__(self, folder: str, recipe: Recipe, code: Collection[str] = ()) -> None:
        """`folder` is the teacher's, and `code` outside LGD what it may run.

        Raises `DataError` for another teacher, and for a precision that this device does not support.
        """
        super().__init__(recipe.targets)
        assert recipe.teacher.size is not None, "imported latents have no network"
        self.recipe, self.size = recipe, recipe.teacher.size
        if recipe.teacher.precision == "bf16" and not (self.device == "cuda" and torch.cuda.is_bf16_supported(False)):
            raise DataError("latents.precision is bf16, but there is no GPU here that has it: set it to fp32")
        teacher, config = load_teacher(folder, code)
        if config.weights_sha256 != recipe.teacher.weights_sha256:
            raise DataError(f"{folder} holds another teacher than the one that made the store: name that by --teacher")
        self.teacher, self.at_once = teacher.to(self.device), _FORWARD[self.device]

    def reader(self, shards: Sequence[Shard], targets: bool = True) -> Reader:
        """A reader for `prepare`; without `targets` latents alone are made of what it reads."""
        return _NativeReader(shards, self.size) if targets else Reader(shards, ("ihc",), self.size)

    def rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The rows of prepared samples, float32: `pooled` (B, views, D), `map` (B, views, D, m, m), and the targets."""
        images = [sample.images["ihc"] for sample in samples]
        ihc_BHW3 = np.stack(images + [np.zeros_like(images[0])] * (-len(images) % self.at_once))
        with exact_float32():
            runs = [self._latents(few_BHW3) for few_BHW3 in np.split(ihc_BHW3, len(ihc_BHW3) // self.at_once)]
        rows = {name: np.concatenate([run[name] for run in runs])[: len(images)] for name in runs[0]}
        return rows | super().rows(samples)

    def _latents(self, ihc_BHW3: np.ndarray) -> dict[str, np.ndarray]:
        """`pooled` and, where maps are stored, `map`, as in `rows`."""
        recipe, pooled, maps = self.recipe.teacher, [], []
        ihc_B3HW = torch.from_numpy(ihc_BHW3).to(self.device).permute(0, 3, 1, 2)
        half = torch.autocast(self.device, torch.bfloat16, enabled=recipe.precision == "bf16")
        with torch.inference_mode(), half:
            for view in range(recipe.views):
                out = self.teacher(d4(ihc_B3HW, torch.full((len(ihc_B3HW),), view)) if view else ihc_B3HW)
                pooled.append(out["pooled"])
                if recipe.map:
                    maps.append(F.adaptive_avg_pool2d(out["map"], recipe.map))
        latents = {"pooled": pooled, "map": maps} if maps else {"pooled": pooled}
        return {name: torch.stack(views, dim=1).float().cpu().numpy() for name, views in latents.items()}


def stored(
    rows: dict[str, np.ndarray], samples: Sequence[Sample], shard: Shard, dtype: str, rounding: dict[str, Rounding]
) -> dict[str, np.ndarray]:
    """The rows in the stored type, with label, slide and key; what the type loses is added to `rounding`.

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
        rounding[name] = measure_difference(arrays[name], full).largest(rounding.get(name))
    labels = [math.nan if sample.meta.label is None else sample.meta.label for sample in samples]
    slides = [(sample.meta.slide or "").encode() for sample in samples]
    arrays |= {"label": np.array(labels, np.float32), "slide": np.array(slides, "S")}
    return arrays | {"key": np.array([sample.key.encode() for sample in samples], "S")}


def measure_difference(a: np.ndarray, b: np.ndarray) -> Rounding:
    """The largest difference of two arrays, and the largest length of a row's difference by that of the row of b."""
    a_nd, b_nd = (np.asarray(array, np.float64).reshape(len(array), -1) for array in (a, b))
    length_n = np.linalg.norm(b_nd, axis=1)
    relative_n = np.linalg.norm(a_nd - b_nd, axis=1) / np.where(length_n > 0, length_n, 1)
    return Rounding(absolute=float(np.abs(a_nd - b_nd).max()), relative=float(relative_n.max()))


def compare_cells(name: str, a: np.ndarray, b: np.ndarray) -> Rounding:
    """`measure_difference` of each cell of a grid or map, or of each vector, by the length of that of b.

    A cell that is shorter than the mean of its row is measured by that: sums have a rounding of their own. By the row
    one wrong cell of many would be lost among the others.
    """
    axis: tuple[int, ...] = {"map": (2,), "nuclei": ()}.get(name, (-1,))

    def measure(array: np.ndarray) -> np.ndarray:
        length: np.ndarray = np.sqrt(np.square(array).sum(axis=axis, keepdims=True))
        return length

    difference, length = np.asarray(a, np.float64) - b, measure(np.asarray(b, np.float64))
    scale = np.maximum(length, length.mean(axis=tuple(range(1, b.ndim)), keepdims=True))
    relative = measure(difference) / np.where(scale > 0, scale, 1)
    return Rounding(absolute=float(np.abs(difference).max()), relative=float(relative.max()))


def reencode(
    store: Store, count: int, teacher: str = "", seed: int = 0, code: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Run the store's first teacher and the targets again on `count` rows, drawn over all, and compare the results.

    Returns the problems, and a line on each dataset. Raises `DataError` when the shards, or the teacher, are not where
    they were; `teacher` names another folder of it.
    """
    if store.recipe.teacher.source == "imported":
        return [], [f"the latents of {store.teacher} were imported: there is no network that could make them again"]
    shards = list(map(store.open_sources(), store.parts))
    supervision = Supervision(teacher or store.sources.teachers[store.teacher], store.recipe, code)
    reader = supervision.reader(shards)
    numbers_n = np.sort(np.random.default_rng(seed).choice(reader.total, min(count, reader.total), replace=False))
    found: dict[str, Rounding] = {}
    with ThreadPoolExecutor(count_cpus()) as pool:
        for numbers in in_batches(numbers_n.tolist(), 16):
            samples = list(pool.map(functools.partial(supervision.prepare, reader), numbers))
            for name, full in supervision.rows(samples).items():
                there = np.stack([store.parts[sample.shard].array(name)[sample.row] for sample in samples])
                found[name] = compare_cells(name, there, full).largest(found.get(name))
    reader.close()
    # Other neighbours in a batch, other threads and another device change sums in their last digits.
    arithmetic = 0.05 if store.recipe.teacher.precision == "bf16" else 1e-3
    rounding = store.document.patches.rounding | store.document.teachers[store.teacher].rounding
    problems = []
    notes = [f"re-encoded {len(numbers_n)} rows of {store.teacher}, largest difference to what is stored:"]
    for name, one in found.items():
        allowed = arithmetic + 2 * rounding[name].relative
        notes.append(f"  {name}: {one.absolute:.2g}, {one.relative:.2g} of its length (at most {allowed:.2g})")
        if one.relative > allowed:
            problems.append(
                f"{store.folder}: {name} differs from what its teacher and targets give by {one.relative:.2g} of "
                f"its length, more than {allowed:.2g}: its shards or its teacher are others than it states"
            )
    return problems, notes


class _NativeReader(Reader):
    """Reads images at native resolution, and the IHC also at the teacher's size, decoded as in training."""

    def __init__(self, shards: Sequence[Shard], teacher_size: int) -> None:
        super().__init__(shards, ("he", "ihc"))
        self.teacher_size = teacher_size

    def decode(self, image: Encoded, out: np.ndarray | None) -> dict[str, np.ndarray]:
        images = super().decode(image, out)
        if image.role == "ihc":
            images["teacher_ihc"] = decode(image.content, image.name, self.teacher_size, found=image.header)
        return images
