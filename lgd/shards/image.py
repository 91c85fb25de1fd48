"""Image bytes <-> pixels: the one place that decides what an image file is, and what it says beside its pixels.

The type is recognised by the content, never by the name: BCI's `.png` files hold JPEG streams. JPEG, PNG and WebP
are accepted; every other content raises `DataError`, and so does a truncated or broken stream, and one of more than
8 bits a channel, whose lower bits would be lost. A malformed orientation or colour profile counts as absent; Pillow's
readers raise nearly everything for it.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, features

from lgd.base.errors import DataError

RESIZE = "scaled JPEG decoding, then antialiased bilinear (1)"
"""How `decode` shrinks: what was computed from its pixels depends on it. Change it with the pixels."""

MAX_PIXELS = 100_000_000

FIRST_BYTES = 32
"""So many first bytes of a file show its type."""

_TOO_LARGE = f"has more than {MAX_PIXELS // 10**6} megapixels: cut it into patches"
FORMAT_NAMES = "JPEG, PNG or WebP"
_FORMATS = ("JPEG", "PNG", "WEBP")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_PNG_END = b"IEND\xaeB`\x82"
# The frame of a JPEG of 12 or 16 bits a channel.
_DEEP_FRAME = re.compile(rb"\xff[\xc1-\xc3\xc9-\xcb]\0.([\x0c\x10])", re.DOTALL)
_MODES = {"RGB", "RGBA", "L", "LA", "P", "PA", "1"}


class Header(NamedTuple):
    """What an image says of itself before it is decoded."""

    extension: str
    """jpg, png or webp, by content."""
    width: int
    height: int


def codecs() -> dict[str, str | None]:
    """Versions of the packages that decide the bytes of re-encoded images, and of their tars."""
    # Pillow's wheels compress PNG with zlib-ng, whose bytes are not zlib's.
    deflate = features.version("zlib_ng")
    deflate = f"ng-{deflate}" if deflate else features.version("zlib")
    pillow, tars = features.version("pil"), importlib.metadata.version("webdataset")
    return {"simplejpeg": simplejpeg.__version__, "pillow": pillow, "zlib": deflate, "webdataset": tars}


def kind(content: bytes | memoryview) -> str | None:
    """The type of an image, jpg, png or webp, by its first bytes; None for everything else."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def header(content: bytes | memoryview, name: str) -> Header:
    """Type and size of an image, without decoding its pixels.

    `name` names the image in errors. Raises `DataError` for content that is not a JPEG, PNG or WebP image,
    for CMYK, 16-bit and animated images, and for more than 100 megapixels. A JPEG of more than 8 bits is refused when
    it is decoded.
    """
    if not content:
        raise DataError(f"{name}: is empty: fetch it again")
    extension = kind(content)
    if extension is None:
        start = bytes(content[:8])
        raise DataError(f"{name}: is no {FORMAT_NAMES} image (it starts with {start!r}): convert or remove it")
    with _explain_errors(name):
        if extension == "jpg":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours in ("CMYK", "YCCK"):
                raise DataError(f"{name}: is a {colours} JPEG: convert it to RGB")
        else:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                # Pillow calls 16-bit colour plainly RGB, and gives its upper bytes.
                if extension == "png" and any("16" in str(tile.args) for tile in image.tile):
                    raise _too_deep(name, 16)
                _check_mode(image, name)
                if getattr(image, "n_frames", 1) > 1:
                    raise DataError(f"{name}: is an animation: keep one frame of it")
                width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {_TOO_LARGE}")
    return Header(extension, width, height)


def _check_mode(image: Image.Image, name: str) -> None:
    if image.mode not in _MODES:
        raise DataError(f"{name}: has pixels of mode {image.mode}: convert it to 8-bit RGB")


def _too_deep(name: str, depth: int) -> DataError:
    return DataError(
        f"{name}: has {depth} bits a channel, and only 8 would be read: scale its values to 8 bits, so that the "
        "brightest is near 255, such as by exporting it from a viewer as 8-bit RGB"
    )


