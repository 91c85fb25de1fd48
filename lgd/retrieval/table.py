"""The table beside an index: part, row, label, key and slide of each indexed latent, in the index's order.

A query is answered from it alone, without opening a part. It is written and read through a map of the file.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lgd.store.parts import Part, check_rows

_BLOCK = 1_000_000
"""Rows that are looked at together."""


def _type(key: int, slide: int) -> np.dtype[Any]:
    """Type of a row, with the widths of its texts. A label of NaN and an empty slide are unknown."""
    return np.dtype([("part", "<u4"), ("row", "<u4"), ("label", "<f4"), ("key", f"S{key}"), ("slide", f"S{slide}")])


def _head(kind: np.dtype[Any], rows: int) -> bytes:
    """What `numpy.save` writes before the rows."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind.descr, "fortran_order": False, "shape": (rows,)})
    return stream.getvalue()


def write_table(path: Path, parts: Sequence[Part], order_n: np.ndarray | None) -> None:
    """Write the rows of some parts, which are counted from 0; `order_n` is the row at each position."""
    layout = parts[0].layout
    keys, slides = (
        max(part.array(name).dtype.itemsize if name in layout else 1 for part in parts) for name in ("key", "slide")
    )
    rows = sum(part.rows for part in parts)
    kind = _type(keys, slides)
    head = _head(kind, rows)
    with path.open("wb") as file:
        file.write(head)
        # A process that writes through a map where the disk is full is killed by SIGBUS.
        os.posix_fallocate(file.fileno(), 0, len(head) + rows * kind.itemsize)
    table: np.memmap = np.memmap(path, kind, "r+", len(head), (rows,))
    position_n = np.arange(rows)
    if order_n is not None:
        position_n[order_n] = np.arange(rows)
    first = 0
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
    head = _head(kind, rows)
    if not start.startswith(head) or os.fstat(file.fileno()).st_size != len(head) + rows * kind.itemsize:
        raise ValueError(f"no table of {rows} rows: it begins with {start[:200]!r}")
    table: np.ndarray = np.memmap(f"/dev/fd/{file.fileno()}", kind, "r", len(head), (rows,))
    rows_of_part = np.array([part.rows for part in parts])
    for first in range(0, rows, _BLOCK):
        part_n, row_n = table["part"][first : first + _BLOCK], table["row"][first : first + _BLOCK]
        if part_n.max() >= len(parts) or (row_n >= rows_of_part[part_n]).any():
            raise ValueError("it names rows that the parts do not have")
        for name in ("key", "slide", "label"):
            check_rows(name, table[name][first : first + _BLOCK])
    return table
