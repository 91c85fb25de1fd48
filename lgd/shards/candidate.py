"""What a layout is, and a pair of files as it finds it; what a row of a CSV says of one, and on which side it lies."""

import bisect
import contextlib
import hashlib
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import ClassVar, NamedTuple

from pydantic import ValidationError

from lgd.base.errors import ConfigError, DataError, require
from lgd.base.records import explain
from lgd.base.target import Label, Target
from lgd.io.files import peek_kind, publish
from lgd.io.location import Location, as_location, relative_name
from lgd.io.tables import write_csv
from lgd.shards.manifest import NOWHERE, Origin
from lgd.shards.region import Region

COLUMNS = ("he", "ihc", "key", "label", "level", "slide", "split", "mpp", *Origin.model_fields)
"""Those of a CSV of pairs."""

SPLITS = ("train", "val", "test")
_SPLITS = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
"""Other names of the splits train, val and test, which are read in any case."""
_NUMBERS = ("alignment", "x", "y", "side", "ihc_x", "ihc_y", "ihc_side")


@dataclass(frozen=True)
class Candidate:
    """A pair as a layout finds it, before its key is known to be good and its slide is looked up."""

    stem: str
    """What becomes the key: the name of the file without its suffix, and the folders that it lies in, with `/`."""
    he: Location
    ihc: Location | None
    """None in a set of H&E alone."""
    label: Label | None
    """Number of the class, or the value; None where unknown."""
    slide: str | None = None
    split: str | None = None
    """The published split; None where there is none."""
    mpp: float | None = None
    """Micrometres per pixel; None where unknown."""
    origin: Origin = NOWHERE
    region: Region | None = None
    """Where `he` and `ihc` are slides: the square of them that is meant."""


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


class Cut(NamedTuple):
    """How pairs of slides are cut into pairs of patches."""

    tile: int
    """Side of the patches, in pixels."""
    mpp: float
    """Their micrometres per pixel."""
    measured: bool
    """Whether the alignment of each must be known."""


class Layout(ABC):
    """A way in which pairs lie below a root."""

    takes_csv: ClassVar[bool] = False
    """Whether the root may be a CSV instead of a folder."""
    labels_slides: ClassVar[bool] = False
    """Whether a patch has the label of its whole slide."""
    caveats: ClassVar[tuple[str, ...]] = ()
    """What a report on real tissue of this layout must say."""

    def __init__(self, target: Target, cut: Cut | None = None) -> None:
        self.target = target
        """What labels are read as."""
        self.cut = cut
        """What is asked of a layout of slides."""

    @abstractmethod
    def scan(self, root: Location) -> Iterator[Candidate | Problem]:
        """The pairs below a folder or a url, and what could not be paired; `DataError` where it has another layout."""


def is_csv(root: Location) -> bool:
    """Whether a root is a CSV; a url is judged by its name."""
    return peek_kind(root, "file" if root.suffix.lower() in (".csv", ".tsv", ".txt") else "folder") == "file"


def cut_suffix(name: str) -> str:
    """The name of an image without its suffix; 2.5_10 has none."""
    return re.sub(r"(?<=[^/])\.[A-Za-z][A-Za-z0-9]{0,4}$", "", name)


