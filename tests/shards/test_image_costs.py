"""Images of a few kB or MB that would take gigabytes or many seconds are refused by their headers."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from containers import chunk, tiff, tiled_tiff
from PIL import Image

from lgd.base.errors import DataError
from lgd.shards.image import decode, encode, header


def saved(kind, image, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_scans(count, progressive=True, frame_at=b""):
    """A JPEG whose last scan stands in it so often more."""
    content = saved("JPEG", Image.new("RGB", (64, 64), "plum"), progressive=progressive)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:2] + frame_at + content[2:-2] + last * count + content[-2:]


def large_png(width, height, channels, *between):
    """A PNG of zeros."""
    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + width * channels)) for _ in range(height)) + packed.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", head), *between, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def spread(content, at, value):
    """Content with other bytes at a place."""
    return content[:at] + value + content[at + len(value) :]


def costly_jp2(marker, place, value):
    """A JPEG 2000 with other bytes so far behind a marker of its main header."""
    content = saved("JPEG2000", Image.new("RGB", (256, 256)))
    return spread(content, content.index(marker) + place, value)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
MANY = [(tag, 7, 90_000, 8) for tag in range(300, 7800)]
ONE_STRIP = saved("TIFF", Image.new("L", (9000, 9000)), compression="tiff_lzw", tiffinfo={278: 9000})
COSTLY = {
    "scans": (with_scans(101), "has more than 100 scans, which take long: save it anew"),
    "scans behind a fill byte": (with_scans(101, frame_at=b"\xff\xff\xfe\0\2"), "has more than 100 scans"),
    "entries": (tiff((256, 7, 30_000, 8), *MANY), "has directories of more than 64 MB: save it anew"),
    "pages": (tiff((256, 4, 1, 8)) + struct.pack("<I", 8), "has more than 64 pages: save it anew"),
    "tile": (spread(tiled_tiff(NOISE, 32), -44, struct.pack("<I", 2**20)), "has 4 strips or tiles of 1048576 x 32"),
    "strip": (ONE_STRIP, "has 1 strips or tiles of 9000 x 9000 pixels"),
    "tiles": (costly_jp2(b"\xff\x51", 22, struct.pack(">II", 2, 2)), "is cut into 16384 tiles"),
    "blocks": (costly_jp2(b"\xff\x52", 10, b"\0\0"), "is cut into blocks of less than 16 x 16 pixels"),
    "jp2": (costly_jp2(b"\xff\x51", 6, struct.pack(">II", 4200, 4200)), "has more than 17 megapixels: cut it"),
    "webp": (saved("WEBP", Image.new("RGB", (8000, 5001)), method=0), "has more than 40 megapixels: cut it"),
    "text": (
        large_png(8, 8, 3, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))]),
        "is truncated or broken .Decompressed data too large",
    ),
}


@pytest.mark.parametrize("name", COSTLY)
@pytest.mark.filterwarnings("ignore")
def test_what_costs_much_is_refused_by_its_header(name):
    content, reason = COSTLY[name]
    with pytest.raises(DataError, match=f"^a.x: .*{reason}"):
        header(content, "a.x")


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_of_encoders_are_read(progressive):
    header(with_scans(0, progressive), "a")
    header(with_scans(85), "a")
    # What looks like scans in front of the picture, such as in a small picture for viewers, is none.
    inside = b"\xff\xe1" + struct.pack(">H", 2 + 10 * 200) + b"\xff\xda\0\x08\1\1\0\0\0\0" * 200
    content = with_scans(0, progressive=False, frame_at=inside)
    assert header(content, "a") == ("jpg", 64, 64) and decode(content, "a").shape == (64, 64, 3)


def test_a_second_scan_behind_a_whole_one_is_an_error_of_the_decoder():
    """So nothing counts the scans of the files that are read most."""
    with pytest.raises(DataError, match="truncated or broken"):
        decode(with_scans(2, progressive=False), "a")


@pytest.mark.parametrize("size", [None, 256])
def test_pixels_are_decoded_within_a_few_bytes_each(tmp_path, size):
    """Those of an RGBA PNG took 16 bytes, in five arrays at a time."""
    (tmp_path / "a.png").write_bytes(large_png(3000, 3000, 4))
    script = (
        "import resource, sys; from pathlib import Path; from lgd.shards.image import decode_upright\n"
        "content = Path(sys.argv[1]).read_bytes()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"before = peak(); decode_upright(content, 'a', {size}); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) / 3000**2 < 12


def test_bands_are_the_whole(monkeypatch):
    monkeypatch.setattr("lgd.shards.pillow_image._BAND", 1000)
    clear = np.dstack([NOISE, np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)])
    for image in (Image.fromarray(clear), Image.fromarray(NOISE).quantize(16), Image.fromarray(NOISE)):
        content = saved("PNG", image)
        in_bands, small = decode(content, "a"), decode(content, "a", 20)
        with monkeypatch.context() as context:
            context.setattr("lgd.shards.pillow_image._BAND", 10**6)
            assert (in_bands == decode(content, "a")).all() and (small == decode(content, "a", 20)).all()
    assert (decode(encode(NOISE, "png"), "a") == NOISE).all()
