"""The slides of a folder as a viewer asks for them: by an id, tile by tile, never by a path.

The id is a digest of the slide's place in the folder, so it is the same on every node and after each start. The label
and the macro image of a slide are never read (`lgd.slides.slide`).
"""

import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from lgd.base.errors import DataError
from lgd.io.folders import walk_files
from lgd.scoring.slide_plan import TileScale, check_scale
from lgd.scoring.slides import IMAGES, name_folder
from lgd.serve.gallery import encode_jpeg
from lgd.serve.messages import explain
from lgd.serve.names import UnknownName
from lgd.slides.openslide_file import is_meant_as_slide
from lgd.slides.slide import Slide, looks_like_slide, open_slide

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Version = tuple[int, int, int]

TILE = 512
"""Pixels of a tile of the viewer."""
_OPEN = 16
"""Slides that are open at a time."""
_FRESH = 10.0
"""Seconds after which the folder is looked through again: each of its files is asked whether it is a slide."""
_FRESH_UNKNOWN = 1.0
"""The same where a slide is asked for that is not among them."""
_QUALITY = 80
_UNKNOWN = "there is no such slide: GET /slides lists them"


class ListedSlide(NamedTuple):
    """A slide of the folder."""

    id: str
    name: str
    """What is shown."""
    path: Path
    folder: str
    """The name of the folder of its result."""
    problem: str | None = None
    """Why it cannot be opened, or is too coarse for the network."""


class Region(NamedTuple):
    """What a query sees of a slide."""

    pixels: np.ndarray
    x: int
    y: int
    side: int
    """The square in level-0 pixels."""


class SlideFolder:
    """The slides below a folder; threads may share one."""

    def __init__(self, folder: Path, hide_names: bool = False, scale: TileScale | None = None) -> None:
        """`scale` is that of the network, which slides must not be too coarse for."""
        self.folder, self.hide_names, self.scale = folder, hide_names, scale
        self._problems: dict[Path, tuple[Version, str | None]] = {}
        self._open: OrderedDict[tuple[str, *Version], Slide] = OrderedDict()
        self._listed: dict[str, ListedSlide] = {}
        self._read_at = -math.inf
        self._lock, self._listing = threading.Lock(), threading.Lock()

    def list_slides(self) -> list[ListedSlide]:
        """The slides that there are, in the order of their names, as they were some seconds ago at most.

        Raises `DataError` where the folder is gone.
        """
        return self._list_slides(_FRESH)

    def _list_slides(self, fresh: float) -> list[ListedSlide]:
        with self._listing:
            if time.monotonic() - self._read_at >= fresh:
                self._listed, self._read_at = self._look_through(), time.monotonic()
            return [*self._listed.values()]

    def _look_through(self) -> dict[str, ListedSlide]:
        try:
            held = [Path(str(at)) for at, lies, hidden in walk_files(self.folder) if lies == "file" and not hidden]
            # `walk_files` passes over a folder that is gone.
            next(self.folder.iterdir(), None)
        except OSError as error:
            logger.warning("%s cannot be listed (%s)", self.folder, error)
            raise DataError("the folder of the slides cannot be read: see the log of the service") from error
        paths = [at for at in held if not at.name.lower().endswith(IMAGES) and _is_slide(at)]
        listed = {}
        for number, path in enumerate(sorted(paths)):
            place = path.relative_to(self.folder).as_posix()
            name = f"slide {number + 1}" if self.hide_names else path.stem.removesuffix(".ome")
            identity = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:16]
            one = ListedSlide(identity, name, path, name_folder(path))
            listed[identity] = one._replace(problem=self._find_problem(one))
        self._problems = {path: one for path, one in self._problems.items() if path in {*paths}}
        return listed

    def _find_problem(self, listed: ListedSlide) -> str | None:
        """Why a slide cannot be used: it is opened once for each change of its file."""
        try:
            version = find_version(listed.path)
            known = self._problems.get(listed.path)
            if known and known[0] == version:
                return known[1]
            problem = None
            with open_slide(listed.path) as slide:
                if self.scale:
                    check_scale(slide, self.scale)
        except OSError as error:
            return f"{listed.name} cannot be read ({error.strerror})"
        except DataError as error:
            problem = explain_slide(error, listed)
        self._problems[listed.path] = version, problem
        return problem

    def find(self, identity: str) -> ListedSlide:
        """The slide of an id; raises `UnknownName`."""
        if identity not in self._listed:
            self._list_slides(_FRESH_UNKNOWN)
        listed = self._listed.get(identity)
        if listed is None or not listed.path.is_file():
            raise UnknownName(_UNKNOWN)
        return listed

    def use(self, identity: str, work: Callable[[Slide], Result]) -> Result:
        """What some work gives of a slide, which is open meanwhile.

        Raises `UnknownName`, and `DataError` for a slide that cannot be opened or is damaged.
        """
        listed = self.find(identity)
        try:
            stated = find_version(listed.path)
        except OSError as error:
            raise UnknownName(_UNKNOWN) from error
        version = identity, *stated
        with self._lock:
            slide = self._open.pop(version, None) or open_slide(listed.path)
            self._open[version] = slide
            if len(self._open) > _OPEN:
                # Closed once nobody reads it any more.
                self._open.popitem(last=False)
        return work(slide)

    def draw_tile(self, identity: str, level: int, column: int, row: int) -> bytes:
        """A tile as JPEG; at `count_levels` - 1 pixels are those of level 0, and each level below halves them."""

        def draw(slide: Slide) -> bytes:
            step = 2 ** (count_levels(slide) - 1 - level)
            if step < 1:
                raise UnknownName("there is no such level")
            left, top = column * TILE, row * TILE
            wide, high = (
                min(TILE, math.ceil(side / step) - at) for side, at in ((slide.width, left), (slide.height, top))
            )
            if min(wide, high) < 1:
                raise UnknownName("there is no such tile")
            pixels = slide.read(left * step, top * step, wide, high, slide.mpp * step)
            return encode_jpeg(pixels, _QUALITY, "420")

        return self.use(identity, draw)

    def read_region(self, identity: str, x: float, y: float, scale: TileScale) -> Region:
        """The field of a network around a place of level 0."""

        def read(slide: Slide) -> Region:
            if not (0 <= x < slide.width and 0 <= y < slide.height):
                raise UnknownName(f"the slide has {slide.width} x {slide.height} pixels, and the place lies outside")
            side = slide.find_side(scale.pixels, scale.mpp)
            left, top = round(x - side / 2), round(y - side / 2)
            return Region(slide.read(left, top, scale.pixels, scale.pixels, scale.mpp), left, top, side)

        return self.use(identity, read)


def find_version(path: Path) -> Version:
    """What changes with a file; raises `OSError` where it is gone."""
    stated = path.stat()
    return stated.st_ino, stated.st_mtime_ns, stated.st_size


def _is_slide(path: Path) -> bool:
    return looks_like_slide(path) or is_meant_as_slide(path)


def count_levels(slide: Slide) -> int:
    """Levels of a viewer's pyramid; the lowest is one tile."""
    return max(0, math.ceil(math.log2(max(slide.width, slide.height) / TILE))) + 1


def explain_slide(error: DataError, listed: ListedSlide) -> str:
    """The message of an error on a slide, without where it lies; its options are those of `lgd predict`."""
    path = listed.path
    return explain(
        error, {str(path): listed.name, str(path.parent): "its folder", path.name: listed.name}, by_parameters=False
    )
