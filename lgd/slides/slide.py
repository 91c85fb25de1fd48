"""A whole slide, opened: its size, scale and bounds, and its pixels at any scale.

    with open_slide("slide.svs") as slide:
        tile = slide.read(x, y, 256, 256, mpp=0.5)

Places are level-0 pixels of the whole frame, as OpenSlide counts them, never of the scanned part alone. The images of
the label and of the whole glass (macro), which may name the patient, are never read; nor is any text that a scanner
wrote. OpenSlide reads all formats but OME-TIFF, whose scale and pyramid it does not see (`lgd.slides.ome`).
"""

import contextlib
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from PIL import Image

from lgd.base.errors import DataError
from lgd.io.location import require_local
from lgd.slides.ome import OmeFile
from lgd.slides.openslide_file import OpenSlideFile
from lgd.slides.openslide_file import looks_like_slide as looks_like_slide
from lgd.slides.source import Source, choose_level, find_scale

_BLOCK = 1024
"""Most pixels along a side that are read at once: 4 MB."""


class Overview(NamedTuple):
    """The whole slide, shrunk."""

    pixels: np.ndarray
    """uint8 (H, W, 3)."""
    scanned_HW: np.ndarray
    """bool: what the file holds; all else is background."""
    mpp: float


class Slide:
    """A slide that is open. Several threads may read it; in another process, or unpickled, it opens its file anew."""

    def __init__(self, path: Path, given_mpp: float | None, open_source: Callable[[], Source]) -> None:
        self._open, self._given = open_source, given_mpp
        self._source, self._process = open_source(), os.getpid()
        self._idle, self._readers, self._closed = threading.Condition(), 0, False
        self.path = path
        self.name = path.name.removesuffix(path.suffix).removesuffix(".ome")
        self.levels = self._source.levels
        self.width, self.height = self.levels[0].width, self.levels[0].height
        self.bounds, self.vendor = self._source.bounds, self._source.vendor
        try:
            self.mpp, notes = find_scale(str(path), given_mpp, self._source.stated)
        except DataError:
            self.close()
            raise
        if self._source.profile:
            notes.append("it carries a colour profile, which is not applied")
        self.notes = tuple(notes)

    def read(self, x: int, y: int, width: int, height: int, mpp: float) -> np.ndarray:
        """A part of the slide, uint8 (height, width, 3), whose top left is at level-0 pixel (x, y).

        `width` and `height` are pixels at `mpp`. They are taken from the coarsest level that is fine enough; one within
        2 % is taken as it is, and then shows `find_side` level-0 pixels. What lies outside is background. Raises
        `DataError` where the file is damaged.
        """
        return self._read(x, y, width, height, mpp / self.mpp, exact=False)[0]

    def find_side(self, pixels: int, mpp: float) -> int:
        """The level-0 pixels that so many pixels at a scale show."""
        level, ratio = choose_level(self.levels, mpp / self.mpp, exact=False)
        return max(1, round(pixels * ratio * self.levels[level].downsample))

    def shrink(self, most: int) -> tuple[np.ndarray, float]:
        """The whole slide at most so many pixels a side, uint8 (H, W, 3), and its micrometres per pixel."""
        overview = self.read_overview(self.mpp * max(1.0, max(self.width, self.height) / most))
        return overview.pixels, overview.mpp

    def read_overview(self, mpp: float) -> Overview:
        """The whole slide at a scale."""
        downsample = mpp / self.mpp
        # Half a pixel at the far edges is left out rather than background added.
        width, height = (max(1, math.floor(side / downsample + 1e-6)) for side in (self.width, self.height))
        return Overview(*self._read(0, 0, width, height, downsample, exact=True), mpp)

    def close(self) -> None:
        """Let go of the file, once no thread reads it any more: OpenSlide would take the process with it."""
        with self._idle:
            self._closed = True
            # The readers of a parent are not those of its fork.
            self._idle.wait_for(lambda: not self._readers or self._process != os.getpid())
            self._source.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[str | Path, float | None], "Slide"], tuple[Path, float | None]]:
        return open_slide, (self.path, self._given)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Source]:
        """The file, which stays open meanwhile.

        A process that was forked shares the place in it with its parent, and opens its own. Raises `ValueError` for a
        slide that is closed.
        """
        with self._idle:
            if self._closed:
                raise ValueError(f"{self.path} is closed")
            if self._process != os.getpid():
                self._source, self._process, self._readers = self._open(), os.getpid(), 0
            self._readers += 1
        try:
            yield self._source
        finally:
            with self._idle:
                self._readers -= 1
                self._idle.notify_all()

    def _read(
        self, x: int, y: int, width: int, height: int, downsample: float, *, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels, and which of them the file holds; in blocks, so that the memory is that of the result."""
        level, ratio = choose_level(self.levels, downsample, exact=exact)
        step = ratio * self.levels[level].downsample
        pixels = np.empty((height, width, 3), np.uint8)
        scanned = np.empty((height, width), np.bool_)
        most = max(1, int(_BLOCK / ratio))
        corners = itertools.product(range(0, height, most), range(0, width, most))
        with self._reading() as source:
            for top, left in corners:
                rows, columns = min(most, height - top), min(most, width - left)
                # Before rounding, of the level.
                wide, high = columns * ratio, rows * ratio
                at = round(x + left * step), round(y + top * step)
                image = _drop_opacity(source.read(level, *at, math.ceil(wide - 1e-6), math.ceil(high - 1e-6)))
                if ratio != 1.0:
                    # Pillow's bilinear filter widens with the shrink factor, which keeps it free of aliases.
                    box = (0.0, 0.0, min(wide, image.width), min(high, image.height))
                    image = image.resize((columns, rows), Image.Resampling.BILINEAR, box)
                place = slice(top, top + rows), slice(left, left + columns)
                pixels[place], scanned[place] = _flatten(image, source.background)
        return pixels, scanned


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide; `mpp` is its micrometres per level-0 pixel, if the file does not say them, or says them wrong.

    Raises `DataError`, with a remedy, for what is no slide, is damaged, or has no scale that can be believed; and
    `ConfigError` for a url.
    """
    local = require_local(path, f"{path}: slides are read from local files only: fetch it first")
    return Slide(local, mpp, functools.partial(_open_source, local))


def _open_source(path: Path) -> Source:
    file = OpenSlideFile(path)
    if not file.is_ome:
        return file
    file.close()
    return OmeFile(path)


def _drop_opacity(image: Image.Image) -> Image.Image:
    """RGB where nothing shows through: it is resized faster."""
    opaque = image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255
    return image.convert("RGB") if opaque else image


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray | bool]:
    """RGB over a background, and which pixels are more than that."""
    if image.mode == "RGB":
        return np.asarray(image), True
    alpha = image.getchannel("A")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=alpha)
    return np.asarray(canvas), np.asarray(alpha) > 127
