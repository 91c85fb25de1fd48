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
from lgd.io.location import Location
from lgd.shards.archive import Shard, read_meta
from lgd.shards.manifest import PatchMeta, canonical_group, hash_64, patch_entry
from lgd.shards.shard_set import ShardFolder, ShardSet

logger = logging.getLogger(__name__)

SEEN = np.dtype([("key", "<u8"), ("pair", "<u8"), ("group", "<u8"), ("known", "?"), ("shard", "<i4"), ("row", "<i4")])
"""What is kept of a sample: 64 bits of a digest of its key, of the key of the pair that it is or was cut from, and of
its group; whether that is a slide; and its address."""
_MOST = 100
_STAINS = ("H&E", "IHC")
_REMEDY = (
    "training would see what is scored; build these sets with one --split group:0.8,0.1,0.1, one --salt and the names "
    "of the slides, or leave one out; slides that only happen to be called alike need other names"
)


def as_seen(rows: Sequence[tuple[int, PatchMeta]], number: int, tiled: bool) -> np.ndarray:
    """The samples of shard `number` of a set, by their rows."""
    entries = []
    for row, meta in rows:
        pair = re.sub(r"_y\d+_x\d+$", "", meta.key) if tiled else meta.key
        entries.append((hash_64(meta.key), hash_64(pair), hash_64(meta.group), meta.slide is not None, number, row))
    return np.array(entries, SEEN)


def unlike_patches(
    shard: Shard, rows: Sequence[tuple[int, PatchMeta]], patches_n: np.ndarray, keeps_files: bool
) -> list[str]:
    """The first sample of which patches.npy states something else; `patches_n` are the rows of the shard.

    `keeps_files`: whether the images are the files that the set was built from, whose digests patches.npy has.
    """
    for row, meta in rows:
        he, ihc, group = patch_entry(meta.sha256.he, meta.sha256.ihc, meta.group)
        stated = {"group": group, **({"he": he, "ihc": ihc} if keeps_files else {})}
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
    offsets = np.cumsum([0, *(shard.samples for shard in shards)])
    patches_n = patches_n[offsets[seen["shard"]] + seen["row"]]
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
    return [
        f"{shards[here['shard']].path}, row {here['row']}: key {_meta(shards, here).key} is in "
        f"{_address(shards, before)}, too"
        for places in find_mixed(seen["key"], np.arange(len(seen)))[0][:_MOST]
        for before, here in itertools.pairwise(seen[places])
    ]


