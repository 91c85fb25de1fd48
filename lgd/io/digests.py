"""Digests of files and of JSON documents, and how two documents differ."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import xxhash

from lgd.base.text import escape_text
from lgd.io.location import Location

_HASHED = 1 << 20
"""Bytes that are hashed at a time."""


def sha256(path: str | Path) -> str:
    """SHA-256 of a local file's content, as hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_64(text: str) -> int:
    """The first 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def may_have_sha256(path: Location, digest: str) -> bool:
    """Whether a local file has this SHA-256; one behind a url may, for to see would cost a download."""
    return not isinstance(path, Path) or sha256(path) == digest


def xxh3(file: BinaryIO) -> str:
    """XXH3-128 of what is left to read of an open file, as hexadecimal: finds damage, at ten times SHA-256's speed.

    It finds no malice: a reader of the file must bear any content.
    """
    return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def matches(file: BinaryIO, digest: str) -> bool:
    """Whether an open file has this SHA-256 (64 digits) or XXH3-128 (32), wherever and by whomever it is being read."""
    hasher = hashlib.sha256() if len(digest) == 64 else xxhash.xxh3_128()
    place = 0
    while block := os.pread(file.fileno(), _HASHED, place):
        hasher.update(block)
        place += len(block)
    return hasher.hexdigest() == digest


def digest_of(document: object) -> str:
    """SHA-256 of a JSON document in its canonical form."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def format_diff(
    there: Mapping[str, object], asked: Mapping[str, object], place: str, other: str = "asked for"
) -> list[str]:
    """A line for each field, by its dotted name, in which two JSON documents differ; `place` is where `there` is, and
    `other` where `asked` is.
    """
    before, now = _flat(there), _flat(asked)
    return [
        f"  {name}: {escape_text(before.get(name), 70)} {place}, {escape_text(now.get(name), 70)} {other}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(document: Mapping[str, object], before: str = "") -> dict[str, object]:
    """The leaves of a document by their dotted names."""
    leaves: dict[str, object] = {}
    for name, value in document.items():
        leaves |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return leaves
