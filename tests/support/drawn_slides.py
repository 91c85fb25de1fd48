"""Slides for tests of how they are opened: smooth colours, and stained tissue on glass."""

import io

import numpy as np
import tifffile
from PIL import Image, ImageDraw

HE, IHC = (0.06, 0.15, 0.04), (0.06, 0.05, 0.03)
"""Optical density of red, green and blue: of ordinary eosin, and of a faint counterstain without any brown."""


def draw_colours(height, width, seed=0):
    """Smooth colours that differ from place to place, so that a shift shows."""
    small = np.random.default_rng(seed).integers(60, 255, (max(2, height // 64), max(2, width // 64), 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def draw_tissue(side, glass=240, stain=HE, seed=0, noise=2.0):
    """Two ellipses of tissue on glass, uint8 (side, side, 3), and where they are."""
    image = Image.new("1", (side, side))
    for box in ((0.1, 0.15, 0.5, 0.7), (0.55, 0.5, 0.9, 0.95)):
        ImageDraw.Draw(image).ellipse([at * side for at in box], fill=1)
    where, random = np.asarray(image), np.random.default_rng(seed)
    # Cells of 8 pixels.
    cells = random.uniform(0.6, 1.6, (-(-side // 8),) * 2).repeat(8, 0).repeat(8, 1)[:side, :side]
    amount = np.where(where, cells + random.uniform(-0.1, 0.1, where.shape), 0)
    pixels = glass * 10 ** -(amount[..., None] * np.array(stain)) + random.normal(0, noise, (side, side, 1))
    return pixels.clip(0, 255).astype(np.uint8), where


def write_tiff(path, pixels, mpp=0.5, levels=3, **page):
    """A tiled pyramid without loss, as programs export it; no scale where `mpp` is None."""
    with tifffile.TiffWriter(path) as file:
        for number in range(levels):
            scale = {"resolution": (1e4 / mpp / 2**number,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
            kind = {"subfiletype": int(number > 0), **scale, **page}
            file.write(pixels, photometric="rgb", tile=(256, 256), metadata=None, software=None, **kind)
            pixels = np.asarray(Image.fromarray(pixels).reduce(2))
    return path


def write_ome(path, pixels, mpp=0.46, tag=None, jpeg="", **page):
    """An OME-TIFF with three levels as VALIS leaves them; tags state `tag` um a pixel; JPEG tiles of a colour space."""
    sizes = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    resolution = {"resolution": (1e4 / tag,) * 2, "resolutionunit": "CENTIMETER"} if tag else {}
    kind = {"photometric": "ycbcr" if jpeg == "YCBCR" else "rgb", "compression": "deflate", **page}
    with tifffile.TiffWriter(path, ome=True) as file:
        for number in range(3):
            first = {"subifds": 2, "metadata": {"axes": "YXS", **(sizes if mpp else {})}, **resolution}
            tiles = iter(_encode_tiles(pixels, jpeg)) if jpeg else pixels
            shape = {"shape": pixels.shape, "dtype": np.uint8} if jpeg else {}
            file.write(tiles, tile=(256, 256), **(kind | shape), **(first if number == 0 else {"subfiletype": 1}))
            pixels = np.asarray(Image.fromarray(pixels).reduce(2))
    if jpeg:
        # tifffile encodes none without imagecodecs, nor writes tiles that are encoded already under that name.
        set_compression(path, 7)
    return path


def set_compression(path, number):
    """Call the tiles of an OME-TIFF compressed by another method than they are."""
    with tifffile.TiffFile(path, mode="r+") as file:
        for page in (file.pages.first, *file.pages.first.pages):
            page.tags[259].overwrite(number)


def _encode_tiles(pixels, space):
    height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, -height % 256), (0, -width % 256), (0, 0)), mode="edge")
    for y in range(0, height, 256):
        for x in range(0, width, 256):
            tile = np.ascontiguousarray(padded[y : y + 256, x : x + 256])
            content = io.BytesIO()
            # Pillow writes RGB as it is, with neither JFIF's nor Adobe's marker, when it is asked to keep it.
            Image.fromarray(tile).save(content, "JPEG", quality=95, subsampling=0, keep_rgb=space == "RGB")
            yield content.getvalue()


def find_tile(path, number, level=0):
    """Where the bytes of a tile lie in a file: the first, and how many."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[level]
        return page.dataoffsets[number], page.databytecounts[number]


def damage(path, first, count):
    """Overwrite bytes of a file."""
    with open(path, "r+b") as file:  # noqa: PTH123
        file.seek(first)
        file.write(b"\x55" * count)
    return path
