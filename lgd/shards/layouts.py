"""How paired patches lie on disk: BCI, MIST, a CSV, and layouts of other packages.

Only names are looked at, from one listing a folder. Nothing is dropped silently: what looks like a patch but cannot be
paired comes back as a `Problem`. In a set of H&E alone no candidate has an IHC. A layout of another package is named
`python:package.module:name`:

    class Flat(Layout):
        def scan(self, root):
            for he in sorted(root.glob("*-he.png")):
                yield Candidate(he.stem, he, he.with_name(he.name.replace("-he", "-ihc")), label=None)
"""

import contextlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple

from pydantic import ValidationError

from lgd.base.errors import DataError, require
from lgd.base.extensions import FORM, is_python, load_object
from lgd.base.records import explain
from lgd.config_sections import LEVEL_NAMES
from lgd.io.files import Kind, list_folder, peek_kind, publish
from lgd.io.location import Location
from lgd.io.tables import read_csv, write_csv
from lgd.shards.manifest import NOWHERE, Origin

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
_SPLIT = re.compile("[A-Za-z0-9_]+")
_COLUMNS = ("he", "ihc", "key", "label", "level", "slide", "split", "mpp", *Origin.model_fields)

_NUMBERS = ("alignment", "x", "y", "side", "ihc_x", "ihc_y", "ihc_side")


