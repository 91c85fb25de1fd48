"""One shard on the disk: a plain tar, and an index that makes any sample of it one read.

The index is needed because a tar can only be read from its start. Nothing in a shard is trusted: the index must
tile the tar exactly, and every read checks the tar header, the crc32 and the KEY.json of what it reads.
"""

import functools
import itertools
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from lgd.base.errors import DataError
from lgd.io.digests import sha256
from lgd.io.files import publish
from lgd.io.location import Location
from lgd.io.remote import drop_damaged, name_with_copy, open_file
from lgd.shards.image import kind
from lgd.shards.index import INDEX, REBUILD, load_index, tiled
from lgd.shards.meta import PatchMeta, parse_meta

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A tar of samples, as the manifest states it."""

    path: Location
    """The tar."""
    name: str
    """The file's stem, such as train-000003."""
    split: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str
    extensions: dict[str, str]
    """Extension of each role that a sample has, in their order: json, hes, he, ihc."""
    labels: int
    """Classes that a label may be the number of."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The members of a sample, in their order: the columns of the index."""
        return tuple(self.extensions)

    def index(self) -> np.ndarray:
        """The offset index: (samples, members) of `INDEX`, columns as `roles`, read-only."""
        return load_index(self.path.with_suffix(".idx"), self.samples, len(self.extensions), self.idx_sha256)

    def open(self) -> tuple[BinaryIO, np.ndarray]:
        """The tar, unbuffered, and its index, checked against each other and against the manifest.

        Those of a url are fetched through the cache. The members that the index states must tile the tar without a
        gap up to the zeros of its end, so that a member too many or too few and a cut tar raise `DataError`. Only the
        end is read.
        """
        index = self.index()
        file, reason = self._open(index)
        if reason and drop_damaged(self.path, self.sha256, file):
            file.close()
            file, reason = self._open(index)
        if reason:
            file.close()
            raise DataError(f"{self.path}: {reason}: {REBUILD}")
        return file, index

    def _open(self, index: np.ndarray) -> tuple[BinaryIO, str]:
        """The tar, and what is wrong with it."""
        try:
            file = open_file(self.path, self.sha256, self.bytes)
            size = os.fstat(file.fileno()).st_size
            if size != self.bytes:
                return file, f"has {size} bytes, but the manifest says {self.bytes}"
            end, reason = tiled(index, self.roles, size)
            if not reason and os.pread(file.fileno(), size - end, end).strip(b"\0"):
                reason = "has something behind its last sample that the index does not know"
        except OSError as error:
            raise DataError(f"{self.path} cannot be opened ({error.strerror or error}): {REBUILD}") from error
        return file, reason


def read_sample(
    file: BinaryIO, index: np.ndarray, row: int, shard: Shard, roles: Sequence[str]
) -> tuple[PatchMeta, dict[str, memoryview]]:
    """Read one sample of an open shard, from any thread: its KEY.json, and the content of the images of `roles`.

    One read for the H&E, one for both images, two for the IHC alone; what is not asked for is not touched. Of each
    member the tar header, the crc32 and the type are checked. Raises `DataError` with shard, row, key and role.
    """
    places = index[row].tolist()
    meta: PatchMeta | None = None
    contents = {}
    for first, last in _runs(shard.roles, tuple(roles)):
        start = places[first][0] - _BLOCK
        end = places[last][0] + places[last][1]
        try:
            block = memoryview(os.pread(file.fileno(), end - start, start))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise _damaged(file, shard, row, meta, shard.roles[first], reason) from error
        for column in range(first, last + 1):
            offset, length, crc = places[column]
            role = shard.roles[column]
            at = offset - start
            content = block[at : at + length]
            if len(content) != length:
                raise _damaged(file, shard, row, meta, role, f"the file ends after {len(content)} of {length} bytes")
            if crc32(content) != crc:
                raise _damaged(file, shard, row, meta, role, "its crc32 is not the index's, so the shard is damaged")
            if column == 0:
                meta, reason = _checked_meta(content, shard)
            else:
                reason = "" if kind(content) == shard.extensions[role] else f"is no {shard.extensions[role]} image"
                contents[role] = content
            if not reason:
                assert meta is not None, "its json is the first member of a sample"
                reason = _wrong_header(block[at - _BLOCK : at], member_name(meta, role, shard), length)
            if reason:
                raise _damaged(file, shard, row, meta, role, reason)
    assert meta is not None
    return meta, contents


