"""Atomic publication and digests.

A file that readers may see is first written under a temporary name beside its place, flushed to the disk and
then renamed: it is there whole, or not at all.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lgd.config import DataError


@contextlib.contextmanager
def publish(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success flush it to the disk and rename it to `path`.

    On an error the temporary file is removed and nothing appears at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Flush a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Publish `content` at `path`."""
    with publish(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, document: Any) -> None:
    """Publish a JSON document at `path`."""
    write_bytes(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON document; `DataError` names the file when it is absent or broken."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON document in its canonical form."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
