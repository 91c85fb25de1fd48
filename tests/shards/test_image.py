import contextlib
import io

import numpy as np
import pytest
from containers import chunk, png, tiff, tiled_tiff, with_exif
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lgd.base.errors import DataError
from lgd.scoring.images import upright_size
from lgd.shards.image import check, decode, decode_upright, encode, header
from lgd.shards.image_limits import MOST_PIXELS


def smooth(height=64, width=64):
    """A picture without fine detail, so that every sensible resize of it agrees."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    y, x = (y + 0.5) / height, (x + 0.5) / width
    return np.stack([y, x, (x + y) / 2], 2) * 200 + 20


PIXELS = smooth().astype(np.uint8)


def saved(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **options)
    return stream.getvalue()


KINDS = {
    "jpg": saved("JPEG", quality=95),
    "progressive": saved("JPEG", quality=95, progressive=True),
    "png": saved("PNG"),
    "webp": saved("WEBP", lossless=True),
    "tif": saved("TIFF", compression="tiff_lzw"),
    "tif raw": saved("TIFF"),
    "tif jpeg": saved("TIFF", compression="jpeg", quality=95),
    "tif tiled": tiled_tiff(PIXELS, 32),
    "bmp": saved("BMP"),
    "jp2": saved("JPEG2000"),
    "jp2 raw": saved("JPEG2000", no_jp2=True),
}
LOSSLESS = {*KINDS} - {"jpg", "progressive", "tif jpeg"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_decodes_and_is_told_by_its_content(kind):
    found = header(KINDS[kind], "a.png")
    assert found == ("jpg" if kind == "progressive" else kind.partition(" ")[0], 64, 64)
    pixels = decode(KINDS[kind], "a.png")
    assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - PIXELS).max() <= (0 if kind in LOSSLESS else 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 20, 64, 96])
def test_scaled_decoding_agrees_with_a_full_decode_and_an_average(kind, size):
    pixels = decode(KINDS[kind], "a", size)
    assert pixels.shape == (size, size, 3) and pixels.flags.writeable
    assert np.abs(pixels - smooth(size, size)).mean() < 3


def test_shrinking_is_antialiased():
    # Single-pixel stripes average to grey; a resize that only picks pixels would keep black or white.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for kind in ("png", "jpg"):
        shrunk = decode(encode(stripes, kind, 100), "a", 20)
        assert np.abs(shrunk.astype(int) - 127).max() < 60


def test_an_oblong_image_fills_the_square():
    assert decode(encode(smooth(64, 128).astype(np.uint8), "jpg"), "a", 32).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.faults
def test_a_cut_file_is_refused_wherever_it_is_cut(kind):
    content = KINDS[kind]
    check(content, "whole")
    for end in [*range(0, len(content) - 40, 37), *range(len(content) - 40, len(content))]:
        with pytest.raises(DataError, match="^cut.png: "):
            check(content[:end], "cut.png")


@pytest.mark.faults
def test_a_flipped_bit_in_a_png_is_refused():
    content = KINDS["png"]
    for position in range(8, len(content), 11):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(DataError):
            check(bytes(flipped), "a")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty"),
        (b"not an image at all", "is no JPEG, PNG, WebP, TIFF, BMP or JPEG 2000 image"),
        (saved("GIF"), "is no JPEG"),
        (saved("JPEG", Image.new("CMYK", (9, 9))), "is a CMYK JPEG: convert it"),
        (saved("PNG", Image.fromarray(np.zeros((9, 9), np.uint16))), "has 16 bits a channel"),
        (saved("PNG", save_all=True, append_images=[Image.new("RGB", (64, 64))]), "animation"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "truncated or broken"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "truncated or broken"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "truncated or broken"),
    ],
)
def test_what_is_no_usable_image_is_refused(content, reason):
    with pytest.raises(DataError, match=f"^a.png: .*{reason}"):
        decode(content, "a.png")


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_are_refused_whatever_the_colours(colour):
    """Pillow gives the upper bytes of all but grey, and calls them RGB: a 12-bit camera's picture is nearly black."""
    remedy = "^a.png: has 16 bits a channel, and only 8 would be read: scale its values to 8 bits"
    deep = chunk(b"IHDR", b"\0\0\0\x08\0\0\0\x08\x10" + bytes([colour]) + bytes(3))
    for content in (png(16, colour), png(8, colour, deep)):
        for read in (header, decode, decode_upright, check):
            with pytest.raises(DataError, match=remedy):
                read(content, "a.png")


