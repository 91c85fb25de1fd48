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


def tiled_tiff(pixels, side, compress=zlib.compress):
    """A TIFF of pixels (height, width, 3) in compressed tiles, as pyramids have them."""
    height, width, channels = pixels.shape
    tiles = [
        compress(pixels[top : top + side, left : left + side].tobytes())
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    starts = [8 + sum(map(len, tiles[:number])) for number in range(len(tiles) + 1)]
    bits_at = starts[-1]
    offsets_at = bits_at + 2 * channels
    directory_at = offsets_at + 8 * len(tiles)
    values = struct.pack(f"<{channels}H{2 * len(tiles)}I", *[8] * channels, *starts[:-1], *map(len, tiles))
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits_at), (259, 3, 1, 8), (262, 3, 1, 2)]
    entries += [(277, 3, 1, channels), (322, 4, 1, side), (323, 4, 1, side), (324, 4, len(tiles), offsets_at)]
    entries += [(325, 4, len(tiles), offsets_at + 4 * len(tiles))]
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", directory_at)
    return head + b"".join(tiles) + values + struct.pack("<H", len(entries)) + body + bytes(4)
