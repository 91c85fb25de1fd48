"""What a user typed -> a path or a url.

A url becomes a `UPath`, of which names and parents are taken as of a `pathlib.Path`; `lgd.io.files` reads and writes
both.
"""

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Union

from lgd.base.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from upath import UPath

Location = Union[Path, "UPath"]
"""A file or a folder: a path here, or a url (imported late: it takes 0.2 s). Only io distinguishes them."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, or of a quota or a limit on the size of a file."""

# Ray hands a job's configuration to the process that it starts for the job, and so to all that this starts.
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# fsspec's wrappers around other file systems, and those that are this process or this machine.
_REFUSED = """
blockcache cached filecache simplecache dir generic reference zip tar libarchive asynclocal local memory data jupyter
dask async_wrapper root
""".split()
HTTP = {"http", "https"}
# Seconds until a server that does not answer, or sends nothing more, is asked again.
_CONNECTING, _STALLED = 5, 15
_EXTRAS = {"s3": "lgd[s3]", "s3a": "lgd[s3]", "gs": "lgd[gs]", "gcs": "lgd[gs]", "http": "aiohttp", "https": "aiohttp"}


class RemoteError(DataError):
    """A url cannot be used now: no connection, no permission, no bucket. It says nothing of the file behind it."""


class MissingError(DataError, FileNotFoundError):
    """There is no file behind a url."""


def as_location(text: str | Location) -> Location:
    """A local path, with the home of `~` or `~user` before it, or a url.

    Raises `DataError` for a scheme that is unknown, not installed, or a wrapper of another one (`a::b`), and for an
    unknown user.
    """
    if not isinstance(text, str):
        return text
    scheme, colon, rest = text.partition("://")
    if not colon:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
            raise DataError(f"{text}: is neither a path nor a url: for a local path of that name write ./{text}")
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            user = text.partition("/")[0]
            raise DataError(
                f"{text}: there is no home of {user} here: write the folder out, or ./{text} for that very name"
            ) from error
    if scheme == "file":
        return Path("/" + rest.removeprefix("localhost").lstrip("/"))
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    if "::" in text or scheme not in known_implementations or scheme in _REFUSED:
        raise DataError(f"{text}: urls of {scheme} are not read or written: use s3://, gs://, http:// or a local path")
    if re.match(r"[^/@]*:[^/@]*@", rest):
        raise DataError(f"{scheme}://...@{rest.partition('@')[2]}: a url must hold no password: use the environment")
    if not rest or rest.startswith("/"):
        raise DataError(f"{text}: names no bucket or host: write {scheme}://NAME/FOLDER")
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        remedy = f"pip install '{_EXTRAS[scheme]}'" if scheme in _EXTRAS else str(error)
        raise DataError(f"{text}: urls of {scheme} need a package that is not installed: {remedy}") from error
    from upath import UPath

    # Listings are not kept: other processes write to the same folders.
    if scheme in HTTP:
        import aiohttp

        # Its own limit of 5 minutes in all would cut the download of a large shard; proxies are taken as usual.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECTING, sock_read=_STALLED)
        client = {"timeout": timeout, "trust_env": True}
        return UPath(text.rstrip("/"), use_listings_cache=False, client_kwargs=client)
    if scheme in ("s3", "s3a"):
        # `lgd.io.calls` tries again: botocore's five tries in each of s3fs's take minutes where a server stalls.
        limits = {"connect_timeout": _CONNECTING, "read_timeout": _STALLED, "retries": {"total_max_attempts": 1}}
        return UPath(text.rstrip("/"), use_listings_cache=False, config_kwargs=limits)
    return UPath(text.rstrip("/"), use_listings_cache=False)


def as_output_location(text: str | Location, option: str) -> Location:
    """`as_location` of what will be written, which `option` named.

    Raises `DataError` for a url of a kind that is only read, and `ConfigError` for a relative path in a job of Ray: the
    folder that it is relative to goes with the job.
    """
    path = as_location(text)
    if not isinstance(path, Path) and path.protocol in HTTP:
        raise DataError(f"{path} cannot be written to: give {option} a folder, or a url such as s3://")
    if isinstance(path, Path) and not path.is_absolute() and _OF_A_JOB in os.environ:
        raise ConfigError(
            f"{option} is {text}, and a job of Ray works in a copy of your folder that is deleted with all that is "
            "written there: give the whole path of a folder that all nodes share, or a url such as s3://BUCKET/FOLDER"
        )
    return path


def require_local(text: str | Location, refusal: str) -> Path:
    """The local path that a user named; a url raises `ConfigError` with the refusal."""
    location = as_location(text)
    if not isinstance(location, Path):
        raise ConfigError(refusal)
    return location


def waits_for_network(text: str | Location) -> bool:
    """Whether a reader there waits rather than works, so that many reads at a time are quicker."""
    return not isinstance(as_location(text), Path)


def relative_name(location: Location, folder: Location) -> str:
    """The name of a file relative to a folder that it lies in, with `/`."""
    if isinstance(location, Path):
        return location.relative_to(str(folder)).as_posix()
    # A UPath's own relative_to takes 0.2 ms.
    return str(location)[len(str(folder)) :].lstrip("/")


def as_arrow(location: Location) -> tuple[str, "FileSystem | None"]:
    """A location in Arrow's terms, a path in a file system; the client of a url tries again by itself."""
    if isinstance(location, Path):
        return str(location), None
    from fsspec import filesystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return location.path, PyFileSystem(FSSpecHandler(filesystem(location.protocol, use_listings_cache=False)))


def fresh_options(url: "UPath") -> dict[str, dict[str, str]]:
    """What a file system's reading functions take so that caches on the way ask the origin again; S3 has no such."""
    return {"headers": {"Cache-Control": "no-cache"}} if url.protocol in HTTP else {}
