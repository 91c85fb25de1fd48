"""Stored patches by key, and what a query found: neighbours, their vote, near-duplicates; as JSON, table and CSV.

JSON, one object a query (`as_json`):

    image          path of the H&E image, or null
    level          the student's level of the image, or null
    probabilities  level -> the student's probability, or null
    stored         for a query by key its key, slide, split and level; null for an image
    neighbours     nearest first: key, slide, split, level, distance, duplicate_of
    vote           level, shares (level -> share), entropy_bits, labelled
    notes          sentences on the image that its reader must know, such as that it looks like no H&E

CSV, one row a neighbour (`as_rows`): image, predicted, rank, key, slide, split, level, distance, duplicate_of, vote,
vote_share, vote_entropy_bits, vote_labelled, query_key, notes. The columns are the same whatever was asked; new ones
will come at the end. What is unknown is null, and empty in CSV.
"""

import difflib
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lgd.base.errors import DataError
from lgd.config_sections import LEVEL_NAMES
from lgd.io.location import Location
from lgd.retrieval.hubs import chance_of_hubs, chance_of_never, count_found, count_hubs, find_hubs
from lgd.scoring.predict import count_notes, join_notes, round_probabilities
from lgd.shards.candidate import safe_key
from lgd.shards.pairs import read_slides
from lgd.store.parts import as_levels
from lgd.store.store import Store

_NEAR_IN_ORDER = 5
_ENOUGH_QUERIES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One patch of the store."""

    key: str
    slide: str | None
    split: str
    level: str | None
    """0, 1+, 2+, 3+, or None where it is unknown."""
    part: int
    row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit(Stored):
    """One neighbour: a stored IHC latent."""

    distance: float
    """1 - cosine of the query's and the stored latent, both whitened where the index is (`latents.components`)."""
    duplicate_of: str | None = None
    """`query`, or the key of a nearer neighbour, where the latent is all but the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """What the levels of the neighbours say together; near-duplicates vote too."""

    level: str | None
    """The commonest; of equals the one that is met first, nearest first. None where no neighbour has a level."""
    shares: dict[str, float | None]
    """Level -> share of the labelled neighbours."""
    entropy_bits: float | None
    """Of the shares: 0 where all agree, 2 where the four levels are equally common."""
    labelled: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A query and what it found."""

    image: str | None = None
    """The H&E image: a path, or its place among those that were given, such as images[0]; None for a stored patch."""
    level: str | None = None
    """The student's level of the image."""
    probabilities: dict[str, float | None] | None = None
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
        levels = [hit.level for hit in self.neighbours if hit.level is not None]
        shares = {name: levels.count(name) / len(levels) if levels else None for name in LEVEL_NAMES}
        return Vote(
            # max gives the first of equals, and the nearest neighbour's level is the first.
            level=max(dict.fromkeys(levels), key=levels.count, default=None),
            shares=shares,
            entropy_bits=sum(share * math.log2(1 / share) for share in shares.values() if share) if levels else None,
            labelled=len(levels),
        )

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


def as_json(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """The answers as plain JSON."""
    return [
        {
            "image": answer.image,
            "level": answer.level,
            "probabilities": answer.probabilities and round_probabilities(answer.probabilities),
            "stored": answer.stored and _shown(answer.stored),
            "neighbours": [_shown(hit) for hit in answer.neighbours],
            "vote": asdict(answer.vote),
            "notes": list(answer.notes),
        }
        for answer in answers
    ]


def _shown(stored: Stored) -> dict[str, object]:
    return {name: value for name, value in asdict(stored).items() if name not in ("part", "row")}


def as_rows(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """One row a neighbour, for CSV."""
    rows = []
    for answer in answers:
        said = answer.vote
        voted = {
            "vote": said.level,
            "vote_share": said.shares[said.level] if said.level else None,
            "vote_entropy_bits": said.entropy_bits,
            "vote_labelled": said.labelled,
            "query_key": answer.stored.key if answer.stored else None,
            "notes": join_notes(answer.notes),
        }
        asked = {"image": answer.image, "predicted": answer.level}
        rows += [asked | {"rank": rank} | _shown(hit) | voted for rank, hit in enumerate(answer.neighbours, 1)]
    return rows


def as_table(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """One row a neighbour and one for the vote of each query, for a person."""
    rows: list[dict[str, object]] = []
    for answer in answers:
        asked: dict[str, object] = {"query": answer.name} | ({} if answer.stored else {"predicted": answer.level})
        for rank, hit in enumerate(answer.neighbours, 1):
            shown = _shown(hit) | {"duplicate_of": hit.duplicate_of or "", "notes": ""}
            rows.append(asked | {"rank": str(rank)} | shown)
        blank, said = dict.fromkeys(rows[-1], ""), answer.vote
        voted = {"rank": "vote", "key": _vote_text(said), "level": said.level, "notes": join_notes(answer.notes)}
        rows.append(blank | asked | voted)
    return rows


def _vote_text(said: Vote) -> str:
    """The shares and the entropy in a few words."""
    if not said.labelled:
        return "no neighbour has a level"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in said.shares.items() if share)
    return f"{shares} ({said.entropy_bits:.2f} bits)"
