"""Large remote files, read through local copies.

The copies lie in LGD_CACHE (default ~/.cache/lgd) and take at most LGD_CACHE_GB (default 100) gigabytes: the least
recently used ones make room for new ones. The folder should be on a disk of the node's own. It may be deleted at any
time when nothing runs.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from lgd.errors import DataError
from lgd.files import matches, sync
from lgd.urls import FULL, call, is_remote, place


def fetch(path: str | Path, digest: str | None = None, size: int | None = None, *, name: str = "") -> Path:
    """The local path of a file; one behind a url is copied into the cache first, unless it is there.

    `digest`, `size`: SHA-256 or XXH3-128, and bytes, that the file must have, checked when it is copied. A copy is
    found again by its digest; where there is none, by its url and `name`, which must change with the content. Threads
    and processes that want the same file copy it once. Another process may evict the copy before it is opened:
    `open_file` sees to that. Raises `DataError` for a file that is not as stated, twice, or does not fit, and as
    `lgd.urls.call` does.
    """
    url: Any = place(path)
    if not is_remote(url):
        return url
    assert digest or name, "without a digest or a name a stale copy would be taken"
    key = digest or hashlib.sha256(f"{name} {url}".encode()).hexdigest()
    folder, limit = _cache()
    copy = folder / f"{key}{url.suffix}"
    if _used(copy, size):
        return copy
    from filelock import FileLock

    lock = folder / f".{copy.name}.lock"
    with FileLock(lock):
        try:
            if not _used(copy, size):
                _download(url, copy, digest, size, limit)
        finally:
            # Whoever waits for a removed lock file sees that, and makes a new one.
            lock.unlink(missing_ok=True)
    return copy


def open_file(path: str | Path, digest: str | None = None, size: int | None = None, *, name: str = "") -> BinaryIO:
    """`fetch` a file and open it unbuffered. An open file stays readable after its copy is evicted, as POSIX has it."""
    for _ in range(5):
        local = fetch(path, digest, size, name=name)
        try:
            return open(local, "rb", buffering=0)
        except FileNotFoundError:
            if local == place(path):
                raise
    raise DataError(f"{local.parent}: copies are evicted before they are opened: raise LGD_CACHE_GB")


def _cache() -> tuple[Path, int]:
    """The cache's folder, which is made, and its limit in bytes."""
    folder = Path(os.environ.get("LGD_CACHE") or "~/.cache/lgd").expanduser().absolute()
    text = os.environ.get("LGD_CACHE_GB") or "100"
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise DataError(
            f"LGD_CACHE_GB is {text!r}: set it to the gigabytes that remote files may take here, such as 100"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}): name another folder in LGD_CACHE") from error
    return folder, limit


def _used(copy: Path, size: int | None) -> bool:
    """Whether the copy is there; its time of change becomes that of its last use."""
    try:
        if size is not None and copy.stat().st_size != size:
            return False
        os.utime(copy)
    except FileNotFoundError:
        return False
    return True


def _download(url: Any, copy: Path, digest: str | None, size: int | None, limit: int) -> None:
    """Copy a remote file to `copy`, whole and checked; the caller holds the lock of `copy`."""
    bytes_ = call(url, "read", url.fs.info, url.path).get("size") if size is None else size
    temporary = _reserve(copy, url, int(bytes_ or 0), limit)
    try:
        for last in (False, True):
            call(url, "read", url.fs.get_file, url.path, str(temporary))
            found = temporary.stat().st_size
            if size is not None and found != size:
                problem = f"has {found} bytes instead of {size}"
            elif digest and not matches(temporary, digest):
                problem = "has another digest than is stated"
            else:
                break
            if last:
                raise DataError(f"{url} {problem}: it was damaged or replaced: upload it again")
        sync(temporary)
        # Whoever counts what lies in the folder must meet it under one of the two names.
        with _room(copy.parent):
            os.replace(temporary, copy)
        sync(copy.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{copy.parent}: no space left for {url} ({bytes_} bytes): free some, name another folder in LGD_CACHE, "
            "or lower LGD_CACHE_GB"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(copy: Path, url: Any, size: int, limit: int) -> Path:
    """Make room, and the temporary file; its name tells its size, so that other downloads leave it room."""
    if size > limit:
        raise DataError(
            f"{url} has {size} bytes, more than the cache may hold ({limit}): raise LGD_CACHE_GB, or build the set "
            "with a smaller --shard-size"
        )
    for leftover in copy.parent.glob(f".{copy.name}.*.tmp"):
        leftover.unlink()
    temporary = copy.with_name(f".{copy.name}.{size}.tmp")
    while True:
        with _room(copy.parent):
            if _evict(copy.parent, limit - size):
                temporary.touch()
                return temporary
        # Downloads that are under way hold the room; they wait for nobody.
        time.sleep(0.05)


def _room(folder: Path) -> contextlib.AbstractContextManager[Any]:
    """The lock of the cache's folder as a whole; held for moments only."""
    from filelock import FileLock

    return FileLock(folder / ".room.lock", poll_interval=0.01)


def _evict(folder: Path, limit: int) -> bool:
    """Remove the least recently used copies until the others take at most `limit` bytes; whether they do."""
    copies, total = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".tmp"):
                total += 0 if _abandoned(entry) else int(entry.name.split(".")[-2])
            elif not entry.name.startswith("."):
                # Another process may remove it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat()
                    copies.append((facts.st_mtime_ns, facts.st_size, entry.path))
                    total += facts.st_size
    for _, size, path in sorted(copies):
        if total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return total <= limit


def _abandoned(temporary: os.DirEntry[str]) -> bool:
    """Remove what a killed download left: nobody holds its lock."""
    from filelock import FileLock, Timeout

    lock = Path(temporary.path.rpartition(".")[0].rpartition(".")[0] + ".lock")
    try:
        with FileLock(lock, timeout=0):
            Path(temporary.path).unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    except Timeout:
        return False
    return True