class Problem(NamedTuple):
    """Why a patch cannot be used."""

    name: str
    """The file, relative to the root, or the row of the CSV."""
    reason: str
    """What is wrong, and the remedy."""
    key: str = ""
    he: str = ""
    ihc: str = ""

    def order(self) -> tuple[int | str, ...]:
        """To sort by: by name, with row 9 before row 10."""
        return (*(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", self.name)), *self)


def write_problems(path: Location, problems: Sequence[Problem]) -> None:
    """Publish a CSV of what was left out, and why."""
    with publish(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        rows = []
        for problem in problems:
            where = problem.he or problem.ihc
            reason = problem.reason if where == problem.name else f"{problem.name}: {problem.reason}"
            rows.append([problem.key, problem.he, problem.ihc, reason])
        write_csv(stream, ["key", "he", "ihc", "reason"], rows)


@dataclass(frozen=True)
class Candidate:
    """A pair as a layout finds it, before its key is known to be good and its slide is looked up."""

    stem: str
    he: Location
    ihc: Location | None
    """None in a set of H&E alone."""
    label: int | None
    """Number of the class; None where unknown."""
    slide: str | None = None
    split: str | None = None
    """The published split; None where there is none."""
    mpp: float | None = None
    """Micrometres per pixel; None where unknown."""
    origin: Origin = NOWHERE


def safe_key(stem: str) -> str:
    """The key of a file stem: whatever is not a letter, digit, `_`, `+` or `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_+-]", "_", stem)


class Layout(ABC):
    """A way in which pairs lie below a root."""

    takes_csv: ClassVar[bool] = False
    """Whether the root may be a CSV instead of a folder."""
    labels_slides: ClassVar[bool] = False
    """Whether a patch has the label of its whole slide."""
    caveats: ClassVar[tuple[str, ...]] = ()
    """What a report on real tissue of this layout must say."""

    @abstractmethod
    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        """The pairs below a folder or a url, and what could not be paired; `DataError` where it has another layout."""


class Bci(Layout):
    """`HE/SPLIT/NAME_LEVEL.png` and the same name under `IHC/`; the level is 0, 1+, 2+ or 3+."""

    labels_slides = True
    caveats = (
        "BCI's background is grey in some images and white in others, a shortcut that a network can learn, and "
        "its two stains are neighbouring sections that are registered only approximately.",
    )

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        top = list_folder(root)
        splits = set()
        for stain in ("HE", "IHC"):
            if top.get(stain) != "folder":
                raise DataError(f"{root} has no folder {stain}: --layout bci wants HE/SPLIT and IHC/SPLIT in --root")
            for name, lies in list_folder(root / stain).items():
                if _is_patch(name):
                    reason = f"lies outside a split: move it into a folder such as {stain}/train"
                    yield Problem(f"{stain}/{name}", reason)
                elif lies == "folder" and not name.startswith("."):
                    splits.add(name)
        for split in sorted(splits):
            if not _SPLIT.fullmatch(split):
                yield Problem(f"HE/{split}", "is no plain word: call a split train, val, test or the like")
                continue
            for entry in _match(root, f"HE/{split}", f"IHC/{split}"):
                if isinstance(entry, Problem):
                    yield entry
                elif (level := entry.stem.rpartition("_")[2]) in LEVEL_NAMES:
                    yield replace(entry, label=LEVEL_NAMES.index(level), split=split)
                else:
                    assert entry.ihc is not None, "both stains were matched"
                    he, ihc = f"HE/{split}/{entry.he.name}", f"IHC/{split}/{entry.ihc.name}"
                    reason = f"level {level!r} in its name is none of {', '.join(LEVEL_NAMES)}: rename it"
                    yield Problem(he, reason, "", he, ihc)


class Mist(Layout):
    """`trainA trainB valA valB`, A being the H&E; `SLIDE_ROW_COLUMN.jpg`.

    MIST publishes `val` as its held-out set, so it is named `test` here.
    """

    caveats = ("MIST's two stains are neighbouring sections that are registered only approximately.",)

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        for folder, split in {"train": "train", "val": "test", "test": "test"}.items():
            for entry in _match(root, f"{folder}A", f"{folder}B"):
                if isinstance(entry, Candidate):
                    slide = re.fullmatch(r"(.+)_\d+_\d+", entry.stem)
                    entry = replace(entry, slide=slide[1] if slide else None, split=split)
                yield entry


class Csv(Layout):
    """A folder with `pairs.csv`, or the CSV itself.

    Columns he and ihc (relative to the CSV), and as you have them key, label, slide, split, mpp and the fields of
    `Origin`. Without a column ihc, or with an empty one, the set holds H&E alone. Whether the files of a remote CSV
    exist is seen when they are read.
    """

    takes_csv = True

    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        base, path = (root.parent, root) if is_csv(root) else (root, root / "pairs.csv")
        for number, row in read_csv(path, required=("he",), allowed=_COLUMNS):
            try:
                yield _read_row(base, row)
            except DataError as error:
                name, named = f"{path.name} row {number}", [row.get(column, "") for column in ("key", "he", "ihc")]
                yield Problem(name, str(error), *named)


LAYOUTS: dict[str, type[Layout]] = {"bci": Bci, "mist": Mist, "csv": Csv}
"""The layouts by their names in `--layout`."""


def check_layout(name: str) -> None:
    """Raise `ConfigError` for a name that is neither a layout of LGD nor of one outside it; nothing is imported."""
    require(
        name in LAYOUTS or is_python(name), f"--layout is {name!r:.120}: use one of {', '.join(LAYOUTS)}, or {FORM}"
    )


def find_layout(name: str) -> Layout:
    """The layout of a name, which is imported where it is outside LGD; `ConfigError` for an unknown one."""
    check_layout(name)
    kind = LAYOUTS.get(name) or load_object(name, "--layout")
    good = isinstance(kind, type) and issubclass(kind, Layout) and not inspect.isabstract(kind)
    require(good, f"--layout is {name}, which is no layout: derive it from lgd.shards.layouts.Layout, with a `scan`")
    return kind()


def is_csv(root: Location) -> bool:
    """Whether a root is a CSV; a url is judged by its name."""
    return peek_kind(root, "file" if root.suffix.lower() == ".csv" else "folder") == "file"


def _match(root: Location, he: str, ihc: str) -> Iterator[Candidate | Problem]:
    """Pair the patches of two folders by stem."""
    he_patches, ihc_patches = _patches(root, he), _patches(root, ihc)
    for stem in sorted(he_patches.keys() | ihc_patches.keys()):
        mine, theirs = he_patches.get(stem, {}), ihc_patches.get(stem, {})
        names = [*mine, *theirs]
        if bad := {name: kind for name, kind in (mine | theirs).items() if kind != "file"}:
            for name, kind in bad.items():
                what = "a folder" if kind == "folder" else "no readable file"
                yield Problem(name, f"is {what}, not an image: remove or replace it")
        elif not mine or not theirs:
            reason = f"has no partner {stem} in {ihc if mine else he}: add it, or remove this one"
            yield Problem(names[0], reason, "", names[0] if mine else "", "" if mine else names[0])
        elif len(names) > 2:
            yield Problem(names[0], f"its pair is ambiguous ({', '.join(names)}): keep one a stain")
        else:
            yield Candidate(stem, root / names[0], root / names[1], label=None)


def _patches(root: Location, folder: str) -> dict[str, dict[str, Kind]]:
    """What each patch of a folder is, by its stem and by its name below the root."""
    patches: dict[str, dict[str, Kind]] = {}
    for name, kind in list_folder(root / folder).items():
        if _is_patch(name):
            patches.setdefault(PurePosixPath(name).stem, {})[f"{folder}/{name}"] = kind
    return patches


def _is_patch(name: str) -> bool:
    """Whether a file is called like an image; hidden files are the system's own."""
    return PurePosixPath(name).suffix.lower() in _SUFFIXES and not name.startswith(".")


def _read_row(base: Location, row: dict[str, str]) -> Candidate:
    """The pair of one row; `DataError` says what is wrong with it."""
    for role in ("he", "ihc"):
        # A path as Windows writes it, unless a file is called so.
        if "\\" in row.get(role, "") and peek_kind(base / row[role], "folder") is None:
            row[role] = row[role].replace("\\", "/")
    for role in ("he", "ihc") if row.get("ihc") else ("he",):
        if not row[role] or Path(row[role]).is_absolute() or "://" in row[role]:
            raise DataError(f"{role} is {row[role]!r}: give the path relative to the CSV")
        if (kind := peek_kind(base / row[role], "file")) != "file":
            lies = "a folder" if kind == "folder" else "missing"
            raise DataError(f"{role} {row[role]} is {lies}: correct the path or remove the row")
    key, split = row.get("key", ""), row.get("split", "")
    if key != safe_key(key):
        raise DataError(f"key is {key!r}: use letters, digits, _, + and - only")
    if split and not _SPLIT.fullmatch(split):
        raise DataError(f"split is {split!r}: use a plain word such as train, val or test")
    he, ihc = base / row["he"], base / row["ihc"] if row.get("ihc") else None
    try:
        # Its numbers are texts here.
        texts = {name: row.get(name) or None for name in Origin.model_fields}
        texts |= {name: _with_point(text) for name, text in texts.items() if text and name in _NUMBERS}
        origin = Origin.model_validate(texts, strict=False)
    except ValidationError as error:
        raise DataError(f"{explain(error)}: correct it, or leave it empty") from error
    return Candidate(
        key or he.stem,
        he,
        ihc,
        _parse_label(row),
        slide=row.get("slide") or None,
        split=split or None,
        mpp=_parse_mpp(_with_point(row.get("mpp", ""))),
        origin=origin,
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


def _with_point(text: str) -> str:
    """A number of a spreadsheet with its decimal comma as a point; 1,234 stays, for it may be a thousand."""
    number = re.fullmatch(r"(-?\d+),(\d+)", text)
    return f"{number[1]}.{number[2]}" if number and (number[1] in ("0", "-0") or len(number[2]) != 3) else text


def _parse_mpp(text: str) -> float | None:
    """Micrometres per pixel, None for no text; `DataError` unless it is a number above 0 and below 100."""
    with contextlib.suppress(ValueError):
        if not text or 0 < float(text) < 100:
            return float(text) if text else None
    raise DataError(f"mpp is {text!r}: use micrometres per pixel, such as 0.46")