@pytest.mark.parametrize(
    "depth, colour", [(1, 0), (2, 0), (4, 0), (1, 3), (2, 3), (4, 3), (8, 0), (8, 2), (8, 4), (8, 6)]
)
def test_what_fits_8_bits_is_read(depth, colour):
    pixels = decode(png(depth, colour), "a")
    assert pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_few_bits_of_grey_expand_exactly():
    for depth in (1, 2, 4):
        values = np.arange(16, dtype=np.uint8).reshape(4, 4) % 2**depth
        expected = values * (255 // (2**depth - 1))
        content = saved("PNG", Image.fromarray(expected), bits=depth)
        assert (decode(content, "a")[..., 0] == expected).all()


def test_a_12_bit_jpeg_is_refused():
    content = KINDS["jpg"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c")
    assert content != KINDS["jpg"]
    with pytest.raises(DataError, match="^a.jpg: has 12 bits a channel"):
        decode(content, "a.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_pixels_are_those_of_pillow(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth(48, 96).astype(np.uint8))
    content = saved(kind, image, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")).astype(int)
    upright = decode_upright(content, "a")
    assert upright.shape == ((96, 48, 3) if orientation >= 5 else (48, 96, 3)) and upright.flags.writeable
    assert np.abs(upright - expected).max() <= 2
    small = np.array(Image.fromarray(expected.astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode_upright(content, "a", 32) - small).mean() < 2
    # The stream's own decoder gives what is stored.
    assert (decode(content, "a") == decode(saved(kind, image), "a")).all()


def test_malformed_exif_turns_nothing():
    plain = decode(KINDS["jpg"], "a")
    for content in (b"", b"II*\0\xff\xff\xff\xff", tiff((0x0112, 3, 1, 77))):
        assert (decode_upright(with_exif(KINDS["jpg"], content), "a") == plain).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_by_its_header():
    content = saved("PNG", Image.new("1", (10001, 10000)))
    with pytest.raises(DataError, match="more than 100 megapixels"):
        decode(content, "a")
    assert MOST_PIXELS["png"] < 10001 * 10000


def test_other_modes_become_rgb():
    grey = Image.new("L", (8, 8), 77)
    assert (decode(saved("PNG", grey), "a") == 77).all() and (abs(decode(saved("JPEG", grey), "a") - 77.0) < 2).all()
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (decode(saved("PNG", clear), "a") == 255).all()
    solid = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    assert (decode(saved("PNG", solid), "a") == (10, 20, 30)).all()
    palette = Image.fromarray(PIXELS).quantize(16)
    assert (decode(saved("PNG", palette), "a") == np.array(palette.convert("RGB"))).all()
    black = Image.new("1", (8, 8), 1)
    assert (decode(saved("PNG", black), "a") == 255).all()


def pages(*changes):
    """A TIFF of pages, the later ones with these tags."""
    first, *others = [Image.fromarray(PIXELS)] + [Image.new("RGB", (32, 32)) for _ in changes]
    for image, change in zip(others, changes, strict=True):
        image.encoderinfo = {"tiffinfo": change}
    return saved("TIFF", first, save_all=True, append_images=others)


def test_of_a_pyramid_the_first_page_is_read_and_of_a_stack_none():
    content = pages({254: 1}, {254: 4})
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (decode(content, "a.tif") == PIXELS).all() and check(content, "a.tif") == ("tif", 64, 64)
    with pytest.raises(DataError, match="^a.tif: has 3 pages: export the one that is the image as a file of its own"):
        header(pages({}, {}), "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_stands_as_its_orientation_says(orientation, compression):
    image = Image.fromarray(smooth(48, 96).astype(np.uint8))
    content = saved("TIFF", image, tiffinfo={274: orientation}, compression=compression)
    exif = Image.Exif()
    exif[274] = orientation
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(saved("PNG", image, exif=exif)))))
    for read in (decode, decode_upright):
        assert (read(content, "a") == expected).all()
    assert header(content, "a")[1:] == check(content, "a")[1:] == expected.shape[1::-1]
    assert upright_size(content, "a") == expected.shape[:2]


@pytest.mark.parametrize("kind, suffix", [("TIFF", "tif"), ("BMP", "bmp"), ("JPEG2000", "jp2")])
def test_colours_of_other_files_are_read_as_those_of_a_png(kind, suffix):
    grey, rgb = Image.fromarray(PIXELS[..., 0]), Image.fromarray(PIXELS)
    images = {"grey": grey, "black": grey.convert("1"), "palette": rgb.quantize(16), "alpha": rgb.convert("RGBA")}
    images["clear"] = Image.fromarray(np.dstack([PIXELS, np.zeros_like(PIXELS[..., 0])]))
    images["grey alpha"] = images["clear"].convert("LA")
    # The fourth byte of a BMP's pixel is nothing, but in its fourth form.
    lacks = {"BMP": {"grey alpha", "clear"}, "JPEG2000": {"black", "palette"}}.get(kind, set())
    for name in images.keys() - lacks:
        content = saved(kind, images[name])
        assert header(content, "a") == (suffix, 64, 64), name
        assert (decode(content, "a") == decode(saved("PNG", images[name]), "a")).all(), name


@pytest.mark.parametrize(
    "kind, image, reason",
    [
        ("TIFF", Image.new("CMYK", (9, 9)), "has pixels of mode CMYK: convert it to 8-bit RGB"),
        ("TIFF", Image.new("LAB", (9, 9)), "has pixels of mode LAB"),
        ("TIFF", Image.new("F", (9, 9)), "has 32 bits a channel, and only 8 would be read"),
        ("TIFF", Image.new("I;16", (9, 9)), "has 16 bits a channel"),
        ("JPEG2000", Image.new("I;16", (9, 9)), "has 16 bits a channel"),
    ],
)
def test_what_would_lose_colours_is_refused(kind, image, reason):
    for read in (header, decode, check):
        with pytest.raises(DataError, match=f"^a.x: {reason}"):
            read(saved(kind, image), "a.x")


@given(name=st.sampled_from(sorted(KINDS)), data=st.data())
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_broken_content_is_a_message(name, data):
    content = bytearray(KINDS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, min(400, len(content) - 1)), st.integers(0, len(content) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    for read in (check, decode_upright, lambda content, name: decode(content, name, 16)):
        with contextlib.suppress(DataError):
            assert read(bytes(content), "a") is not None


def test_encoding_comes_back():
    assert (decode(encode(PIXELS, "png"), "a") == PIXELS).all()
    assert np.abs(decode(encode(PIXELS[:, 1:], "jpg", 95), "a").astype(int) - PIXELS[:, 1:]).max() < 12
    assert len(encode(PIXELS, "jpg", 30)) < len(encode(PIXELS, "jpg", 95))


def test_a_real_patch_shrinks_alike_by_both_ways(real_data):
    content = (real_data / "bci-native/HE/test/00820_test_2+.png").read_bytes()
    assert header(content, "a") == ("jpg", 1024, 1024)
    full = decode(content, "a")
    average = full.reshape(256, 4, 256, 4, 3).mean((1, 3))
    assert np.abs(decode(content, "a", 256) - average).mean() < 2
