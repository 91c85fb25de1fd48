"""One shard + the frozen teacher -> one part. Caching resumes part by part.

`lgd cache-latents` and tools/cache_teacher_latents.py run `cache_latents`, which leaves a store (`lgd.store.store`).
"""

import functools
import importlib.metadata
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lgd.base import threads
from lgd.base.errors import DataError, require
from lgd.base.logs import progress
from lgd.config import Config
from lgd.io.digests import digest_of
from lgd.io.files import exists, size_of
from lgd.io.folders import refuse_foreign
from lgd.io.location import Location, RemoteError, as_location
from lgd.io.locks import LOCK, exclusive
from lgd.models.availability import check_packages
from lgd.models.description import TeacherConfig
from lgd.models.spec import EncoderSpec
from lgd.models.teacher import load_teacher
from lgd.ray_jobs.mapping import map_with
from lgd.shards.archive import Shard
from lgd.store.commit import commit
from lgd.store.document import PATCHES, Recipe, StoreDocument, TargetsRecipe, part_name, read_sidecar
from lgd.store.drift import check_drift, make_fixed_vectors, refuse_recipe
from lgd.store.probe import ensure_probe, lacks_probe, prune_probes
from lgd.store.recipes import recipe_of, targets_of
from lgd.store.store import Store
from lgd.store.supervision import Supervision, TargetSupervision, stored
from lgd.store.writer import shard_writer
from lgd.stream.reader import Sample

if TYPE_CHECKING:
    from tqdm import tqdm


SHARDS_AT_ONCE = 2
"""Shards that a worker has in hand: while the rows of one are hashed and written, the next is decoded already."""

_OURS = {"store.json", "sources.json", "parts", "index", "probe", LOCK}


class Cached(NamedTuple):
    """What `cache_latents` did."""

    store: Store
    computed: int
    """Shards whose parts had to be computed."""
    pruned: int
    """Shards that the store does not hold any more."""


def cache_latents(config: Config, shards: Sequence[Shard], workers: int, prune: bool = False) -> Cached:
    """Fill the store of a run with the latents of its teacher, with the domain targets, and with a probe where no label
    taught the teacher.

    Parts of other shards stay, unless `prune` removes them, and so do the latents of other teachers. Raises `DataError`
    while another process caches into the same local folder.
    """
    require(
        config.teacher.source != "imported",
        "teacher.source is imported, and no network here computes such latents: lgd import-latents puts them there",
    )
    folder, recipe, name = as_location(config.latents.dir), recipe_of(config, shards[0].target), config.teacher.name
    assert recipe.teacher.size is not None, "it has a network"
    spec = EncoderSpec.from_json(recipe.teacher.encoder)
    before = _open(folder, recipe, name)
    named = {entry.name for entry in before.entries} if before else set[str]()
    training = [shard for shard in shards if shard.split == "train"]
    probed = not TeacherConfig.read_folder(config.teacher.dir).gives_labels
    if before and name in before.teachers and not prune:
        there = Store(folder, recipe, (name,))
        has_all = {part.tar_sha256 for part in there.parts} >= {shard.sha256 for shard in shards}
        whole = has_all and not _missing(folder, recipe, name, shards)
        if whole and not (probed and lacks_probe(there, training)):
            return Cached(there, 0, 0)
    if before is None:
        refuse_foreign(folder, _OURS, "name another folder as latents.dir")
    check_packages(spec)
    libraries = ("torch", "transformers", *(("timm",) if "architecture" in spec.backbone else ()))
    versions = {library: importlib.metadata.version(library) for library in libraries}
    with exclusive(folder, "caching latents"):
        missing = _missing(folder, recipe, name, shards)
        stored, fixed = before.teachers.get(name) if before else None, None
        # Where there are no rows to add, as for a probe or to prune, the teacher is not needed.
        if missing or not stored:
            fixed = make_fixed_vectors(load_teacher(config.teacher.dir, config.code)[0], recipe.teacher.size)
            if stored and stored.probe:
                check_drift(name, stored.probe, fixed, stored.versions, versions)
        _fill(config, recipe, missing, workers)
        store = commit(
            folder,
            recipe,
            shards,
            name=name,
            sources=sorted({str(shard.path.absolute().parent) for shard in shards}),
            teacher=config.teacher.dir,
            versions=versions,
            fixed=fixed,
            prune=prune,
        )
        if probed:
            ensure_probe(store, training)
        if prune:
            prune_probes(store)
        return Cached(store, len(missing), len(named - {entry.name for entry in store.document.entries}))


def fill_targets(config: Config, shards: Sequence[Shard], workers: int, targets: TargetsRecipe | None = None) -> int:
    """Measure the domain targets that a store's folder lacks, for a teacher that learns them or has no network here.

    Returns of how many shards. `cache_latents` finds them there. Raises `DataError` where the store has other targets,
    and while another process caches into the same local folder.
    """
    folder, recipe = as_location(config.latents.dir), targets or targets_of(config, shards[0].target)
    if exists(folder / "store.json"):
        stored = StoreDocument.read(folder / "store.json").patches.recipe
        if stored != recipe:
            refuse_recipe(folder, stored, recipe)
    else:
        refuse_foreign(folder, _OURS, "name another folder as latents.dir")
    if not _missing(folder, recipe, PATCHES, shards):
        return 0
    with exclusive(folder, "caching latents"):
        missing = _missing(folder, recipe, PATCHES, shards)
        _fill(config, recipe, missing, workers)
        return len(missing)


