"""The scale of an image file against that of the patches that a network was trained on.

A network knows one scale: shrunk to half of it, the same patch's probability of 3+ fell from 0.35 to 0.07. A file of
the training patches' size is taken to have their scale; any other one must be stated.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from lgd.base.errors import DataError
from lgd.shards.manifest import Shape

Mpp = float | Literal["unknown"] | None
"""What is said of the scale of image files: micrometres per pixel, that nobody knows it, or nothing."""

_SAME = 1.02
"""Ratio up to which two sizes or scales are one."""
_COARSEST = 1.15
_LEAST_SIDE = 32
_LARGEST = 4
"""Largest field, in those of the training patches along each side."""

UNSTATED = "the scale of this file is not stated: it has the training patches' size, and is taken to have their scale"
UNKNOWN = "the scale of this image is unknown, and the network knows one scale only: the level may be wrong"
ENLARGED = "the image is coarser than the training patches, and was enlarged"


class Fit(NamedTuple):
    """How an image is shown to a network."""

    height: int
    width: int
    """Size that it is shrunk, or enlarged, to."""
    notes: list[str]


def fit_scale(shapes: Sequence[Shape], size: int, height: int, width: int, mpp: Mpp) -> Fit:
    """The size at which an image of this height and width has the scale of the training patches, `shapes`.

    `size` is the side to which these were shrunk. Raises `DataError`, without the file's name, for an image whose scale
    must be stated, or is too coarse.
    """
    if mpp == "unknown":
        return Fit(size, size, [UNKNOWN])
    if mpp is None:
        if not any(_is_same(shape, height, width) for shape in shapes):
            raise DataError(
                f"is {width} x {height} pixels, and the network was trained on patches of {_format_shapes(shapes)}: "
                "say its scale by --mpp X (micrometres per pixel), or --mpp unknown to score it as it is"
            )
        return Fit(size, size, [UNSTATED])
    known = [shape for shape in shapes if shape.mpp]
    if not known:
        raise DataError("the scale of the network's training patches is unknown: use --mpp unknown")
    return _resample(known[0], size, height, width, mpp)


def _resample(shape: Shape, size: int, height: int, width: int, mpp: float) -> Fit:
    """The size of an image of a stated scale, by the commonest training patches."""
    assert shape.mpp is not None
    coarser = mpp / shape.mpp
    if coarser > _COARSEST:
        raise DataError(
            f"has {mpp:g} um a pixel, and the network was trained on patches of {shape.mpp:g}: what it looks for is "
            "not in so coarse an image, scan or export it at a finer scale"
        )
    rows, columns = height * coarser / shape.height, width * coarser / shape.width
    if max(rows, columns) > _LARGEST:
        raise DataError(
            f"shows a field of {width * mpp:.0f} x {height * mpp:.0f} um, and the network was trained on "
            f"{shape.width * shape.mpp:.0f} x {shape.height * shape.mpp:.0f} um: cut it into patches"
        )
    notes = [ENLARGED] if coarser > _SAME else []
    if _near(rows, 1) and _near(columns, 1):
        return Fit(size, size, notes)
    fitted = Fit(round(size * rows), round(size * columns), notes)
    if min(fitted[:2]) < _LEAST_SIDE:
        raise DataError(
            f"shows a field of {width * mpp:.0f} x {height * mpp:.0f} um only, of which the network sees "
            f"{fitted.width} x {fitted.height} pixels: use larger patches"
        )
    return fitted


def _is_same(shape: Shape, height: int, width: int) -> bool:
    return _near(shape.height, height) and _near(shape.width, width)


def _near(one: float, other: float) -> bool:
    return max(one, other) <= _SAME * min(one, other)


def _format_shapes(shapes: Sequence[Shape]) -> str:
    shown = [_format_shape(shape) for shape in shapes[:3]]
    return ", ".join(shown) + (", ..." if len(shapes) > len(shown) else "")


def _format_shape(shape: Shape) -> str:
    return f"{shape.width} x {shape.height}" + (f" ({shape.mpp:g} um a pixel)" if shape.mpp else "")
