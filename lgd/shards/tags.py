"""What an image file says beside its pixels: its bit depth, its EXIF orientation and its colour profile.

The three containers are walked here by hand: a file costs a few microseconds, no pixel is decoded, and what is
malformed counts as absent. Layouts: ITU T.81 annex B and ICC.1 annex B.4 (JPEG), the PNG specification,
RFC 9649 (WebP), TIFF 6.0 (what EXIF is).
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator

import numpy as np

ORIENTATIONS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "turned by 90 degrees and mirrored",
    6: "turned by 90 degrees",
    7: "turned by 270 degrees and mirrored",
    8: "turned by 270 degrees",
}
"""EXIF orientations other than 1, upright, and how the stored pixels must be shown."""

_ORIENTATION_TAG = 0x0112
# TIFF's types BYTE, SHORT and LONG: a struct code each.
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_EXIF = b"Exif\0\0"
_ICC = b"ICC_PROFILE\0"
# Real profiles have up to 2 MB; one of zeros would inflate a thousandfold.
_MOST_PROFILE = 16 * 1024 * 1024

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS = range(0xD0, 0xD8)
_APP1, _APP2 = b"\xe1", b"\xe2"
# SOF0 to SOF15 without DHT, JPG and DAC, which lie among them.
_FRAMES = {bytes([marker]) for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}


def read_bit_depth(content: bytes | memoryview, extension: str) -> int:
    """Bits of a channel (of an index, in a palette image); 8 where the file does not say."""
    if extension == "png":
        # Of two headers a decoder may take the second.
        depths = [data[8] for name, data in _segments(content, extension, b"IDAT") if name == b"IHDR" and len(data) > 8]
        return max(depths, default=8)
    if extension == "jpg":
        return next((data[0] for name, data in _segments(content, extension) if name in _FRAMES and data), 8)
    return 8


def read_orientation(content: bytes | memoryview, extension: str) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or it is malformed."""
    for name, data in _segments(content, extension):
        if extension == "jpg":
            if name == _APP1 and data[:6] == _EXIF:
                return _find_orientation(data[6:])
        elif name in (b"eXIf", b"EXIF"):
            # Some writers keep the JPEG's prefix.
            return _find_orientation(data[6:] if data[:6] == _EXIF else data)
    return 1


def read_icc_digest(content: bytes | memoryview, extension: str) -> str | None:
    """SHA-256 of the embedded ICC profile, the same in every container; None where there is none or it is broken."""
    profile = _read_icc(content, extension)
    return hashlib.sha256(profile).hexdigest() if profile else None


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (height, width, 3) as the orientation says that they are to be shown; contiguous."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    vertical = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    horizontal = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[vertical, horizontal])


def _segments(
    content: bytes | memoryview, extension: str, end: bytes | None = None
) -> Iterator[tuple[bytes, memoryview]]:
    """Name and data of each part of a file, up to the pixels of a JPEG, or to the part `end`; cut ones are left out."""
    data = memoryview(content)
    for name, part in _jpeg_segments(data) if extension == "jpg" else _chunks(data, extension == "png"):
        if name == end:
            return
        yield name, part


def _jpeg_segments(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xFF, _TEM, _SOI) or marker in _RESTARTS:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4])
        if marker in (_SOS, _EOI) or length < 2 or at + 2 + length > len(data):
            return
        yield bytes([marker]), data[at + 4 : at + 2 + length]
        at += 2 + length


def _chunks(data: memoryview, png: bool) -> Iterator[tuple[bytes, memoryview]]:
    """Of a PNG length, name, data and a checksum; of a WebP name, length and data, padded to an even length."""
    at = 8 if png else 12
    while at + 8 <= len(data):
        first, second = data[at : at + 4], data[at + 4 : at + 8]
        name, length = (second, int.from_bytes(first)) if png else (first, int.from_bytes(second, "little"))
        end = at + 8 + length
        if end + 4 * png > len(data):
            return
        yield bytes(name), data[at + 8 : end]
        at = end + (4 if png else length % 2)


def _find_orientation(tiff: memoryview) -> int:
    """The orientation in the first directory of a TIFF header."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return 1
    try:
        magic, start = struct.unpack_from(f"{order}HI", tiff, 2)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _ORIENTATION_TAG and kind in _INTEGERS and values == 1:
                (value,) = struct.unpack_from(f"{order}{_INTEGERS[kind]}", tiff, entry + 8)
                return value if magic == 42 and value in ORIENTATIONS else 1
    except struct.error:
        pass
    return 1


def _read_icc(content: bytes | memoryview, extension: str) -> bytes | None:
    if extension == "jpg":
        return _join_icc(data for name, data in _segments(content, extension) if name == _APP2)
    for name, data in _segments(content, extension):
        if name == b"ICCP":
            return bytes(data)
        if name == b"iCCP":
            return _inflate_icc(bytes(data))
    return None


def _join_icc(segments: Iterator[memoryview]) -> bytes | None:
    """The profile of a JPEG, whose segments are numbered from 1 and each say how many there are."""
    parts = sorted((data[12], data[13], bytes(data[14:])) for data in segments if data[:12] == _ICC and len(data) >= 14)
    whole = [(number, len(parts)) for number in range(1, len(parts) + 1)]
    return b"".join(part[2] for part in parts) if [part[:2] for part in parts] == whole else None


def _inflate_icc(data: bytes) -> bytes | None:
    """The profile of a PNG: a name, a method, and a zlib stream."""
    name, _, rest = data.partition(b"\0")
    if not 1 <= len(name) <= 79 or rest[:1] != b"\0":
        return None
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(rest[1:], _MOST_PROFILE)
    except zlib.error:
        return None
    return profile if inflater.eof else None
