"""Image bytes <-> pixels: the one place that decides what an image file is, and that decodes and encodes it.

The type is recognised by the content, never by the name: BCI's `.png` files hold JPEG streams. JPEG, PNG, WebP, TIFF,
BMP and JPEG 2000 of up to 8 bits a channel are read, within the limits of `lgd.shards.image_limits`; every other
content raises `DataError`, and so does a truncated or broken stream. A malformed orientation or colour profile counts
as absent; Pillow's readers raise nearly everything for it.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile

from lgd.base.errors import CostError, DataError
from lgd.shards import jpeg2000, tiff
from lgd.shards.image_limits import (
    BROKEN,
    LIMITED,
    MODES,
    MOST_PIXELS,
    check_limits,
    check_scans,
    find_depth,
    make_depth_error,
)
from lgd.shards.pillow_image import decode_image
from lgd.shards.profiles import Profile, find_profile

RESIZE = "scaled JPEG decoding, then antialiased bilinear (1)"
"""How `decode` shrinks: what was computed from its pixels depends on it. Change it with the pixels."""

FORMAT_NAMES = "JPEG, PNG, WebP, TIFF, BMP or JPEG 2000"
STORED = ("jpg", "png", "webp")
"""Types that a shard holds; images of others are stored as PNG."""
FIRST_BYTES = 32
"""So many first bytes of a file show its type."""

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "jp2": "JPEG2000"}
_PNG_END = b"IEND\xaeB`\x82"
_PNG_TAGS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
# Markers of what may stand in front of the first scan beside the frame: tables, comments and data of applications.
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_BMP_HEADS = {12, 16, 40, 52, 56, 64, 108, 124}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Header(NamedTuple):
    """What an image says of itself before it is decoded."""

    extension: str
    """jpg, png, webp, tif, bmp or jp2, by content."""
    width: int
    height: int


def kind(content: bytes | memoryview) -> str | None:
    """The type of an image, as in `Header.extension`, by its first bytes; None for everything else."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if content[:4] in _TIFF_STARTS:
        return "tif"
    if content[:2] == b"BM" and int.from_bytes(content[14:18], "little") in _BMP_HEADS:
        return "bmp"
    return "jp2" if content[:12] == jpeg2000.SIGNATURE or content[:4] == jpeg2000.RAW else None


def header(content: bytes | memoryview, name: str) -> Header:
    """Type and size of an image, without decoding its pixels; those of a TIFF as its orientation tag turns it.

    `name` names the image in errors. Raises `DataError` for content that is no image of these types, for CMYK and
    other colours than grey and RGB, for more than 8 bits a channel, for several pages or frames, and for what would
    cost too much. A JPEG of more than 8 bits is refused when it is decoded.
    """
    if not content:
        raise DataError(f"{name}: is empty: fetch it again")
    extension = kind(content)
    if extension is None:
        start = bytes(content[:8])
        raise DataError(f"{name}: is no {FORMAT_NAMES} image (it starts with {start!r}): convert or remove it")
    with explain_broken(name):
        if extension in LIMITED:
            check_limits(content, extension, name)
        if extension == "jpg":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours in ("CMYK", "YCCK"):
                raise DataError(f"{name}: is a {colours} JPEG: convert it to RGB")
            if _may_have_scans(content):
                check_scans(content)
        else:
            with open_image(content, extension) as image:
                # Pillow calls 16-bit colour plainly RGB, and gives its upper bytes.
                if extension == "png" and any("16" in str(tile.args) for tile in image.tile):
                    raise make_depth_error(name, 16)
                check_mode(image, name)
                if extension in ("png", "webp") and getattr(image, "n_frames", 1) > 1:
                    raise DataError(f"{name}: is an animation: keep one frame of it")
                width, height = image.size
    if width * height > MOST_PIXELS[extension]:
        raise DataError(f"{name}: has more than {MOST_PIXELS[extension] // 10**6} megapixels: cut it into patches")
    return Header(extension, width, height)


def open_image(content: bytes | memoryview, extension: str | None = None) -> ImageFile.ImageFile:
    """A Pillow image of this type, or of any, whose pixels are not decoded yet."""
    return Image.open(io.BytesIO(content), formats=[_FORMATS[extension]] if extension else [*_FORMATS.values()])


def check_mode(image: Image.Image, name: str) -> None:
    """Raise `DataError` unless an image has grey or RGB colours of up to 8 bits."""
    if image.mode not in MODES:
        raise DataError(f"{name}: has pixels of mode {image.mode}: convert it to 8-bit RGB")


@contextlib.contextmanager
def explain_broken(name: str, content: bytes | memoryview = b"") -> Iterator[None]:
    """Turn the errors of decoders into `DataError`; one of a JPEG may mean that it has more than 8 bits."""
    try:
        yield
    except DataError:
        raise
    except CostError as error:
        raise DataError(f"{name}: {error}: save it anew") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: has more than 100 megapixels: cut it into patches") from error
    except BROKEN as error:
        if kind(content) == "jpg" and (depth := find_depth(content)):
            raise make_depth_error(name, depth) from error
        raise DataError(f"{name}: is truncated or broken ({error}): fetch it again") from error


def _may_have_scans(content: bytes | memoryview) -> bool:
    """Whether a JPEG may hold several scans: all but a baseline one whose first scan has all of its colours.

    Searching all of its bytes would cost 1 % of decoding; libjpeg raises for a second scan in the others.
    """
    at, colours = 2, 0
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xDA:
            return content[at + 4] != colours
        if marker in (0xC0, 0xC1):
            colours = content[at + 9]
        elif marker not in _TABLES:
            break
        at += 2 + (content[at + 2] << 8 | content[at + 3])
    return True