def safe_key(stem: str) -> str:
    """The key of a file stem: whatever is not a letter, digit, `_`, `+` or `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_+-]", "_", stem)


def read_row(base: Location, row: dict[str, str], target: Target) -> Candidate:
    """The pair of one row; `DataError` says what is wrong with it."""
    for role in ("he", "ihc") if row.get("ihc") else ("he",):
        row[role] = _as_relative(base, row[role], role)
        if (kind := peek_kind(base / row[role], "file")) != "file":
            lies = "a folder" if kind == "folder" else "missing"
            raise DataError(f"{role} {row[role]} is {lies}: correct the path or remove the row")
    key = row.get("key", "")
    if key != safe_key(key):
        raise DataError(f"key is {key!r}: use letters, digits, _, + and - only")
    he, ihc = base / row["he"], base / row["ihc"] if row.get("ihc") else None
    try:
        # Its numbers are texts here.
        texts = {name: row.get(name) or None for name in Origin.model_fields}
        texts |= {name: _with_point(text) for name, text in texts.items() if text and name in _NUMBERS}
        origin = Origin.model_validate(texts, strict=False)
    except ValidationError as error:
        raise DataError(f"{explain(error)}: correct it, or leave it empty") from error
    return Candidate(
        key or cut_suffix(he.name),
        he,
        ihc,
        _parse_label(row, target),
        slide=row.get("slide") or None,
        split=as_split(row.get("split", "")) or None,
        mpp=_parse_mpp(_with_point(row.get("mpp", ""))),
        origin=origin,
    )


def _as_relative(base: Location, text: str, role: str) -> str:
    """The path of an image relative to the CSV, as systems other than Windows write it; `DataError` for any other."""
    path = text
    # A file may be called so.
    if "\\" in path and peek_kind(base / path, "folder") != "file":
        path = path.replace("\\", "/")
    if path.startswith("~/"):
        path = str(as_location(path))
    if path.startswith(f"{base}/"):
        path = relative_name(as_location(path), base)
    if not path or "://" in path or Path(path).is_absolute() or PureWindowsPath(path).is_absolute():
        raise DataError(f"{role} is {text!r}: give the path relative to the CSV, which may lie in any folder above")
    return path


def as_split(text: str) -> str:
    """The name that LGD has for a split; that of an unknown one stays, for another split may be drawn."""
    name = text.lower()
    return _SPLITS.get(name, name if name in _SPLITS.values() else text)


def _parse_label(row: dict[str, str], target: Target) -> Label | None:
    """The label of a row; `level` is the old name of the column `label`."""
    given = {name: row[name] for name in ("label", "level") if row.get(name)}
    labels = []
    for name, text in given.items():
        try:
            labels.append(target.parse_label(text))
        except DataError as error:
            reason = f"{name} is {text!r}: {error}, or leave it empty; --target says what labels are of"
            raise DataError(reason) from error
    if len({*labels}) > 1:
        raise DataError(f"label is {given['label']!r} and level is {given['level']!r}: keep the column label")
    return labels[0] if labels else None


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


class SplitRule(NamedTuple):
    """A parsed `--split`."""

    keep: bool
    """The published split stays; the shares then only divide its `train`."""
    shares: dict[str, float]
    """Share of each split, adding up to 1; empty where nothing is to be drawn."""

    @classmethod
    def parse(cls, text: str) -> "SplitRule":
        """Parse `keep`, `keep:VAL` (a share of train, by group) or `group:TRAIN,VAL,TEST`.

        Raises `ConfigError` that names `--split`.
        """
        if text == "keep":
            return cls(True, {})
        usage = (
            f"--split {text}: use keep, keep:0.1 (validation share of train, between 0 and 1) or group:0.8,0.1,0.1 "
            "(shares of train, val and test, which add up to 1)"
        )
        kind, _, numbers = text.partition(":")
        try:
            shares = [float(number) for number in numbers.split(",")]
        except ValueError as error:
            raise ConfigError(usage) from error
        if kind == "keep" and len(shares) == 1 and 0 < shares[0] < 1:
            return cls(True, {"train": 1 - shares[0], "val": shares[0]})
        good = len(shares) == len(SPLITS) and min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-9)
        require(kind == "group" and good, usage)
        return cls(False, dict(zip(SPLITS, shares, strict=True)))


def assign(group: str, shares: dict[str, float], salt: str = "") -> str:
    """The split of a group: a point in [0, 1) from the SHA-256 of salt and name, against the summed shares.

    A split of share 0 gets nothing. Another `salt` draws another split.
    """
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    digest = hashlib.sha256(f"{len(salt)}:{salt}{group}".encode()).digest()
    # 53 bits, so that the quotient is exact and stays below 1.
    point = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    drawn = {name: share for name, share in shares.items() if share > 0}
    ends = list(itertools.accumulate(drawn.values()))
    # The last end may be rounded to less than 1.
    return list(drawn)[bisect.bisect(ends[:-1], point)]


def split_of(rule: SplitRule, group: str, published: str | None, salt: str = "") -> str | None:
    """The split of a sample under a rule; None where the rule keeps a split that was never published."""
    if rule.keep and (published != "train" or not rule.shares):
        return published
    return assign(group, rule.shares, salt)
