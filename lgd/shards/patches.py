"""DIR/patches.npy: what must not lie on two sides of a split, of every sample, without reading a shard.

`numpy.save` content, shape (samples,), in the order of the manifest's shards; each entry has the first 64 bits of the
SHA-256 of the file that the H&E was (`he`), of the IHC's (`ihc`, 0 where there is none), and of the group (`group`).
"""

import hashlib
import io
from collections.abc import Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.io.remote import open_checked
from lgd.shards.index import REBUILD
from lgd.shards.manifest import Manifest
from lgd.shards.sources import Sample
from lgd.shards.split import canonical_group

FILE = "patches.npy"
PATCHES = np.dtype([("he", "<u8"), ("ihc", "<u8"), ("group", "<u8")])


def as_patches(samples: Sequence[Sample]) -> bytes:
    """The content of the file, of samples in the order of their shards."""
    rows = [
        (
            *(int.from_bytes(bytes.fromhex(digest[:16]), "little") for digest in sample.source.sha256),
            _first_64(canonical_group(sample.source.pair.group)),
        )
        for sample in samples
    ]
    stream = io.BytesIO()
    np.save(stream, np.array(rows, PATCHES), allow_pickle=False)
    return stream.getvalue()


def _first_64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def read_patches(folder: Location, manifest: Manifest) -> np.ndarray:
    """The table of a set, (samples,) of `PATCHES`; `DataError` for a file that is not the manifest's."""
    path, said = folder / FILE, manifest.patches
    samples = sum(split.samples for split in manifest.splits.values())
    head = _head(samples)
    size = len(head) + samples * PATCHES.itemsize
    with open_checked(path, said.sha256, said.bytes, REBUILD) as stream:
        content = stream.read(size) if said.bytes == size else b""
    if not content.startswith(head):
        raise DataError(f"{path} is no table of {samples} samples: {REBUILD}")
    return np.frombuffer(content, PATCHES, offset=len(head))


def _head(samples: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": PATCHES.descr, "fortran_order": False, "shape": (samples,)})
    return stream.getvalue()
