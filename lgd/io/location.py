"""What a user typed -> a path or a url, and one message for whatever a remote answers.

A url becomes a `UPath`, of which names and parents are taken as of a `pathlib.Path`; `lgd.io.files` reads and writes
both.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, Union

from lgd.base.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from upath import UPath

Params = ParamSpec("Params")
Result = TypeVar("Result")

Location = Union[Path, "UPath"]
"""A file or a folder: a path here, or a url (imported late: it takes 0.2 s). Only the modules of io tell them apart."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk, or of a quota or a limit on the size of a file."""

# Ray hands a job's configuration to the process that it starts for the job, and so to all that this starts.
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# fsspec's wrappers around other file systems, and those that are this process or this machine.
_REFUSED = """
blockcache cached filecache simplecache dir generic reference zip tar libarchive asynclocal local memory data jupyter
dask async_wrapper root
""".split()
_HTTP = {"http", "https"}
_EXTRAS = {"s3": "lgd[s3]", "s3a": "lgd[s3]", "gs": "lgd[gs]", "gcs": "lgd[gs]", "http": "aiohttp", "https": "aiohttp"}
_KEYS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}


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
    if scheme not in _HTTP:
        return UPath(text.rstrip("/"), use_listings_cache=False)
    import aiohttp

    # Its own limit of 5 minutes in all would cut the download of a large shard; proxies are taken as usual.
    client = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60), "trust_env": True}
    return UPath(text.rstrip("/"), use_listings_cache=False, client_kwargs=client)


def as_output_location(text: str | Location, option: str) -> Location:
    """`as_location` of what will be written, which `option` named.

    Raises `DataError` for a url of a kind that is only read, and `ConfigError` for a relative path in a job of Ray: the
    folder that it is relative to goes with the job.
    """
    path = as_location(text)
    if not isinstance(path, Path) and path.protocol in _HTTP:
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
    """A location in Arrow's terms, a path in a file system; that of a url is the client that everything else uses."""
    if isinstance(location, Path):
        return str(location), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return location.path, PyFileSystem(FSSpecHandler(location.fs))


def call(
    url: "UPath", doing: str, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs
) -> Result:
    """Call a function of a url's file system; its errors become `RemoteError` or `MissingError`.

    `doing`: read, written or listed. s3fs and gcsfs try again by themselves; http is tried three times here.
    """
    for pause in (0.3, 1, None):
        try:
            return function(*args, **options)
        except DataError:
            raise
        except Exception as error:  # The client libraries share no base class.
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            cause = error.__cause__
            # fsspec calls every error of http a missing file.
            found = cause if cause and isinstance(error, FileNotFoundError) and _module(cause) == "aiohttp" else error
            status = getattr(found, "status", None)
            passing = _module(found) == "aiohttp" and (status is None or status >= 500)
            if pause is None or not passing:
                raise _explained(url, doing, found, status) from error
            time.sleep(pause)
    raise AssertionError


def _module(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _explained(url: "UPath", doing: str, error: BaseException, status: int | None) -> DataError:
    """What a client library's error means, with the remedy."""
    scheme = {"s3a": "s3", "gcs": "gs"}.get(url.protocol, url.protocol)
    problem = f"{url} cannot be {doing}"
    if "bucket does not exist" in str(error):
        return RemoteError(f"{problem}: its bucket does not exist: create it, or correct the url")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingError(f"{url} is missing: correct the url")
    denied = isinstance(error, PermissionError) or status in (401, 403)
    if denied or re.search("Credentials|Profile", type(error).__name__):
        remedy = f"set {_KEYS[scheme]} for every process" if scheme in _KEYS else "ask its owner for access"
        return RemoteError(f"{problem}: access is denied ({error}): {remedy}")
    if isinstance(error, NotImplementedError) or status in (405, 501):
        return RemoteError(f"{problem}: {scheme} urls do not offer that: use s3://, gs:// or a local folder")
    address = " and AWS_ENDPOINT_URL" if scheme == "s3" else ""
    return RemoteError(
        f"{problem} ({type(error).__name__}: {error}): check the url, the network{address}, and try again"
    )


def fresh_options(url: "UPath") -> dict[str, dict[str, str]]:
    """What a file system's reading functions take so that caches on the way ask the origin again; S3 has no such."""
    return {"headers": {"Cache-Control": "no-cache"}} if url.protocol in _HTTP else {}


def upload(local: Path, url: "UPath") -> None:
    """Copy a local file to a url, where it appears when it is complete."""
    if url.protocol in _HTTP:
        raise RemoteError(f"{url} cannot be written: http urls do not offer that: use s3://, gs:// or a local folder")
    call(url, "written", url.fs.put_file, str(local), url.path)
