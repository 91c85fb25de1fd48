"""Locks between processes: on a folder that one of them works on, and on a file that several want to make.

A lock is the kernel's (flock) on a file of its own, so it goes with the process that holds it, however that ends, and
none is ever stale. Its holder writes into the file who it is, and removes it at the end. Across nodes a lock holds
where the file system carries it (NFS 4, Lustre mounted with -o flock, GPFS); a url has none.

The packages for this are not used: their releases take a file system without locks for a lock that is taken, or fall
back to files that outlive their process.
"""

import contextlib
import errno
import fcntl
import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lgd.base.errors import DataError
from lgd.base.records import Count, Line, Record, load_json
from lgd.io.files import explain_write_errors
from lgd.io.location import Location, as_location

logger = logging.getLogger(__name__)

LOCK = ".lgd.lock"
"""The lock of a folder lies in it under this name."""
DEFAULT_REMEDY = (
    "use a folder on a file system that has them (a local disk, NFS 4, Lustre mounted with -o flock, GPFS), or a url "
    "such as s3://"
)

_TAKEN = {errno.EACCES, errno.EAGAIN}
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# The file was removed by its holder, on an NFS server also after it was opened here.
_GONE = {errno.ENOENT, errno.ESTALE}
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.EISDIR}
_LONGEST_PAUSE, _LONGEST_NAME = 0.05, 10_000
# More often than others can remove a folder in between; /proc takes no file however often it is asked.
_LOST_FOLDERS = 100
# The owner of a lock that was taken a moment ago has not written its name yet.
_NAMING = 1.0
_QUIET_WAIT = 30.0


class Owner(Record):
    """Who holds a lock."""

    doing: Line
    pid: Count
    host: Line
    since: Annotated[float, Field(ge=0)]
    """Seconds since 1970."""

    def describe(self) -> str:
        """One clause on who does what."""
        minutes = max(0.0, time.time() - self.since) / 60
        return f"process {self.pid} on {self.host} is {self.doing} there, for {minutes:.1f} minutes"


class TakenError(DataError):
    """Another process holds the lock."""


@contextlib.contextmanager
def exclusive(folder: str | Location, doing: str) -> Iterator[None]:
    """Let one process at a time work on a folder, which is made; a folder at a url is given to everybody.

    `doing` is shown to others: "training", "building shards". A folder that is empty at the end is removed if it was
    made here. Raises `TakenError` with who is at work, and `DataError` for a file system without locks.
    """
    at = as_location(folder)
    with explain_write_errors(at):
        missing = [path for path in (at, *at.parents) if isinstance(path, Path) and not path.exists()]
    try:
        with hold_lock(at / LOCK, doing, wait=False):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


@contextlib.contextmanager
def hold_lock(path: Location, doing: str, *, wait: bool = True, remedy: str = DEFAULT_REMEDY) -> Iterator[None]:
    """Hold the lock that the file `path` stands for; it is made with its folder, and removed at the end.

    Threads exclude each other like processes. Without `wait`, `TakenError` names who holds it; a long wait is logged on
    standard error. `remedy` is what to do where the file system has no locks. A url has none, and all may enter.
    """
    if not isinstance(path, Path):
        yield
        return
    with explain_write_errors(path):
        descriptor = _acquire(path, wait, remedy)
    try:
        with explain_write_errors(path):
            owner = Owner(doing=doing, pid=os.getpid(), host=platform.node(), since=time.time())
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner.model_dump_json().encode() + b"\n", 0)
        yield
    finally:
        # It is another's where somebody removed it while it was held.
        with contextlib.suppress(OSError, DataError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, wait: bool, remedy: str) -> int:
    """The open and locked file `path`."""
    began, pause, noted = time.monotonic(), 0.001, False
    while True:
        descriptor = try_lock(path, remedy)
        if descriptor is not None:
            return descriptor
        waited = time.monotonic() - began
        owner = read_owner(path)
        if not wait and (owner is not None or waited > _NAMING):
            raise TakenError(f"{path.parent}: {_explain_taken(path, owner)}")
        if wait and waited > _QUIET_WAIT and not noted:
            noted = True
            logger.warning("waiting for %s: %s", path.parent, _explain_taken(path, owner))
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def try_lock(path: Path, remedy: str = DEFAULT_REMEDY) -> int | None:
    """The open and locked file `path`, or None while another holds it; close it to give the lock back."""
    with contextlib.ExitStack() as opened:
        try:
            descriptor = _open(path, remedy)
            opened.callback(os.close, descriptor)
            if not _lock(descriptor) or not _is_at(descriptor, path):
                return None
        except OSError as error:
            if error.errno in _GONE:
                return None
            if error.errno in _NO_FILE:
                raise DataError(f"{path} is no plain file, and a lock must lie there: remove it") from error
            if error.errno not in _WITHOUT_LOCKS:
                raise
            path.unlink(missing_ok=True)
            raise DataError(
                f"{path.parent} lies on a file system without locks (flock: {error.strerror}), so two processes could "
                f"spoil each other's work there: {remedy}"
            ) from error
        opened.pop_all()
    return descriptor


def _open(path: Path, remedy: str) -> int:
    """Make or open the file of a lock, whose folder others may remove and make again at any moment."""
    for _ in range(_LOST_FOLDERS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # NFS locks only what is open for writing. A link might lead to a file of somebody else's.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:
            continue
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(f"{path.parent} cannot be made, a file is in the way: name another folder") from error
    raise DataError(f"{path.parent} cannot hold locks, no file can be made there: {remedy}")


def _lock(descriptor: int) -> bool:
    """Lock an open file; False while another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still lies at `path`, from where its last holder removed it."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise DataError(f"{path} is no plain file or has another name too, and a lock must lie there: remove it")
    # Opened, because an NFS client may answer a mere question from what it knew.
    again = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.path.samestat(found, os.fstat(again))
    finally:
        os.close(again)


def read_owner(path: Path) -> Owner | None:
    """Who wrote its name into a lock's file last, if anybody did."""
    try:
        with path.open("rb") as file:
            return Owner.from_json(load_json(file.read(_LONGEST_NAME)))
    except (OSError, ValueError):
        return None


def _explain_taken(path: Path, owner: Owner | None) -> str:
    """Who holds a lock, and what to do."""
    if owner is None:
        return "another process works there: wait until it is done, or end it"
    message = f"{owner.describe()}: wait until it is done, or end it"
    if owner.host == platform.node() and _is_alive(owner.pid):
        return message
    # An NFS server may keep the lock of a client that vanished.
    return f"{message}; if it is gone, as after a crash of {owner.host}, remove {path}"


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True
