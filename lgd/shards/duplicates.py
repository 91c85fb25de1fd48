"""Pairs that would leak or count twice, found before anything is written: one image under two keys or as both stains,
and one slide under two spellings.

All pairs of a set are looked at together, in memory and time that grow with their number, and in an order that does
not depend on how they were checked.
"""

import collections
import functools
import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from lgd.base.errors import DataError
from lgd.config import LEVEL_NAMES
from lgd.shards.layouts import Problem
from lgd.shards.meta import Origin
from lgd.shards.pairs import PatchPair
from lgd.shards.sources import Source
from lgd.shards.split import SplitRule, canonical_group

_STAINS = ("H&E", "IHC")
_MOST = 10


def refuse_spellings(pairs: Sequence[PatchPair], where: str) -> None:
    """Raise `DataError` where two names of slides differ by their spelling only (`canonical_group`).

    `where` names the CSV that names the slides, or is empty where the files do.
    """
    first: dict[str, dict[str, PatchPair]] = {}
    for pair in pairs:
        if pair.slide is not None:
            first.setdefault(canonical_group(pair.slide), {}).setdefault(pair.slide, pair)
    several = [spelled for _, spelled in sorted(first.items()) if len(spelled) > 1]
    if not several:
        return
    lines = [f"  {' and '.join(_show_spellings(spelled))}" for spelled in several[:_MOST]]
    more = [f"  and {len(several) - _MOST} more"] if len(several) > _MOST else []
    column = f"in {where}, column slide" if where else "in a CSV with the columns key and slide (--slides)"
    slides = "a slide is" if len(several) == 1 else f"{len(several)} slides are"
    raise DataError(
        f"{slides} written in more than one way: write it in one way {column}, or rename one where they are different "
        "slides:",
        *lines,
        *more,
    )


def _show_spellings(spelled: dict[str, PatchPair]) -> list[str]:
    composed = {unicodedata.normalize("NFC", name) for name in spelled}
    # Both forms of a composed letter look the same.
    show = repr if len(composed) == len(spelled) else ascii
    return [f"{show(name)} ({pair.key})" for name, pair in sorted(spelled.items())]


class _Use(NamedTuple):
    """One image of one source."""

    number: int
    """Place of the source."""
    stain: int
    """0 as H&E, 1 as IHC."""


class _Facts(NamedTuple):
    """What two copies of a pair must agree in, so that one of them can be left out without loss."""

    sha256: tuple[Any, ...]
    split: str | None
    label: Any
    slide: str | None
    mpp: float | None
    origin: Origin


def leave_out_duplicates(sources: Sequence[Source], rule: SplitRule) -> tuple[list[Source], list[Problem]]:
    """The sources whose images are theirs alone, in their order, and a problem for each of the others.

    Of copies that agree in images, published split (where `rule` keeps it) and all other facts the first stays.
    Every other pair that shares an image with another pair, or with itself, is a problem: either may be wrong.
    """
    users = _shared_images(sources)
    facts = {use.number: _facts_of(sources[use.number], rule) for uses in users for use in uses}
    problems: dict[int, Problem] = {}
    copies: dict[int, Problem] = {}
    for uses in users:
        if len({use.stain for use in uses}) == 1 and len({facts[use.number] for use in uses}) == 1:
            for use in uses[1:]:
                copies.setdefault(use.number, _copy(sources[use.number], sources[uses[0].number]))
            continue
        witnesses = _witnesses(uses, facts)
        for use in uses:
            if len(set(sources[use.number].sha256)) == 1:
                other = _Use(use.number, 1 - use.stain)
            else:
                other = max(witnesses, key=functools.partial(_against, facts, use))
            problems.setdefault(use.number, _conflict(use, other, sources, facts))
    problems = copies | problems
    return [source for number, source in enumerate(sources) if number not in problems], list(problems.values())


