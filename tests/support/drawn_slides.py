"""Slides for tests of how they are opened: smooth colours, and stained tissue on glass."""

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
    amount = np.where(where, random.uniform(0.6, 1.6, where.shape), 0)
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