def _open(folder: Location, recipe: Recipe, teacher: str) -> StoreDocument | None:
    """What a store states, if there is one; `DataError` where it has other targets, or other latents of the name."""
    if not exists(folder / "store.json"):
        return None
    document = StoreDocument.read(folder / "store.json")
    stored = document.teachers[teacher].recipe if teacher in document.teachers else recipe.teacher
    if (before := Recipe(targets=document.patches.recipe, teacher=stored)) != recipe:
        refuse_recipe(folder, before, recipe, teacher)
    return document


def _missing(folder: Location, recipe: Recipe | TargetsRecipe, teacher: str, shards: Sequence[Shard]) -> list[Shard]:
    """The shards without complete parts, each tar once."""
    by_tar = {shard.sha256: shard for shard in shards}
    return [shard for shard in by_tar.values() if _lacking(folder, recipe, teacher, shard)]


def _lacking(folder: Location, recipe: Recipe | TargetsRecipe, teacher: str, shard: Shard) -> list[str]:
    """The layers of a recipe in which a shard has no complete part."""
    layers = (PATCHES, teacher) if isinstance(recipe, Recipe) else (PATCHES,)
    return [layer for layer in layers if not is_complete(folder, layer, shard, recipe)]


def is_complete(store: Location, layer: str, shard: Shard, recipe: Recipe | TargetsRecipe) -> bool:
    """Whether a layer of the shard's part was committed under this recipe, and its file is there in its size."""
    folder, name = store / "parts" / layer, part_name(shard)
    try:
        sidecar = read_sidecar(folder, name)
        size = size_of(folder / f"{name}.h5")
    except RemoteError:
        raise
    except (DataError, FileNotFoundError):
        return False
    asked = (digest_of(recipe.of(layer).as_json()), shard.sha256, shard.samples, size)
    return (sidecar.recipe, sidecar.tar_sha256, sidecar.rows, sidecar.bytes) == asked


def _fill(config: Config, recipe: Recipe | TargetsRecipe, missing: Sequence[Shard], workers: int) -> None:
    """Compute parts, behind a bar with patches a second and the time left."""
    if not missing:
        return
    total = sum(shard.samples for shard in missing)
    with progress(total, "caching", "patches") as bar:
        # A worker is elsewhere: its patches are counted when its part is done.
        make = functools.partial(Cacher, config, recipe, bar if workers == 0 else None)
        done = map_with(
            make,
            missing,
            workers=workers,
            option_name="train.workers",
            threads=config.data.threads,
            at_once=SHARDS_AT_ONCE,
            name=lambda shard: str(shard.path),
        )
        for rows in done:
            bar.update(rows if workers else 0)


class Cacher:
    """Turns shards into parts; it may be called from several threads, which share its threads and its teacher."""

    def __init__(self, config: Config, recipe: Recipe | TargetsRecipe, bar: "tqdm[None] | None" = None) -> None:
        """With a recipe of the targets alone no teacher is needed."""
        self.config, self.recipe, self.bar = config, recipe, bar
        self.supervision = (
            TargetSupervision(recipe)
            if isinstance(recipe, TargetsRecipe)
            else Supervision(config.teacher.dir, recipe, config.code)
        )
        self._pool = ThreadPoolExecutor(config.data.threads, thread_name_prefix="lgd-prepare")
        self._turn = threading.Lock()
        self._counting, self._stopping = threading.Lock(), threading.Event()

    def __call__(self, shard: Shard) -> int:
        """Write the shard's parts that are missing; returns its rows."""
        make = self.supervision
        batch = -(-self.config.latents.batch // make.at_once) * make.at_once
        folder = as_location(self.config.latents.dir)
        lacking = _lacking(folder, self.recipe, self.config.teacher.name, shard)
        if not lacking:
            # A worker wrote them and died before it could say so.
            return shard.samples
        reader = make.reader([shard], PATCHES in lacking)
        prepare = functools.partial(make.prepare, reader)
        prepared = threads.map_ordered_prefetch(self._pool, prepare, range(shard.samples), count=batch)
        with shard_writer(folder, shard, self.recipe, lacking) as writer:
            while samples := list(itertools.islice(prepared, batch)):
                if self._stopping.is_set():
                    raise InterruptedError("caching was stopped")
                writer.add(stored(self._rows(samples), samples, shard, self.config.latents.dtype, writer.rounding))
                if self.bar is not None:
                    with self._counting:
                        self.bar.update(len(samples))
        reader.close()
        return shard.samples

    def _rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        if self.supervision.device == "cpu":
            # More threads than the pool's would only push each other's work out of the caches.
            return self._pool.submit(self.supervision.rows, samples).result()
        # One batch after the other; meanwhile the pool prepares the next ones.
        with self._turn:
            return self.supervision.rows(samples)

    def stop(self) -> None:
        """End the calls in other threads at their next batch."""
        self._stopping.set()
