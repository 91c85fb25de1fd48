"""What a layout gives -> the pairs that may go into a set: named, and none of them twice.

A slide under two spellings, and one image under two keys or as both stains, would leak or count twice. All pairs of a
set are looked at together for that, in memory and time that grow with their number, and in an order that does not
depend on how they were checked.
"""

import io
import logging
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lgd.base.errors import DataError
from lgd.base.spelling import canonical_group
from lgd.base.target import Target
from lgd.io.files import exists, list_folder, peek_kind
from lgd.io.location import Location, as_location, relative_name
from lgd.io.tables import read_csv
from lgd.shards.candidate import Candidate, Cut, Problem, is_csv, safe_key
from lgd.shards.layouts import find_layout
from lgd.shards.manifest import PATCHES, Digests, patch_entry
from lgd.shards.profiles import Profile

logger = logging.getLogger(__name__)

# With a tile's place and a member's extension a name stays within the 100 bytes of a plain tar header.
_LONGEST_KEY = 72
_LONGEST_PLACE = len("_y123456_x123456")
# Escapes for terminals, line breaks, and halves of letters that cannot be written to any file.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_STAINS = ("H&E", "IHC")
_MOST = 10


@dataclass(frozen=True, kw_only=True)
class PatchPair(Candidate):
    """An H&E patch and the IHC patch of the same field, if there is one, under a key that no other pair has."""

    key: str
    """Of letters, digits, `_`, `+` and `-`."""
    names: tuple[str, ...]
    """The files of the H&E and of the IHC, relative to the root, with `/`."""

    @property
    def images(self) -> tuple[Location, ...]:
        """The H&E and the IHC."""
        return (self.he,) if self.ihc is None else (self.he, self.ihc)

    @property
    def group(self) -> str:
        """The slide where it is known, else the key: what must never lie on two sides of a split."""
        return self.slide or self.key

    def problem(self, reason: str, name: str = "") -> Problem:
        """Why the pair cannot be used; `name` is the file at fault, by default the H&E."""
        return Problem(name or self.names[0], reason, self.key, *self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A pair whose images were read and decoded in full; of each image a fact stands in the pair's order."""

    pair: PatchPair
    width: int
    height: int
    extensions: tuple[str, ...]
    """True types of the H&E and the IHC (`lgd.shards.image`)."""
    sha256: tuple[str, ...]
    """Digests of the H&E and the IHC file."""
    icc: tuple[Profile | None, ...]
    """The colour profiles in them."""


def find_pairs(
    layout: str,
    root: str | Location,
    target: Target,
    slides: str | Location | None = None,
    cut: Cut | None = None,
) -> tuple[list[PatchPair], list[Problem]]:
    """The pairs of a layout (`lgd.shards.layouts`) under `root`, sorted by key, and what could not be paired.

    `target`: what their labels are read as. `slides`: a CSV with the columns key and slide, which names the slide of
    every pair. `cut`: how slides are cut. Raises `DataError` where the root or a CSV is missing or malformed, or holds
    no patches at all.
    """
    scanner, root = find_layout(layout, target, cut), as_location(root)
    presumed = is_csv(root) if scanner.takes_csv else not list_folder(root)
    folder = peek_kind(root, "file" if presumed else "folder") == "folder"
    if not folder and not exists(root):
        raise DataError(f"{root} does not exist: give --root an existing folder or url")
    if not folder and not scanner.takes_csv:
        raise DataError(f"{root} is no folder: give --root the folder of the {layout} layout")
    entries = list(scanner.scan(root))
    if not entries:
        raise DataError(f"{root} holds no pairs of the {layout} layout: check --root and --layout")
    problems = [entry for entry in entries if isinstance(entry, Problem)]
    known, base = None if slides is None else read_slides(slides), root if folder else root.parent
    paired = sum(bool(entry.ihc) for entry in entries)
    sharing: dict[str, list[PatchPair]] = {}
    for entry in entries:
        if not isinstance(entry, Problem):
            key, names = safe_key(entry.stem), [relative_name(entry.he, base)]
            if entry.ihc is not None:
                names.append(relative_name(entry.ihc, base))
            elif paired:
                reason = f"has no IHC, and {paired} of {len(entries)} have one: name it, or build two sets"
                problems.append(Problem(names[0], reason, key, names[0]))
                continue
            if entry.label is not None and (wrong := target.find_problem(entry.label)):
                problems.append(Problem(names[0], f"its label is {entry.label!r:.80}, {wrong}", key, *names))
                continue
            slide = entry.slide if known is None else known.get(key)
            sharing.setdefault(key, []).append(PatchPair(**vars(entry) | {"slide": slide}, key=key, names=tuple(names)))
    pairs = []
    for key in sorted(sharing):
        for pair in sharing[key]:
            if problem := _find_problem(pair, sharing[key], slides):
                problems.append(problem)
            else:
                pairs.append(pair)
    return pairs, sorted(problems, key=Problem.order)


def _find_problem(pair: PatchPair, sharing: Sequence[PatchPair], slides: str | Location | None) -> Problem | None:
    """Why a pair cannot be used, by its names alone; those `sharing` its key are itself and all others."""
    if len(sharing) > 1:
        others = ", ".join(other.names[0] for other in sharing if other is not pair)
        return pair.problem(f"has the key {pair.key} of {others} too: rename one, or name keys in a CSV")
    # The key of a region has its place already.
    longest = _LONGEST_KEY + (_LONGEST_PLACE if pair.region else 0)
    if not 1 <= len(pair.key) <= longest:
        return pair.problem(f"its key has {len(pair.key)} characters: use 1 to {longest}")
    if slides is not None and pair.slide is None:
        return pair.problem(f"key {pair.key} has no slide in {slides}: add the row")
    names = (*pair.names, pair.slide or "")
    if any(map(_UNPRINTABLE.search, names)):
        *files, slide = (name.encode("unicode_escape").decode() for name in names)
        reason = f"a file or slide name cannot be printed ({files[-1]}, slide {slide or 'unknown'}): rename it"
        return Problem(files[0], reason, pair.key, *files)
    return None


def choose_center(pairs: Sequence[PatchPair], center: str) -> list[PatchPair]:
    """The pairs of one center, or all where `center` is empty; `DataError` where there is none of it."""
    if not center:
        return [*pairs]
    chosen = [pair for pair in pairs if pair.origin.center == center]
    if not chosen:
        names = sorted({pair.origin.center for pair in pairs if pair.origin.center is not None})
        known = f"they are of {', '.join(names[:_MOST])}" if names else "a CSV names it in the column center"
        raise DataError(f"--center {center}: no pair is of this center; {known}")
    logger.info("%d of %d pairs are of the center %s; the others are left out", len(chosen), len(pairs), center)
    return chosen


def shared_center(pairs: Sequence[PatchPair]) -> str | None:
    """The center of all pairs, where it is one."""
    centers = {pair.origin.center for pair in pairs}
    return next(iter(centers)) if len(centers) == 1 else None


def make_patch_table(sources: Iterable[Source]) -> bytes:
    """The bytes of patches.npy: `PATCHES` of the source of each sample, in the order of the shards."""
    rows = [patch_entry(Digests.of(source.sha256), source.pair.group) for source in sources]
    stream = io.BytesIO()
    np.save(stream, np.array(rows, PATCHES), allow_pickle=False)
    return stream.getvalue()


def read_slides(path: str | Location) -> dict[str, str]:
    """Key (`safe_key` of a file stem) -> slide, from a CSV with the columns key and slide; empty ones are left out."""
    known: dict[str, str] = {}
    for number, row in read_csv(as_location(path), required=("key", "slide")):
        key, slide = safe_key(row["key"]), row["slide"]
        if slide and known.setdefault(key, slide) != slide:
            raise DataError(f"{path}: row {number}: slide {slide} of {key} was {known[key]} above: keep one of them")
    return known


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


def is_virtual(sources: Sequence[Source]) -> bool:
    """Whether `lgd synth` drew any pair, as OUT/HE/train/KEY.png or OUT/HE/SLIDE.tif: it is no tissue, reports say."""
    one_of = {str(source.pair.he).rsplit("/", 3)[0]: source.pair for source in sources}
    marks = (
        pair.he.parent.parent / "truth.json" if pair.region else pair.he.parent.parent.parent / "synth.json"
        for pair in one_of.values()
    )
    return any(map(exists, marks))


class _Use(NamedTuple):
    """One image of one source."""

    pair: PatchPair
    stain: int
    """0 as H&E, 1 as IHC."""
    facts: dict[str, Hashable]
    """What two copies must agree in to leave one of them out without loss; the most harmful to get wrong first."""

    def contradicts(self, other: "_Use") -> list[bool]:
        """In which facts; the greater, the worse."""
        return [mine != theirs for mine, theirs in zip(self.facts.values(), other.facts.values(), strict=True)]


def leave_out_duplicates(
    sources: Sequence[Source], keeps_split: bool, target: Target
) -> tuple[list[Source], list[Problem]]:
    """The sources whose images are theirs alone, in their order, and a problem for each of the others.

    Of copies that agree in images, published split (where it is kept) and all other facts the first stays.
    Every other pair that shares an image with another pair, or with itself, is a problem: either may be wrong.
    """
    users: dict[str, list[_Use]] = {}
    for source in sources:
        pair, split = source.pair, source.pair.split if keeps_split else None
        label = target.name_label(pair.label)
        shared = {"split": split, "label": label, "slide": pair.slide, "mpp": pair.mpp, **dict(pair.origin)}
        for stain, digest in enumerate(source.sha256):
            other_image = source.sha256[1 - stain] if len(source.sha256) == 2 else None
            facts = {"stain": stain, **shared, _STAINS[1 - stain]: other_image}
            users.setdefault(digest, []).append(_Use(pair, stain, facts))
    conflicts: dict[str, Problem] = {}
    copies: dict[str, Problem] = {}
    for first, *others in users.values():
        other = next((use for use in others if use.facts != first.facts), None)
        if other is None:
            for use in others:
                reason = f"{use.pair.key} is the same pair as {first.pair.key} ({first.pair.names[0]}): remove one"
                copies.setdefault(use.pair.key, use.pair.problem(reason))
            continue
        # A few among which each use finds one that contradicts it, and one that does so in a harmful way.
        kinds = {tuple(use.facts.values())[:3]: use for use in (first, *others)}
        witnesses = [first, other, *list(kinds.values())[:_MOST]]
        for use in (first, *others):
            conflicts.setdefault(use.pair.key, _conflict(use, max(witnesses, key=use.contradicts)))
    problems = copies | conflicts
    return [source for source in sources if source.pair.key not in problems], list(problems.values())


def _conflict(use: _Use, other: _Use) -> Problem:
    """Two uses of an image that cannot both be right."""
    pair, theirs, stains = use.pair, other.pair, (_STAINS[use.stain], _STAINS[other.stain])
    reason = f"is the {stains[0]} of {pair.key} and, byte for byte, the {stains[1]} of {theirs.key}"
    reason += f" ({theirs.names[other.stain]})"
    if use.stain != other.stain:
        reason += ": correct the wrong one"
    else:
        facts = zip(use.facts.items(), other.facts.values(), strict=True)
        differences = [_format_difference(name, one, two) for (name, one), two in facts if one != two]
        reason += f", but {', '.join(differences)}: keep the right pair only"
    return pair.problem(reason, pair.names[use.stain])


def _format_difference(name: str, mine: Hashable, theirs: Hashable) -> str:
    if name in _STAINS:
        return f"their {name} is not the same"
    one, other = ("unknown" if value is None else value for value in (mine, theirs))
    return f"their {name} is {one} and {other}"
