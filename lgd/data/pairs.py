"""Image files, here or behind a url -> `PatchPair`s: the BCI, MIST and CSV layouts.

Only names are looked at here, from one listing a folder; `lgd.data.shards` reads the contents. Nothing is dropped
silently: what looks like a patch but cannot be paired comes back as a `Problem`.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from lgd.config import LEVEL_NAMES
from lgd.data.meta import UNPRINTABLE, Origin
from lgd.errors import DataError
from lgd.files import Kind, exists, is_remote, list_folder, place, read_bytes
from lgd.tables import unescape_cell
from lgd.urls import MissingError

Layout = Literal["bci", "mist", "csv"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
_SPLIT = re.compile("[A-Za-z0-9_]+")
_TEXTS = ("marker", "center", "scanner", "ihc_slide")
_NUMBERS = ("alignment", "x", "y", "side", "ihc_x", "ihc_y", "ihc_side")
_COLUMNS = ("he", "ihc", "key", "label", "level", "slide", "split", "mpp", *_TEXTS, *_NUMBERS)
NOWHERE = Origin.from_json(dict.fromkeys(Origin.model_fields))
"""Of a pair of which nothing more is known."""
# With a tile's place and a member's extension a name stays within the 100 bytes of a plain tar header.
_LONGEST_KEY = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchPair:
    """An H&E patch and the IHC patch of the same field."""

    key: str
    """Unique name, of letters, digits, `_`, `+` and `-`."""
    he: Path
    ihc: Path
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


class Problem(NamedTuple):
    """Why a patch cannot be used."""

    name: str
    """The file, relative to the root, or the row of the CSV."""
    reason: str
    """What is wrong, and the remedy."""
    key: str = ""
    he: str = ""
    ihc: str = ""

    def order(self) -> tuple[Any, ...]:
        """To sort by: by name, with row 9 before row 10."""
        return (*(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", self.name)), *self)


class _Found(NamedTuple):
    """A pair before its key is known to be good and its slide is looked up."""

    stem: str
    he: Path
    ihc: Path
    label: int | None
    slide: str | None
    split: str | None
    mpp: float | None = None
    origin: Origin = NOWHERE


def find_pairs(
    layout: Layout, root: str | Path, slides: str | Path | None = None
) -> tuple[list[PatchPair], list[Problem]]:
    """The pairs under `root`, sorted by key, and what could not be paired.

    `bci`: `HE/SPLIT/NAME_LEVEL.png` and the same name under `IHC/`; the level is 0, 1+, 2+ or 3+.
    `mist`: `trainA trainB valA valB`, A being the H&E; `SLIDE_ROW_COLUMN.jpg`. MIST publishes `val` as its
    held-out set, so it is named `test` here.
    `csv`: a folder with `pairs.csv`, or the CSV itself; columns he and ihc (relative to the CSV), and as you
    have them key, label, slide, split, mpp and the fields of `Origin`. Whether the files of a remote CSV exist is seen
    when they are read.
    `slides`: a CSV with the columns key and slide, which names the slide of every pair.

    Raises `DataError` where the root or a CSV is missing or malformed, or holds no patches at all.
    """
    root = place(root)
    if not is_remote(root):
        folder = root.is_dir()
    else:
        folder = root.suffix.lower() != ".csv" if layout == "csv" else bool(list_folder(root))
    if not folder and not exists(root):
        raise DataError(f"{root} does not exist: give --root an existing folder or url")
    if layout != "csv" and not folder:
        raise DataError(f"{root} is no folder: give --root the folder of the {layout} layout")
    base = root if folder else root.parent
    if layout == "csv":
        entries = _scan_csv(base, root / "pairs.csv" if folder else root)
    else:
        entries = {"bci": _scan_bci, "mist": _scan_mist}[layout](root)
    found: list[_Found] = []
    problems: list[Problem] = []
    for entry in entries:
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            found.append(entry)
    if not found and not problems:
        raise DataError(f"{root} holds no pairs of the {layout} layout: check --root and --layout")
    pairs = _with_keys(found, base, problems)
    if slides is not None:
        pairs = _with_slides(pairs, place(slides), problems)
    pairs = _printable(pairs, problems)
    return sorted(pairs, key=lambda pair: pair.key), sorted(problems, key=Problem.order)


def safe_key(stem: str) -> str:
    """The key of a file stem: whatever is not a letter, digit, `_`, `+` or `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_+-]", "_", stem)


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


def _with_keys(found: list[_Found], base: Path, problems: list[Problem]) -> list[PatchPair]:
    """Turn stems into keys; too long and shared keys become problems, for every pair that has them."""
    owners: dict[str, list[_Found]] = {}
    for entry in found:
        owners.setdefault(safe_key(entry.stem), []).append(entry)
    pairs = []
    for key, entries in owners.items():
        for entry in entries:
            source = _relative(entry.he, base)
            reason = ""
            if len(entries) > 1:
                others = ", ".join(_relative(other.he, base) for other in entries if other is not entry)
                reason = f"has the key {key} of {others} too: rename one, or name keys in a CSV"
            elif not key or len(key) > _LONGEST_KEY:
                reason = f"its key has {len(key)} characters: use 1 to {_LONGEST_KEY}"
            if reason:
                problems.append(Problem(source, reason, key, source, _relative(entry.ihc, base)))
                continue
            fields = {name: getattr(entry, name) for name in ("he", "ihc", "label", "slide", "split", "mpp", "origin")}
            ihc = _relative(entry.ihc, base)
            pairs.append(PatchPair(key=key, source=source, ihc_source=ihc, group=entry.slide or key, **fields))
    return pairs


def _relative(path: Path, base: Path) -> str:
    if is_remote(path):
        # A UPath's own relative_to takes 0.2 ms.
        return str(path)[len(str(base)) :].lstrip("/")
    return path.relative_to(base).as_posix()


def read_slides(path: str | Path) -> dict[str, str]:
    """Key (`safe_key` of a file stem) -> slide, from a CSV with the columns key and slide; empty ones are left out."""
    known: dict[str, str] = {}
    for number, row in _read_csv(place(path), required=("key", "slide"), allowed=None):
        key, slide = safe_key(row["key"]), row["slide"]
        if slide and known.setdefault(key, slide) != slide:
            raise DataError(f"{path}: row {number}: slide {slide} of {key} was {known[key]} above: keep one of them")
    return known


def _with_slides(pairs: list[PatchPair], path: Path, problems: list[Problem]) -> list[PatchPair]:
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


def _scan_bci(root: Path) -> Iterator[_Found | Problem]:
    top = list_folder(root)
    splits = set()
    for stain in ("HE", "IHC"):
        if top.get(stain) != "folder":
            raise DataError(f"{root} has no folder {stain}: --layout bci wants HE/SPLIT and IHC/SPLIT in --root")
        listed = list_folder(root / stain)
        for names in _patches(listed).values():
            for name in names:
                yield Problem(f"{stain}/{name}", f"lies outside a split: move it into a folder such as {stain}/train")
        splits |= {name for name, kind in listed.items() if kind == "folder" and not _is_hidden_or_image(name)}
    for split in sorted(splits):
        if not _SPLIT.fullmatch(split):
            yield Problem(f"HE/{split}", "is no plain word: call a split train, val, test or the like")
            continue
        for entry in _match(root, f"HE/{split}", f"IHC/{split}"):
            if isinstance(entry, Problem):
                yield entry
                continue
            stem, he, ihc = entry
            level = stem.rpartition("_")[2]
            if level not in LEVEL_NAMES:
                reason = f"level {level!r} in its name is none of {', '.join(LEVEL_NAMES)}: rename it"
                yield Problem(he, reason, "", he, ihc)
                continue
            yield _Found(stem, root / he, root / ihc, LEVEL_NAMES.index(level), None, split)


def _is_hidden_or_image(name: str) -> bool:
    return name.startswith(".") or PurePosixPath(name).suffix.lower() in _SUFFIXES


def _scan_mist(root: Path) -> Iterator[_Found | Problem]:
    for folder, split in {"train": "train", "val": "test", "test": "test"}.items():
        for entry in _match(root, f"{folder}A", f"{folder}B"):
            if isinstance(entry, Problem):
                yield entry
                continue
            stem, he, ihc = entry
            slide = re.fullmatch(r"(.+)_\d+_\d+", stem)
            yield _Found(stem, root / he, root / ihc, None, slide[1] if slide else None, split)


def _match(root: Path, he: str, ihc: str) -> Iterator[tuple[str, str, str] | Problem]:
    """Pair the patches of two folders by stem: stem, H&E and IHC, relative to the root."""
    listed = {folder: list_folder(root / folder) for folder in (he, ihc)}
    he_patches, ihc_patches = _patches(listed[he]), _patches(listed[ihc])
    for stem in sorted(he_patches.keys() | ihc_patches.keys()):
        mine, theirs = he_patches.get(stem, []), ihc_patches.get(stem, [])
        names = [f"{he}/{name}" for name in mine] + [f"{ihc}/{name}" for name in theirs]
        kinds = [listed[he][name] for name in mine] + [listed[ihc][name] for name in theirs]
        bad = [(name, kind) for name, kind in zip(names, kinds, strict=True) if kind != "file"]
        for name, kind in bad:
            what = "a folder" if kind == "folder" else "no readable file"
            yield Problem(name, f"is {what}, not an image: remove or replace it")
        if bad:
            continue
        if not mine or not theirs:
            reason = f"has no partner {stem} in {ihc if mine else he}: add it, or remove this one"
            yield Problem(names[0], reason, "", names[0] if mine else "", "" if mine else names[0])
        elif len(names) > 2:
            yield Problem(names[0], f"its pair is ambiguous ({', '.join(names)}): keep one a stain")
        else:
            yield stem, names[0], names[1]


def _patches(listed: dict[str, Kind]) -> dict[str, list[str]]:
    """Whatever is called like an image in a folder, by stem; hidden files are the system's own."""
    patches: dict[str, list[str]] = {}
    for name in listed:
        if PurePosixPath(name).suffix.lower() in _SUFFIXES and not name.startswith("."):
            patches.setdefault(PurePosixPath(name).stem, []).append(name)
    return patches


def _scan_csv(base: Path, path: Path) -> Iterator[_Found | Problem]:
    for number, row in _read_csv(path, required=("he", "ihc"), allowed=_COLUMNS):
        try:
            yield _csv_pair(base, row)
        except DataError as error:
            yield Problem(f"{path.name} row {number}", str(error), row.get("key", ""), row["he"], row["ihc"])


def _csv_pair(base: Path, row: dict[str, str]) -> _Found:
    """The pair of one row; `DataError` tells what is wrong with it."""
    for role in ("he", "ihc"):
        if not row[role] or Path(row[role]).is_absolute() or "://" in row[role]:
            raise DataError(f"{role} is {row[role]!r}: give the path relative to the CSV")
        if not is_remote(base) and not (base / row[role]).is_file():
            kind = "a folder" if (base / row[role]).is_dir() else "missing"
            raise DataError(f"{role} {row[role]} is {kind}: correct the path or remove the row")
    key, split, mpp = (row.get(name, "") for name in ("key", "split", "mpp"))
    if key != safe_key(key):
        raise DataError(f"key is {key!r}: use letters, digits, _, + and - only")
    if split and not _SPLIT.fullmatch(split):
        raise DataError(f"split is {split!r}: use a plain word such as train, val or test")
    he, ihc = base / row["he"], base / row["ihc"]
    return _Found(
        key or he.stem,
        he,
        ihc,
        _parse_label(row),
        row.get("slide") or None,
        split or None,
        _parse_mpp(mpp) if mpp else None,
        _parse_origin(row),
    )


def _parse_label(row: dict[str, str]) -> int | None:
    """The number of the class; `level` is the old name of the column `label`."""
    names = {**{name: value for value, name in enumerate(LEVEL_NAMES)}, "1": 1, "2": 2, "3": 3}
    given = {name: row[name] for name in ("label", "level") if row.get(name)}
    for name, text in given.items():
        if text not in names:
            raise DataError(f"{name} is {text!r}: use {', '.join(LEVEL_NAMES)}, or leave it empty")
    if len({names[text] for text in given.values()}) > 1:
        raise DataError(f"label is {given['label']!r} and level is {given['level']!r}: keep the column label")
    return names[next(iter(given.values()))] if given else None


def _parse_origin(row: dict[str, str]) -> Origin:
    fields: dict[str, Any] = {name: row.get(name) or None for name in _TEXTS}
    for name in _NUMBERS:
        try:
            fields[name] = float(row[name]) if row.get(name) else None
        except ValueError as error:
            raise DataError(f"{name} is {row[name]!r}: use a number, or leave it empty") from error
    try:
        return Origin.from_json(fields)
    except ValueError as error:
        raise DataError(f"{error}: correct it, or leave it empty") from error


def _parse_mpp(text: str) -> float:
    """Micrometres per pixel; `DataError` unless it is a number above 0 and below 100."""
    try:
        mpp = float(text)
    except ValueError:
        mpp = 0.0
    if not 0 < mpp < 100:
        raise DataError(f"mpp is {text!r}: use micrometres per pixel, such as 0.46")
    return mpp


def _read_csv(path: Path, required: tuple[str, ...], allowed: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV with their line numbers; values are stripped of blanks, and of what `write_csv` escaped."""
    try:
        with io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames = [unescape_cell(name) for name in reader.fieldnames or []]
            missing = [name for name in required if name not in columns]
            if missing:
                raise DataError(f"{path}: has no column {', '.join(missing)} (it has {', '.join(columns)}): add it")
            unknown = [name for name in columns if allowed and name not in allowed]
            if unknown:
                raise DataError(
                    f"{path}: column {', '.join(unknown)} is unknown: use {', '.join(allowed)}, or remove it"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}: row {reader.line_num} has not {len(columns)} values: correct it")
                yield reader.line_num, {name: unescape_cell(value.strip()) for name, value in row.items()}
    except MissingError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV in UTF-8 ({error}): correct or replace it") from error
