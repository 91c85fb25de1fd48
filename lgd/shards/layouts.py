"""How paired patches lie on disk: BCI, MIST, a CSV, and layouts of other packages.

Only names are looked at, from one listing a folder. Nothing is dropped silently: what looks like a patch but cannot be
paired comes back as a `Problem`. In a set of H&E alone no candidate has an IHC. A layout of another package is named
`python:package.module:name`:

    class Flat(Layout):
        def scan(self, root):
            for he in sorted(root.glob("*-he.png")):
                yield Candidate(he.stem, he, he.with_name(he.name.replace("-he", "-ihc")), label=None)
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple

from lgd.base.errors import DataError, require
from lgd.base.extensions import FORM, is_python, load_object
from lgd.config_sections import LEVEL_NAMES
from lgd.io.files import Kind, list_folder, peek_kind, publish
from lgd.io.location import Location
from lgd.io.tables import read_csv, write_csv
from lgd.shards.candidate import COLUMNS, Candidate, as_split, read_row

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}


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
            for entry in _match(root, f"HE/{split}", f"IHC/{split}"):
                if isinstance(entry, Problem):
                    yield entry
                elif (level := entry.stem.rpartition("_")[2]) in LEVEL_NAMES:
                    yield replace(entry, label=LEVEL_NAMES.index(level), split=as_split(split))
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
        for number, row in read_csv(path, required=("he",), allowed=COLUMNS):
            try:
                yield read_row(base, row)
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
    return peek_kind(root, "file" if root.suffix.lower() in (".csv", ".tsv", ".txt") else "folder") == "file"


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
