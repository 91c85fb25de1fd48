"""The table beside an index: part, row, label, key and slide of each indexed latent, in the index's order.

A query is answered from it alone, without opening a part. It is written and read through a map of the file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lgd.store.parts import Part

_BLOCK = 1_000_000
"""Rows that are looked at together."""


def _type(key: int, slide: int) -> np.dtype[Any]:
    """Type of a row, with the widths of its texts. A label of NaN and an empty slide are unknown."""
    return np.dtype([("part", "<u4"), ("row", "<u4"), ("label", "<f4"), ("key", f"S{key}"), ("slide", f"S{slide}")])


def write_table(path: Path, parts: Sequence[Part], order_n: np.ndarray | None) -> None:
    """Write the rows of some parts, which are counted from 0; `order_n` is the row at each position."""
    layout = parts[0].layout
    keys, slides = (
        max(part.array(name).dtype.itemsize if name in layout else 1 for part in parts) for name in ("key", "slide")
    )
    rows = sum(part.rows for part in parts)
    table = np.lib.format.open_memmap(path, "w+", _type(keys, slides), (rows,))
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
    table = np.lib.format.open_memmap(f"/dev/fd/{file.fileno()}", "r")
    fields: Any = table.dtype.fields or {}
    widths = [fields[name][0].itemsize for name in ("key", "slide") if name in fields]
    if len(widths) != 2 or table.dtype != _type(*widths) or table.shape != (rows,):
        raise ValueError(f"a table of type {str(table.dtype):.200} and shape {table.shape}")
    rows_of_part = np.array([part.rows for part in parts])
    for start in range(0, rows, _BLOCK):
        part_n, row_n = table["part"][start : start + _BLOCK], table["row"][start : start + _BLOCK]
        if part_n.max() >= len(parts) or (row_n >= rows_of_part[part_n]).any():
            raise ValueError("it names rows that the parts do not have")
    return table
