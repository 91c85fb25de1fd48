"""Features that other tools computed -> latents of a store, under a name of their own: `lgd import-latents`.

All is read and checked before anything is written; then the shards are written part by part, as by caching, and the
store's document last. The latents are relative to their mean over the training split, as those of teachers here.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, JsonValue

from lgd.base.arguments import check_bounds
from lgd.base.errors import DataError
from lgd.base.logs import progress
from lgd.base.text import escape_text
from lgd.config import Config
from lgd.config_sections import Pool
from lgd.io.digests import digest_of
from lgd.io.files import exists
from lgd.io.location import Location, as_location, require_local
from lgd.io.locks import exclusive
from lgd.models.known import find_published
from lgd.shards.archive import Shard
from lgd.store.cache import fill_targets, is_complete
from lgd.store.commit import commit
from lgd.store.document import PATCHES, Recipe, StoreDocument, TargetsRecipe, TeacherRecipe
from lgd.store.drift import refuse_recipe
from lgd.store.feature_layouts import open_features
from lgd.store.features import TOOLS, FeatureFile, find_files, stamp_of
from lgd.store.joining import Joined, Patches, describe_patch, join, name_first
from lgd.store.probe import ensure_probe
from lgd.store.recipes import targets_of
from lgd.store.store import Store
from lgd.store.supervision import measure_difference
from lgd.store.writer import shard_writer
from lgd.stream.plan import offsets

_LARGEST = 65_504.0
"""That float16 holds."""
Centre = tuple[float, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What `lgd import-latents` is asked for."""

    files: list[str]
    """Files of features, or folders of them."""
    layout: Literal["auto", "table", "trident", "clam", "stamp"] = "auto"
    """How the files are laid out; `auto` sees it by what they hold, but for those of CLAM."""
    encoder: str = ""
    """What computed the features, such as UNI2-h, where the files do not state it."""
    licence: str = ""
    """Terms of the encoder, which travel to whatever is trained on the latents; default: those of LGD's table."""
    pool: Pool | None = None
    """How the encoder's tokens became one vector, if you know it."""
    patches: str = ""
    """CLAM's folder `patches`, which says how large a tile is."""
    slide_mpp: Annotated[float, Field(gt=0, lt=100)] | None = None
    """Micrometres a pixel of the slides' level 0, of places in micrometres; default: that of the patches."""

    def __post_init__(self) -> None:
        check_bounds(self)


class Imported(NamedTuple):
    """What `import_latents` did."""

    store: Store
    written: int
    """Shards whose parts had to be written."""


def import_latents(config: Config, options: ImportOptions, shards: Sequence[Shard], workers: int) -> Imported:
    """Put features of other tools into the store of a run, as the latents named `teacher.name`.

    The domain targets that the store lacks are measured by `workers`. Raises `DataError`, before anything is written,
    for files that are damaged or do not fit, for a patch without features, for features that are not finite, and where
    the store has other latents of that name.
    """
    folder, name = as_location(config.latents.dir), config.teacher.name
    paths = find_files([require_local(one, f"{one} is a url: copy the features here first") for one in options.files])
    files = _open_all(paths, options)
    before = StoreDocument.read(folder / "store.json") if exists(folder / "store.json") else None
    there = before.teachers.get(name) if before else None
    targets = _choose_targets(config, before, shards)
    shards = [*{shard.sha256: shard for shard in shards}.values()]
    training = [shard for shard in shards if shard.split == "train"]
    if before and there:
        recipe = Recipe(targets=targets, teacher=_describe(config, options, files, there.centre))
        if (stored := before.recipe(name)) != recipe:
            refuse_recipe(folder, stored, recipe, name)
        store = Store(folder, recipe, (name,))
        held = {part.tar_sha256 for part in store.parts}
        layers = [(shard, layer) for shard in shards for layer in (PATCHES, name)]
        if all(shard.sha256 in held and is_complete(folder, layer, shard, recipe) for shard, layer in layers):
            ensure_probe(store, training)
            return Imported(store, 0)
    patches = Patches.read(shards)
    joined = join(patches, files, options.slide_mpp)
    reached, mean = _check_features(files, joined, patches, shards)
    centre = there.centre if there else None if files[0].centred else mean
    _check_range(config, reached, centre)
    recipe = Recipe(targets=targets, teacher=_describe(config, options, files, centre))
    fill_targets(config, shards, workers, targets)
    with exclusive(folder, "importing latents"):
        written = _write(folder, name, recipe, shards, files, joined, patches, centre)
        store = commit(
            folder,
            recipe,
            shards,
            name=name,
            sources=sorted({str(shard.path.absolute().parent) for shard in shards}),
            teacher=", ".join(str(Path(one).absolute()) for one in options.files),
            centre=centre,
        )
        ensure_probe(store, training)
    return Imported(store, written)


