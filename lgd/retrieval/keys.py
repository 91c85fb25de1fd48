"""Keys of stored patches -> where they lie, and the slides that they are of."""

import difflib
from collections.abc import Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.config import LEVEL_NAMES
from lgd.io.location import Location
from lgd.retrieval.answers import Stored
from lgd.shards.layouts import safe_key
from lgd.shards.pairs import read_slides
from lgd.store.store import Store, as_levels

_NEAR_IN_ORDER = 5


def find_stored(store: Store, keys: Sequence[str]) -> list[Stored]:
    """Each stored patch of the keys, in the order of the parts; `DataError` for a key that no part has."""
    patches = []
    for key in dict.fromkeys(keys):
        found = store.find(key)
        if not found:
            close = difflib.get_close_matches(key, _near_in_order(store, key), 3, 0.6)
            near = f"close to it are {', '.join(close)}" if close else "none of its keys is close"
            if safe_key(key) != key:
                near = "a key has no dots and no slashes, and images are named before --key"
            raise DataError(f"the store {store.folder} has no patch {key!r:.120}; {near}")
        for number, row in found:
            part = store.parts[number]
            level = name_level(int(as_levels(part.array("label")[row])))
            slide = bytes(part.array("slide")[row]).decode()
            patches.append(Stored(key=key, slide=slide or None, split=part.split, level=level, part=number, row=row))
    return patches


def name_level(level: int) -> str | None:
    """The name of a level; None for -1, unknown."""
    return None if level < 0 else LEVEL_NAMES[level]


def _near_in_order(store: Store, key: str) -> list[str]:
    """Keys that a mistyped one may mean: each part's first and last, and those beside its place in a part."""
    near: dict[str, None] = {}
    for part in store.parts:
        near |= dict.fromkeys((part.first, part.last))
        if part.first <= key <= part.last:
            keys = part.array("key")
            place = int(np.searchsorted(keys, key.encode()))
            beside = keys[max(0, place - _NEAR_IN_ORDER) : place + _NEAR_IN_ORDER]
            near |= dict.fromkeys(bytes(there).decode() for there in beside)
    return list(near)


def find_slides(store: Store, keys: Sequence[str], slides: Location | None) -> list[frozenset[str]]:
    """The slides of each key: of the CSV, or of every stored patch of this key; `DataError` where one is unknown."""
    named = read_slides(slides) if slides else {}
    found = []
    for key in keys:
        if key in named:
            found.append(frozenset([named[key]]))
            continue
        there = [bytes(store.parts[part].array("slide")[row]).decode() for part, row in store.find(key)]
        found.append(frozenset(there) if all(there) else frozenset())
    unknown = [key for key, known in zip(keys, found, strict=True) if not known]
    if unknown:
        raise DataError(
            f"the slide of {len(unknown)} of {len(keys)} queries is unknown, the first of them {unknown[0]}, and "
            f"--exclude-same-slide needs it: give --slides CSV (columns key,slide) with a row {unknown[0]},SLIDE"
        )
    return found
