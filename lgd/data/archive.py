"""One shard on the disk: a plain tar, and an index that makes any sample of it one read.

The index is needed because a tar can only be read from its start. Nothing in a shard is trusted: the index must
tile the tar exactly, and every read checks the tar header, the crc32 and the KEY.json of what it reads.
"""

import functools
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from zlib_ng.zlib_ng import crc32

from lgd.config import LEVEL_NAMES
from lgd.data.image import EXTENSIONS, kind
from lgd.data.index import INDEX, REBUILD, ROLES, forget, load_index, tiled
from lgd.data.meta import parse_meta
from lgd.errors import DataError
from lgd.files import digest_of, publish, read_json
from lgd.remote import open_file
from lgd.urls import RemoteError, is_remote, place

FORMAT = "lgd-shards/1"
_MOST = 20
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A tar of samples, as the manifest states it."""

    path: Path
    """The tar; a `UPath` where the set lies at a url."""
    name: str
    """The file's stem, such as train-000003."""
    split: str
    samples: int
    bytes: int
    sha256: str
    extensions: dict[str, str]
    """Role (json, he, ihc) -> extension."""

    def index(self) -> np.ndarray:
        """The offset index: (samples, 3) of `INDEX`, columns as `ROLES`, read-only."""
        return load_index(self.path.with_suffix(".idx"), self.samples, self.sha256)

    def open(self) -> tuple[BinaryIO, np.ndarray]:
        """The tar, unbuffered, and its index, checked against each other and against the manifest.

        Those of a url are fetched through the cache. The members that the index states must tile the tar without a
        gap up to the zeros of its end, so that an index of another tar, a member too many or too few and a cut tar
        raise `DataError`. Only the end is read.
        """
        index = self.index()
        try:
            file = open_file(self.path, self.sha256, self.bytes)
            size = os.fstat(file.fileno()).st_size
            end, reason = tiled(index, size)
            if size != self.bytes:
                reason = f"has {size} bytes, but the manifest says {self.bytes}"
            elif not reason and os.pread(file.fileno(), size - end, end).strip(b"\0"):
                reason = "has something behind its last sample that the index does not know"
        except OSError as error:
            raise DataError(f"{self.path} cannot be opened ({error.strerror or error}): {REBUILD}") from error
        if reason:
            file.close()
            forget(self.path.with_suffix(".idx"), self.sha256)
            raise DataError(f"{self.path}: {reason}: {REBUILD}")
        return file, index


def open_shards(folder: str | Path) -> tuple[dict[str, Any], list[Shard]]:
    """The manifest of a shard folder, which may be a url, and its shards in the manifest's order.

    Raises `DataError` when the manifest is missing, malformed, edited or of another format, and names shard
    files that are missing or have another size than the manifest says; those of a url are checked when fetched.
    """
    manifest, shards = read_manifest(folder)
    lost = {} if is_remote(place(folder)) else missing(place(folder), shards)
    if lost:
        problems = [problem for found in lost.values() for problem in found]
        more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
        raise DataError("\n".join(problems[:_MOST] + more))
    return manifest, shards


def read_manifest(folder: str | Path) -> tuple[dict[str, Any], list[Shard]]:
    """The manifest of a shard folder, and the shards that it names; `DataError` as `open_shards`."""
    folder = place(folder)
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except (DataError, ValueError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            told = f"{folder} holds no finished shard set; run lgd build-shards"
            raise DataError(f"{path} is missing: {told}") from error
        if isinstance(error, RemoteError):
            raise
        # A number of too many digits is a plain ValueError.
        raise DataError(f"{path} is not valid JSON ({error.__cause__ or error}): {REBUILD}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: field format is not {FORMAT}: build the set again with this version of lgd")
    try:
        extensions = {role: manifest["extensions"][role] for role in ROLES}
        if extensions["json"] != "json" or not {extensions["he"], extensions["ihc"]} <= set(EXTENSIONS):
            raise ValueError(f"extensions {extensions}")
        shards = [
            shard for name, part in manifest["splits"].items() for shard in _shards(folder, name, part, extensions)
        ]
        if not shards:
            raise ValueError("no shards")
        edited = digest_of({name: value for name, value in manifest.items() if name != "digest"}) != manifest["digest"]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: field extensions or splits is malformed ({error!r}): {REBUILD}") from error
    if edited:
        raise DataError(f"{path}: its digest is not that of its content: it was edited or damaged: {REBUILD}")
    return manifest, shards


def count_levels(manifests: Iterable[dict[str, Any]], split: str) -> dict[str, int]:
    """Samples of each level, and of `unknown`, in one split of shard sets."""
    total = dict.fromkeys((*LEVEL_NAMES, "unknown"), 0)
    for manifest in manifests:
        for name, count in manifest["splits"].get(split, {}).get("levels", {}).items():
            total[name] += count
    return total


def _shards(folder: Path, split: str, part: dict[str, Any], extensions: dict[str, str]) -> list[Shard]:
    """The shards of one split; `ValueError` for what the builder does not write."""
    shards = []
    for number, entry in enumerate(part["shards"]):
        # A manifest from elsewhere must not lead out of its folder, nor leave out or repeat a shard.
        name = f"{split}-{number:06d}"
        if not re.fullmatch("[A-Za-z0-9_]+", split) or entry["file"] != f"{name}.tar":
            raise ValueError(f"file {entry['file']!r} instead of {name}.tar")
        samples, size, digest = entry["samples"], entry["bytes"], entry["sha256"]
        # The least sample has three headers.
        if type(samples) is not int or type(size) is not int or not 0 < samples <= size // (3 * _BLOCK):
            raise ValueError(f"{samples!r:.80} samples in {size!r:.80} bytes of {name}")
        if type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"sha256 {digest!r:.80} of {name}")
        path = folder / f"{name}.tar"
        shards.append(
            Shard(path=path, name=name, split=split, samples=samples, bytes=size, sha256=digest, extensions=extensions)
        )
    if not shards or sum(shard.samples for shard in shards) != part["samples"]:
        raise ValueError(f"{part['samples']!r:.80} samples in the split {split}")
    return shards