def _checked_meta(content: memoryview, shard: Shard) -> tuple[PatchMeta | None, str]:
    meta, reason = parse_meta(content, shard.split)
    label = meta.label if meta and not reason else None
    if shard.labels and label is not None and (type(label) is not int or not 0 <= label < shard.labels):
        reason = f"field label is {label!r:.80}, and the set has {shard.labels} classes"
    return meta, reason


@functools.lru_cache
def _runs(roles: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """First and last column of each read: KEY.json, and what is wanted."""
    columns = [column for column, role in enumerate(roles) if role in ("json", *wanted)]
    runs = [list(run) for _, run in itertools.groupby(columns, lambda column: column - columns.index(column))]
    return tuple((run[0], run[-1]) for run in runs)


def _damaged(file: BinaryIO, shard: Shard, row: int, meta: PatchMeta | None, role: str, reason: str) -> DataError:
    key = f"{meta.key}, " if meta else ""
    return DataError(f"{name_with_copy(shard.path, file)}, row {row}, {key}{role}: {reason}: {REBUILD}")


def member_name(meta: PatchMeta, role: str, shard: Shard) -> str:
    """The file name of a sample's member."""
    return f"{meta.key}.json" if role == "json" else f"{meta.key}.{role}.{shard.extensions[role]}"


def _wrong_header(header: memoryview, name: str, length: int) -> str:
    """What is wrong with a member's tar header, or nothing."""
    if header[156] != ord("0"):
        # Links and devices; but also extended headers, which give the next member another name.
        return f"its tar header is of type {bytes(header[156:157])!r}, not of a regular file"
    found = bytes(header[: len(name) + 1])
    if found != name.encode() + b"\0" or header[345]:
        return f"its tar header names {bytes(header[:100]).rstrip(bytes(1))!r}, not {name}"
    if header[124:136] != b"%011o\0" % length:
        return "its tar header states another length than the index"
    return ""


def read_member(fd: int, entry: np.void, what: str) -> bytes:
    """Read one member of an open tar at its `INDEX` entry, from any thread, and check its crc32.

    `what` names shard and key in the `DataError` for a short read or another checksum.
    """
    length = int(entry["length"])
    try:
        content = os.pread(fd, length, int(entry["offset"]))
    except (OSError, OverflowError) as error:
        raise DataError(f"{what}: cannot be read ({error}): {REBUILD}") from error
    if len(content) != length:
        raise DataError(f"{what}: the file ends after {len(content)} of {length} bytes: {REBUILD}")
    if crc32(content) != entry["crc32"]:
        raise DataError(f"{what}: its crc32 is not the index's, so the shard is damaged: {REBUILD}")
    return content


class Written(NamedTuple):
    """What a manifest states of a tar, and the digest of its index."""

    bytes: int
    sha256: str
    idx_sha256: str


def write_archive(
    path: Location, samples: Iterable[tuple[str, Sequence[bytes]]], extensions: dict[str, str]
) -> Written:
    """Publish a tar at `path`, then its index beside it.

    `samples`: each key with the content of each of its members; `extensions`: of each role, in their order.
    """
    import webdataset

    suffixes = [extension if role == "json" else f"{role}.{extension}" for role, extension in extensions.items()]
    crcs: list[int] = []
    with publish(path) as temporary:
        form = {"user": "lgd", "group": "lgd", "mtime": 0, "encoder": False}
        with temporary.open("wb") as stream, webdataset.TarWriter(stream, **form) as writer:
            for key, contents in samples:
                for suffix, content in zip(suffixes, contents, strict=True):
                    # One call a member: of one call's members the writer keeps the alphabetical order.
                    writer.write({"__key__": key, suffix: content})
                    crcs.append(crc32(content))
        # Read back rather than computed, so that the index cannot disagree with the tar.
        places = [(member.offset_data, member.size) for member in tar_members(temporary)]
        size, digest = temporary.stat().st_size, sha256(temporary)
    rows = [(*place, crc) for place, crc in zip(places, crcs, strict=True)]
    index = np.array(rows, dtype=INDEX).reshape(-1, len(extensions))
    with publish(path.with_suffix(".idx")) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, index, allow_pickle=False)
        return Written(size, digest, sha256(temporary))


def tar_members(path: Path) -> list[tarfile.TarInfo]:
    """Headers of a tar's members, in order; `DataError` when it is no tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            return tar.getmembers()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: is no readable tar ({error}): {REBUILD}") from error
