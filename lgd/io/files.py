"""Files here and behind urls: atomic publication, digests, folders.

A file that readers may see is first written under a temporary name beside its place, flushed to the disk and then
renamed: it is there whole, or not at all. A url gets the same promise from its store: an upload appears when it is
complete. Large remote files are read through the cache of `lgd.io.remote`.
"""

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from lgd.base.errors import DataError
from lgd.base.text import dump_json
from lgd.io.calls import Fault, call, upload
from lgd.io.location import FULL, HTTP, Location, MissingError, RemoteError, as_location, fresh_options

Kind = Literal["file", "folder", "other"]

_LITTER = re.compile(
    r"\.ds_store|\._.*|__macosx|icon\r|\.(localized|spotlight-v100|trashes|fseventsd|temporaryitems|apdisk)|"
    r"(eh)?thumbs\.db|desktop\.ini|\$recycle\.bin|system volume information|"
    r"\.nfs[0-9a-f]*|\.fuse_hidden.*|\.smbdelete.*|lost\+found|\.directory|\.trash-[0-9]+|@eadir|\.~lock\..*#",
    re.IGNORECASE | re.DOTALL,
)
"""Of macOS, of Windows, and of Linux and its network drives."""

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_FAILING = {errno.EIO, errno.ESTALE}


@contextlib.contextmanager
def publish(path: str | Location, name_of: Callable[[Path], str] | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; on success flush it to the disk and rename it to `path`.

    `name_of` gives the name that the written file gets instead of that of `path`, such as its digest. For a url the
    temporary file lies in TMPDIR and is uploaded. On an error it is removed and nothing appears; a full disk and a
    folder that may not be written to raise `DataError`.
    """
    path = as_location(path)
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="lgd-") as folder:
            temporary = Path(folder) / path.name
            with explain_write_errors(temporary):
                yield temporary
            upload(temporary, path.with_name(name_of(temporary)) if name_of else path)
        return
    temporary = temporary_path(path)
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path.with_name(name_of(temporary)) if name_of else path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other process takes: pids alone repeat on the nodes of a cluster."""
    host = re.sub("[^A-Za-z0-9-]", "-", platform.node())[:30]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def explain_write_errors(path: Location) -> Iterator[None]:
    """Turn the errors of a full or failing disk, and of a folder that may not be written to, into `DataError`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        remedies = {
            **dict.fromkeys(_FORBIDDEN, "get write access, or name another folder"),
            **dict.fromkeys(_FAILING, "its disk or network drive fails: try again, or use another one"),
        }
        if error.errno in FULL:
            raise DataError(explain_full(path, error)) from error
        if error.errno in remedies:
            raise DataError(f"{path} cannot be written ({reason}): {remedies[error.errno]}") from error
        raise


def explain_full(path: str | Location, error: OSError) -> str:
    """What an error of a full disk means, with the remedy."""
    return (
        f"{path} cannot be written, no space is left ({error.strerror}): free some, or use another disk (for "
        "temporary files by TMPDIR)"
    )


def sync(path: str | Path) -> None:
    """Flush a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Location, content: bytes) -> None:
    """Publish `content` at `path`."""
    with publish(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Location, document: object) -> None:
    """Publish a strict JSON document at `path`; `DataError` names the field of a number that is not finite."""
    write_bytes(path, _encode(path, document))


def create_json(path: str | Location, document: object) -> bool:
    """Publish a JSON document at `path`, unless there is one at that url already; whether it is this one.

    A store that has no such request is asked first, and two that write at once may then both learn that they did. A
    local folder should be locked by the caller.
    """
    at, content = as_location(path), _encode(path, document)
    if isinstance(at, Path):
        write_bytes(at, content)
        return True

    def create() -> bool:
        try:
            at.fs.pipe_file(at.path, content, mode="create")
        except (PermissionError, FileNotFoundError):
            raise
        except (OSError, NotImplementedError) as error:
            if Fault.of(error).may_pass("written", answered=True):
                raise
            # Stores say in several ways that it is there, and that they do not know the request.
            if at.fs.exists(at.path):
                return False
            at.fs.pipe_file(at.path, content)
        return True

    return call(at, "written", create)