def _open_all(paths: Sequence[Path], options: ImportOptions) -> list[FeatureFile]:
    """The files, of one layout, one encoder and one length; `DataError` names two that differ."""
    layout = None if options.layout == "auto" else options.layout
    patches = require_local(options.patches, "--patches is a url: name a local folder") if options.patches else None
    files = []
    with progress(len(paths), "reading", "files") as bar:
        for path in paths:
            stamp = stamp_of(path)
            files.append(dataclasses.replace(open_features(path, layout, patches), stamp=stamp))
            bar.update(1)
    filled = [file for file in files if file.rows]
    if not filled:
        raise DataError(f"{paths[0]} and all other files hold no row of features: name those of slides with tissue")
    first = filled[0]
    for one in filled:
        for what, mine, its in (
            ("laid out as", TOOLS[first.layout], TOOLS[one.layout]),
            ("of numbers a row", first.dim, one.dim),
            ("of the encoder", first.encoder, one.encoder),
            ("centred", first.centred, one.centred),
        ):
            if mine != its:
                raise DataError(f"{first.path} is {what} {mine}, and {one.path} {its}: one name is of one encoder")
    return filled


def _choose_targets(config: Config, before: StoreDocument | None, shards: Sequence[Shard]) -> TargetsRecipe:
    """The domain targets: none where patches have no second image, for all parts of a store have the same."""
    paired = all("ihc" in shard.roles for shard in shards)
    stored = before.patches.recipe if before else None
    if stored is None:
        return targets_of(config, shards[0].target, paired)
    if stored.nuclei_grid is not None and not paired:
        raise DataError(
            f"{config.latents.dir} holds domain targets, which patches without a second image (IHC) cannot have: name "
            "another folder as latents.dir"
        )
    return targets_of(config, shards[0].target, stored.nuclei_grid is not None)


def _describe(config: Config, options: ImportOptions, files: Sequence[FeatureFile], centre: Centre) -> TeacherRecipe:
    """The recipe of imported latents: digests of the files, and what they or the user state of the encoder."""
    first = files[0]
    encoder = escape_text(options.encoder, 500) or first.encoder
    if not encoder:
        raise DataError(
            f"{first.path} does not say which encoder computed it: name it by --encoder, such as --encoder UNI2-h (or "
            "what else the numbers are)"
        )
    known = find_published(encoder)
    licence = escape_text(options.licence, 5000) or first.licence or (known.licence if known else None)
    stated: dict[str, JsonValue] = {
        "name": encoder,
        "tool": TOOLS[first.layout],
        "version": ", ".join(sorted({file.version for file in files if file.version})) or None,
        "files": len(files),
        "licence": licence,
        "slide_mpp": options.slide_mpp,
        "centre": None if centre is None else digest_of(list(centre)),
    }
    return TeacherRecipe(
        source="imported",
        weights_sha256=digest_of(sorted(file.sha256 for file in files)),
        encoder=stated,
        pool=options.pool,
        size=None,
        mpp=None,
        resize=None,
        precision=None,
        views=1,
        map=0,
        dtype=config.latents.dtype,
    )


