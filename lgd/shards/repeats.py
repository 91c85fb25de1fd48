"""What shards hold more than once, and should not: keys, slides on two sides or in two spellings, and images.

`find_repeats` is for `lgd verify`. `open_disjoint(config.shard_dirs)` opens the folders of a run for whatever trains,
caches or scores: a slide or an image on two sides of the split makes its scores worthless. It reads the manifest and
`patches.npy` of each folder, and no shard unless there is something to refuse.

64 bits of each name are compared, in arrays, so that sets of any size fit; of what repeats KEY.json is read again, to
name it.
"""

import itertools
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lgd.base.errors import DataError
from lgd.base.spelling import canonical_group
from lgd.io.digests import hash_64
from lgd.io.location import Location
from lgd.shards.archive import Shard, read_sample
from lgd.shards.manifest import PatchMeta, patch_entry
from lgd.shards.shard_set import ShardSet

logger = logging.getLogger(__name__)

SEEN = np.dtype([("key", "<u8"), ("pair", "<u8"), ("group", "<u8"), ("known", "?"), ("number", "<i8")])
"""What is kept of a sample: 64 bits of a digest of its key, of the key of the pair that it is or was cut from, and of
its group; whether that is a slide; and its number over all shards."""
_MOST = 100
_STAINS = ("H&E", "IHC")
_REMEDY = (
    "training would see what is scored; build these sets with one --split group:0.8,0.1,0.1, one --salt and the names "
    "of the slides, or leave one out; slides that only happen to be called alike need other names"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A patch of some shards, by its KEY.json."""

    shard: Shard
    row: int
    meta: PatchMeta
    stain: int
    """0 for the H&E, 1 for the IHC, where an image is meant."""

    @property
    def address(self) -> str:
        """Where it lies in its folder."""
        return f"{self.shard.path.name}, row {self.row}"

    def __str__(self) -> str:
        return f"{self.meta.key} ({self.meta.split} of {self.shard.path.parent})"


def _read_place(shards: Sequence[Shard], number: int) -> Place:
    """The patch of a number over all shards; the numbers behind them count them once more, for their IHC."""
    stain, row = divmod(int(number), sum(shard.samples for shard in shards))
    for shard in shards:
        if row < shard.samples:
            file, index = shard.open()
            with file:
                meta, _ = read_sample(file, index, row, shard, ())
            return Place(shard=shard, row=row, meta=meta, stain=stain)
        row -= shard.samples
    raise AssertionError(number)


def _find_sides(shards: Sequence[Shard], number_n: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names of the splits, and the place of its own among them (n,) for each sample, by its number."""
    names = sorted({shard.split for shard in shards})
    shard_n = np.cumsum([shard.samples for shard in shards]).searchsorted(number_n, "right")
    return names, np.array([names.index(shard.split) for shard in shards])[shard_n]


def as_seen(rows: Sequence[tuple[int, PatchMeta]], start: int, tiled: bool) -> np.ndarray:
    """The samples of a shard, by their rows; `start` is the number of its first one."""
    entries = []
    for row, meta in rows:
        pair = re.sub(r"_y\d+_x\d+$", "", meta.key) if tiled else meta.key
        entries.append((hash_64(meta.key), hash_64(pair), hash_64(meta.group), meta.slide is not None, start + row))
    return np.array(entries, SEEN)


def unlike_patches(shard: Shard, rows: Sequence[tuple[int, PatchMeta]], patches_n: np.ndarray) -> list[str]:
    """The first sample of which patches.npy states something else; `patches_n` are the rows of the shard."""
    for row, meta in rows:
        he, ihc, group = patch_entry(meta.sha256, meta.group)
        stated = {"group": group, **({"he": he, "ihc": ihc} if shard.keeps_files else {})}
        if wrong := [name for name, value in stated.items() if patches_n[row][name] != value]:
            return [
                f"{shard.path}, row {row}, {meta.key}: its row of patches.npy is another sample's ({', '.join(wrong)})"
            ]
    return []


def find_repeats(shards: Sequence[Shard], seen: np.ndarray, patches_n: np.ndarray | None) -> list[str]:
    """One sentence for each of the first 100 keys, slides and images that repeat.

    `patches_n`: the set's patches.npy, if it is whole; without it spellings and images are not compared.
    """
    problems = _same_keys(shards, seen) + _leaks(shards, seen)
    if patches_n is None or not len(seen):
        return problems
    patches_n = patches_n[seen["number"]]
    return problems + _spellings(shards, seen, patches_n["group"]) + _same_images(shards, seen, patches_n)


def find_mixed(value_n: np.ndarray, *facts: np.ndarray) -> tuple[list[np.ndarray], int]:
    """The places of equal values (n,) uint64, of which 0 is none.

    Gives, of each value whose places differ in each of the facts (n,), those places; and how many other values have
    places that differ in the first fact.
    """
    order = np.argsort(value_n, kind="stable")[np.count_nonzero(value_n == 0) :]
    if not len(order):
        return [], 0
    sorted_n = value_n[order]
    starts = np.flatnonzero(np.append(True, sorted_n[1:] != sorted_n[:-1]))
    ends = np.append(starts[1:], len(order))
    sorted_facts = [fact_n[order] for fact_n in facts]
    differs = [np.minimum.reduceat(fact_n, starts) != np.maximum.reduceat(fact_n, starts) for fact_n in sorted_facts]
    mixed = np.logical_and.reduce(differs)
    places = [order[start:end] for start, end in zip(starts[mixed], ends[mixed], strict=True)]
    return places, int(differs[0].sum()) - len(places)


def _same_keys(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Keys that occur twice."""
    problems = []
    for rows in find_mixed(seen["key"], seen["number"])[0][:_MOST]:
        places = [_read_place(shards, number) for number in seen["number"][rows]]
        for before, here in itertools.pairwise(places):
            problems.append(f"{here.shard.path}, row {here.row}: key {here.meta.key} is in {before.address}, too")
    return problems


def _leaks(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Groups on two sides of the split."""
    names, side_n = _find_sides(shards, seen["number"])
    return [
        f"group {_read_place(shards, seen['number'][rows[0]]).meta.group} lies in the splits "
        f"{' and '.join(names[side] for side in np.unique(side_n[rows]))}: the set leaks"
        for rows in find_mixed(seen["group"], side_n)[0][:_MOST]
    ]


def _spellings(shards: Sequence[Shard], seen: np.ndarray, canonical_n: np.ndarray) -> list[str]:
    """Slides of two names that differ by their spelling only."""
    problems = []
    for rows in find_mixed(np.where(seen["known"], canonical_n, 0), seen["group"])[0][:_MOST]:
        first = rows[np.unique(seen["group"][rows], return_index=True)[1]]
        metas = [_read_place(shards, number).meta for number in seen["number"][np.sort(first)[:3]]]
        names = " and ".join(f"{meta.slide!r} ({meta.split})" for meta in metas)
        problems.append(f"slides {names} are one name in other spellings: name each slide in one way")
    return problems


def _same_images(shards: Sequence[Shard], seen: np.ndarray, patches_n: np.ndarray) -> list[str]:
    """Files that serve two pairs, or as H&E and as IHC."""
    # In one column, so that an H&E is compared with every IHC as well.
    value_n = np.concatenate([patches_n["he"], patches_n["ihc"]])
    use_n = np.concatenate([seen["pair"], ~seen["pair"]])
    number_n = np.concatenate([seen["number"], seen["number"] + sum(shard.samples for shard in shards)])
    problems = []
    for rows in find_mixed(value_n, use_n)[0][:_MOST]:
        other = rows[use_n[rows] != use_n[rows[0]]][0]
        uses = [_read_place(shards, number_n[row]) for row in (rows[0], other)]
        names = " and ".join(f"the {_STAINS[use.stain]} of {use.meta.key} ({use.address})" for use in uses)
        problems.append(f"{names} are one file, byte for byte: keep the right one")
    return problems


def open_disjoint(folders: Iterable[str | Location]) -> ShardSet:
    """Open shard folders that share no slide and no image on two sides of the split.

    Raises `DataError` where they do, or hold one set twice, and as `ShardSet.open`. A note names slides and images that
    folders share on one side.
    """
    shards = ShardSet.open(folders)
    for one, other in itertools.combinations(shards.folders, 2):
        if one.manifest.digest == other.manifest.digest:
            same = "is listed twice" if one.folder == other.folder else f"holds the same set as {one.folder}"
            raise DataError(
                f"data.shards: {other.folder} {same}, and each patch would count twice: remove it from the list"
            )
    if len(shards.folders) > 1:
        _refuse_overlaps(shards)
    return shards


def _refuse_overlaps(shards: ShardSet) -> None:
    tables = [one.read_patches() for one in shards.folders]
    table_n = np.concatenate(tables)
    folder_n = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    _, side_n = _find_sides(shards.shards, np.arange(len(table_n)))

    # In one column, so that an H&E is compared with every IHC as well.
    image_n = np.concatenate([table_n["he"], table_n["ihc"]])
    images, images_twice = find_mixed(image_n, np.tile(folder_n, 2), np.tile(side_n, 2))
    slides, slides_twice = find_mixed(table_n["group"], folder_n, side_n)
    for leaks, describe in ((images, _describe_image), (slides, _describe_slide)):
        for places in leaks:
            pair = _opposed(places, folder_n, side_n)
            if reason := describe(*(_read_place(shards.shards, number) for number in pair)):
                more = f" ({len(leaks)} in all)" if len(leaks) > 1 else ""
                raise DataError(f"data.shards: {reason}{more}: {_REMEDY}")
    if (images_twice or slides_twice) and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"data.shards: its folders share, on one side of the split, images: {images_twice} (each counts twice), "
            f"slides: {slides_twice}"
        )


def _opposed(places: np.ndarray, folder_n: np.ndarray, side_n: np.ndarray) -> tuple[int, int]:
    """Two of the places that are of other folders and other sides; where there are several of both, there are such."""
    kinds = np.stack([folder_n, side_n])[:, places % len(folder_n)]
    _, first = np.unique(kinds, axis=1, return_index=True)
    pairs = itertools.combinations(first, 2)
    return next((int(places[one]), int(places[two])) for one, two in pairs if (kinds[:, one] != kinds[:, two]).all())


def _describe_image(one: Place, other: Place) -> str:
    """What two places of an image are; nothing where the 64 bits agree and the images do not."""
    digests = [(at.meta.sha256.he, at.meta.sha256.ihc)[at.stain] for at in (one, other) if at.shard.keeps_files]
    if len(digests) == 2 and digests[0] != digests[1]:
        return ""
    uses = " and ".join(f"the {_STAINS[at.stain]} of {at}" for at in (one, other))
    return f"an image lies on two sides of the split, as {uses}"


def _describe_slide(one: Place, other: Place) -> str:
    mine, theirs = one.meta.group, other.meta.group
    if canonical_group(mine) != canonical_group(theirs):
        return ""
    what = "a patch of an unknown slide" if one.meta.slide is None is other.meta.slide else "a slide"
    names = repr(mine) if mine == theirs else f"{mine!r} and {theirs!r}"
    return f"{what}, {names}, lies on two sides of the split, with {one} and {other}"
