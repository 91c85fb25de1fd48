"""A tiled pyramidal TIFF, as scanners leave them: every level has half the pixels of the one before, as JPEG tiles.

`write_pyramid(path, image, mpp)` leaves one file that OpenSlide (also in QuPath) opens with all levels and the scale.
The same pixels give the same bytes. Also whoever has an image and needs a slide, tests above all, calls it.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import simplejpeg

from lgd.base.errors import DataError
from lgd.io.files import publish

TILE = 256
_IN_MEMORY = 1 << 24  # bytes of a level's tiles that wait in memory; more wait in a file
_COMPRESSION, _SUBSAMPLING, _JPEG = 259, 530, 7  # TIFF's numbers

TileRow = Sequence[np.ndarray | None]
"""The tiles of one row, from left to right, (h, w, 3) uint8, smaller than others only at the right and lower border;
None where the scanner left the glass out."""


def write_pyramid(
    path: str | Path,
    image: np.ndarray | Iterable[TileRow],
    mpp: float,
    *,
    size: tuple[int, int] | None = None,
    quality: int = 90,
) -> None:
    """Write a slide: the image and its halves, down to one tile.

    Args:
        path: The file; it appears when it is complete.
        image: (H, W, 3) uint8 RGB; or, for slides that are larger than the memory, its rows of tiles of `TILE` pixels
            from top to bottom, of which a few are held at once.
        mpp: Micrometres per pixel of the image.
        size: Height and width in pixels; needed with rows of tiles.
        quality: Of the JPEG tiles, whose colours have half the resolution.

    Raises:
        DataError: Where tifffile is not installed, or the disk is full.
    """
    if isinstance(image, np.ndarray):
        size, image = image.shape[:2], _cut_rows(image)
    assert size is not None, "rows of tiles: give the size"
    shapes = [size]
    while max(shapes[-1]) > TILE:
        shapes.append((max(1, shapes[-1][0] // 2), max(1, shapes[-1][1] // 2)))
    levels: list[_Level] = []
    for shape in reversed(shapes):
        levels.insert(0, _Level(shape, quality, levels[0] if levels else None))
    with publish(path) as temporary:
        _write(temporary, levels, image, mpp)


def _cut_rows(image: np.ndarray) -> Iterator[TileRow]:
    for y in range(0, image.shape[0], TILE):
        yield [image[y : y + TILE, x : x + TILE] for x in range(0, image.shape[1], TILE)]


class _Level:
    """One level of the pyramid: encodes rows of tiles, and hands each two of them, halved, to the next level."""

    def __init__(self, shape: tuple[int, int], quality: int, smaller: "_Level | None") -> None:
        self.shape, self.quality, self.smaller = shape, quality, smaller
        self.rows, self.columns = (-(-side // TILE) for side in shape)
        self._upper: TileRow | None = None
        self._waiting: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._lengths: list[int] = []

    def encode(self, row: TileRow) -> list[bytes]:
        """Each tile's JPEG, empty where there is no tile."""
        assert len(row) == self.columns, f"a row of {len(row)} tiles, not {self.columns}"
        tiles = [tile if tile is None else _fill(tile) for tile in row]
        if self._upper is None:
            self._upper = tiles
        else:
            self._halve(self._upper, tiles)
        encode = functools.partial(simplejpeg.encode_jpeg, quality=self.quality, colorsubsampling="420")
        return [b"" if tile is None else encode(tile) for tile in tiles]

    def finish(self) -> None:
        """Hand on a last row that has none below it."""
        if self._upper:
            self._halve(self._upper, [None] * self.columns)

    def read_waiting(self) -> Iterator[bytes]:
        """The JPEGs of a smaller level, encoded while the level before was written."""
        self._waiting.seek(0)
        yield from map(self._waiting.read, self._lengths)
        self._waiting.close()

    def _halve(self, upper: TileRow, lower: TileRow) -> None:
        self._upper = None
        # Where a side has an odd number of pixels, the last one has no part in the smaller level.
        if self.smaller is None or len(self.smaller._lengths) == self.smaller.rows * self.smaller.columns:
            return
        columns = range(0, 2 * self.smaller.columns, 2)
        for content in self.smaller.encode([_halve_tiles(upper[at : at + 2], lower[at : at + 2]) for at in columns]):
            self.smaller._lengths.append(len(content))
            self.smaller._waiting.write(content)


def _fill(tile: np.ndarray) -> np.ndarray:
    """A tile of full size, its border repeated."""
    missing = ((0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0))
    return np.ascontiguousarray(np.pad(tile, missing, mode="edge") if tile.shape[:2] != (TILE, TILE) else tile)


def _halve_tiles(upper: TileRow, lower: TileRow) -> np.ndarray | None:
    """Up to four tiles as one of half their scale; what is missing is white, and None where all are."""
    tiles = [(y, x, tile) for y, row in enumerate((upper, lower)) for x, tile in enumerate(row) if tile is not None]
    if not tiles:
        return None
    joined = np.full((2 * TILE, 2 * TILE, 3), 255, np.uint8)
    for y, x, tile in tiles:
        joined[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE] = tile
    # Four sums are four times as fast as one over axes.
    whole = np.asarray(sum(joined[y::2, x::2].astype(np.uint16) for y in (0, 1) for x in (0, 1)))
    halved: np.ndarray = ((whole + 2) >> 2).astype(np.uint8)
    return halved


def _write(path: Path, levels: Sequence[_Level], rows: Iterable[TileRow], mpp: float) -> None:
    try:
        import tifffile
    except ImportError as error:
        raise DataError("tifffile is not installed, which writes slides: pip install 'lgd[slides]'") from error

    encoded = itertools.chain.from_iterable(map(levels[0].encode, rows))
    height, width = levels[0].shape
    with tifffile.TiffWriter(path, bigtiff=height * width > 1 << 30) as file:
        for number, level in enumerate(levels):
            file.write(
                level.read_waiting() if number else encoded,
                shape=(*level.shape, 3),
                dtype=np.uint8,
                photometric="ycbcr",
                tile=(TILE, TILE),
                compression="deflate",
                # OpenSlide takes only such pages for levels.
                subfiletype=int(number > 0),
                resolution=(1e4 / mpp / 2**number,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
                software=None,
            )
            level.finish()
    # Without imagecodecs tifffile writes no page that says JPEG, even of tiles that are encoded.
    with tifffile.TiffFile(path, mode="r+") as file:
        for page in file.pages:
            assert isinstance(page, tifffile.TiffPage)
            page.tags[_COMPRESSION].overwrite(_JPEG)
            page.tags[_SUBSAMPLING].overwrite((2, 2))
