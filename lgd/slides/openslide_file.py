"""What OpenSlide reads: which files are slides, and one that is open.

Of what a scanner wrote beside the pixels only size, levels, scale, bounds, background and vendor are read.
"""

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, TiffImagePlugin

from lgd.base.errors import DataError
from lgd.io.files import peek_kind, read_first_bytes
from lgd.slides.source import INSTALL, Bounds, Level, Stated

if TYPE_CHECKING:
    from openslide import OpenSlide

_LEAST_WHITE = 140
"""A darker background, such as none at all, would look like tissue."""
# A patch has no more (`lgd.shards.image_limits`).
_MOST_PATCH_PIXELS = 10**8
_DESCRIPTION = "tiff.ImageDescription"
_PLACES = {"generic-tiff": "TIFF resolution", "aperio": "MPP"}
_SLIDE_SUFFIXES = tuple(".svs .ndpi .scn .bif .svslide .ome.tif .ome.tiff".split())
_NAMES = (*_SLIDE_SUFFIXES, *".tif .tiff .mrxs .vms .vmu .czi .dcm".split())
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_WIDTH = 273, 279, 322
_IMAGES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"BM": "BMP", b"RIFF": "WebP"}


def is_named_like_slide(name: str) -> bool:
    """Whether a file is called like a slide, or a TIFF."""
    return name.lower().endswith(_NAMES)


def looks_like_slide(path: str | Path) -> bool:
    """Whether a file is a slide rather than an image of a patch, by what it holds.

    One that only a slide can be called like, and that begins like a TIFF, is one even if it is damaged or nothing is
    installed to read it: opening it says so.
    """
    path = Path(path)
    try:
        named = path.name.lower().endswith(_SLIDE_SUFFIXES) and read_first_bytes(path, 4) in _TIFF
    except (OSError, DataError):
        return False
    try:
        from openslide import OpenSlide, OpenSlideError
    except (ImportError, OSError):
        return named
    try:
        vendor = OpenSlide.detect_format(path)
        if vendor != "generic-tiff":
            return vendor is not None or named
        with OpenSlide(path) as slide:
            width, height = slide.dimensions
            # A tiled TIFF of one level and of a patch's size may be a patch.
            return slide.level_count > 1 or _is_ome(slide.properties) or width * height > _MOST_PATCH_PIXELS
    except OpenSlideError:
        return True


def is_meant_as_slide(path: Path) -> bool:
    """Whether a file that does not look like a slide is called like one, or is a TIFF that was to be one.

    A TIFF is, where it has tiles, is cut short, or cannot be read; one in strips, or of another kind, is an image.
    """
    if not is_named_like_slide(path.name):
        return False
    if not path.name.lower().endswith((".tif", ".tiff")) or path.name.lower().endswith(_SLIDE_SUFFIXES):
        return True
    try:
        first = read_first_bytes(path, 4)
        if first not in _TIFF:
            return not first.startswith(tuple(_IMAGES))
        # Unlike `Image.open` it has no bound of the pixels, of which none is read.
        with TiffImagePlugin.TiffImageFile(path) as image:
            tags = image.tag_v2
            ends = zip(tags.get(_STRIP_OFFSETS, ()), tags.get(_STRIP_BYTES, ()), strict=False)
            return _TILE_WIDTH in tags or any(start + size > path.stat().st_size for start, size in ends)
    except (OSError, DataError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return True


class OpenSlideFile:
    """A file that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = _open_handle(path)
        properties = self._slide.properties
        self.vendor = properties["openslide.vendor"]
        self.is_ome = self.vendor == "generic-tiff" and _is_ome(properties)
        sizes = zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
        self.levels = tuple(Level(*size, downsample) for size, downsample in sizes)
        self.bounds = _find_bounds(properties, self.levels[0])
        across, down = (_as_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        place = _PLACES.get(self.vendor, "scanner")
        self.stated: tuple[Stated, ...] = (Stated(place, across, down),) if across and down else ()
        self.background = _find_background(properties.get("openslide.background-color", ""))
        self.profile = self._slide.color_profile is not None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        from openslide import OpenSlideError

        slide = self._slide
        try:
            return slide.read_region((x, y), level, (width, height))
        except OpenSlideError:
            # An error stays with a handle, and is also that of other threads' reads: a fresh one says whose it is. The
            # old one is closed when the last of them ends.
            self._slide = _open_handle(self._path)
        with _open_handle(self._path) as own:
            try:
                return own.read_region((x, y), level, (width, height))
            except OpenSlideError as error:
                raise DataError(f"{self._path} is damaged at x {x}, y {y}: {error}") from error

    def close(self) -> None:
        self._slide.close()


def _open_handle(path: Path) -> "OpenSlide":
    """Raises `DataError` for what OpenSlide does not read."""
    try:
        from openslide import OpenSlide, OpenSlideError
    except (ImportError, OSError) as error:
        raise DataError(f"{path}: {INSTALL}") from error
    try:
        if OpenSlide.detect_format(path) is None:
            raise DataError(_explain_unknown(path))
        return OpenSlide(path)
    except OpenSlideError as error:
        raise DataError(f"{path} is damaged, or of a kind that is not read: {error}") from error


def _explain_unknown(path: Path) -> str:
    """Why a file that OpenSlide does not know is none, and what to do."""
    kind = peek_kind(path, "file")
    if kind is None:
        return f"{path} does not exist"
    if kind == "folder":
        return f"{path} is a folder: name a slide that lies in it"
    try:
        first = read_first_bytes(path, 4)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    for start, name in _IMAGES.items():
        if first.startswith(start):
            return f"{path} is a {name} image and no slide, whatever it is called"
    if first in _TIFF:
        return (
            f"{path} is a TIFF that is cut short, damaged, or without tiles: copy it again, or convert it by "
            "`vips tiffsave IN OUT --tile --pyramid --compression jpeg --Q 90`"
        )
    return f"{path} is no slide: use a format of OpenSlide, such as SVS, NDPI, MRXS or a tiled TIFF"


def _is_ome(properties: Mapping[str, str]) -> bool:
    return "<OME" in properties.get(_DESCRIPTION, "")


def _find_bounds(properties: Mapping[str, str], whole: Level) -> Bounds:
    """The scanned part, which some scanners state; else the whole."""
    stated = [_as_number(properties.get(f"openslide.bounds-{name}")) for name in ("x", "y", "width", "height")]
    if not all(isinstance(value, float) for value in stated):
        return Bounds(0, 0, whole.width, whole.height)
    x, y, width, height = (int(value or 0) for value in stated)
    left, top = min(max(x, 0), whole.width), min(max(y, 0), whole.height)
    right, bottom = min(x + width, whole.width), min(y + height, whole.height)
    return Bounds(left, top, max(0, right - left), max(0, bottom - top))


def _find_background(text: str) -> tuple[int, int, int]:
    """The colour of what was not scanned, such as FFFFFF; white where it is not stated, or dark as tissue."""
    if re.fullmatch("[0-9A-Fa-f]{6}", text):
        red, green, blue = bytes.fromhex(text)
        if min(red, green, blue) >= _LEAST_WHITE:
            return red, green, blue
    return 255, 255, 255


def _as_number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
