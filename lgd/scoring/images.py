"""Images as a user gives them (files, folders, patterns, arrays, Pillow images) -> pixels at the scale of a network.

A network knows one scale: shrunk to half of it, the same patch's probability of 3+ fell from 0.35 to 0.07. A file of
the training patches' size is taken to have their scale; any other one must be stated.
"""

import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from lgd.base.errors import DataError, require
from lgd.io.files import is_litter, peek_kind
from lgd.io.location import require_local
from lgd.models.description import Training
from lgd.shards.image import (
    FORMAT_NAMES,
    check_mode,
    decode_upright,
    explain_broken,
    find_orientation,
    header,
    read_orientation,
    read_profile,
    resize,
    turn_upright,
)
from lgd.shards.image_files import list_images
from lgd.shards.image_limits import check_size
from lgd.shards.manifest import Shape
from lgd.shards.pillow_image import convert_to_rgb
from lgd.shards.profiles import Profile, find_profile

_MOST = 5
"""Names that a message lists."""

logger = logging.getLogger(__name__)

ImageSource = str | Path | np.ndarray | Image.Image
"""A file, a folder or a pattern; an array, uint8 (H, W, 3); or a Pillow image."""

Images = ImageSource | Iterable[ImageSource]
"""One, or several."""

Mpp = float | Literal["unknown"] | None
"""What is said of the scale of image files: micrometres per pixel, that nobody knows it, or nothing."""

SAME = 1.02
"""Ratio up to which two sizes or scales are one."""
COARSEST = 1.15
_LEAST_SIDE = 32
_SMALL = 0.7
"""Field of an image, in those of the training patches along each side, below which a note says so."""
_LARGEST = 4
"""Largest field, in those of the training patches along each side."""

UNSTATED = "the scale of this file is not stated: it has the training patches' size, and is taken to have their scale"
UNKNOWN = "the scale of this image is unknown, and the network knows one scale only: the {} may be wrong"
"""Of the word for a label."""
ENLARGED = "the image is coarser than the training patches, and was enlarged"
SMALL = "the image shows a much smaller field than the training patches: the {} may be wrong"
"""Of the word for a label."""


class MemoryImage(NamedTuple):
    """An image that is in memory."""

    name: str
    """Its place among those that were given, such as images[0]."""
    source: np.ndarray | Image.Image | bytes
    """The content of a file, where these are bytes."""

    def __str__(self) -> str:
        return self.name

    @property
    def stem(self) -> str:
        """As a path has it."""
        return self.name


OneImage = Path | MemoryImage


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """The image files of a list of files, folders and glob patterns, sorted, each once.

    A file that is named is taken. In folders, which are searched deep and through links, a file is taken when its name
    or its content is that of an image (`lgd.shards.image_files`); one warning names all others, and counts images that
    are hidden. Of several names of one file the first is taken. Raises `DataError` for a name that means none, and
    `ConfigError` for a url.
    """
    named: list[Path] = []
    others: list[Path] = []
    hidden: list[Path] = []
    # A shell's pattern names litter, pipes and empty folders too.
    for name in [name for name in names if not is_litter(Path(name).name)] or names:
        path = require_local(name, f"{name}: images are read from local files only: fetch it first")
        images, left, behind = _find_named(path)
        named += images
        others += left if images or left else [path]
        hidden += behind
    if names and not named:
        only = _listed({"": sorted({*others} - {*map(Path, names)}), "hidden": hidden}, ", only ")
        raise DataError(f"{', '.join(map(str, names))} holds no {FORMAT_NAMES} file{only}")
    # `Path.absolute` keeps what is between `x/..`, and `Path.resolve` follows links.
    spelled = {os.path.abspath(path): path for path in sorted(named, reverse=True)}  # noqa: PTH100
    taken = sorted({os.path.realpath(path): path for path in sorted(spelled.values(), reverse=True)}.values())
    left_out = {
        "no image": sorted({*others} - {*named}),
        "hidden": sorted({*hidden} - {*named}),
        "another name of an image": sorted({*spelled.values()} - {*taken}),
    }
    if listed := _listed(left_out, "left out "):
        logger.warning("%s", listed)
    return taken