def _shared_images(sources: Sequence[Source]) -> list[list[_Use]]:
    """The uses of each image that has more than one."""
    counts = collections.Counter(itertools.chain.from_iterable(source.sha256 for source in sources))
    users: dict[str, list[_Use]] = {}
    for number, source in enumerate(sources):
        for stain, digest in enumerate(source.sha256):
            if digest and counts[digest] > 1:
                users.setdefault(digest, []).append(_Use(number, stain))
    return list(users.values())


def _facts_of(source: Source, rule: SplitRule) -> _Facts:
    pair = source.pair
    return _Facts(source.sha256, pair.split if rule.keep else None, pair.label, pair.slide, pair.mpp, pair.origin)


def _witnesses(uses: Sequence[_Use], facts: dict[int, _Facts]) -> list[_Use]:
    """A few of the uses of an image that is not all copies, among which each use finds one that contradicts it."""
    kinds: dict[Any, _Use] = {}
    for use in uses:
        kinds.setdefault((use.stain, facts[use.number].split, facts[use.number].label), use)
    # Of each two kinds one is another than a use's own.
    others = [use for use in uses if facts[use.number] != facts[uses[0].number]][:1]
    return [uses[0], *others, *list(kinds.values())[:_MOST]]


def _against(facts: dict[int, _Facts], use: _Use, other: _Use) -> tuple[bool, ...]:
    """How strongly another use of an image contradicts this one: two stains, two sides, two labels, any difference."""
    mine, theirs = facts[use.number], facts[other.number]
    return use.stain != other.stain, mine.split != theirs.split, mine.label != theirs.label, mine != theirs


def _copy(source: Source, first: Source) -> Problem:
    pair = source.pair
    reason = f"{pair.key} is the same pair as {first.pair.key} ({first.pair.source}): remove one"
    return Problem(pair.source, reason, pair.key, pair.source, pair.ihc_source)


def _conflict(use: _Use, other: _Use, sources: Sequence[Source], facts: dict[int, _Facts]) -> Problem:
    """Two uses of an image that cannot both be right."""
    pair, theirs = sources[use.number].pair, sources[other.number].pair
    name, file = ((one.source, one.ihc_source)[stain] for one, stain in ((pair, use.stain), (theirs, other.stain)))
    if use.number == other.number:
        reason = f"is both the H&E and the IHC of {pair.key}: name the two images of the field"
    elif use.stain != other.stain:
        reason = (
            f"is the {_STAINS[use.stain]} of {pair.key} and, byte for byte, the {_STAINS[other.stain]} of {theirs.key} "
            f"({file}): correct the wrong one"
        )
    else:
        reason = (
            f"is the {_STAINS[use.stain]} of {pair.key} and, byte for byte, of {theirs.key} ({file}), but "
            f"{_format_difference(facts[use.number], facts[other.number], use.stain)}: keep the right pair only"
        )
    return Problem(name, reason, pair.key, pair.source, pair.ihc_source)


def _format_difference(mine: _Facts, theirs: _Facts, stain: int) -> str:
    """In what two pairs that share an image differ; the most harmful first."""
    shown = [
        ("split", mine.split, theirs.split),
        ("label", _label_name(mine.label), _label_name(theirs.label)),
        ("slide", mine.slide, theirs.slide),
        ("mpp", mine.mpp, theirs.mpp),
        *((name, value, getattr(theirs.origin, name)) for name, value in mine.origin),
    ]
    said = [f"their {name} is {_show(one)} and {_show(other)}" for name, one, other in shown if one != other]
    if mine.sha256[1 - stain] != theirs.sha256[1 - stain]:
        said.append(f"their {_STAINS[1 - stain]} is not the same")
    return ", ".join(said)


def _label_name(label: Any) -> Any:
    return LEVEL_NAMES[label] if type(label) is int and 0 <= label < len(LEVEL_NAMES) else label


def _show(value: Any) -> str:
    return "unknown" if value is None else str(value)