def _encode(path: str | Location, document: object) -> bytes:
    try:
        return f"{dump_json(document, indent=1)}\n".encode()
    except DataError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def read_bytes(path: str | Location, fresh: bool = False) -> bytes:
    """The content of a file; one request for a url. Raises `OSError` for a local file, as `call` does for a url.

    `fresh`: caches on the way to a url are asked to fetch it anew.
    """
    at = as_location(path)
    if isinstance(at, Path):
        return at.read_bytes()
    # s3fs would ask for the size first, and read large files in pieces.
    options: dict[str, object] = {"max_concurrency": 1} if at.protocol in ("s3", "s3a") else {}
    if fresh:
        options |= fresh_options(at)
    return bytes(call(at, "read", at.fs.cat_file, at.path, **options))


def read_first_bytes(path: str | Location, count: int) -> bytes:
    """The first bytes of a file, at most `count`; raises as `read_bytes`."""
    at = as_location(path)
    if isinstance(at, Path):
        with at.open("rb") as file:
            return file.read(count)
    size = call(at, "read", at.fs.info, at.path)["size"]
    if size is None or size <= count:
        return read_bytes(at)[:count]
    return bytes(call(at, "read", at.fs.cat_file, at.path, start=0, end=count))


def read_json(path: str | Location) -> Any:
    """Read a JSON document; `DataError` names the file when it is absent or broken."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error


def exists(path: str | Location) -> bool:
    """Whether there is a file or a folder; one or two requests for a url."""
    at = as_location(path)
    if isinstance(at, Path):
        return at.exists()
    try:
        call(at, "read", at.fs.info, at.path)
    except MissingError:
        return False
    return True


def peek_kind(path: Location, presumed: Kind) -> Kind | None:
    """What lies at a local path, None where nothing does; a url is not asked, but taken for what is presumed."""
    if not isinstance(path, Path):
        return presumed
    try:
        # Asked once: another process may make it meanwhile.
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def size_of(path: str | Location) -> int:
    """Bytes of a file; raises `OSError` for a local file, as `call` does for a url."""
    at = as_location(path)
    return at.stat().st_size if isinstance(at, Path) else int(call(at, "read", at.fs.info, at.path)["size"])


def is_litter(name: str) -> bool:
    """Whether a file or folder is named like those that systems leave in every folder, unasked: it is nobody's."""
    return _LITTER.fullmatch(name) is not None


def list_folder(path: str | Location) -> dict[str, Kind]:
    """What lies in a folder, by name, but for litter; nothing where there is no folder.

    A url costs one request in 1,000 files.
    """
    at = as_location(path)
    if isinstance(at, Path):
        if not at.is_dir():
            return {}
        with os.scandir(at) as entries:
            return dict(sorted((entry.name, _kind(entry)) for entry in entries if not is_litter(entry.name)))
    if at.protocol in HTTP:
        raise RemoteError(
            f"{at}: folders behind {at.protocol} cannot be listed: name the files in a CSV (--layout csv)"
        )
    try:
        found = call(at, "listed", at.fs.ls, at.path, detail=True)
    except MissingError:
        return {}
    own = at.path.strip("/")
    kinds: dict[str, Kind] = {"file": "file", "directory": "folder"}
    # A store may keep an empty object for the folder itself, and answers for a file with that file.
    inside = [(entry["name"].strip("/"), kinds.get(entry["type"], "other")) for entry in found]
    by_name = ((name.rpartition("/")[2], kind) for name, kind in sorted(inside) if name != own)
    return {name: kind for name, kind in by_name if not is_litter(name)}


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        # A link that leads back to itself.
        return "other"


def remove(path: str | Location) -> None:
    """Remove a file, if it is there."""
    at = as_location(path)
    if isinstance(at, Path):
        at.unlink(missing_ok=True)
        return
    with contextlib.suppress(MissingError):
        call(at, "removed", at.fs.rm_file, at.path)


def remove_folder(path: str | Location) -> None:
    """Remove a folder and all that is in it, if it is there."""
    at = as_location(path)
    if isinstance(at, Path):
        shutil.rmtree(at, ignore_errors=True)
        return
    with contextlib.suppress(MissingError):
        call(at, "removed", at.fs.rm, at.path, recursive=True)


def try_writing(path: Location) -> None:
    """Write an empty file to a url and remove it: that a bucket or a permission is missing should show early."""
    if not isinstance(path, Path):
        write_bytes(path, b"")
        remove(path)
