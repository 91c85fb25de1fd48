"""Large files, local or behind urls, opened and checked; remote ones are read through `lgd.io.download_cache`."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lgd.base.errors import DataError
from lgd.io.calls import call_promised
from lgd.io.digests import matches
from lgd.io.download_cache import (
    DIGEST,
    copy_path,
    explain_errors,
    lock_copy,
    lock_room,
    open_cache,
    open_copy,
    reserve,
)
from lgd.io.files import sync
from lgd.io.location import Location, MissingError, as_location, fresh_options

if TYPE_CHECKING:
    from upath import UPath


def open_checked(
    path: str | Location,
    digest: str,
    size: int | None,
    remedy: str,
    find_problem: Callable[[BinaryIO], str] | None = None,
) -> BinaryIO:
    """`open_file`, and check every byte, also of a local file; or only what `find_problem` looks at.

    A copy that was damaged in the cache is fetched again. Raises `DataError` with the remedy for a file that is not as
    stated or cannot be opened, `MissingError` for one that is missing, and as `open_file` does.
    """
    find = find_problem or functools.partial(_find_problem, digest=digest, size=size)
    try:
        file = open_file(path, digest, size)
        problem = find(file)
        if problem and drop_damaged(path, digest, file):
            file.close()
            file = open_file(path, digest, size)
            problem = find(file)
    except OSError as error:
        kind = MissingError if isinstance(error, FileNotFoundError) else DataError
        raise kind(f"{path} is missing or cannot be read ({error.strerror or error}): {remedy}") from error
    if problem:
        file.close()
        raise DataError(f"{path} {problem}: {remedy}")
    return file


def drop_damaged(path: str | Location, digest: str, file: BinaryIO) -> bool:
    """Whether `file`, which `open_file` gave, is a copy that no longer has its digest; the cache then forgets it.

    One that finds the content of a file wrong asks here, and opens it once more where the answer is yes. All of the
    file is read, whatever other threads read from it.
    """
    url = as_location(path)
    if isinstance(url, Path) or not _find_problem(file, digest, None):
        return False
    copy = Path(file.name)
    with explain_errors(copy.parent, url), lock_copy(copy), contextlib.suppress(FileNotFoundError):
        # Another reader may have put a better one there meanwhile.
        if os.path.samestat(copy.lstat(), os.fstat(file.fileno())):
            copy.unlink()
    return True


def open_file(path: str | Location, digest: str, size: int | None = None) -> BinaryIO:
    """Open a file, unbuffered; one behind a url is copied into the cache first, unless it is there.

    `digest`, `size`: SHA-256 or XXH3-128, and bytes, that the file must have. Both are checked when it is copied, and
    the size of a copy whenever it is opened. A copy is found again by its digest, whatever its url. Threads and
    processes that want the same file copy it once. A copy that is open keeps its room in the cache: close it soon.
    Raises `DataError` for a file that is not as stated, twice, or does not fit, and for a digest that is none; and as
    `lgd.io.calls.call_promised` does.
    """
    url = as_location(path)
    _require_facts(url, digest, size)
    if isinstance(url, Path):
        return url.open("rb", buffering=0)
    folder, limit = open_cache()
    copy = copy_path(folder, digest, url.suffix)
    with explain_errors(folder, url):
        if file := open_copy(copy, size):
            return file
        with lock_copy(copy):
            return open_copy(copy, size) or _download(url, copy, digest, size, limit)


def name_with_copy(path: Location, file: BinaryIO) -> str:
    """The name of a file that `open_file` opened, with that of the copy that is read where it is behind a url."""
    return str(path) if isinstance(path, Path) else f"{path} (its copy {file.name})"


def _require_facts(path: Location, digest: object, size: object) -> None:
    """Refuse a digest or a size that is none: documents from elsewhere state them, and file names are made of them."""
    remedy = "the document that states it is damaged or forged: get a whole copy"
    if not isinstance(digest, str) or not re.fullmatch(DIGEST, digest):
        raise DataError(
            f"{path}: its digest is stated as {digest!r:.80}, which is no SHA-256 (64 digits 0-9, a-f) and no XXH3-128 "
            f"(32): {remedy}"
        )
    if size is not None and (type(size) is not int or size < 0):
        raise DataError(f"{path}: its size is stated as {size!r:.80}, which is no number of bytes: {remedy}")


def _find_problem(file: BinaryIO, digest: str, size: int | None) -> str:
    """What is wrong with an open file, or nothing."""
    try:
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            return f"has {found} bytes instead of {size}"
        return "" if matches(file, digest) else "does not match its digest"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _download(url: "UPath", copy: Path, digest: str, size: int | None, limit: int) -> BinaryIO:
    """Copy a remote file to `copy`, whole and checked, and open it; the caller holds the lock of `copy`."""
    stated = call_promised(url, "read", url.fs.info, url.path).get("size") if size is None else size
    # One whose size nobody states may need all there is.
    expected = limit if stated is None else int(stated)
    if expected > limit:
        raise DataError(
            f"{url} has {expected} bytes, more than the cache may hold ({limit}): raise LGD_CACHE_GB, or build the set "
            "with a smaller --shard-size"
        )
    temporary = reserve(copy, expected, limit)
    try:
        for attempt in (0, 1):
            # What a proxy has cut or changed may be whole when it is asked for again.
            call_promised(url, "read", _get_file, url, temporary, expected, fresh_options(url) if attempt else {})
            with temporary.open("rb", buffering=0) as file:
                problem = _find_problem(file, digest, size)
            if not problem:
                break
        else:
            raise DataError(f"{url} {problem}: it was damaged or replaced: upload it again")
        sync(temporary)
        # What counts the files of the folder must meet it under one of its two names, and nobody may evict it here.
        with lock_room(copy.parent):
            temporary.replace(copy)
            opened = copy.open("rb", buffering=0)
        sync(copy.parent)
        return opened
    finally:
        temporary.unlink(missing_ok=True)


def _get_file(url: "UPath", temporary: Path, most: int, options: Mapping[str, object]) -> None:
    """Download into a file, but never more bytes than there is room for, whatever the server sends."""
    from fsspec.callbacks import Callback

    class Bound(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > most:
                raise DataError(
                    f"{url} sends more than {most} bytes, its stated size or the limit of the cache (LGD_CACHE_GB): it "
                    "was damaged or replaced: upload it again"
                )

    url.fs.get_file(url.path, str(temporary), callback=Bound(), **options)
