"""Orientation and colour profile, against what Pillow writes and reads."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from containers import chunk, png, tiff, with_exif, with_segments
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from lgd.shards.image import read_orientation, read_profile, turn_upright
from lgd.shards.profiles import Profile, describe_profiles

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(extension, **options):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, FORMATS[extension], **options)
    return stream.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x010F] = "a camera"
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_and_applied_as_pillow_does(extension, orientation):
    content = saved(extension, exif=exif(orientation), **({"lossless": True} if extension == "webp" else {}))
    assert read_orientation(content) == orientation
    with Image.open(io.BytesIO(content)) as image:
        stored, upright = np.array(image.convert("RGB")), np.array(ImageOps.exif_transpose(image).convert("RGB"))
    turned = turn_upright(stored, orientation)
    assert turned.flags.c_contiguous and (turned == upright).all()


@pytest.mark.parametrize("extension", FORMATS)
def test_an_image_without_exif_is_upright(extension):
    assert read_orientation(saved(extension)) == 1
    assert read_profile(saved(extension)) is None


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [3, 4])
def test_both_byte_orders_and_any_place_of_the_directory(order, kind):
    content = tiff((0x010E, 4, 1, 3), (0x0112, kind, 1, 6), order=order, start=26)
    assert read_orientation(with_exif(saved("jpg"), content)) == 6
    for data in (content, b"Exif\0\0" + content):
        assert read_orientation(png(8, 2, chunk(b"eXIf", data))) == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"II",
        b"XX*\0\x08\0\0\0",
        tiff((0x0112, 3, 1, 6), magic=43),
        tiff((0x0112, 3, 1, 0)),
        tiff((0x0112, 3, 1, 9)),
        tiff((0x0112, 7, 1, 6)),
        tiff((0x010E, 4, 1, 6)),
        tiff((0x010E, 4, 1, 6), count=60000),
        tiff(start=8)[:4] + struct.pack("<I", 2**31),
        tiff((0x0112, 3, 1, 6))[:-9],
    ],
)
def test_malformed_exif_is_none(content):
    assert read_orientation(with_exif(saved("jpg"), content)) == 1
    assert read_orientation(png(8, 2, chunk(b"eXIf", content))) == 1


def test_exif_lies_behind_other_segments_and_the_first_counts():
    six, three = (b"Exif\0\0" + tiff((0x0112, 3, 1, value)) for value in (6, 3))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='8'/>"
    content = with_segments(
        saved("jpg"), (b"\xe0", b"JFIF\0" + bytes(9)), (b"\xe1", xmp), (b"\xe1", six), (b"\xe1", three)
    )
    assert read_orientation(content) == 6
    # Fill bytes may stand before a marker; a PNG may name it behind the pixels.
    assert read_orientation(content.replace(b"\xff\xe1", b"\xff\xff\xff\xe1")) == 6
    behind = png(8, 2)[:-12] + chunk(b"eXIf", six) + chunk(b"IEND", b"")
    assert read_orientation(behind) == 6


@pytest.mark.parametrize("extension", FORMATS)
def test_a_profile_has_one_digest_in_every_container(extension):
    # Of several segments in a JPEG, which hold up to 65,519 bytes each.
    profile = np.random.default_rng(1).integers(0, 256, 150_001, np.uint8).tobytes()
    found = read_profile(saved(extension, icc_profile=profile))
    assert found == (hashlib.sha256(profile).hexdigest(), "of an unknown name")


def test_segments_of_a_profile_come_in_any_order():
    one, two = b"ICC_PROFILE\0\1\2first", b"ICC_PROFILE\0\2\2second"
    expected = hashlib.sha256(b"firstsecond").hexdigest()
    other = (b"\xe2", b"MPF\0 of a camera")
    assert read_profile(with_segments(saved("jpg"), (b"\xe2", two), other, (b"\xe2", one))).sha256 == expected


@pytest.mark.parametrize(
    "segments",
    [
        [b"ICC_PROFILE\0"],
        [b"ICC_PROFILE\0\1"],
        [b"ICC_PROFILE\0\1\1"],
        [b"ICC_PROFILE\0\1\2abc"],
        [b"ICC_PROFILE\0\2\2abc"],
        [b"ICC_PROFILE\0\1\0abc"],
    ],
)
def test_a_malformed_profile_of_a_jpeg_is_none(segments):
    assert read_profile(with_segments(saved("jpg"), *[(b"\xe2", data) for data in segments])) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"name",
        b"name\0\1" + zlib.compress(b"abc"),
        b"name\0\0abc",
        b"name\0\0" + zlib.compress(bytes(20_000_000)),
    ],
)
def test_a_malformed_profile_of_a_png_is_none(data):
    assert read_profile(png(8, 2, chunk(b"iCCP", data))) is None


@given(extension=st.sampled_from(sorted(FORMATS)), position=st.floats(0, 1), value=st.binary(min_size=1, max_size=4))
def test_no_content_breaks_the_reading(extension, position, value):
    content = saved(extension, exif=exif(6), icc_profile=b"profile " * 40)
    at = int(position * 700) % len(content)
    for spoilt in (content[:at], content[:at] + value + content[at + len(value) :], content[:at] + value):
        assert 1 <= read_orientation(spoilt) <= 8
        assert len((read_profile(spoilt) or ("0" * 64,))[0]) == 64


def test_a_profile_is_named_and_mixed_ones_are_counted():
    for kind in ("PNG", "TIFF"):
        stream = io.BytesIO()
        Image.fromarray(PIXELS).save(stream, kind, icc_profile=SRGB)
        profile = read_profile(stream.getvalue())
        assert profile.name == "sRGB built-in"
    other = Profile("f" * 64, profile.name)
    assert describe_profiles([profile, profile], "images") == describe_profiles([None], "images") == ""
    assert describe_profiles([], "images") == ""
    text = describe_profiles([None, profile, None], "images")
    assert text.startswith(
        "3 images carry different colour profiles, 2 none, 1 'sRGB built-in': their colours are read"
    )
    assert f"1 'sRGB built-in' ({profile.sha256[:8]}), 1 'sRGB built-in' (ffffffff)" in describe_profiles(
        [profile, other], "images"
    )


def test_exif_that_shares_its_bytes_among_entries_is_not_read(monkeypatch):
    """As many entries as fit, each of the whole file, would be 65 GB of 2 MB."""
    monkeypatch.setattr(Image.Image, "getexif", lambda image: pytest.fail("was read"))
    entries = [(tag, 7, 30_000, 8) for tag in range(1, 4000)]
    content = tiff((0x0112, 3, 1, 6), *entries)
    assert read_orientation(png(8, 2, chunk(b"eXIf", content))) == 1
