"""`lgd export-latents`: the latents of a store in the HDF5 layout of TRIDENT, which other pathology tools read.

    OUT/SLIDE.h5       `features` (n, D) float32, view 0; `coords` (n, 2) int64, x and y in pixels of level 0;
                       and beside them `key`, `level` (-1 unknown; of other targets than HER2 `label` or `value`)
                       and `size` (n, 2): width and height; the
                       file's attributes name the encoder and its terms, and state that the latents are centred
    OUT/export.json    the files that are ours, and the store that they are of; written first

The layout is that of TRIDENT's `save_h5` (Zhang et al., arXiv 2502.06750). What is not known, such as the
magnification, is left out. The teacher's mean is subtracted from the latents, as in the store.

A slide is named by its patches' `slide`; where that is unknown, each source patch is one of its own. Its level 0 is
whatever the positions are counted in: MIST states a patch's place on the slide in its name, and `build-shards --tile`
a tile's place in its patch. Other places are not known: such patches are laid side by side in one row, and the
attribute `coords_known` is False.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from lgd.base.errors import DataError, require
from lgd.base.records import Line, Many, Sha256
from lgd.io.documents import Document
from lgd.io.files import list_folder, remove, write_bytes
from lgd.io.folders import refuse_foreign
from lgd.io.location import Location, as_output_location
from lgd.io.locks import LOCK, exclusive
from lgd.shards.manifest import PatchMeta
from lgd.store.parts import Part, as_labels
from lgd.store.store import Store
from lgd.stream.reader import Reader

logger = logging.getLogger(__name__)

_SAFE = re.compile("[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}")
"""A slide's name that may be a file's as it is."""
_TILE = re.compile(r"(.+)_y(\d+)_x(\d+)")


class ExportDocument(Document):
    """export.json."""

    FORMAT: ClassVar[str] = "lgd-export/2"
    ABSENT: ClassVar[str] = "it is no export"
    REMEDY: ClassVar[str] = "name another folder as --out"

    store: Sha256
    teacher: Sha256
    splits: Line
    files: Many[Annotated[str, Field(pattern=r"^[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,99}\.h5$")]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What `lgd export-latents` is asked for."""

    store: str
    """Folder or url of the feature store; the shards that it was made of must still be there."""
    out: str
    """Folder or url to write to: empty, new, or one of an earlier export."""
    teacher: str = ""
    """Name of the latents to export, of a store that holds several teachers'."""
    split: str = ""
    """Splits to export, such as `train,val`; by default all."""


class Patch(NamedTuple):
    """A row of the store, and what its shard says of the patch."""

    part: Part
    row: int
    meta: PatchMeta


class Exported(NamedTuple):
    """A file of an export."""

    file: str
    slide: str
    patches: int
    coords_known: bool


def export(options: ExportOptions) -> list[Exported]:
    """Write a file a slide.

    Raises `ConfigError` for a split that the store does not have, and `DataError` where the shards are gone or the
    folder holds something else, and while another process exports into a local one.
    """
    store = Store(options.store, teachers=[options.teacher] if options.teacher else ())
    out = as_output_location(options.out, "--out")
    splits = sorted({part.split for part in store.parts})
    asked = options.split.split(",") if options.split else splits
    for split in asked:
        require(split in splits, f"--split: the store has no split {split!r}, only {', '.join(splits)}")
    with exclusive(out, "exporting latents"):
        groups: dict[str, list[Patch]] = {}
        for patch in patches_of(store, asked):
            groups.setdefault(patch.meta.group, []).append(patch)
        files = {group: file_name(group) for group in groups}
        there = list_folder(out)
        # An export.json from elsewhere must not have other files removed.
        ours = set(ExportDocument.read(out / "export.json").files) if "export.json" in there else set[str]()
        refuse_foreign(out, {*ours, "export.json", LOCK}, "name another folder as --out")
        for stale in sorted(ours & there.keys() - {*files.values()}):
            remove(out / stale)
        facts = {"store": store.digest, "teacher": store.recipe.teacher.weights_sha256, "splits": ",".join(asked)}
        ExportDocument(files=tuple(sorted(files.values())), **facts).write(out / "export.json")
        layer = store.document.teachers[store.teacher]
        facts |= {"encoder": str(layer.recipe.encoder.get("name")), "licence": layer.licence or "None"}
        rows = [_write(out / files[group], group, patches, facts) for group, patches in groups.items()]
    unknown = sum(not row.coords_known for row in rows)
    if unknown:
        logger.warning(
            f"lgd: of {unknown} of {len(rows)} files the patches' places are unknown: they are laid side by side, "
            "and coords_known is False"
        )
    return rows


