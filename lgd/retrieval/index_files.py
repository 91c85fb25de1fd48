"""The files of an index: index.json, what a faiss.index of ours looks like, the table of the latents that it holds, and
in which space it compares them.

A query is answered from the table alone, without opening a part. It is written and read through a map of the file.

FAISS reads a file by trusting it: the lengths, type codes and cell numbers in it are used as they stand, and of 140
corrupted files `read_index` accepted 91. Only four kinds are built here (`Flat`, and `IVFn` before `Flat`, `SQfp16` or
`SQ8`), of which all bytes but the vectors and the sizes of the cells follow from index.json. They are compared before
FAISS reads anything, and the positions in the cells must count up from 0.

So a file that was forged together with its digests can still hold other vectors than the store's, or none that are
finite: its answers are wrong then, but they are positions of the table, found in bounded time and memory.
"""

import io
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from lgd.base.errors import DataError
from lgd.base.records import Count, Many, Record, Sha256, Text, Xxh3
from lgd.io.documents import Document
from lgd.shards.manifest import Word
from lgd.store.parts import Part, check_rows

REMEDY = "run lgd build-index"
KINDS = "auto, Flat, or IVFn (n cells) before ,Flat ,SQfp16 or ,SQ8"
_FACTORY = re.compile("Flat|IVF([1-9][0-9]{0,6}),(Flat|SQfp16|SQ8)")
_POSITION = 8
"""Bytes of a position in a cell."""
# Number of the scalar quantizer's type, bytes a dimension, floats a dimension that it has learnt.
_QUANTIZER = {"SQfp16": (4, 2, 0), "SQ8": (0, 1, 2)}
_BLOCK = 1_000_000
"""Rows of a table that are looked at together."""


def cells_of(factory: str) -> int:
    """Cells of an index by its factory string, 0 for an exact one; `DataError` for a string that is not built here."""
    found = _FACTORY.fullmatch(factory)
    if not found:
        raise DataError(f"latents.index {factory!r:.80} is not built: use {KINDS}")
    return int(found[1] or 0)


class IndexFile(Record):
    """A file of the index, named by its digest."""

    bytes: Annotated[int, Field(ge=1, lt=2**53)]
    xxh3: Xxh3


class BiasSource(Record):
    """What the bias of an index against hubs is learnt from (`lgd.retrieval.bias`)."""

    sharpness: Annotated[float, Field(gt=0)]
    """latents.bias."""
    student: Sha256
    """Weights of the student that saw the H&E."""
    split: Word
    shards: Annotated[Many[Sha256], Field(min_length=1)]
    """Of the H&E."""


class IndexRequest(Record):
    """What an index is asked to be."""

    asked: Text
    """latents.index."""
    gallery: Many[Word]
    target: Annotated[float, Field(gt=0, le=1)]
    """latents.recall."""
    components: Count
    """latents.components."""
    bias: BiasSource | None
    """None of an index without one."""
    parts: Annotated[Many[Sha256], Field(min_length=1)]
    """Digest of each of the parts that are indexed."""


class IndexDocument(Document, IndexRequest):
    """index.json."""

    FORMAT: ClassVar[str] = "lgd-index/5"
    ABSENT: ClassVar[str] = f"there is no index; {REMEDY}"
    REMEDY: ClassVar[str] = REMEDY

    factory: Text
    nprobe: Count
    rows: Annotated[int, Field(ge=1, lt=2**40)]
    dim: Annotated[int, Field(ge=1, lt=2**20)]
    """Length of the vectors that are compared."""
    latent_dim: Annotated[int, Field(ge=1, lt=2**20)]
    """Length of the latents that are whitened to these."""
    why: Text
    trained_on: Count
    seconds: dict[Text, float]
    recall_at_10: Annotated[float, Field(ge=0, le=1)]
    queries: Text
    faiss: IndexFile
    table: IndexFile
    whitening: IndexFile | None

    @property
    def width(self) -> int:
        """Length of the indexed vectors, which the bias makes longer by one."""
        return self.dim + (self.bias is not None)

    @model_validator(mode="after")
    def _check_probes(self) -> Self:
        cells = cells_of(self.factory)
        if not min(1, cells) <= self.nprobe <= cells:
            raise ValueError(f"field nprobe is {self.nprobe}, and {self.factory} has {cells} cells")
        return self

    @model_validator(mode="after")
    def _check_whitening(self) -> Self:
        # Of latents that do not vary along so many there are fewer.
        dims = range(1, min(self.components, self.latent_dim) + 1) if self.whitening else (self.latent_dim,)
        if (self.whitening is None) != (self.components == 0) or self.dim not in dims:
            raise ValueError(f"field dim is {self.dim}, and {self.components} components are of {self.latent_dim}")
        return self


