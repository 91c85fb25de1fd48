"""Limits within which decoding an image takes less than 1 GB and a few seconds; they are checked before it."""

import itertools
import re
import struct
import zlib

import numpy as np
from PIL import TiffImagePlugin

from lgd.base.errors import CostError, DataError
from lgd.shards import jpeg2000, tiff

MOST_PIXELS = {"jpg": 10**8, "png": 10**8, "tif": 10**8, "bmp": 10**8, "webp": 4 * 10**7, "jp2": 17 * 10**6}
"""A WebP takes 23 bytes a pixel, a JPEG 2000 some 20 bytes and 0.6 us, all others up to 9 bytes."""
MODES = {"RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1"}
"""Pillow's names of the colours that are read."""
LIMITED = {"tif", "jp2"}
"""Types that `check_limits` knows."""
BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error)
"""What decoders raise for content that is broken."""

_MOST_SCANS = 100
"""Of a JPEG: each goes over all pixels, in 14 bytes of the file. Encoders write about ten."""
_SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e]")
# The frame of a JPEG of 12 or 16 bits a channel.
_DEEP_FRAME = re.compile(rb"\xff[\xc1-\xc3\xc9-\xcb]\0.([\x0c\x10])", re.DOTALL)
_MOST_STRIP = 64 * 2**20
"""Bytes of a strip or tile of a compressed TIFF, which is decoded as a whole."""
_MOST_STRIPS = 100_000


def check_limits(content: bytes | memoryview, extension: str, name: str) -> None:
    """Raise `CostError` for a TIFF or JPEG 2000 that would cost too much, and `DataError` for what is not read."""
    if extension == "tif":
        _check_tiff(content, name)
    if extension == "jp2":
        _check_jpeg2000(content, name)


def check_size(width: int, height: int, name: str, extension: str = "png") -> None:
    """Raise `DataError` for an image of more pixels than may be decoded."""
    most = MOST_PIXELS[extension]
    if width * height > most:
        raise DataError(f"{name}: has more than {most // 10**6} megapixels: cut it into patches")


def make_depth_error(name: str, depth: int) -> DataError:
    """The error for an image of so many bits a channel."""
    return DataError(
        f"{name}: has {depth} bits a channel, and only 8 would be read: scale its values to 8 bits, so that the "
        "brightest is near 255, such as by exporting it from a viewer as 8-bit RGB"
    )


def check_scans(content: bytes | memoryview) -> None:
    """Raise `CostError` for a JPEG of too many scans."""
    # Searching its bytes by a pattern takes six times as long.
    words = (np.frombuffer(content, "<u2", (len(content) - start) // 2, start) for start in (0, 1))
    if sum(int(np.count_nonzero(word == 0xDAFF)) for word in words) <= _MOST_SCANS:
        return
    if next(itertools.islice(_SCAN.finditer(content), _MOST_SCANS, None), None):
        raise CostError(f"has more than {_MOST_SCANS} scans, which take long")


def find_depth(content: bytes | memoryview) -> int:
    """The bits a channel of a JPEG where these are 12 or 16; else 0."""
    frame = _DEEP_FRAME.search(content)
    return frame[1][0] if frame else 0


def _check_tiff(content: bytes | memoryview, name: str) -> None:
    page, *others = tiff.read_pages(content)

    def read(tag: int, default: int = 1) -> int:
        return page[tag].first if tag in page else default

    if others:
        raise DataError(f"{name}: has {1 + len(others)} pages: export the one that is the image as a file of its own")
    if read(tiff.BITS) > 8:
        raise make_depth_error(name, read(tiff.BITS))
    if read(tiff.CHANNELS) > 4:
        raise DataError(f"{name}: has {read(tiff.CHANNELS)} channels: export it as 8-bit RGB")
    if read(tiff.COMPRESSION) not in TiffImagePlugin.COMPRESSION_INFO:
        method = read(tiff.COMPRESSION)
        raise DataError(f"{name}: is compressed by a method that is not read ({method}): save it with LZW or deflate")
    strips = max(page[tag].number if tag in page else 0 for tag in (tiff.STRIPS, tiff.TILES))
    width, rows = read(tiff.WIDTH), min(read(tiff.STRIP_ROWS, 2**32), read(tiff.HEIGHT))
    if tiff.TILES in page:
        width, rows = read(tiff.TILE_WIDTH), read(tiff.TILE_HEIGHT)
    whole = width * rows * read(tiff.CHANNELS) if read(tiff.COMPRESSION) != 1 else 0
    if strips > _MOST_STRIPS or whole > _MOST_STRIP:
        raise CostError(f"has {strips} strips or tiles of {width} x {rows} pixels, which take much memory")


def _check_jpeg2000(content: bytes | memoryview, name: str) -> None:
    facts = jpeg2000.read_facts(content)
    if facts.bits > 8:
        raise make_depth_error(name, facts.bits)
    if facts.channels > 4:
        raise DataError(f"{name}: has {facts.channels} channels: export it as 8-bit RGB")
    check_size(facts.width, facts.height, name, "jp2")