def decode(
    content: bytes | memoryview,
    name: str,
    size: int | None = None,
    out: np.ndarray | None = None,
    found: Header | None = None,
) -> np.ndarray:
    """Decode an image to RGB.

    `size` shrinks (or enlarges) to `size` x `size` pixels: a JPEG first by libjpeg's scaled decoding, to the
    smallest of its eight scales that is not below `size`; what is left by an antialiased resize. Grey and
    palette images become RGB; transparent pixels are laid on white, the colour of bare glass. `out`, contiguous
    uint8 (size, size, 3), takes the pixels and is returned. `found` is the image's `header`, where it was read before.

    The pixels are given as they are stored; `decode_upright` turns them as EXIF asks. Those of a TIFF always stand as
    its orientation tag says.

    Returns (height, width, 3) uint8, writable and contiguous. Raises `DataError` with `name` as `header`
    does, and for truncated or broken content.
    """
    found = found or header(content, name)
    buffer = None
    with explain_broken(name, content):
        if found.extension == "jpg":
            side = size or 0
            # libjpeg can write to where the pixels belong when no resize follows.
            buffer = out if out is not None and out.shape[:2] == _scaled(found, side) else None
            pixels: np.ndarray = simplejpeg.decode_jpeg(content, min_height=side, min_width=side, buffer=buffer)
        else:
            pixels = _decode_by_pillow(content, found.extension, size)
        if size is not None and pixels.shape[:2] != (size, size):
            pixels = resize(pixels, size, size)
    if out is None:
        return pixels
    if buffer is None:
        out[:] = pixels
    return out


def _decode_by_pillow(content: bytes | memoryview, extension: str, size: int | None) -> np.ndarray:
    # A function, so that the image is gone before its pixels are shrunk.
    with open_image(content, extension) as image:
        return decode_image(image, size)


def decode_upright(content: bytes | memoryview, name: str, size: int | None = None) -> np.ndarray:
    """`decode` an image, and turn it as its EXIF orientation says.

    Shards are read by `decode`: their builder refused or turned such images, and no stream pays for looking again.
    """
    return turn_upright(decode(content, name, size), read_orientation(content))


def find_orientation(image: Image.Image) -> int:
    """The orientation of an image, 1 to 8; 1, upright, where there is none or it is malformed."""
    if image.format == "TIFF":
        # Pillow turns its pixels itself.
        return 1
    with contextlib.suppress(Exception):
        if not (exif := image.info.get("exif")) or not tiff.is_costly(exif):
            # A PNG may name it behind its pixels, which this then decodes.
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            return int(orientation or 1) if orientation in range(2, 9) else 1
    return 1


def read_orientation(content: bytes | memoryview) -> int:
    """`find_orientation` of a file."""
    if kind(content) == "png" and not any(tag in bytes(content) for tag in _PNG_TAGS):
        # Pillow would decode all pixels to look behind them.
        return 1
    with contextlib.suppress(Exception), open_image(content) as image:
        return find_orientation(image)
    return 1


def read_profile(content: bytes | memoryview) -> Profile | None:
    """`find_profile` of a file; None too where it is broken. That of a JPEG 2000 is not read."""
    with contextlib.suppress(Exception), open_image(content) as image:
        return find_profile(image) if image.info.get("icc_profile") else None
    return None


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (height, width, 3) as the orientation says that they are to be shown; contiguous."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    vertical = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    horizontal = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[vertical, horizontal])


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels (H, W, 3) shrunk or enlarged to (height, width, 3), antialiased as `decode` does it."""
    # Pillow's bilinear filter widens with the shrink factor, which is what keeps it free of aliases.
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


@functools.lru_cache
def _scaled(found: Header, side: int) -> tuple[int, int]:
    """Height and width to which libjpeg decodes: the smallest of its eighths of which neither is below `side`."""
    sizes = [(-(-found.height * eighths // 8), -(-found.width * eighths // 8)) for eighths in range(1, 9)]
    return next((size for size in sizes if min(size) >= side), sizes[-1])


def check(content: bytes, name: str, turns: bool = False) -> Header:
    """Decode an image fully, and refuse it unless it is whole to its last byte, and stored upright or one `turns` it.

    Returns its type, and its size when it is upright. Raises `DataError` as `decode` does. Pillow alone would accept a
    PNG without its end.
    """
    found = header(content, name)
    decode(content, name)
    if found.extension == "png":
        with explain_broken(name), open_image(content, "png") as image:
            image.verify()
            if _PNG_END not in content:
                raise EOFError("its end is missing")
    orientation = read_orientation(content)
    if orientation != 1 and not turns:
        raise DataError(
            f"{name}: has EXIF orientation {orientation}: viewers turn or mirror it, but training reads the pixels as "
            "they are stored: use --image png or --image jpeg:95, which turn them"
        )
    return found._replace(width=found.height, height=found.width) if orientation >= 5 else found


def encode(pixels: np.ndarray, extension: str, quality: int = 95) -> bytes:
    """Encode (height, width, 3) uint8 RGB pixels as `png`, or as `jpg` of the given quality.

    The JPEG keeps full colour resolution (4:4:4): stain colours are the signal.
    """
    if extension == "jpg":
        pixels = np.ascontiguousarray(pixels)
        return cast(bytes, simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="444"))
    assert extension == "png", extension
    stream = io.BytesIO()
    # On a real patch level 1 is twice as fast as the default 6 and 3 % larger.
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