@contextlib.contextmanager
def _explain_errors(name: str, content: bytes | memoryview = b"") -> Iterator[None]:
    """Turn the errors of decoders into `DataError`; one of a JPEG may mean that it has more than 8 bits."""
    try:
        yield
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {_TOO_LARGE}") from error
    except _BROKEN as error:
        if kind(content) == "jpg" and (deep := _DEEP_FRAME.search(content)):
            raise _too_deep(name, deep[1][0]) from error
        raise DataError(f"{name}: is truncated or broken ({error}): fetch it again") from error


def decode(
    content: bytes | memoryview,
    name: str,
    size: int | None = None,
    out: np.ndarray | None = None,
    found: Header | None = None,
) -> np.ndarray:
    """Decode a JPEG, PNG or WebP image to RGB.

    `size` shrinks (or enlarges) to `size` x `size` pixels: a JPEG first by libjpeg's scaled decoding, to the
    smallest of its eight scales that is not below `size`; what is left by an antialiased resize. Grey and
    palette images become RGB; transparent pixels are laid on white, the colour of bare glass. `out`, contiguous
    uint8 (size, size, 3), takes the pixels and is returned. `found` is the image's `header`, where it was read before.

    The pixels are given as they are stored; `decode_upright` turns them as EXIF asks.

    Returns (height, width, 3) uint8, writable and contiguous. Raises `DataError` with `name` as `header`
    does, and for truncated or broken content.
    """
    found = found or header(content, name)
    buffer = None
    with _explain_errors(name, content):
        if found.extension == "jpg":
            side = size or 0
            # libjpeg can write to where the pixels belong when no resize follows.
            buffer = out if out is not None and out.shape[:2] == _scaled(found, side) else None
            pixels: np.ndarray = simplejpeg.decode_jpeg(content, min_height=side, min_width=side, buffer=buffer)
            if size is not None and pixels.shape[:2] != (size, size):
                pixels = resize(pixels, size, size)
        else:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                rgb = _rgb(image)
                pixels = np.array(rgb if size is None else rgb.resize((size, size), Image.Resampling.BILINEAR))
    if out is None:
        return pixels
    if buffer is None:
        out[:] = pixels
    return out


def decode_upright(content: bytes | memoryview, name: str, size: int | None = None) -> np.ndarray:
    """`decode` an image, and turn it as its EXIF orientation says.

    Shards are read by `decode`: their builder refused or turned such images, and no stream pays for looking again.
    """
    return turn_upright(decode(content, name, size), read_orientation(content))


def as_pixels(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of a Pillow image, uint8 (H, W, 3), as `decode_upright` gives those of a file; raises as it does."""
    _check_mode(image, name)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{name}: {_TOO_LARGE}")
    with _explain_errors(name):
        pixels = np.array(_rgb(image))
    return turn_upright(pixels, find_orientation(image))


def upright_size(content: bytes | memoryview, name: str) -> tuple[int, int]:
    """Height and width of an image as `decode_upright` gives it; raises as `header` does."""
    found = header(content, name)
    turned = read_orientation(content) >= 5
    return (found.width, found.height) if turned else (found.height, found.width)


def find_orientation(image: Image.Image) -> int:
    """The orientation of an image, 1 to 8; 1, upright, where there is none or it is malformed."""
    with contextlib.suppress(Exception):
        # A PNG may name it behind its pixels, which this then decodes.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation or 1) if orientation in range(2, 9) else 1
    return 1


def read_orientation(content: bytes | memoryview) -> int:
    """`find_orientation` of a file."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        return find_orientation(image)
    return 1


def read_icc_digest(content: bytes | memoryview) -> str | None:
    """SHA-256 of the embedded ICC profile, the same in every container; None where there is none or it is broken."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        profile = image.info.get("icc_profile")
        return hashlib.sha256(profile).hexdigest() if profile else None
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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check(content: bytes, name: str, turns: bool = False) -> Header:
    """Decode an image fully, and refuse it unless it is whole to its last byte, and stored upright or one `turns` it.

    Returns its type, and its size when it is upright. Raises `DataError` as `decode` does. Pillow alone would accept a
    PNG without its end.
    """
    found = header(content, name)
    decode(content, name)
    if found.extension == "png":
        with _explain_errors(name), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
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
