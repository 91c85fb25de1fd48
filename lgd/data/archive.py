"""One shard on the disk: a plain tar, and an index that makes any member of it one read.

The index is needed because a tar can only be read from its start. Its crc32s are checked on every read.
"""

import os
import re
import tarfile
import tokenize
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lgd.config import DataError
from lgd.files import publish, read_json

FORMAT = "lgd-shards/1"
ROLES = ("json", "he", "ihc")
INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
"""Type of one entry of an `.idx`, which holds `numpy.save` content of shape (samples, 3): json, he, ihc."""

_REBUILD = "fetch it again, or build the set again into an empty folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A tar of samples, as the manifest states it."""

    path: Path
    name: str
    """The file's stem, such as train-000003."""
    split: str
    samples: int
    bytes: int
    sha256: str
    extensions: dict[str, str]
    """Role (json, he, ihc) -> extension."""

    def index(self) -> np.ndarray:
        """The offset index, memory-mapped: (samples, 3) of `INDEX`, columns as `ROLES`."""
        return load_index(self.path.with_suffix(".idx"), self.samples)


def load_index(path: Path, samples: int) -> np.ndarray:
    """Map an index file; `DataError` when it is missing, broken or not of `samples` samples."""
    try:
        # numpy.load would also take zip files and pickles.
        index = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path} is missing or broken ({error}): {_REBUILD}") from error
    if index.dtype != INDEX or index.shape != (samples, len(ROLES)):
        raise DataError(f"{path} is no index of {samples} samples: {_REBUILD}")
    return index


def open_shards(folder: Path) -> tuple[dict[str, Any], list[Shard]]:
    """The manifest of a shard folder, and its shards in the manifest's order.

    Raises `DataError` when the manifest is missing, malformed or of another format, and names every shard
    file that is missing or has another size than the manifest says.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        raise DataError(f"{path} is missing: {folder} holds no finished shard set; run lgd build-shards")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: field format is not {FORMAT}: build the set again with this version of lgd")
    try:
        shards = [
            _shard(folder, split, entry, manifest["extensions"])
            for split, part in manifest["splits"].items()
            for entry in part["shards"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: field extensions or splits is malformed ({error!r}): {_REBUILD}") from error
    problems = []
    for shard in shards:
        for file, size in ((shard.path, shard.bytes), (shard.path.with_suffix(".idx"), None)):
            found = file.stat().st_size if file.is_file() else None
            if found is None:
                problems.append(f"{file} is missing: {_REBUILD}")
            elif size is not None and found != size:
                problems.append(f"{file} has {found} bytes, but the manifest says {size}: {_REBUILD}")
    if problems:
        raise DataError("\n".join(problems))
    return manifest, shards


def _shard(folder: Path, split: str, entry: dict[str, Any], extensions: dict[str, str]) -> Shard:
    file = entry["file"]
    # A manifest from elsewhere must not lead out of its folder.
    if not re.fullmatch(rf"{re.escape(split)}-\d{{6}}\.tar", file) or "/" in file:
        raise ValueError(f"shard file {file!r}")
    return Shard(
        path=folder / file,
        name=file.removesuffix(".tar"),
        split=split,
        samples=int(entry["samples"]),
        bytes=int(entry["bytes"]),
        sha256=str(entry["sha256"]),
        extensions={role: str(extensions[role]) for role in ROLES},
    )


def read_member(fd: int, entry: np.void, what: str) -> bytes:
    """Read one member of an open tar at its `INDEX` entry, from any thread, and check its crc32.

    `what` names shard and key in the `DataError` for a short read or another checksum.
    """
    length = int(entry["length"])
    try:
        content = os.pread(fd, length, int(entry["offset"]))
    except (OSError, OverflowError) as error:
        raise DataError(f"{what}: cannot be read ({error}): {_REBUILD}") from error
    if len(content) != length:
        raise DataError(f"{what}: the file ends after {len(content)} of {length} bytes: {_REBUILD}")
    if zlib.crc32(content) != entry["crc32"]:
        raise DataError(f"{what}: its crc32 is not the index's, so the shard is damaged: {_REBUILD}")
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
                    crcs.append(zlib.crc32(content))
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
        raise DataError(f"{path}: is no readable tar ({error}): {_REBUILD}") from error


def is_whole(path: Path, samples: int) -> bool:
    """Whether a tar and its index are both there, and every member has its crc32."""
    try:
        index = load_index(path.with_suffix(".idx"), samples)
        with open(path, "rb") as stream:
            for entry in index.flat:
                read_member(stream.fileno(), entry, path.name)
    except (OSError, DataError):
        return False
    return True
