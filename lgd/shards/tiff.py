"""The directories of a TIFF, and of EXIF, which is one: what they say, before a library reads it.

A library reads the value of every entry, however many of them share their bytes: 65,535 entries of 1 MB each are 65 GB
of a file of 2 MB.
"""

import struct
from typing import NamedTuple

from lgd.base.errors import CostError

WIDTH, HEIGHT, BITS, COMPRESSION = 256, 257, 258, 259
CHANNELS, STRIP_ROWS, TILE_WIDTH, TILE_HEIGHT = 277, 278, 322, 323
STRIPS, TILES = 273, 324
_SUBFILE = 254
_REDUCED = 1 | 4
"""A smaller copy of another page, or its mask."""
# Directories that belong to one: of EXIF, of a place on the globe, and of interoperability.
_NESTED = (34665, 34853, 40965)

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_BYTES = 64_000_000
_COSTS = f"has directories of more than {_MOST_BYTES // 10**6} MB"
_MOST_PAGES = 64


class Value(NamedTuple):
    """What an entry of a directory says."""

    number: int
    """Of values."""
    first: int
    """Its first value, where it is an integer."""


Directory = dict[int, Value]
"""The values of one page, by their tags."""


class _Form(NamedTuple):
    """How numbers are written."""

    order: str
    entries: str
    """Letters of `struct` of the number of entries, and of an offset."""
    offset: str
    entry: int
    """Bytes of an entry."""


def read_pages(content: bytes | memoryview) -> list[Directory]:
    """The directories of the pages of a TIFF, without those that are smaller copies or masks of another.

    Raises `ValueError` or `struct.error` for what is none, and `CostError` for what would cost too much to read.
    """
    order = {b"II": "<", b"MM": ">"}.get(bytes(content[:2]))
    magic = int.from_bytes(content[2:4], "big" if order == ">" else "little")
    if order is None or magic not in (42, 43):
        raise ValueError("no TIFF")
    form = _Form(order, "H", "I", 12) if magic == 42 else _Form(order, "Q", "Q", 20)
    (at,) = struct.unpack_from(order + form.offset, content, 4 if magic == 42 else 8)
    pages: list[Directory] = []
    cost = number = 0
    while at and number < _MOST_PAGES:
        page, following, bytes_of_page = _read_directory(content, form, at)
        for tag in _NESTED:
            if tag in page:
                bytes_of_page += _read_directory(content, form, page[tag].first)[2]
        cost += bytes_of_page
        if cost > _MOST_BYTES:
            raise CostError(_COSTS)
        if not number or not page.get(_SUBFILE, Value(0, 0)).first & _REDUCED:
            pages.append(page)
        at, number = following, number + 1
    if at:
        raise CostError(f"has more than {_MOST_PAGES} pages")
    return pages


def _read_directory(content: bytes | memoryview, form: _Form, at: int) -> tuple[Directory, int, int]:
    """The directory at this offset, the offset of the next one, or 0, and the bytes of all its values."""
    order, size_of_offset = form.order, struct.calcsize(form.offset)
    (count,) = struct.unpack_from(order + form.entries, content, at)
    at += struct.calcsize(form.entries)
    directory: Directory = {}
    cost = 0
    if count * form.entry > len(content):
        raise ValueError("its directory is longer than it")
    for place in range(at, at + count * form.entry, form.entry):
        tag, kind, number = struct.unpack_from(f"{order}HH{form.offset}", content, place)
        size = _SIZES.get(kind, 1)
        # Of one that is cut off nothing is read.
        cost += min(number * size, len(content))
        if cost > _MOST_BYTES:
            raise CostError(_COSTS)
        value_at = place + 4 + size_of_offset
        if number * size > size_of_offset:
            (value_at,) = struct.unpack_from(order + form.offset, content, value_at)
        first = int.from_bytes(content[value_at : value_at + size], "little" if order == "<" else "big")
        directory[tag] = Value(number, first)
    (following,) = struct.unpack_from(order + form.offset, content, at + count * form.entry)
    return directory, following, cost


def is_costly(exif: bytes) -> bool:
    """Whether reading EXIF would cost much memory."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    try:
        read_pages(exif)
    except CostError:
        return True
    except Exception:  # noqa: BLE001
        # Malformed, which is for Pillow to say.
        return False
    return False
