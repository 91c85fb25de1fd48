"""Pixels of a Pillow image as RGB, in little memory: every step of Pillow's copies all pixels, at 4 bytes each."""

import numpy as np
from PIL import Image

_BAND = 2**20
"""Pixels that are converted at a time."""


def decode_image(image: Image.Image, size: int | None) -> np.ndarray:
    """The pixels of an image, uint8 (H, W, 3), shrunk to (size, size) where Pillow can do so at once."""
    if size is not None and image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    return convert_to_rgb(image)


def convert_to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image as RGB; at once or in bands, for every step of Pillow's copies all of its pixels."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = image if height <= rows else image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_rgb(band))
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
