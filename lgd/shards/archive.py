"""One shard on the disk: a plain tar, and an index that makes any sample of it one read.

The index is needed because a tar can only be read from its start. Nothing in a shard is trusted: the index must
tile the tar exactly, and every read checks the tar header, the crc32 and the KEY.json of what it reads.
"""

import functools
import io
import itertools
import math
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError
from zlib_ng.zlib_ng import crc32

from lgd.base.errors import DataError
from lgd.base.records import explain
from lgd.base.target import Target
from lgd.io.location import Location
from lgd.io.remote import name_with_copy, open_checked
from lgd.shards.image import kind
from lgd.shards.manifest import NOWHERE, REBUILD, PatchMeta

INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
"""Type of one entry of an `.idx`, which holds `numpy.save` content of shape (samples, members of a sample)."""
SKIPPED = PatchMeta.model_construct(**vars(NOWHERE), key="", label=None, slide=None, group="", mpp=None)
"""In the place of one that could not be read."""

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_JSON = 1 << 16


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
    keeps_files: bool
    """Whether its images are the files that the set was built from, so that KEY.json has their digests."""
    he_size: int | None = None
    """Side of the H&E that a sample also has as its role hes; None where it has none."""
    target: Target
    """What its labels are of."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The members of a sample, in their order: the columns of the index."""
        return tuple(self.extensions)

    def index(self) -> np.ndarray:
        """The offset index: (samples, members) of `INDEX`, columns as `roles`, read-only."""
        shape = self.samples, len(self.extensions)
        return load_table(self.path.with_suffix(".idx"), self.idx_sha256, None, INDEX, shape)

    def open(self) -> tuple[BinaryIO, np.ndarray]:
        """The tar, unbuffered, and its index, checked against each other and against the manifest.

        Those of a url are fetched through the cache. The members that the index states must tile the tar without a
        gap up to the zeros of its end, so that a member too many or too few and a cut tar raise `DataError`. Only the
        end is read.
        """
        index = self.index()

        def find_problem(file: BinaryIO) -> str:
            size = os.fstat(file.fileno()).st_size
            if size != self.bytes:
                return f"has {size} bytes, but the manifest says {self.bytes}"
            end, reason = tiled(index, self.roles, size)
            if not reason and os.pread(file.fileno(), size - end, end).strip(b"\0"):
                reason = "has something behind its last sample that the index does not know"
            return reason

        return open_checked(self.path, self.sha256, self.bytes, REBUILD, find_problem), index


def load_table(
    path: Location, digest: str, size: int | None, dtype: np.dtype[np.void], shape: tuple[int, ...]
) -> np.ndarray:
    """What `numpy.save` wrote of this type and shape, (samples, ...), read-only.

    `DataError` for any other content, and for a file that is missing, or not of this SHA-256 and, where it is known,
    of this size.
    """
    # numpy.load would also take zip files and pickles; and it parses the head with `ast`, which fails now and then when
    # several threads of Python 3.11 do so at once.
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype.descr, "fortran_order": False, "shape": shape})
    head = stream.getvalue()
    expected = len(head) + math.prod(shape) * dtype.itemsize
    with open_checked(path, digest, size, REBUILD) as file:
        # The size comes first: the count of a hostile manifest would ask for any amount of memory.
        content = file.read(expected) if os.fstat(file.fileno()).st_size == expected else b""
    if not content.startswith(head):
        raise DataError(f"{path} is no table of {shape[0]} samples, or broken: {REBUILD}")
    return np.frombuffer(content, dtype, offset=len(head)).reshape(shape)


def tiled(index: np.ndarray, roles: tuple[str, ...], size: int) -> tuple[int, str]:
    """Where the last member of a tar of `size` bytes ends, and why its index does not tile it, or nothing."""
    entries = index.reshape(-1)
    # Places follow from the lengths alone: each member has one header and is padded to whole blocks.
    lengths = entries["length"].astype(np.int64)
    steps = _BLOCK + -(-lengths // _BLOCK) * _BLOCK
    ends = np.cumsum(steps)
    wrong = np.flatnonzero(entries["offset"] != (ends - steps + _BLOCK).astype(np.uint64))
    end = int(ends[-1])
    if wrong.size:
        row, column = divmod(int(wrong[0]), len(roles))
        return end, (
            f"does not fit its index, row {row}, {roles[column]}: the index places it at byte "
            f"{entries['offset'][wrong[0]]}, but the members before it end at {ends[wrong[0]] - steps[wrong[0]]}: the "
            "index is of another tar, or was changed"
        )
    # A tar ends with two empty blocks, and is filled up to whole records.
    record = tarfile.RECORDSIZE
    if -(-(end + 2 * _BLOCK) // record) * record != size:
        return end, f"has {size} bytes, but its index describes members that end at byte {end}"
    longest = int(index["length"][:, 0].max())
    return end, f"holds a KEY.json of {longest} bytes" if longest > _LONGEST_JSON else ""


def read_sample(
    file: BinaryIO, index: np.ndarray, row: int, shard: Shard, roles: Sequence[str]
) -> tuple[PatchMeta, dict[str, memoryview]]:
    """Read one sample of an open shard, from any thread: its KEY.json, and the content of the images of `roles`.

    One read for the first image, one for all, two for the IHC alone; what is not asked for is not touched. Of each
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
                meta, reason = _parse_meta(content, shard)
            else:
                reason = "" if kind(content) == shard.extensions[role] else f"is no {shard.extensions[role]} image"
                contents[role] = content
            if not reason:
                assert meta is not None, "its json is the first member of a sample"
                name = f"{meta.key}.json" if column == 0 else f"{meta.key}.{role}.{shard.extensions[role]}"
                reason = _wrong_header(block[at - _BLOCK : at], name, length)
            if reason:
                raise _damaged(file, shard, row, meta, role, reason)
    assert meta is not None
    return meta, contents


def _parse_meta(content: memoryview, shard: Shard) -> tuple[PatchMeta | None, str]:
    """A KEY.json of a shard, or None, and what is wrong with it, or nothing."""
    try:
        meta = PatchMeta.model_validate_json(bytes(content))
    except ValidationError as error:
        return None, explain(error)
    if meta.slide not in (None, meta.group):
        return None, f"{meta.key}: fields slide and group are {meta.slide!r:.80} and {meta.group!r:.80}"
    if meta.split != shard.split:
        return meta, f"field split is {meta.split!r:.80}, but the shard is of {shard.split}"
    if (meta.sha256.ihc is not None) != ("ihc" in shard.extensions):
        return meta, f"field sha256 has {'an' if meta.sha256.ihc else 'no'} IHC, and the set {shard.roles[1:]}"
    if meta.label is not None and (problem := shard.target.find_problem(meta.label)):
        return meta, f"field label is {meta.label!r:.80}, {problem}"
    return meta, ""


@functools.lru_cache
def _runs(roles: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """First and last column of each read: KEY.json, and what is wanted."""
    columns = [column for column, role in enumerate(roles) if role in ("json", *wanted)]
    runs = [list(run) for _, run in itertools.groupby(columns, lambda column: column - columns.index(column))]
    return tuple((run[0], run[-1]) for run in runs)


def _damaged(file: BinaryIO, shard: Shard, row: int, meta: PatchMeta | None, role: str, reason: str) -> DataError:
    key = f"{meta.key}, " if meta else ""
    return DataError(f"{name_with_copy(shard.path, file)}, row {row}, {key}{role}: {reason}: {REBUILD}")


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
