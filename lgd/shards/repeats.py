"""What a shard set holds more than once, and should not: keys, slides on two sides or in two spellings, and images.

64 bits of each name are compared, in arrays, so that sets of any size fit; of what repeats KEY.json is read again, to
name it.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from lgd.shards.archive import Shard, read_sample
from lgd.shards.meta import PatchMeta
from lgd.shards.split import canonical_group

SEEN = np.dtype([("key", "<u8"), ("pair", "<u8"), ("group", "<u8"), ("known", "?"), ("shard", "<i4"), ("row", "<i4")])
"""What is kept of a sample: 64 bits of a digest of its key, of the key of the pair that it is or was cut from, and of
its group; whether that is a slide; and its address."""
_MOST = 100
_STAINS = ("H&E", "IHC")


def hash_64(text: str) -> int:
    """The first 64 bits of a text's SHA-256, as patches.npy has them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


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
        stated = {"group": hash_64(canonical_group(meta.group))}
        if keeps_files:
            digests = meta.sha256.as_json().items()
            stated |= {role: int.from_bytes(bytes.fromhex(digest or "")[:8], "little") for role, digest in digests}
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


def equal_runs(value_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An order that sorts the values (n,), and where in it each run of equal ones starts and ends."""
    order = np.argsort(value_n, kind="stable")
    value_n = value_n[order]
    starts = np.flatnonzero(np.append(True, value_n[1:] != value_n[:-1])) if len(order) else np.empty(0, np.int64)
    return order, starts, np.append(starts[1:], len(order))


def differs(value_n: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Whether the runs that begin at `starts` hold more than one value."""
    differing: np.ndarray = np.minimum.reduceat(value_n, starts) != np.maximum.reduceat(value_n, starts)
    return differing


def _same_keys(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Keys that occur twice."""
    order = np.argsort(seen["key"], kind="stable")
    twice = np.flatnonzero(np.diff(seen["key"][order]) == 0)
    return [
        f"{shards[here['shard']].path}, row {here['row']}: key {_meta(shards, here).key} is in "
        f"{_address(shards, before)}, too"
        for before, here in ((seen[order[place]], seen[order[place + 1]]) for place in twice[:_MOST])
    ]


def _leaks(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Groups on two sides of the split."""
    if not len(seen):
        return []
    names, side_n = _sides(shards, seen)
    order, starts, ends = equal_runs(seen["group"])
    several = differs(side_n[order], starts)
    return [
        f"group {_meta(shards, seen[order[start]]).group} lies in the splits "
        f"{' and '.join(names[side] for side in np.unique(side_n[order[start:end]]))}: the set leaks"
        for start, end in np.column_stack([starts, ends])[several][:_MOST]
    ]


def _spellings(shards: Sequence[Shard], seen: np.ndarray, canonical_n: np.ndarray) -> list[str]:
    """Slides of two names that differ by their spelling only."""
    known = np.flatnonzero(seen["known"])
    if not len(known):
        return []
    order, starts, ends = equal_runs(canonical_n[known])
    several = differs(seen["group"][known][order], starts)
    problems = []
    for start, end in np.column_stack([starts, ends])[several][:_MOST]:
        places = known[order[start:end]]
        first = places[np.unique(seen["group"][places], return_index=True)[1]]
        names = [
            f"{meta.slide!r} ({meta.split})" for meta in (_meta(shards, seen[place]) for place in np.sort(first)[:3])
        ]
        problems.append(f"slides {' and '.join(names)} are one name in other spellings: name each slide in one way")
    return problems


def _same_images(shards: Sequence[Shard], seen: np.ndarray, patches_n: np.ndarray) -> list[str]:
    """Files that serve two pairs, or as H&E and as IHC."""
    # In one column, so that an H&E is compared with every IHC as well.
    value_n = np.concatenate([patches_n["he"], patches_n["ihc"]])
    pair_n, stain_n = np.tile(seen["pair"], 2), np.repeat([0, 1], len(seen))
    order, starts, ends = equal_runs(value_n)
    several = differs(pair_n[order], starts) | differs(stain_n[order], starts)
    several &= value_n[order[starts]] != 0
    problems = []
    for start, end in np.column_stack([starts, ends])[several][:_MOST]:
        places = order[start:end]
        others = (pair_n[places] != pair_n[places[0]]) | (stain_n[places] != stain_n[places[0]])
        uses = [
            f"the {_STAINS[stain_n[place]]} of {_meta(shards, at).key} ({_address(shards, at)})"
            for place in (places[0], places[others][0])
            for at in (seen[place % len(seen)],)
        ]
        problems.append(f"{' and '.join(uses)} are one file, byte for byte: keep the right one")
    return problems


def _sides(shards: Sequence[Shard], seen: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names of the splits, and the split of each sample."""
    names = sorted({shard.split for shard in shards})
    return names, np.array([names.index(shard.split) for shard in shards], np.int32)[seen["shard"]]


def _address(shards: Sequence[Shard], place: np.void) -> str:
    return f"{shards[place['shard']].path.name}, row {place['row']}"


def _meta(shards: Sequence[Shard], place: np.void) -> PatchMeta:
    """KEY.json of a sample, read again."""
    shard = shards[place["shard"]]
    file, index = shard.open()
    with file:
        return read_sample(file, index, int(place["row"]), shard, ())[0]
