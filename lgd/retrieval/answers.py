"""Stored patches by key, and what a query found: neighbours, their vote, near-duplicates."""

import difflib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lgd.base.errors import DataError
from lgd.base.target import Target
from lgd.io.location import Location
from lgd.retrieval.hubs import chance_of_hubs, chance_of_never, count_found, count_hubs, find_hubs
from lgd.scoring.notes import count_notes
from lgd.shards.candidate import safe_key
from lgd.shards.pairs import read_slides
from lgd.store.parts import as_labels
from lgd.store.store import Store

_NEAR_IN_ORDER = 5
_ENOUGH_QUERIES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One patch of the store."""

    key: str
    slide: str | None
    split: str
    label: str | float | None
    """Name of the class, such as 2+, or the value; None where it is unknown."""
    part: int
    row: int

    @property
    def level(self) -> str | float | None:
        """The label by its old name, that of HER2."""
        return self.label


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit(Stored):
    """One neighbour: a stored IHC latent."""

    distance: float
    """1 - cosine of the query's and the stored latent, both whitened where the index is (`latents.components`)."""
    duplicate_of: str | None = None
    """`query`, or the key of a nearer neighbour, where the latent is all but the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """What the labels of the neighbours say together; near-duplicates vote too."""

    label: str | float | None
    """The commonest; of equals the one that is met first, nearest first. Of values their mean. None where no neighbour
    has a label."""
    shares: dict[str, float | None] | None
    """Class -> share of the labelled neighbours; None of values."""
    entropy_bits: float | None
    """Of the shares: 0 where all agree, 2 where four classes are equally common."""
    labelled: int

    @property
    def level(self) -> str | float | None:
        """The label by its old name, that of HER2."""
        return self.label


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A query and what it found."""

    image: str | None = None
    """The H&E image: a path, or its place among those that were given, such as images[0]; None for a stored patch."""
    label: str | float | None = None
    """The student's label of the image."""
    probabilities: dict[str, float | None] | None = None
    """Of each class; None for a stored patch, empty where labels are values."""
    target: Target | None = None
    """What the student predicts; None for a stored patch."""
    known: Target
    """What the labels of stored patches are of."""
    stored: Stored | None = None
    """The stored patch whose latent was the query."""
    neighbours: Sequence[Hit] = ()
    """Nearest first."""
    notes: Sequence[str] = ()
    """What a reader must know of the image; or why it cannot be used."""
    usable: bool = True

    @property
    def vote(self) -> Vote:
        """The vote of the neighbours."""
        labels = [hit.label for hit in self.neighbours if hit.label is not None]
        if self.known.is_number:
            mean = float(np.mean(np.array(labels, float))) if labels else None
            return Vote(label=mean, shares=None, entropy_bits=None, labelled=len(labels))
        shares = {name: labels.count(name) / len(labels) if labels else None for name in self.known.classes}
        return Vote(
            # max gives the first of equals, and the nearest neighbour's label is the first.
            label=max(dict.fromkeys(labels), key=labels.count, default=None),
            shares=shares,
            entropy_bits=sum(share * math.log2(1 / share) for share in shares.values() if share) if labels else None,
            labelled=len(labels),
        )

    @property
    def level(self) -> str | float | None:
        """The label by its old name, that of HER2."""
        return self.label

    @property
    def name(self) -> str:
        """The image's path or the stored key."""
        return self.stored.key if self.stored else self.image or ""


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
            label = store.target.name_label(as_labels(part.array("label")[row : row + 1], store.target)[0].item())
            slide = bytes(part.array("slide")[row]).decode()
            patches.append(Stored(key=key, slide=slide or None, split=part.split, label=label, part=number, row=row))
    return patches


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


def count_neighbours(answers: Sequence[Answer], near: float) -> str:
    """A line on how many neighbours all answers together have, and how many of them are near-duplicates.

    `near` is the distance below which they are (`lgd.retrieval.queries`).
    """
    hits = [hit for answer in answers for hit in answer.neighbours]
    twins = [hit for hit in hits if hit.duplicate_of]
    return (
        f"queries: {len(answers)}, neighbours: {len(hits)}, of these near-duplicates (closer than {near} to "
        f"the query or to a nearer neighbour): {len(twins)}"
    )


def describe_hubs(answers: Sequence[Answer], rows: int) -> str:
    """A line on how evenly the queries find the `rows` that they search; none of too few queries to say.

    Enough are 50 that draw each row once, were they blind.
    """
    found = [[(hit.part, hit.row) for hit in answer.neighbours] for answer in answers if answer.neighbours]
    k = max(map(len, found), default=0)
    if len(found) < _ENOUGH_QUERIES or k * len(found) < rows:
        return ""
    numbers = {place: number for number, place in enumerate(dict.fromkeys(itertools.chain(*found)))}
    first_m = count_found(np.array([numbers[places[0]] for places in found]), rows)
    share = first_m[find_hubs(first_m)].sum() / len(found)
    never = 1 - len(numbers) / rows
    return (
        f"hubs: the {count_hubs(rows)} IHCs (1 % of {rows}) found first most often are the first answer to "
        f"{100 * share:.1f} % of the queries (by chance {100 * chance_of_hubs(len(found), 1, rows):.1f} %); "
        f"{100 * never:.1f} % of all are never found (by chance {100 * chance_of_never(len(found), k, rows):.1f} %)"
    )


def collect_notes(store: Store, answers: Sequence[Answer]) -> list[str]:
    """Notes on all answers together, a line each: keys that several parts have, and how many answers have a note."""
    lines: list[str] = []
    parts: dict[str, list[str]] = {}
    for answer in answers:
        if answer.stored:
            parts.setdefault(answer.stored.key, []).append(store.parts[answer.stored.part].name)
    for key, names in parts.items():
        if len(names) > 1:
            lines.append(f"key {key} is in {len(names)} parts ({', '.join(names)}): one answer each, in this order")
    return lines + count_notes((answer.notes for answer in answers), "queries")
