"""The offset index of a tar: where each member lies, how long it is, and its crc32."""

import functools
import io
import os
import tarfile

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.io.remote import open_checked

ROLES = ("json", "hes", "he", "ihc")
"""All members that a sample may have, in their order: a reader of the H&E stops before the IHC."""
INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
"""Type of one entry of an `.idx`, which holds `numpy.save` content of shape (samples, members of a sample)."""

REBUILD = "fetch it again, or build the set again into an empty folder"
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_JSON = 1 << 16


def index_bytes(samples: int, members: int) -> int:
    """Size of an index file."""
    return len(_head(samples, members)) + samples * members * INDEX.itemsize


def load_index(path: Location, samples: int, members: int, digest: str) -> np.ndarray:
    """Read an index file; `DataError` when it is missing, broken, or not the one of this SHA-256."""
    size = index_bytes(samples, members)
    with open_checked(path, digest, None, REBUILD) as stream:
        # The size comes first: the count of a hostile manifest would ask for any amount of memory.
        content = stream.read(size) if os.fstat(stream.fileno()).st_size == size else b""
    # numpy.load would also take zip files and pickles; and it parses the head with `ast`, which fails now and then when
    # several threads of Python 3.11 do so at once.
    head = _head(samples, members)
    if not content.startswith(head):
        raise DataError(f"{path} is no index of {samples} samples, or broken: {REBUILD}")
    return np.frombuffer(content, INDEX, offset=len(head)).reshape(samples, members)


@functools.lru_cache(maxsize=16)
def _head(samples: int, members: int) -> bytes:
    """What `numpy.save` writes before the entries."""
    stream = io.BytesIO()
    shape = (samples, members)
    np.lib.format.write_array_header_1_0(stream, {"descr": INDEX.descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


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
            f"row {row}, {roles[column]}: the index places it at byte {entries['offset'][wrong[0]]}, but the members "
            f"before it end at {ends[wrong[0]] - steps[wrong[0]]}: the index is of another tar, or was changed"
        )
    # A tar ends with two empty blocks, and is filled up to whole records.
    record = tarfile.RECORDSIZE
    if -(-(end + 2 * _BLOCK) // record) * record != size:
        return end, f"has {size} bytes, but its index describes members that end at byte {end}"
    longest = int(index["length"][:, 0].max())
    return end, f"holds a KEY.json of {longest} bytes" if longest > _LONGEST_JSON else ""
