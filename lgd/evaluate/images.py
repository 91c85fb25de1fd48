"""Names as a user gives them -> the image files that they mean."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lgd.data.image import kind
from lgd.errors import ConfigError, DataError
from lgd.urls import is_remote, place

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_SYSTEM = {"thumbs.db", "desktop.ini"}
_MOST = 5
"""Names that a message lists."""


class Found(NamedTuple):
    """What lies under some names."""

    paths: list[Path]
    """The image files, sorted, each once."""
    notes: list[str]
    """What was left out."""


def find_images(names: Sequence[str]) -> Found:
    """The image files of a list of files, folders and glob patterns.

    A file that is named is taken. In folders, which are searched deep and through links, a file is taken when its name
    or its content is that of a JPEG, PNG or WebP; all others are noted, but for hidden ones. Of several names of one
    file the first is taken. Raises `DataError` for a name that means none, and `ConfigError` for a url.
    """
    named: list[Path] = []
    others: list[Path] = []
    for name in names:
        path = place(name)
        if is_remote(path):
            raise ConfigError(f"{name}: images are read from local files only: fetch it first")
        if path.is_dir():
            inside: dict[bool, list[Path]] = {True: [], False: []}
            for file in sorted(_files(path)):
                inside[_is_image(file)].append(file)
            if not inside[True]:
                raise DataError(f"{path} holds no JPEG, PNG or WebP file{_listed(inside[False], ', only ')}")
            named += inside[True]
            others += inside[False]
        elif path.is_file():
            named.append(path)
        else:
            matching = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            if not matching:
                raise DataError(f"{name} is no file, no folder, and no pattern that matches files")
            named += matching
    taken: dict[str, Path] = {}
    again: dict[str, Path] = {}
    for path in sorted(named):
        first = taken.setdefault(os.path.realpath(path), path)
        if os.path.abspath(first) != os.path.abspath(path):
            again[os.path.abspath(path)] = path
    notes = []
    if others:
        notes.append(f"left out {len(others)} files that are no JPEG, PNG or WebP{_listed(others)}")
    if again:
        notes.append(f"left out {len(again)} further names of the same files{_listed(list(again.values()))}")
    return Found(list(taken.values()), notes)


def _files(folder: Path) -> Iterator[Path]:
    """All files of a folder, deep and through links, without hidden ones and those of the system."""
    entered = {os.path.realpath(folder)}

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror})") from error

    for at, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        inside = []
        for name in sorted(folders):
            target = os.path.realpath(os.path.join(at, name))
            # A link may lead back to where it lies.
            if not name.startswith(".") and target not in entered:
                entered.add(target)
                inside.append(name)
        folders[:] = inside
        yield from (Path(at, name) for name in files if not name.startswith(".") and name.lower() not in _SYSTEM)


def _is_image(path: Path) -> bool:
    named = path.suffix.lower() in _SUFFIXES
    if not path.is_file():
        # A link to nowhere is told as an image that cannot be read; a pipe would be waited for.
        return named and not path.exists()
    try:
        with open(path, "rb") as stream:
            return named or kind(stream.read(12)) is not None
    except OSError:
        return named


def _listed(paths: Sequence[Path], before: str = ": ") -> str:
    more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
    return f"{before}{', '.join(map(str, paths[:_MOST]))}{more}" if paths else ""