def missing(folder: Path, shards: Sequence[Shard]) -> dict[str, list[str]]:
    """Shard name -> one sentence for each of its local files that is missing or has not the manifest's size."""
    # One listing is quicker than asking for 2e5 files by name.
    found = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    problems = {}
    for shard in shards:
        tar, idx = f"{shard.name}.tar", f"{shard.name}.idx"
        wrong = [f"{folder / file} is missing: {REBUILD}" for file in (tar, idx) if file not in found]
        if found.get(tar, shard.bytes) != shard.bytes:
            wrong.append(f"{shard.path} has {found[tar]} bytes, but the manifest says {shard.bytes}: {REBUILD}")
        if wrong:
            problems[shard.name] = wrong
    return problems


def read_sample(
    file: BinaryIO, index: np.ndarray, row: int, shard: Shard, roles: Sequence[str]
) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """Read one sample of an open shard, from any thread: its KEY.json, and the content of the images of `roles`.

    One read for the H&E, one for both images, two for the IHC alone; what is not asked for is not touched. Of each
    member the tar header, the crc32 and the type are checked. Raises `DataError` with shard, row, key and role.
    """
    places = index[row].tolist()
    meta: dict[str, Any] = {}
    contents = {}
    for first, last in _runs(tuple(roles)):
        start = places[first][0] - _BLOCK
        end = places[last][0] + places[last][1]
        try:
            block = memoryview(os.pread(file.fileno(), end - start, start))
        except OSError as error:
            raise _damaged(file, shard, row, meta, ROLES[first], f"cannot be read ({error.strerror})") from error
        for column in range(first, last + 1):
            offset, length, crc = places[column]
            role = ROLES[column]
            at = offset - start
            content = block[at : at + length]
            if len(content) != length:
                raise _damaged(file, shard, row, meta, role, f"the file ends after {len(content)} of {length} bytes")
            if crc32(content) != crc:
                raise _damaged(file, shard, row, meta, role, "its crc32 is not the index's, so the shard is damaged")
            if column == 0:
                meta, reason = parse_meta(content, shard.split)
            else:
                reason = "" if kind(content) == shard.extensions[role] else f"is no {shard.extensions[role]} image"
                contents[role] = content
            reason = reason or _wrong_header(block[at - _BLOCK : at], member_name(meta, role, shard), length)
            if reason:
                raise _damaged(file, shard, row, meta, role, reason)
    return meta, contents


@functools.lru_cache
def _runs(roles: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """First and last column of each read."""
    if "ihc" not in roles:
        return ((0, 1 if "he" in roles else 0),)
    return ((0, 2),) if "he" in roles else ((0, 0), (2, 2))


def _damaged(file: BinaryIO, shard: Shard, row: int, meta: dict[str, Any], role: str, reason: str) -> DataError:
    copy = f" (its copy {file.name})" if is_remote(shard.path) else ""
    key = f"{meta['key']}, " if "key" in meta else ""
    return DataError(f"{shard.path}{copy}, row {row}, {key}{role}: {reason}: {REBUILD}")


def member_name(meta: dict[str, Any], role: str, shard: Shard) -> str:
    """The file name of a sample's member."""
    return f"{meta['key']}.json" if role == "json" else f"{meta['key']}.{role}.{shard.extensions[role]}"


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


def write_archive(path: Path, samples: Iterable[tuple[str, Sequence[bytes]]], extensions: Sequence[str]) -> None:
    """Publish a tar at `path`, then its index beside it.

    `samples`: each key with its json, H&E and IHC content; `extensions`: those of the two images.
    """
    import webdataset

    suffixes = ("json", f"he.{extensions[0]}", f"ihc.{extensions[1]}")
    crcs: list[int] = []
    with publish(path) as temporary:
        with open(temporary, "wb") as stream:
            writer = webdataset.TarWriter(stream, user="lgd", group="lgd", mtime=0, encoder=False)
            for key, contents in samples:
                for suffix, content in zip(suffixes, contents, strict=True):
                    # One call a member: of one call's members the writer keeps the alphabetical order.
                    writer.write({"__key__": key, suffix: content})
                    crcs.append(crc32(content))
            writer.close()
        # Read back rather than computed, so that the index cannot disagree with the tar.
        places = [(member.offset_data, member.size) for member in tar_members(temporary)]
    rows = [(*place, crc) for place, crc in zip(places, crcs, strict=True)]
    index = np.array(rows, dtype=INDEX).reshape(-1, len(ROLES))
    with publish(path.with_suffix(".idx")) as temporary, open(temporary, "wb") as stream:
        np.save(stream, index, allow_pickle=False)


def tar_members(path: Path) -> list[tarfile.TarInfo]:
    """Headers of a tar's members, in order; `DataError` when it is no tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            return tar.getmembers()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: is no readable tar ({error}): {REBUILD}") from error


def is_whole(path: Path, samples: int) -> bool:
    """Whether a tar and its index are both there and agree, and every member has its crc32."""
    try:
        index = load_index(path.with_suffix(".idx"), samples)
        headers = [(member.offset_data, member.size) for member in tar_members(path)]
        if tiled(index, path.stat().st_size)[1] or headers != index[["offset", "length"]].reshape(-1).tolist():
            return False
        with open(path, "rb") as stream:
            for entry in index.flat:
                read_member(stream.fileno(), entry, path.name)
    except (OSError, DataError):
        return False
    return True
