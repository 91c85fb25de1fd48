"""What a layout gives -> `PatchPair`s: their keys, slides and names; `lgd.shards.builder` reads the contents."""

from dataclasses import dataclass, replace

from lgd.base.errors import DataError
from lgd.io.files import exists, list_folder, peek_kind
from lgd.io.location import Location, as_location, relative_name
from lgd.io.tables import read_csv
from lgd.shards.layouts import NOWHERE, Candidate, Problem, find_layout, is_csv, safe_key
from lgd.shards.meta import UNPRINTABLE, Origin

# With a tile's place and a member's extension a name stays within the 100 bytes of a plain tar header.
_LONGEST_KEY = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchPair:
    """An H&E patch and the IHC patch of the same field."""

    key: str
    """Unique name, of letters, digits, `_`, `+` and `-`."""
    he: Location
    ihc: Location
    source: str
    """The H&E file, relative to the root, with `/`."""
    ihc_source: str
    """The IHC file, likewise."""
    label: int | None
    """Number of the class; None where unknown."""
    slide: str | None
    group: str
    """The slide where it is known, else the key: what must never lie on two sides of a split."""
    split: str | None
    """The published split; None where there is none."""
    mpp: float | None
    """Micrometres per pixel; None where unknown."""
    origin: Origin = NOWHERE


def find_pairs(
    layout: str, root: str | Location, slides: str | Location | None = None
) -> tuple[list[PatchPair], list[Problem]]:
    """The pairs of a layout (`lgd.shards.layouts`) under `root`, sorted by key, and what could not be paired.

    `slides`: a CSV with the columns key and slide, which names the slide of every pair. Raises `DataError` where the
    root or a CSV is missing or malformed, or holds no patches at all.
    """
    scanner, root = find_layout(layout), as_location(root)
    presumed = is_csv(root) if scanner.takes_csv else not list_folder(root)
    folder = peek_kind(root, "file" if presumed else "folder") == "folder"
    if not folder and not exists(root):
        raise DataError(f"{root} does not exist: give --root an existing folder or url")
    if not folder and not scanner.takes_csv:
        raise DataError(f"{root} is no folder: give --root the folder of the {layout} layout")
    found: list[Candidate] = []
    problems: list[Problem] = []
    for entry in scanner.scan(root):
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            found.append(entry)
    if not found and not problems:
        raise DataError(f"{root} holds no pairs of the {layout} layout: check --root and --layout")
    pairs = _with_keys(found, root if folder else root.parent, problems)
    if slides is not None:
        pairs = _with_slides(pairs, as_location(slides), problems)
    pairs = _printable(pairs, problems)
    return sorted(pairs, key=lambda pair: pair.key), sorted(problems, key=Problem.order)


def _printable(pairs: list[PatchPair], problems: list[Problem]) -> list[PatchPair]:
    """Pairs whose names can be written and shown; control characters and broken text become problems."""
    good = []
    for pair in pairs:
        names = (pair.source, pair.ihc_source, pair.slide or "")
        if not any(map(UNPRINTABLE.search, names)):
            good.append(pair)
            continue
        source, ihc, slide = (name.encode("unicode_escape").decode() for name in names)
        reason = f"a file or slide name cannot be printed ({ihc}, slide {slide or 'unknown'}): rename it"
        problems.append(Problem(source, reason, pair.key, source, ihc))
    return good


def _with_keys(found: list[Candidate], base: Location, problems: list[Problem]) -> list[PatchPair]:
    """Turn stems into keys; too long and shared keys become problems, for every pair that has them."""
    owners: dict[str, list[Candidate]] = {}
    for entry in found:
        owners.setdefault(safe_key(entry.stem), []).append(entry)
    pairs = []
    for key, entries in owners.items():
        for entry in entries:
            source = relative_name(entry.he, base)
            reason = ""
            if len(entries) > 1:
                others = ", ".join(relative_name(other.he, base) for other in entries if other is not entry)
                reason = f"has the key {key} of {others} too: rename one, or name keys in a CSV"
            elif not key or len(key) > _LONGEST_KEY:
                reason = f"its key has {len(key)} characters: use 1 to {_LONGEST_KEY}"
            if reason:
                problems.append(Problem(source, reason, key, source, relative_name(entry.ihc, base)))
                continue
            fields = {name: getattr(entry, name) for name in ("he", "ihc", "label", "slide", "split", "mpp", "origin")}
            ihc = relative_name(entry.ihc, base)
            pairs.append(PatchPair(key=key, source=source, ihc_source=ihc, group=entry.slide or key, **fields))
    return pairs


def read_slides(path: str | Location) -> dict[str, str]:
    """Key (`safe_key` of a file stem) -> slide, from a CSV with the columns key and slide; empty ones are left out."""
    known: dict[str, str] = {}
    for number, row in read_csv(as_location(path), required=("key", "slide"), allowed=None):
        key, slide = safe_key(row["key"]), row["slide"]
        if slide and known.setdefault(key, slide) != slide:
            raise DataError(f"{path}: row {number}: slide {slide} of {key} was {known[key]} above: keep one of them")
    return known


def _with_slides(pairs: list[PatchPair], path: Location, problems: list[Problem]) -> list[PatchPair]:
    """Name each pair's slide from a CSV; a pair that it does not name becomes a problem."""
    known = read_slides(path)
    named = []
    for pair in pairs:
        if pair.key in known:
            named.append(replace(pair, slide=known[pair.key], group=known[pair.key]))
        else:
            reason = f"key {pair.key} has no slide in {path}: add the row"
            problems.append(Problem(pair.source, reason, pair.key, pair.source, pair.ihc_source))
    return named