def _leaks(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Groups on two sides of the split."""
    names = sorted({shard.split for shard in shards})
    side_n = np.array([names.index(shard.split) for shard in shards], np.int32)[seen["shard"]]
    return [
        f"group {_meta(shards, seen[places[0]]).group} lies in the splits "
        f"{' and '.join(names[side] for side in np.unique(side_n[places]))}: the set leaks"
        for places in find_mixed(seen["group"], side_n)[0][:_MOST]
    ]


def _spellings(shards: Sequence[Shard], seen: np.ndarray, canonical_n: np.ndarray) -> list[str]:
    """Slides of two names that differ by their spelling only."""
    problems = []
    for places in find_mixed(np.where(seen["known"], canonical_n, 0), seen["group"])[0][:_MOST]:
        first = places[np.unique(seen["group"][places], return_index=True)[1]]
        metas = [_meta(shards, seen[place]) for place in np.sort(first)[:3]]
        names = " and ".join(f"{meta.slide!r} ({meta.split})" for meta in metas)
        problems.append(f"slides {names} are one name in other spellings: name each slide in one way")
    return problems


def _same_images(shards: Sequence[Shard], seen: np.ndarray, patches_n: np.ndarray) -> list[str]:
    """Files that serve two pairs, or as H&E and as IHC."""
    # In one column, so that an H&E is compared with every IHC as well.
    value_n = np.concatenate([patches_n["he"], patches_n["ihc"]])
    use_n = np.concatenate([seen["pair"], ~seen["pair"]])
    problems = []
    for places in find_mixed(value_n, use_n)[0][:_MOST]:
        others = places[use_n[places] != use_n[places[0]]]
        uses = [
            f"the {_STAINS[stain]} of {_meta(shards, seen[row]).key} ({_address(shards, seen[row])})"
            for stain, row in (divmod(int(place), len(seen)) for place in (places[0], others[0]))
        ]
        problems.append(f"{' and '.join(uses)} are one file, byte for byte: keep the right one")
    return problems


def _address(shards: Sequence[Shard], place: np.void) -> str:
    return f"{shards[place['shard']].path.name}, row {place['row']}"


def _meta(shards: Sequence[Shard], place: np.void) -> PatchMeta:
    return read_meta(shards[place["shard"]], int(place["row"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A patch of one of the folders, by its KEY.json."""

    opened: ShardFolder
    meta: PatchMeta
    stain: int
    """0 for the H&E, 1 for the IHC, where an image is meant."""

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
    tables = [one.read_patches() for one in opened]
    table_n = np.concatenate(tables)
    folder_n = np.repeat(np.arange(len(opened)), [len(table) for table in tables])
    splits = sorted({shard.split for one in opened for shard in one.shards})
    sides = [(splits.index(shard.split), shard.samples) for one in opened for shard in one.shards]
    side_n = np.repeat(*np.array(sides).T)

    # In one column, so that an H&E is compared with every IHC as well.
    image_n = np.concatenate([table_n["he"], table_n["ihc"]])
    images, images_twice = find_mixed(image_n, np.tile(folder_n, 2), np.tile(side_n, 2))
    slides, slides_twice = find_mixed(table_n["group"], folder_n, side_n)
    for leaks, describe in ((images, _describe_image), (slides, _describe_slide)):
        for places in leaks:
            pair = _opposed(places, folder_n, side_n)
            if reason := describe(*(_read_place(opened, number) for number in pair)):
                more = f" ({len(leaks)} in all)" if len(leaks) > 1 else ""
                raise DataError(f"data.shards: {reason}{more}: {_REMEDY}")
    if (images_twice or slides_twice) and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"data.shards: its folders share, on one side of the split, images: {images_twice} (each counts twice), "
            f"slides: {slides_twice}"
        )


def _refuse_copies(opened: Sequence[ShardFolder]) -> None:
    first: dict[str, Location] = {}
    for one in opened:
        folder = one.folder
        other = first.setdefault(one.manifest.digest, folder)
        if other is not folder:
            same = "is listed twice" if other == folder else f"holds the same set as {other}"
            raise DataError(f"data.shards: {folder} {same}, and each patch would count twice: remove it from the list")


def _opposed(places: np.ndarray, folder_n: np.ndarray, side_n: np.ndarray) -> tuple[int, int]:
    """Two of the places that are of other folders and other sides; where there are several of both, there are such."""
    kinds = np.stack([folder_n, side_n])[:, places % len(folder_n)]
    _, first = np.unique(kinds, axis=1, return_index=True)
    pairs = itertools.combinations(first, 2)
    return next((int(places[one]), int(places[two])) for one, two in pairs if (kinds[:, one] != kinds[:, two]).all())


def _read_place(opened: Sequence[ShardFolder], number: int) -> Place:
    """The patch of a place: its row in all tables, one behind the other, and behind them once more for its IHC."""
    stain, row = divmod(number, sum(shard.samples for one in opened for shard in one.shards))
    for one in opened:
        for shard in one.shards:
            if row < shard.samples:
                return Place(opened=one, meta=read_meta(shard, row), stain=stain)
            row -= shard.samples
    raise AssertionError(number)


def _describe_image(one: Place, other: Place) -> str:
    """What two places of an image are; nothing where the 64 bits agree and the images do not."""
    digests = [(at.meta.sha256.he, at.meta.sha256.ihc)[at.stain] for at in (one, other) if at.opened.keeps_files]
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
