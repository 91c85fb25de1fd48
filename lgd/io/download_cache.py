"""The folder of local copies of remote files: its names, its limit, who may be removed.

The copies lie in LGD_CACHE (default ~/.cache/lgd) and take at most LGD_CACHE_GB (default 100) gigabytes: the least
recently used ones make room for new ones. The folder should be on a disk of the node's own. It may be deleted at any
time when nothing runs. Only files with these names are counted and removed; all others, and links and folders of any
name, are the user's:

    lgd-DIGEST.tar             a copy; DIGEST is the SHA-256 or XXH3-128 of its content
    .lgd-DIGEST.tar.SIZE.tmp   a download of SIZE bytes
    .lgd-DIGEST.tar.lock       held while the copy is added or dropped
    .lgd-room.lock             held for moments while copies are counted, added or evicted
"""

import contextlib
import io
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.io.locks import hold_lock, try_lock

DIGEST = "[0-9a-f]{64}|[0-9a-f]{32}"
"""SHA-256 or XXH3-128."""

_REMEDY = "name a folder on a disk of the node's own in LGD_CACHE"
_SUFFIX = r"\.[A-Za-z0-9]{1,16}"
_COPY = re.compile(rf"lgd-(?:{DIGEST})(?:{_SUFFIX})?")
_TEMPORARY = re.compile(rf"\.(?P<copy>{_COPY.pattern})\.(?P<size>[0-9]+)\.tmp")


def open_cache() -> tuple[Path, int]:
    """The cache's folder, which is made, and its limit in bytes."""
    given = os.environ.get("LGD_CACHE") or "~/.cache/lgd"
    text = os.environ.get("LGD_CACHE_GB") or "100"
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise DataError(
            f"LGD_CACHE_GB is {text!r}: set it to the gigabytes that remote files may take here, such as 100"
        )
    if "://" in given:
        raise DataError(f"LGD_CACHE is {given}: set it to a folder on a disk of this machine")
    try:
        folder = Path(given).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{given} cannot be made ({reason}): name another folder in LGD_CACHE") from error
    return folder, limit


def copy_path(folder: Path, digest: str, suffix: str) -> Path:
    """Where the copy of a file with this digest lies; a suffix of plain letters is kept, for people who look there."""
    assert re.fullmatch(DIGEST, digest), "anything else could lead out of the folder"
    return folder / f"lgd-{digest}{suffix if re.fullmatch(_SUFFIX, suffix) else ''}"


@contextlib.contextmanager
def explain_errors(folder: Path, url: Location) -> Iterator[None]:
    """Errors of the cache's own disk become a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{folder} cannot hold a copy of {url} ({error.strerror or error}): free space there, name another folder "
            "in LGD_CACHE, or lower LGD_CACHE_GB"
        ) from error


def lock_copy(copy: Path) -> contextlib.AbstractContextManager[object]:
    """The lock of one copy, to add or drop it."""
    return hold_lock(_lock_path(copy), "downloading", remedy=_REMEDY)


def _lock_path(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.lock")


def lock_room(folder: Path) -> contextlib.AbstractContextManager[object]:
    """The lock of the cache's folder as a whole; held for moments only."""
    return hold_lock(folder / ".lgd-room.lock", "making room", remedy=_REMEDY)


def open_copy(copy: Path, size: int | None) -> BinaryIO | None:
    """Open a copy, unbuffered, if it is there and of this size; its time of change becomes that of its last use."""
    try:
        if not stat.S_ISREG(copy.lstat().st_mode):
            raise DataError(f"{copy} is no file, so lgd did not put it there: remove it, or use another LGD_CACHE")
        file = io.FileIO(copy, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))
    except FileNotFoundError:
        return None
    if size is not None and os.fstat(file.fileno()).st_size != size:
        file.close()
        return None
    os.utime(file.fileno())
    return file


def reserve(copy: Path, size: int, limit: int) -> Path:
    """Make room, and the temporary file; its name holds its size, so that other downloads leave it room.

    The caller holds the lock of `copy`.
    """
    for leftover, match in _list_files(copy.parent, _TEMPORARY):
        if match["copy"] == copy.name:
            Path(leftover.path).unlink(missing_ok=True)
    temporary = copy.with_name(f".{copy.name}.{size}.tmp")
    while True:
        with lock_room(copy.parent):
            if _evict(copy.parent, limit - size):
                temporary.touch(exist_ok=False)
                return temporary
        # Downloads that are under way hold the room; they wait for nobody.
        time.sleep(0.05)


def _list_files(folder: Path, form: re.Pattern[str]) -> Iterator[tuple[os.DirEntry[str], re.Match[str]]]:
    """The files in the cache whose whole name has a form; links to files are none."""
    with os.scandir(folder) as entries:
        for entry in entries:
            match = form.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                yield entry, match


def _evict(folder: Path, limit: int) -> bool:
    """Remove the least recently used copies until the others take at most `limit` bytes; whether they do."""
    total = sum(int(match["size"]) for entry, match in _list_files(folder, _TEMPORARY) if not _abandoned(entry, match))
    copies = []
    for entry, _ in _list_files(folder, _COPY):
        # Another process may drop it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            facts = entry.stat(follow_symlinks=False)
            copies.append((facts.st_mtime_ns, facts.st_size, entry.path))
            total += facts.st_size
    for _, size, path in sorted(copies):
        if total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return total <= limit


def _abandoned(temporary: os.DirEntry[str], match: re.Match[str]) -> bool:
    """Remove what a killed download left: nobody holds its lock."""
    path = Path(temporary.path)
    lock = _lock_path(path.with_name(match["copy"]))
    descriptor = try_lock(lock, _REMEDY)
    if descriptor is None:
        return False
    path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    os.close(descriptor)
    return True