def code_bytes(factory: str, dim: int) -> int:
    """Bytes that a vector takes in the index."""
    coding = factory.rpartition(",")[2]
    return dim * (_QUANTIZER[coding][1] if coding in _QUANTIZER else 4)


def check_file(file: BinaryIO, factory: str, rows: int, dim: int, nprobe: int) -> None:
    """Raise `ValueError` unless FAISS writes such a file for an index of this kind."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = 0
        for fixed, free in _start(factory, rows, dim, nprobe):
            if content[at : at + len(fixed)] != fixed:
                raise ValueError(f"other bytes than {factory} of {rows} rows has, from byte {at} on")
            at += len(fixed) + free
        cells = cells_of(factory)
        end = _check_cells(content, at, cells, rows, code_bytes(factory, dim)) if cells else at
        if end != len(content):
            raise ValueError(f"{len(content)} bytes, and {factory} of {rows} rows has {end}")


def _start(factory: str, rows: int, dim: int, nprobe: int) -> Iterator[tuple[bytes, int]]:
    """Fixed bytes, and how many free ones follow, in turn: all of an exact index, the others up to their cells."""
    cells = cells_of(factory)
    if not cells:
        yield _vectors(rows, dim)
        return
    coding, size = factory.rpartition(",")[2], code_bytes(factory, dim)
    head = _header(b"IwSq" if coding in _QUANTIZER else b"IwFl", rows, dim) + struct.pack("<QQ", cells, nprobe)
    centroids, free = _vectors(cells, dim)
    yield head + centroids, free
    no_map = struct.pack("<bQ", 0, 0)
    if coding in _QUANTIZER:
        kind, _, learnt = _QUANTIZER[coding]
        yield no_map + struct.pack("<iifQQQ", kind, 0, 0, dim, size, learnt * dim), 4 * learnt * dim
        yield struct.pack("<Q?", size, True), 0
    else:
        yield no_map, 0
    yield b"ilar" + struct.pack("<QQ", cells, size), 0


def _header(kind: bytes, rows: int, dim: int) -> bytes:
    # Two unused numbers, whether it is trained, and the metric: inner product.
    return kind + struct.pack("<iqqq?i", dim, rows, 1 << 20, 1 << 20, True, 0)


def _vectors(rows: int, dim: int) -> tuple[bytes, int]:
    return _header(b"IxFI", rows, dim) + struct.pack("<Q", rows * dim), 4 * rows * dim


def _check_cells(content: mmap.mmap, at: int, cells: int, rows: int, size: int) -> int:
    """Where the cells that begin with their sizes at `at` end, all checked."""
    kind, listed = struct.unpack("<4sQ", content[at : at + 12].ljust(12))
    at += 12
    # Where more than half of the cells are empty, FAISS lists the others by number and size.
    if not ((kind == b"full" and listed == cells) or (kind == b"sprs" and listed <= cells)):
        raise ValueError(f"other bytes than an index of {cells} cells has, from byte {at - 12} on")
    size_c = np.frombuffer(content[at : at + 8 * listed], "<u8")
    if kind == b"sprs":
        if listed % 2 or (np.diff(size_c[::2].astype(np.int64)) <= 0).any() or (size_c[::2] >= cells).any():
            raise ValueError("a list of cells that is none")
        size_c = size_c[1::2]
    at += 8 * listed
    # Each is checked alone first, for a sum of huge ones could come out right.
    if (size_c > rows).any() or size_c.sum() != rows:
        raise ValueError(f"cells that do not hold {rows} rows in all")
    first = 0
    for count in size_c.tolist():
        at += count * size
        there = np.frombuffer(content[at : at + count * _POSITION], "<i8")
        if not np.array_equal(there, np.arange(first, first + count)):
            raise ValueError(f"other positions than {first} to {first + count - 1} in a cell")
        at += count * _POSITION
        first += count
    return at


def _type(key: int, slide: int) -> np.dtype[np.void]:
    """Type of a row, with the widths of its texts. A label of NaN and an empty slide are unknown."""
    return np.dtype([("part", "<u4"), ("row", "<u4"), ("label", "<f4"), ("key", f"S{key}"), ("slide", f"S{slide}")])


def write_table(path: Path, parts: Sequence[Part], order_n: np.ndarray) -> None:
    """Write the rows of some parts, which are counted from 0; `order_n` is the row at each position."""
    layout = parts[0].layout
    keys, slides = (
        max(part.array(name).dtype.itemsize if name in layout else 1 for part in parts) for name in ("key", "slide")
    )
    rows = sum(part.rows for part in parts)
    table = np.lib.format.open_memmap(path, "w+", _type(keys, slides), (rows,))
    # A process that writes through a map where the disk is full is killed by SIGBUS.
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    position_n, first = np.argsort(order_n), 0
    for number, part in enumerate(parts):
        at = position_n[first : first + part.rows]
        table["part"][at], table["row"][at] = number, np.arange(part.rows)
        table["key"][at] = part.array("key")
        table["label"][at] = part.array("label") if "label" in layout else np.nan
        table["slide"][at] = part.array("slide") if "slide" in layout else b""
        first += part.rows
    table.flush()


def read_table(file: BinaryIO, rows: int, parts: Sequence[Part]) -> np.ndarray:
    """Map a table of so many rows of some parts, (rows,), read-only; `ValueError` for anything else."""
    # numpy's own reader parses the head with `ast`, which fails now and then where several threads of Python 3.11 do so
    # at once.
    start = os.pread(file.fileno(), 1024, 0)
    widths = [int(width) for width in re.findall(rb"'\|S([1-9]\d{0,3})'", start)]
    if len(widths) != 2:
        raise ValueError(f"no table: it begins with {start[:40]!r}")
    kind = _type(*widths)
    # What `numpy.save` writes before the rows.
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind.descr, "fortran_order": False, "shape": (rows,)})
    head = stream.getvalue()
    if not start.startswith(head) or os.fstat(file.fileno()).st_size != len(head) + rows * kind.itemsize:
        raise ValueError(f"no table of {rows} rows: it begins with {start[:200]!r}")
    table: np.ndarray = np.memmap(f"/dev/fd/{file.fileno()}", kind, "r", len(head), (rows,))
    rows_of_part = np.array([part.rows for part in parts])
    for first in range(0, rows, _BLOCK):
        part_n, row_n = table["part"][first : first + _BLOCK], table["row"][first : first + _BLOCK]
        if part_n.max() >= len(parts) or (row_n >= rows_of_part[part_n]).any():
            raise ValueError("it names rows that the parts do not have")
        for name in ("key", "slide", "label"):
            check_rows(name, table[name][first : first + _BLOCK], parts[0].target)
    return table


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """The space that an index compares latents in: (latent - mean) @ axes, uncorrelated numbers of variance 1.

    A teacher's latents vary along a few directions far more than along all others, and cosines see only those: the same
    few IHCs lie near every query. Whitening is linear: a ridge regression to latents, whitened, is the ridge regression
    to whitened latents.
    """

    mean_D: np.ndarray
    axes_Dk: np.ndarray

    def apply(self, latent_nD: np.ndarray) -> np.ndarray:
        """The compared vectors, (n, k) float32."""
        whitened_nk: np.ndarray = (np.asarray(latent_nD, np.float32) - self.mean_D) @ self.axes_Dk
        return whitened_nk

    def write(self, file: BinaryIO) -> None:
        """Write mean and axes as float32, little-endian."""
        file.write(np.vstack([self.mean_D, self.axes_Dk.T]).astype("<f4").tobytes())

    @classmethod
    def read(cls, file: BinaryIO, latent_dim: int, components: int) -> Self:
        """Read what `write` wrote; `ValueError` for another size or what is not finite."""
        content = file.read()
        if len(content) != 4 * (1 + components) * latent_dim:
            raise ValueError(f"{len(content)} bytes, and {components} axes of {latent_dim} numbers have more or less")
        rows = np.frombuffer(content, "<f4").reshape(1 + components, latent_dim).astype(np.float32)
        if not np.isfinite(rows).all():
            raise ValueError("a number that is not finite")
        return cls(rows[0], np.ascontiguousarray(rows[1:].T))
