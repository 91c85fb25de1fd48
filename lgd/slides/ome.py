"""OME-TIFF, as VALIS, QuPath and Bio-Formats write it.

OpenSlide does not see the levels that such a file keeps below its first page, and takes the scale from tags that the
writers leave at 1,000 um a pixel or copy from another slide: the OME-XML is what counts. Only the first image of a file
is read, and nothing of its XML but the sizes of a pixel.
"""

import contextlib
import itertools
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image

from lgd.base.errors import DataError
from lgd.slides.source import INSTALL, Bounds, Level, Stated

if TYPE_CHECKING:
    from tifffile import TiffPage

_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_UM_OF_TAG = {2: 25400.0, 3: 10000.0}
"""Of an inch and a centimetre, the units of a TIFF's resolution."""
_JPEG, _RGB = 7, 2
# Says that the colours are not YCbCr, which decoders assume of a JPEG that says nothing.
_ADOBE_RGB = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
_PROFILE = 34675
_BROKEN = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error)


class OmeFile:
    """An OME-TIFF that is open; several threads may read it."""

    vendor = "ome-tiff"
    background = (255, 255, 255)

    def __init__(self, path: Path) -> None:
        try:
            from tifffile import TiffFile
        except ImportError as error:
            raise DataError(f"{path}: {INSTALL}") from error
        self._path, self._lock = path, threading.Lock()
        try:
            self._file = TiffFile(path)
            self._pages = _list_pages(self._file.pages.first)
        except _BROKEN as error:
            raise DataError(f"{path} is damaged: {error}") from error
        first = self._pages[0]
        if first.dtype != np.uint8 or first.samplesperpixel != 3 or first.planarconfig != 1:
            self._file.close()
            colours = f"{first.samplesperpixel} channel(s) of {first.bitspersample} bits"
            raise DataError(f"{path} has {colours}: export it as 8-bit RGB, whose colours lie side by side")
        _require_codec(path, first)
        width, height = first.imagewidth, first.imagelength
        self.levels = tuple(Level(page.imagewidth, page.imagelength, width / page.imagewidth) for page in self._pages)
        self.bounds = Bounds(0, 0, width, height)
        self.stated = tuple(_list_scales(first))
        self.profile = _PROFILE in first.tags

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        page, downsample = self._pages[level], self.levels[level].downsample
        left, top = round(x / downsample), round(y / downsample)
        image = Image.new("RGBA", (width, height))
        rows = _overlapping(top, height, page.tilelength, page.imagelength)
        columns = _overlapping(left, width, page.tilewidth, page.imagewidth)
        for row, column in itertools.product(rows, columns):
            try:
                tile = self._read_tile(page, row * -(-page.imagewidth // page.tilewidth) + column)
            except _BROKEN as error:
                raise DataError(f"{self._path} is damaged at x {x}, y {y}: {error}") from error
            if tile is not None:
                at_x, at_y = column * page.tilewidth, row * page.tilelength
                # A tile at the border goes beyond the image.
                held = tile[: page.imagelength - at_y, : page.imagewidth - at_x]
                image.paste(Image.fromarray(held).convert("RGBA"), (at_x - left, at_y - top))
        return image

    def close(self) -> None:
        self._file.close()

    def _read_tile(self, page: "TiffPage", number: int) -> np.ndarray | None:
        """Pixels (H, W, 3) of a tile; None where the file leaves it out."""
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        if not count:
            return None
        with self._lock:
            handle = self._file.filehandle
            handle.seek(offset)
            content = handle.read(count)
        if len(content) < count:
            raise EOFError("it is cut short")
        if page.compression == _JPEG:
            marker = _ADOBE_RGB if page.photometric == _RGB else b""
            tables = (page.jpegtables or b"\xff\xd8\xff\xd9")[2:-2]
            return np.asarray(simplejpeg.decode_jpeg(content[:2] + marker + tables + content[2:], "RGB"))
        tile, *_ = page.decode(content, number, _fullsize=True)
        return None if tile is None else np.asarray(tile[0])


def _list_pages(first: "TiffPage") -> list["TiffPage"]:
    """The page of the first image and its smaller copies, from the largest on, with all that reading them needs."""
    from tifffile import TiffPage

    pages = [first]
    for page in first.pages or ():
        if isinstance(page, TiffPage) and page.is_tiled and page.dtype == first.dtype:
            alike = abs(page.imagewidth * first.imagelength / (page.imagelength * first.imagewidth) - 1) < 0.05
            if page.samplesperpixel == first.samplesperpixel and alike:
                pages.append(page)
    for page in pages:
        # Lazy otherwise, and then not safe with threads.
        _ = page.dataoffsets, page.databytecounts, page.jpegtables, page.decode
    return sorted(pages, key=lambda page: -page.imagewidth)


def _require_codec(path: Path, page: "TiffPage") -> None:
    from tifffile import COMPRESSION, TIFF

    if page.compression == _JPEG:
        return
    try:
        _ = TIFF.DECOMPRESSORS[page.compression]
    except KeyError as error:
        name = page.compression.name if isinstance(page.compression, COMPRESSION) else page.compression
        raise DataError(
            f"{path} is compressed by {name}: pip install imagecodecs, or export it with deflate or JPEG"
        ) from error


def _list_scales(page: "TiffPage") -> list[Stated]:
    """What the OME-XML says of the scale, and what the tags say."""
    stated = []
    pixels = re.search(r"<(?:\w+:)?Pixels\s([^>]*)>", page.description)
    said = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels[1])) if pixels else {}
    with contextlib.suppress(ValueError, LookupError):
        across, down = (
            float(said[f"PhysicalSize{axis}"]) * _UM[said.get(f"PhysicalSize{axis}Unit", "µm").strip()] for axis in "XY"
        )
        stated.append(Stated("OME-XML", across, down))
    with contextlib.suppress(ValueError, LookupError, ArithmeticError):
        um = _UM_OF_TAG[int(page.resolutionunit)]
        stated.append(Stated("TIFF resolution", *(um / value for value in page.resolution)))
    return stated


def _overlapping(first: int, count: int, tile: int, whole: int) -> range:
    """Which tiles along a side hold any of these pixels."""
    return range(max(0, first) // tile, -(-min(first + count, whole) // tile))