def patches_of(store: Store, splits: Sequence[str]) -> Iterator[Patch]:
    """The rows of some splits, in the store's order, with what their shards say of them."""
    find_shard = store.open_sources()
    for part in store.parts:
        if part.split not in splits:
            continue
        reader = Reader([find_shard(part)], ())
        for row, key in enumerate(part.array("key").tolist()):
            meta = reader.read(row).meta
            if meta.key.encode() != key:
                raise DataError(f"{part.path}, row {row}, is of {key.decode()}, but its shard's of {meta.key}")
            yield Patch(part, row, meta)
        reader.close()


def file_name(group: str) -> str:
    """A slide's file: its name where that is safe as one, else what is left of it and a digest."""
    if _SAFE.fullmatch(group):
        return f"{group}.h5"
    kept = re.sub("[^A-Za-z0-9_+-]+", "_", group)[:80]
    return f"{kept}-{hashlib.sha256(group.encode()).hexdigest()[:12]}.h5"


def places(patches: Sequence[PatchMeta]) -> tuple[np.ndarray, bool]:
    """The upper left corner of each patch of a slide, int64 (n, 2) of x and y, and whether these are known."""
    tiles = [_TILE.fullmatch(patch.key) for patch in patches]
    if all(tiles) and len({tile[1] for tile in tiles if tile}) == 1:
        grid = [(int(tile[3]), int(tile[2])) for tile in tiles if tile]
    else:
        # A tile does not say how large its patch is, so of several patches' tiles the places are not known.
        named = [re.fullmatch(rf"{re.escape(p.slide)}_(\d+)_(\d+)", p.key) if p.slide else None for p in patches]
        grid = [(int(name[2]), int(name[1])) for name in named if name]
    size_n2 = _sizes(patches)
    if len(grid) == len(patches) and (size_n2 == size_n2[0]).all():
        return np.array(grid, np.int64) * size_n2, True
    return np.array([(number * size_n2.max(), 0) for number in range(len(patches))], np.int64), False


def _sizes(patches: Sequence[PatchMeta]) -> np.ndarray:
    """Width and height in pixels, int64 (n, 2)."""
    return np.array([(patch.width, patch.height) for patch in patches], np.int64)


def _write(path: Location, group: str, patches: Sequence[Patch], facts: dict[str, str]) -> Exported:
    import h5py

    metas = [patch.meta for patch in patches]
    (coords_n2, known), size_n2 = places(metas), _sizes(metas)
    side, mpps = int(size_n2.max()), {meta.mpp for meta in metas}
    attributes = {
        "name": group,
        "savetodir": str(path.parent),
        "patch_size": side,
        "patch_size_level0": side,
        "overlap": 0,
        "coords_known": known,
    }
    if len(mpps) == 1 and None not in mpps:
        attributes["mpp"] = mpps.pop()
    target = patches[0].part.target
    label_n = np.array([patch.part.array("label")[patch.row] for patch in patches])
    datasets = {
        "features": np.stack([patch.part.array("pooled")[patch.row, 0] for patch in patches]).astype(np.float32),
        "coords": coords_n2,
        "key": np.array([meta.key.encode() for meta in metas], "S"),
        target.label_word: as_labels(label_n, target).astype(np.float32 if target.is_number else np.int8),
        "size": size_n2,
    }
    # In memory: HDF5 2.0 crashes some time after it has met a full disk.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array)
        file["coords"].attrs.update(attributes)
        file["features"].attrs.update({"name": group, "savetodir": str(path.parent)})
        file.attrs.update({**facts, "centred": True})
        file.flush()
        write_bytes(path, file.id.get_file_image())
    return Exported(path.name, group, len(patches), known)