def _find_named(path: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The images that a file, a folder or a pattern means; what it also holds that is none; and hidden images."""
    try:
        lies = peek_kind(path, "file")
    except OSError:
        # Reading it says why.
        return [path], [], []
    if lies == "folder":
        images, others, hidden = ([Path(str(one)) for one in found] for found in list_images(path))
        return images, others, hidden
    if lies == "file" or path.is_symlink():
        return [path], [], []
    if lies:
        # A pipe would be waited for.
        return [], [path], []
    # `Path.glob` takes no absolute pattern, and also finds hidden files.
    matching = sorted(Path(one) for one in glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not matching:
        raise DataError(f"{path} is no file, no folder, and no pattern that matches files")
    found_of = [_find_named(one) for one in matching if not is_litter(one.name)]
    images, others, hidden = ([one for found in found_of for one in found[place]] for place in range(3))
    return images, others, hidden


def list_sources(images: Images) -> list[ImageSource]:
    """What was given, as a list: of one image, too."""
    return [images] if isinstance(images, ImageSource) else list(images)


def take_images(images: Images) -> list[OneImage]:
    """Every image of what was given, in that order; those of a folder are sorted.

    Raises as `find_images`, and `ConfigError` for an array of other than uint8 (H, W, 3), and for what is no image.
    """
    taken: list[OneImage] = []
    for number, source in enumerate(list_sources(images)):
        if isinstance(source, str | Path):
            taken += find_images([source])
            continue
        name = f"images[{number}]"
        if isinstance(source, np.ndarray):
            good = source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3 and source.size > 0
            given = f"an array of {source.dtype}, {source.shape}"
        else:
            good, given = isinstance(source, Image.Image), f"of type {type(source).__name__}"
        require(good, f"{name} is {given}: give a path, a Pillow image, or an array of uint8 (height, width, 3), RGB")
        taken.append(MemoryImage(name, source))
    return taken


def as_pixels(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of a Pillow image, uint8 (H, W, 3), as `decode_upright` gives those of a file; raises as it does."""
    check_mode(image, name)
    check_size(image.width, image.height, name)
    with explain_broken(name):
        pixels = convert_to_rgb(image)
    return turn_upright(pixels, find_orientation(image))


def upright_size(content: bytes | memoryview, name: str) -> tuple[int, int]:
    """Height and width of an image as `decode_upright` gives it; raises as `header` does."""
    found = header(content, name)
    turned = read_orientation(content) >= 5
    return (found.width, found.height) if turned else (found.height, found.width)


def read_image(path: Path, size: int | None) -> np.ndarray:
    """One image file as uint8 (H, W, 3), upright, and shrunk to size x size unless `size` is None."""
    return decode_upright(_read_bytes(path), str(path), size)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


class Fitted(NamedTuple):
    """An image as a network takes it."""

    pixels: np.ndarray
    """uint8 (H, W, 3); empty where the image cannot be used."""
    notes: list[str]
    profile: Profile | None = None
    """The colour profile that it carries."""


def read_fitted(image: OneImage, training: Training, size: int, mpp: Mpp) -> Fitted:
    """One image at the scale of the training patches (see `_fit_scale`), with notes on that."""
    name = str(image)
    if isinstance(image, MemoryImage) and not isinstance(image.source, bytes):
        # A Pillow image may be of a kind that no file could be.
        given = image.source
        pixels = as_pixels(given, name) if isinstance(given, Image.Image) else given
        profile = find_profile(given) if isinstance(given, Image.Image) else None
        (height, width), notes = _fit_scale(name, training, size, pixels.shape[0], pixels.shape[1], mpp)
    else:
        content = image.source if isinstance(image, MemoryImage) else _read_bytes(image)
        assert isinstance(content, bytes)
        (height, width), notes = _fit_scale(name, training, size, *upright_size(content, name), mpp)
        profile = read_profile(content)
        # A large JPEG is shrunk while it is decoded.
        pixels = decode_upright(content, name, size if (height, width) == (size, size) else None)
    return Fitted(resize(pixels, height, width), notes, profile)


def _listed(paths_of: Mapping[str, Sequence[Path]], before: str) -> str:
    """`before`, and how many paths there are of each reason, and the first of them; nothing where there are none."""
    parts = []
    for reason, paths in paths_of.items():
        more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
        count = f"{len(paths)} ({reason}): " if reason else ""
        parts += [f"{count}{', '.join(map(str, paths[:_MOST]))}{more}"] if paths else []
    return before + "; ".join(parts) if parts else ""


def _fit_scale(
    name: str, training: Training, size: int, height: int, width: int, mpp: Mpp
) -> tuple[tuple[int, int], list[str]]:
    """Height and width at which an image has the scale of the training patches; and notes on that.

    `size` is the side to which these were shrunk; of several the commonest that has a scale counts. Raises `DataError`
    for an image whose scale must be stated, is too coarse, or shows too much or too little.
    """
    shapes = training.shapes
    if mpp == "unknown":
        return (size, size), [UNKNOWN.format(training.target.label_word)]
    if mpp is None:
        if not any(_near(shape.height, height) and _near(shape.width, width) for shape in shapes):
            raise DataError(
                f"{name} is {width} x {height} pixels, and the network was trained on patches of "
                f"{_format_shapes(shapes)}: say its scale by --mpp X (micrometres per pixel), or --mpp unknown to "
                "score it as it is"
            )
        return (size, size), [UNSTATED]
    shape = next((one for one in shapes if one.mpp), None)
    if shape is None or shape.mpp is None:
        raise DataError(f"{name}: the scale of the network's training patches is unknown: use --mpp unknown")
    coarser = mpp / shape.mpp
    if coarser > COARSEST:
        raise DataError(
            f"{name} has {mpp:g} um a pixel, and the network was trained on patches of {shape.mpp:g}: what it looks "
            "for is not in so coarse an image, scan or export it at a finer scale"
        )
    rows, columns = height * coarser / shape.height, width * coarser / shape.width
    if max(rows, columns) > _LARGEST:
        raise DataError(
            f"{name} shows a field of {width * mpp:.0f} x {height * mpp:.0f} um, and the network was trained on "
            f"{shape.width * shape.mpp:.0f} x {shape.height * shape.mpp:.0f} um: cut it into patches"
        )
    same = _near(rows, 1) and _near(columns, 1)
    fitted = (size, size) if same else (round(size * rows), round(size * columns))
    if not same and min(fitted) < _LEAST_SIDE:
        raise DataError(
            f"{name} shows a field of {width * mpp:.0f} x {height * mpp:.0f} um only, of which the network sees "
            f"{fitted[1]} x {fitted[0]} pixels: use larger patches"
        )
    notes = [ENLARGED] if coarser > SAME else []
    if max(rows, columns) < _SMALL:
        notes.append(SMALL.format(training.target.label_word))
    return fitted, notes


def _near(one: float, other: float) -> bool:
    return max(one, other) <= SAME * min(one, other)


def _format_shapes(shapes: Sequence[Shape]) -> str:
    shown = [f"{one.width} x {one.height}" + (f" ({one.mpp:g} um a pixel)" if one.mpp else "") for one in shapes[:3]]
    return ", ".join(shown) + (", ..." if len(shapes) > len(shown) else "")
