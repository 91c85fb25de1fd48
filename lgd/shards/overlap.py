"""What the shard folders of one run share: a slide or an image on two sides of the split makes its scores worthless.

`open_disjoint(config.shard_dirs)` opens them for whatever trains, caches or scores. It reads the manifest and
`patches.npy` of each folder, and no shard unless there is something to refuse.
"""

import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.shards.archive import read_sample
from lgd.shards.meta import PatchMeta
from lgd.shards.patches import read_patches
from lgd.shards.repeats import differs, equal_runs
from lgd.shards.shard_set import ShardFolder, ShardSet
from lgd.shards.split import canonical_group

logger = logging.getLogger(__name__)

_STAINS = ("he", "ihc")
_NAMES = {"he": "H&E", "ihc": "IHC"}
_REMEDY = (
    "training would see what is scored; build these sets with one --split group:0.8,0.1,0.1, one --salt and the names "
    "of the slides, or leave one out; slides that only happen to be called alike need other names"
)


class Shared(NamedTuple):
    """The values that rows of more than one folder have."""

    leaks: list[np.ndarray]
    """Of each value that lies on two sides of the split, its places."""
    same_side: int
    """How many lie on one side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A patch of one of the folders, by its KEY.json."""

    opened: ShardFolder
    meta: PatchMeta
    stain: str
    """he or ihc, where an image is meant."""

    def __str__(self) -> str:
        return f"{self.meta.key} ({self.meta.split} of {self.opened.folder})"


def open_disjoint(folders: Iterable[str | Location]) -> ShardSet:
    """Open shard folders that share no slide and no image on two sides of the split.

    Raises `DataError` where they do, or hold one set twice, and as `ShardSet.open`. A note names slides and images that
    folders share on one side.
    """
    shards = ShardSet.open(folders)
    if len(shards.folders) > 1:
        _refuse_overlaps(shards.folders)
    return shards


def _refuse_overlaps(opened: Sequence[ShardFolder]) -> None:
    _refuse_copies(opened)
    tables = [read_patches(one.folder, one.manifest) for one in opened]
    table_n = np.concatenate(tables)
    folder_n = np.repeat(np.arange(len(opened)), [len(table) for table in tables])
    splits = sorted({shard.split for one in opened for shard in one.shards})
    sides = [(splits.index(shard.split), shard.samples) for one in opened for shard in one.shards]
    side_n = np.repeat(*np.array(sides).T)

    # In one column, so that an H&E is compared with every IHC as well.
    image_n = np.concatenate([table_n["he"], table_n["ihc"]])
    images = find_shared(image_n, np.tile(folder_n, 2), np.tile(side_n, 2))
    slides = find_shared(table_n["group"], folder_n, side_n)
    for shared, describe in ((images, _describe_image), (slides, _describe_slide)):
        for places in shared.leaks:
            pair = _opposed(places, folder_n, side_n)
            if reason := describe(*(_read_place(opened, number) for number in pair)):
                more = f" ({len(shared.leaks)} in all)" if len(shared.leaks) > 1 else ""
                raise DataError(f"data.shards: {reason}{more}: {_REMEDY}")
    if (images.same_side or slides.same_side) and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"data.shards: its folders share, on one side of the split, images: {images.same_side} (each counts "
            f"twice), slides: {slides.same_side}"
        )


def _refuse_copies(opened: Sequence[ShardFolder]) -> None:
    first: dict[str, Location] = {}
    for one in opened:
        folder = one.folder
        other = first.setdefault(one.manifest.digest, folder)
        if other is not folder:
            same = "is listed twice" if other == folder else f"holds the same set as {other}"
            raise DataError(f"data.shards: {folder} {same}, and each patch would count twice: remove it from the list")


def find_shared(value_n: np.ndarray, folder_n: np.ndarray, side_n: np.ndarray) -> Shared:
    """Values (n,) uint64, of which 0 is none, that lie in more than one folder."""
    if not len(value_n):
        return Shared([], 0)
    order, starts, ends = equal_runs(value_n)
    several = differs(folder_n[order], starts) & (value_n[order[starts]] != 0)
    two_sides = differs(side_n[order], starts)
    leaks = several & two_sides
    runs = zip(starts[leaks].tolist(), ends[leaks].tolist(), strict=True)
    return Shared([order[start:end] for start, end in runs], int((several & ~two_sides).sum()))


def _opposed(places: np.ndarray, folder_n: np.ndarray, side_n: np.ndarray) -> tuple[int, int]:
    """Two of the places that are of other folders and other sides; where there are several of both, there are such."""
    # Backwards, so that the first of each kind is kept.
    first = {(folder_n[at % len(folder_n)], side_n[at % len(folder_n)]): at for at in sorted(places.tolist())[::-1]}
    return next(
        (one, other)
        for (here, one), (there, other) in itertools.combinations(sorted(first.items()), 2)
        if here[0] != there[0] and here[1] != there[1]
    )


def _read_place(opened: Sequence[ShardFolder], number: int) -> Place:
    """The patch of a place: its row in all tables, one behind the other, and behind them once more for its IHC."""
    stain, row = divmod(number, sum(shard.samples for one in opened for shard in one.shards))
    for one in opened:
        for shard in one.shards:
            if row < shard.samples:
                file, index = shard.open()
                with file:
                    meta, _ = read_sample(file, index, row, shard, ())
                return Place(opened=one, meta=meta, stain=_STAINS[stain])
            row -= shard.samples
    raise AssertionError(number)


def _describe_image(one: Place, other: Place) -> str:
    """What two places of an image are; nothing where the 64 bits agree and the images do not."""
    digests = [at.meta.sha256.as_json()[at.stain] for at in (one, other) if at.opened.keeps_files]
    if len(digests) == 2 and digests[0] != digests[1]:
        return ""
    uses = " and ".join(f"the {_NAMES[at.stain]} of {at}" for at in (one, other))
    return f"an image lies on two sides of the split, as {uses}"


def _describe_slide(one: Place, other: Place) -> str:
    mine, theirs = one.meta.group, other.meta.group
    if canonical_group(mine) != canonical_group(theirs):
        return ""
    what = "a patch of an unknown slide" if one.meta.slide is None is other.meta.slide else "a slide"
    names = repr(mine) if mine == theirs else f"{mine!r} and {theirs!r}"
    return f"{what}, {names}, lies on two sides of the split, with {one} and {other}"
