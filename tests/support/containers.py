"""PNG, JPEG and TIFF put together by hand, with what no library writes."""

import struct
import zlib


def chunk(name, data):
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth, colour, *between):
    """A black PNG of 8 x 8 pixels; `between` are chunks in front of its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = b"".join(b"\0" + bytes(max(1, 8 * channels * depth // 8)) for _ in range(8))
    palette = chunk(b"PLTE", bytes(3 * 2**depth)) if colour == 3 else b""
    parts = (header, palette, *between, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(*entries, order="<", magic=42, start=8, count=None):
    """A TIFF header with one directory of entries (tag, type, count, value)."""
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", magic, start)
    body = struct.pack(f"{order}H", len(entries) if count is None else count)
    for tag, kind, values, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, values)
        body += struct.pack(f"{order}{'Hxx' if kind == 3 else 'I'}", value)
    return head + b"\0" * (start - 8) + body


def with_segments(jpeg, *segments):
    """A JPEG with segments (marker, data) in front of what it holds."""
    parts = (b"\xff" + marker + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    return b"\xff\xd8" + b"".join(parts) + jpeg[2:]


def with_exif(jpeg, tiff_bytes):
    """A JPEG with EXIF in front of what it holds."""
    return with_segments(jpeg, (b"\xe1", b"Exif\0\0" + tiff_bytes))