def _check_features(
    files: Sequence[FeatureFile], joined: Joined, patches: Patches, shards: Sequence[Shard]
) -> tuple[float, Centre]:
    """The largest number in the patches' features, and their mean over the training split, or over all without one.

    Raises `DataError` for features that are not finite.
    """
    split_n = np.repeat([shard.split == "train" for shard in shards], [shard.samples for shard in shards])
    counted_n = split_n if split_n.any() else np.ones_like(split_n)
    reached, sum_D, bad = 0.0, np.zeros(files[0].dim), list[int]()
    with progress(len(joined.row_n), "checking", "patches") as bar:
        for number, file in enumerate(files):
            member_n = _members(joined, number)
            for part, block in file.read(joined.row_n[member_n]):
                block_mD, patch_m = block.astype(np.float32), member_n[part]
                finite_m = np.isfinite(block_mD).all(axis=1)
                bad += patch_m[~finite_m].tolist()
                sum_D += block_mD[finite_m & counted_n[patch_m]].sum(axis=0, dtype=np.float64)
                reached = max(reached, float(np.abs(block_mD[finite_m]).max(initial=0.0)))
                bar.update(len(patch_m))
    if bad:
        raise DataError(
            f"the features of {len(bad)} of {len(joined.row_n)} patches are not finite, as where float16 was too small "
            f"for them: {name_first(describe_patch(patches, one) for one in sorted(bad))}: compute them again, in "
            "float32"
        )
    mean_D = (sum_D / counted_n.sum()).astype(np.float32)
    return reached, tuple(float(value) for value in mean_D)


def _check_range(config: Config, reached: float, centre: Centre) -> None:
    """Raise `DataError` for features that the stored type cannot hold."""
    reached += max(map(abs, centre), default=0.0) if centre else 0.0
    if config.latents.dtype == "float16" and reached > _LARGEST:
        raise DataError(
            f"latents.dtype is float16, which holds numbers up to {_LARGEST:,.0f}, and the features reach "
            f"{reached:,.0f}: set latents.dtype to float32"
        )


def _members(joined: Joined, file: int) -> np.ndarray:
    """The patches of a file, by their rows in it."""
    member_n = np.flatnonzero(joined.file_n == file)
    return member_n[np.argsort(joined.row_n[member_n], kind="stable")]


def _write(  # noqa: PLR0913 - what parts are made of
    folder: Location,
    name: str,
    recipe: Recipe,
    shards: Sequence[Shard],
    files: Sequence[FeatureFile],
    joined: Joined,
    patches: Patches,
    centre: Centre,
) -> int:
    """Write the parts that are missing; returns their number."""
    written, centre_D = 0, np.array(centre or 0.0, np.float32)
    first = offsets([shard.samples for shard in shards])
    with progress(len(patches.keys), "importing", "patches") as bar:
        for shard, start in zip(shards, first.tolist(), strict=False):
            part = slice(start, start + shard.samples)
            if not is_complete(folder, name, shard, recipe):
                full_nD = _read_rows(files, Joined(joined.file_n[part], joined.row_n[part])) - centre_D
                pooled_nD = full_nD.astype(recipe.teacher.dtype)
                with shard_writer(folder, shard, recipe, (name,)) as writer:
                    writer.rounding["pooled"] = measure_difference(pooled_nD, full_nD)
                    keys = np.array([key.encode() for key in patches.keys[part]], "S")
                    writer.add({"pooled": pooled_nD[:, None], "key": keys})
                    _refuse_changed(files)
                written += 1
            bar.update(shard.samples)
    return written


def _read_rows(files: Sequence[FeatureFile], joined: Joined) -> np.ndarray:
    """The features of some patches, float32 (n, D)."""
    rows_nD = np.empty((len(joined.row_n), files[0].dim), np.float32)
    for number in np.unique(joined.file_n).tolist():
        member_n = _members(joined, number)
        for part, block in files[number].read(joined.row_n[member_n]):
            rows_nD[member_n[part]] = block
    return rows_nD


def _refuse_changed(files: Sequence[FeatureFile]) -> None:
    """Raise `DataError` for a file that is not the one any more whose digest is known."""
    for file in files:
        if file.held_nD is None and stamp_of(file.path) != file.stamp:
            raise DataError(f"{file.path} was changed while it was read: import it again when it is finished")
