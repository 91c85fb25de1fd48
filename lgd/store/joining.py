"""Patches and rows of features of other tools, put together: by key, or by place on the slide. Never by order.

One to one and whole: a patch without a row of its own is an error, and rows that no patch needs are counted.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.base.spelling import canonical_group
from lgd.shards.archive import Shard
from lgd.store.features import FeatureFile, Tiles
from lgd.stream.reader import Reader

logger = logging.getLogger(__name__)

_SHOWN = 3
"""Names that a message gives."""
SAME_SIDE = 0.02
"""Sides that differ by so much, and by a pixel more, are the same: tools round and floor them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Patches:
    """What joins the patches of some shards to features, in their order; NaN or None where it is unknown."""

    keys: list[str]
    slides: list[str | None]
    """The slide of the second image."""
    place_n2: np.ndarray
    """Upper left corner there, in pixels of its level 0."""
    side_n: np.ndarray
    mpp_n: np.ndarray
    """Micrometres a pixel of that level 0."""

    @classmethod
    def read(cls, shards: Sequence[Shard]) -> "Patches":
        """Those of some shards, from their KEY.json."""
        reader, keys, slides, numbers = Reader(shards, ()), [], [], []
        for number in range(reader.total):
            meta = reader.read(number).meta
            keys.append(meta.key)
            slides.append(meta.ihc_slide)
            mpp = meta.mpp * meta.width / meta.ihc_side if meta.mpp and meta.ihc_side else None
            numbers.append((meta.ihc_x, meta.ihc_y, meta.ihc_side, mpp))
        reader.close()
        number_n4 = np.array(numbers, np.float64).reshape(-1, 4)
        return cls(
            keys=keys,
            slides=slides,
            place_n2=number_n4[:, :2],
            side_n=number_n4[:, 2],
            mpp_n=number_n4[:, 3],
        )


class Joined(NamedTuple):
    """Where the features of each patch are."""

    file_n: np.ndarray
    """Number of the file."""
    row_n: np.ndarray
    """Row in it."""


def join(patches: Patches, files: Sequence[FeatureFile], slide_mpp: float | None = None) -> Joined:
    """Find the row of each patch; `slide_mpp` is the um/px of level 0 for places in micrometres.

    Raises `DataError` where a patch has none, a key or a place is there twice, or tiles are of another size.
    """
    file_n, row_n = (
        _join_keys(patches, files) if files[0].layout == "table" else _join_places(patches, files, slide_mpp)
    )
    _require_all(patches, files, file_n)
    if unused := sum(file.rows for file in files) - len(file_n):
        logger.info("%d rows of features are of no patch of these shards, and are left out", unused)
    return Joined(file_n, row_n)


def _require_all(patches: Patches, files: Sequence[FeatureFile], file_n: np.ndarray) -> None:
    """Raise `DataError` for patches that have no row, with what has been matched on both sides."""
    lacking = np.flatnonzero(file_n < 0)
    if not len(lacking):
        return
    matched, rows = len(file_n) - len(lacking), sum(file.rows for file in files)
    unused = [file.path.name for number, file in enumerate(files) if not (file_n == number).any()]
    first = name_first(describe_patch(patches, one) for one in lacking.tolist())
    raise DataError(
        f"{len(lacking)} of {len(file_n)} patches have no features: {first}",
        f"  {matched} patches have some; of {rows} rows of {len(files)} files {rows - matched} are of no patch"
        + (f", and all of {name_first(unused)}" if unused else ""),
        "name the features of all patches of data.shards, or build shards of those that have some",
    )


def describe_patch(patches: Patches, number: int) -> str:
    """A patch for a message: its key, and its place where that is known."""
    x, y = patches.place_n2[number]
    at = f" ({patches.slides[number]}, x {x:g}, y {y:g})" if patches.slides[number] and np.isfinite(x + y) else ""
    return f"{patches.keys[number]}{at}"


