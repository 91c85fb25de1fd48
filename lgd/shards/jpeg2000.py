"""What a JPEG 2000 says of itself, and how finely it is divided, before a library reads it.

A library has some 100 to 300 bytes of its own for each block and each precinct, of which a file of a few kB can state
millions.
"""

import struct
from typing import NamedTuple

from lgd.base.errors import CostError

_START, _SIZE, _CODING, _CODING_OF_ONE, _TILE, _DATA, _END = 0xFF4F, 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
RAW = b"\xff\x4f\xff\x51"
"""First bytes of a file, and of one without a container."""

_MOST_TILES = 4096
_LEAST_BLOCK = 8
"""Of a block's width and height as powers of 2, added up: 16 x 16."""
_LEAST_PRECINCT = 4
"""Of a precinct's side."""


class Facts(NamedTuple):
    """What a codestream says."""

    width: int
    height: int
    channels: int
    bits: int
    """A channel's, at most."""


def read_facts(content: bytes | memoryview) -> Facts:
    """The facts of a JPEG 2000; `ValueError` or `struct.error` for a broken one, `CostError` for a costly one."""
    at = _find_codestream(content)
    facts, tile_end = None, 0
    while True:
        (marker,) = struct.unpack_from(">H", content, at)
        if marker == _END:
            break
        if marker == _START:
            at += 2
            continue
        if marker == _DATA:
            if tile_end <= at:
                raise ValueError("a tile ends before it begins")
            at = tile_end
            continue
        (length,) = struct.unpack_from(">H", content, at + 2)
        body = content[at + 4 : at + 2 + length]
        if marker == _SIZE:
            facts = _read_size(body)
        elif marker == _CODING:
            _check_coding(body[5:], body[0] & 1)
        elif marker == _CODING_OF_ONE:
            _check_coding(body[2:], body[1] & 1)
        elif marker == _TILE:
            (bytes_of_tile,) = struct.unpack_from(">I", body, 2)
            tile_end = at + bytes_of_tile if bytes_of_tile else len(content) - 2
        at += 2 + length
    if facts is None:
        raise ValueError("it states no size")
    return facts


def _find_codestream(content: bytes | memoryview) -> int:
    """Where the codestream begins: behind the head of the container's box jp2c."""
    at = 0 if content[:4] == SIGNATURE[:4] else -1
    while at >= 0:
        length, kind = struct.unpack_from(">I4s", content, at)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", content, at + 8)
            head = 16
        if kind == b"jp2c":
            return at + head
        if length < head:
            raise ValueError("it has no codestream")
        at += length
    return 0


def _read_size(body: bytes | memoryview) -> Facts:
    right, bottom, left, top, tile_width, tile_height, tile_x, tile_y, channels = struct.unpack_from(">8IH", body, 2)
    if not tile_width or not tile_height:
        raise ValueError("it has tiles without pixels")
    tiles = -(-(right - tile_x) // tile_width) * -(-(bottom - tile_y) // tile_height)
    if tiles > _MOST_TILES:
        raise CostError(f"is cut into {tiles} tiles, and at most {_MOST_TILES} are read")
    bits = max((one & 0x7F for one in bytes(body[36::3])), default=0) + 1
    return Facts(right - left, bottom - top, channels, bits)


def _check_coding(body: bytes | memoryview, has_precincts: int) -> None:
    """`CostError` for blocks or precincts that are too small; `body` begins with the number of levels."""
    if (body[1] & 15) + 2 + (body[2] & 15) + 2 < _LEAST_BLOCK:
        raise CostError("is cut into blocks of less than 16 x 16 pixels, which take much memory")
    precincts = bytes(body[5:]) if has_precincts else b""
    if any(min(one & 15, one >> 4) < _LEAST_PRECINCT for one in precincts):
        raise CostError("is cut into precincts of less than 16 x 16 pixels, which take much memory")
