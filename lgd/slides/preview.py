"""A slide as a small picture, with the outline of its tissue and a scale bar."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from lgd.io.files import publish
from lgd.io.location import Location
from lgd.slides.slide import Slide
from lgd.slides.tissue_mask import Tissue

_OUTLINE = (0, 114, 178)
"""A blue that no stain has, and that colour-blind readers see."""
_BAR_SHARE = 0.25
"""Most of the width that a scale bar takes."""


def draw_preview(slide: Slide, tissue: Tissue | None = None, most: int = 1200) -> Image.Image:
    """The whole slide at most so many pixels a side, with the outline of its tissue where that is given."""
    pixels, mpp = slide.shrink(most)
    if tissue is not None:
        pixels = draw_outline(pixels, tissue.mask_HW)
    return draw_scale_bar(Image.fromarray(pixels), mpp)


def save_preview(image: Image.Image, path: Location) -> None:
    """Write a picture as a PNG, whole or not at all; raises `DataError` where it cannot be written."""
    with publish(path) as temporary:
        image.save(temporary, "PNG")


def draw_outline(pixels: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) with the outline of a mask of the same field, of any size."""
    height, width, _ = pixels.shape
    shown_HW = np.asarray(Image.fromarray(mask_HW).resize((width, height), Image.Resampling.NEAREST))
    thick = max(1, round(max(height, width) / 500))
    # Padded, so that tissue that the edge of the slide cuts has an outline there too.
    inner_HW = ndimage.binary_erosion(np.pad(shown_HW, 1), iterations=thick)[1:-1, 1:-1]
    return np.where((shown_HW & ~inner_HW)[..., None], np.array(_OUTLINE, np.uint8), pixels)


def draw_scale_bar(image: Image.Image, mpp: float) -> Image.Image:
    """A picture with a bar of a round length at its lower left, on white; `mpp` is that of the picture."""
    um = _round_down(image.width * _BAR_SHARE * mpp)
    text, long = (f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"), max(1, round(um / mpp))
    font = ImageFont.load_default(max(10, image.width // 50))
    left, top, right, bottom = map(round, font.getbbox(text))
    gap = max(4, image.width // 150)
    wide, high = max(long, right - left) + 2 * gap, bottom - top + 4 * gap
    draw = ImageDraw.Draw(image)
    y = image.height - high
    draw.rectangle((0, y, wide, image.height), (255, 255, 255))
    draw.text((gap - left, y + gap - top), text, (0, 0, 0), font)
    draw.rectangle((gap, image.height - 2 * gap, gap + long - 1, image.height - gap - 1), (0, 0, 0))
    return image


def _round_down(value: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not above it."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)))