def name_first(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _join_keys(patches: Patches, files: Sequence[FeatureFile]) -> tuple[np.ndarray, np.ndarray]:
    wanted = dict(zip(patches.keys, range(len(patches.keys)), strict=True))
    if len(wanted) < len(patches.keys):
        twice = sorted({key for number, key in enumerate(patches.keys) if wanted[key] != number})
        raise DataError(
            f"{len(twice)} keys are in several folders of data.shards ({name_first(twice)}), which a "
            "key does not distinguish: import the features of each folder in a run of its own"
        )
    file_n, row_n = np.full(len(wanted), -1, np.int32), np.zeros(len(wanted), np.int64)
    repeated: list[str] = []
    for number, file in enumerate(files):
        assert file.key_n is not None
        for row, content in enumerate(file.key_n.tolist()):
            key = content.decode(errors="replace")
            patch = wanted.get(key)
            if patch is None:
                continue
            if file_n[patch] >= 0:
                repeated.append(f"{key} ({files[file_n[patch]].path.name}, {file.path.name})")
            file_n[patch], row_n[patch] = number, row
    if repeated:
        raise DataError(f"{len(repeated)} keys have several rows of features: {name_first(repeated)}: keep one of each")
    return file_n, row_n


def _join_places(
    patches: Patches, files: Sequence[FeatureFile], slide_mpp: float | None
) -> tuple[np.ndarray, np.ndarray]:
    _require_places(patches)
    of_slide = _number_slides(files)
    by_file: dict[int, list[int]] = {}
    named: dict[str | None, int | None] = {}
    for number, slide in enumerate(patches.slides):
        if slide not in named:
            assert slide is not None
            named[slide] = next((of_slide[one] for one in _spellings(slide) if one in of_slide), None)
        if (place := named[slide]) is not None:
            by_file.setdefault(place, []).append(number)
    file_n, row_n = np.full(len(patches.keys), -1, np.int32), np.zeros(len(patches.keys), np.int64)
    others = []
    for number, members in by_file.items():
        member_n, file = np.array(members), files[number]
        assert file.tiles is not None
        tiles = _in_pixels(file, file.tiles, patches.mpp_n[member_n], slide_mpp)
        _refuse_repeated(file, tiles)
        side_n = patches.side_n[member_n]
        differs_n = np.abs(side_n - tiles.side) > 1 + SAME_SIDE * side_n
        if differs_n.any():
            others.append(f"{file.path.name} of tiles of {tiles.side:.6g} px, patches of {side_n[differs_n][0]:.6g}")
            continue
        found_n = match_places(patches.place_n2[member_n], tiles.place_n2, tiles.step / 2)
        file_n[member_n[found_n >= 0]], row_n[member_n] = number, found_n
    if others:
        raise DataError(
            f"the tiles of {len(others)} of {len(by_file)} files are not of the patches' size, in pixels of level 0 "
            f"(ihc_side): {name_first(others)}: compute features of tiles of that size"
        )
    return file_n, row_n


def match_places(patch_n2: np.ndarray, tile_m2: np.ndarray, reach: float) -> np.ndarray:
    """The tile of each patch, int64 (n,), -1 for none.

    Tile and patch are the nearest of each other, and less than `reach` apart in x and in y.
    """
    if not len(patch_n2) or not len(tile_m2):
        return np.full(len(patch_n2), -1, np.int64)
    from scipy.spatial import KDTree

    distance_n, nearest_n = KDTree(tile_m2).query(patch_n2, p=np.inf)
    _, back_n = KDTree(patch_n2).query(tile_m2[nearest_n], p=np.inf)
    found_n: np.ndarray = np.where((distance_n < reach) & (back_n == np.arange(len(patch_n2))), nearest_n, -1)
    return found_n


def _require_places(patches: Patches) -> None:
    """Raise `DataError` for patches of which it is not known where they lie on the slide of their second image."""
    unknown_n = ~np.isfinite(np.column_stack([patches.place_n2, patches.side_n])).all(axis=1)
    unknown = [number for number, slide in enumerate(patches.slides) if slide is None or unknown_n[number]]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(patches.keys)} patches have no place on the slide of their second image "
            f"({name_first(patches.keys[one] for one in unknown)}), by which features of slides are joined: build the "
            "shards from a CSV with ihc_slide, ihc_x, ihc_y and ihc_side, or import a table by key"
        )


def _number_slides(files: Sequence[FeatureFile]) -> dict[str, int]:
    """The file of each slide, by its name as `canonical_group` has it."""
    numbers: dict[str, int] = {}
    for number, file in enumerate(files):
        first = numbers.setdefault(canonical_group(file.slide), number)
        if first != number:
            raise DataError(
                f"{files[first].path} and {file.path} are both of slide {file.slide}: name the features of one scale "
                "and one encoder"
            )
    return numbers


def _spellings(slide: str) -> tuple[str, ...]:
    """What a slide's features may be named for: its name with and without the extension of a file, or both of OME's."""
    path = PurePosixPath(slide.replace("\\", "/"))
    return tuple(map(canonical_group, (path.name, path.stem, path.stem.removesuffix(".ome"))))


def _in_pixels(file: FeatureFile, tiles: Tiles, mpp_n: np.ndarray, slide_mpp: float | None) -> Tiles:
    """Tiles in pixels of level 0."""
    if not tiles.in_um:
        return tiles
    if slide_mpp is None:
        known_n = mpp_n[np.isfinite(mpp_n)]
        if not len(known_n) or np.ptp(known_n) > SAME_SIDE * known_n[0]:
            raise DataError(
                f"{file.path} has places in micrometres, and the patches of {file.slide} "
                f"{'differ in' if len(known_n) else 'do not state'} the scale of its level 0: give --slide-mpp X"
            )
        slide_mpp = float(np.median(known_n))
    return Tiles(tiles.place_n2 / slide_mpp, tiles.side / slide_mpp, tiles.step / slide_mpp, in_um=False)


def _refuse_repeated(file: FeatureFile, tiles: Tiles) -> None:
    order = np.lexsort(tiles.place_n2.T)
    place_n2 = tiles.place_n2[order]
    repeated_n = (np.abs(np.diff(place_n2, axis=0)) < 0.5).all(axis=1)
    if repeated_n.any():
        x, y = place_n2[int(np.argmax(repeated_n))]
        raise DataError(
            f"{file.path} has {int(repeated_n.sum())} places twice, the first at x {x:g}, y {y:g}: compute it again, "
            "at one scale"
        )
