"""The folder of local copies of remote files: its names, its limit, who may be removed.

The copies lie in LGD_CACHE (default ~/.cache/lgd) and take at most LGD_CACHE_GB (default 100) gigabytes: the least
recently used ones make room for new ones. A file that a process has open or mapped keeps its room on the disk even
without a name, so it is not removed, and who needs its room waits. The limit therefore holds for the disk, but for the
rest of a block in each file. The folder should be on a disk of the node's own. It may be deleted at any time when
nothing runs. Only files with these names are counted and removed; all others, and links and folders of any name, are
the user's:

    lgd-DIGEST.tar             a copy; DIGEST is the SHA-256 or XXH3-128 of its content
    .lgd-DIGEST.tar.SIZE.tmp   a download of SIZE bytes
    .lgd-DIGEST.tar.lock       held while the copy is added or dropped
    .lgd-room.lock             held for moments while copies are counted, added or evicted
"""

import contextlib
import errno
import fcntl
import io
import logging
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.io.locks import hold_lock, try_lock

logger = logging.getLogger(__name__)

idle_maps: list[Callable[[], object]] = []
"""What drops maps of copies that this process can do without, as long as there is no room."""

DIGEST = "[0-9a-f]{64}|[0-9a-f]{32}"
"""SHA-256 or XXH3-128."""

_LONGEST_WAIT = 60.0
"""Seconds to wait for files that others have open."""
_RECENT = 60.0
"""Seconds since its last use in which a copy does not make room for one that is fetched ahead."""
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
    facts = os.fstat(file.fileno())
    # It may have been removed while it was being opened.
    if facts.st_nlink == 0 or (size is not None and facts.st_size != size):
        file.close()
        return None
    os.utime(file.fileno())
    return file


def reserve(copy: Path, size: int, limit: int) -> Path:
    """Make room, and the temporary file; its name holds its size, so that other downloads leave it room.

    The caller holds the lock of `copy`. Raises `DataError` where files that are open leave no room for a minute.
    """
    for leftover, match in _list_files(copy.parent, _TEMPORARY):
        if match["copy"] == copy.name:
            Path(leftover.path).unlink(missing_ok=True)
    temporary = copy.with_name(f".{copy.name}.{size}.tmp")
    began, noted = time.monotonic(), False
    while True:
        with lock_room(copy.parent):
            downloads = _count_downloads(copy.parent)
            if _evict(copy.parent, limit - size - downloads):
                temporary.touch(exist_ok=False)
                return temporary
        for drop in idle_maps:
            drop()
        # Downloads that are under way hold the room, which wait for nobody, or files that are being read.
        waited = time.monotonic() - began
        if waited > _LONGEST_WAIT and not downloads:
            raise DataError(
                f"{copy.parent} has no room for {size} bytes more, what is read now fills it to its limit ({limit} "
                "bytes): raise LGD_CACHE_GB"
            )
        if waited > _LONGEST_WAIT / 10 and not noted:
            noted = True
            logger.warning(
                "waiting for room in %s, whose limit is LGD_CACHE_GB: what is read now fills it", copy.parent
            )
        time.sleep(0.05)


def has_room(size: int) -> bool:
    """Whether a file of this size can be fetched ahead of its use: no copy that was used a moment ago goes for it."""
    folder, limit = open_cache()
    with lock_room(folder):
        left = limit - size - _count_downloads(folder)
        recent = time.time_ns() - int(_RECENT * 1e9)
        return sum(size for used, size, _ in _list_copies(folder) if used > recent) <= left


def _list_files(folder: Path, form: re.Pattern[str]) -> Iterator[tuple[os.DirEntry[str], re.Match[str]]]:
    """The files in the cache whose whole name has a form; links to files are none."""
    with os.scandir(folder) as entries:
        for entry in entries:
            match = form.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                yield entry, match


def _count_downloads(folder: Path) -> int:
    """Bytes that the downloads under way will take."""
    return sum(int(match["size"]) for entry, match in _list_files(folder, _TEMPORARY) if not _abandoned(entry, match))


def _list_copies(folder: Path) -> list[tuple[int, int, str]]:
    """Time of last use, bytes and path of each copy."""
    copies = []
    for entry, _ in _list_files(folder, _COPY):
        # Another process may drop it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            facts = entry.stat(follow_symlinks=False)
            copies.append((facts.st_mtime_ns, facts.st_size, entry.path))
    return copies


def _evict(folder: Path, limit: int) -> bool:
    """Remove the least recently used copies until the others take at most `limit` bytes; whether they do."""
    copies = _list_copies(folder)
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= limit:
            break
        if _remove_unless_open(path):
            total -= size
    return total <= limit


def _remove_unless_open(path: str) -> bool:
    """Remove a copy that no process has open or mapped; whether it is gone.

    The kernel leases a file only to who alone has it open. Where it leases none (some file systems, a file of another
    user's) any may be removed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    try:
        # Who opens it now waits until it is closed here; the signal about that would end the process by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            os.close(descriptor)
            return False
    Path(path).unlink(missing_ok=True)
    os.close(descriptor)
    return True


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
