"""What an image file says beside its pixels, as Pillow reads it: its orientation and its colour profile.

What is malformed counts as absent; Pillow's readers raise nearly everything for it.
"""

import contextlib
import hashlib
import io

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""What is read, as Pillow calls it."""


def find_orientation(image: Image.Image) -> int:
    """The orientation of an image, 1 to 8; 1, upright, where there is none or it is malformed."""
    with contextlib.suppress(Exception):
        # A PNG may name it behind its pixels, which this then decodes.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation or 1) if orientation in range(2, 9) else 1
    return 1


def read_orientation(content: bytes | memoryview) -> int:
    """`find_orientation` of a file."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return find_orientation(image)
    return 1


def read_icc_digest(content: bytes | memoryview) -> str | None:
    """SHA-256 of the embedded ICC profile, the same in every container; None where there is none or it is broken."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        profile = image.info.get("icc_profile")
        return hashlib.sha256(profile).hexdigest() if profile else None
    return None


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (height, width, 3) as the orientation says that they are to be shown; contiguous."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    vertical = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    horizontal = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[vertical, horizontal])
