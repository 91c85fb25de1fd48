"""The patches of a feature store, listed and shown.

A patch is called PART-ROW, the numbers of its place in the store; no key or path comes into a url.
"""

import logging
import re
from typing import NamedTuple

import numpy as np
import simplejpeg

from lgd.base.errors import DataError
from lgd.report.sheet import Gallery, read_fields
from lgd.retrieval.answers import Stored
from lgd.scoring.label_sets import show_label
from lgd.serve.names import UnknownName
from lgd.shards.archive import Shard
from lgd.store.parts import as_labels
from lgd.store.store import Store
from lgd.stream.reader import Reader

logger = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9]{1,7})-([0-9]{1,9})", re.ASCII)
_QUALITY = 90


class Page(NamedTuple):
    """Some of the patches that there are."""

    total: int
    patches: list[dict[str, object]]


class StoreGallery:
    """A store and the shards that it was made of; threads may share one."""

    def __init__(self, store: Store) -> None:
        """Where the shards are gone, a warning says so, and no patch has a picture."""
        self.store = store
        try:
            self._images: Gallery | None = Gallery(store)
        except DataError as error:
            logger.warning("patches are shown without their images: %s", error)
            self._images = None
        self._start_n = np.cumsum([0, *(part.rows for part in store.parts)])
        self._label_n = np.concatenate([as_labels(part.array("label"), store.target) for part in store.parts])
        self._split_n = np.repeat([part.split for part in store.parts], [part.rows for part in store.parts])

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self._label_n)

    @property
    def splits(self) -> list[str]:
        """Those that there are, in the order of the parts."""
        return list(dict.fromkeys(part.split for part in self.store.parts))

    def count_labels(self) -> dict[str, int]:
        """Patches of each class; nothing where labels are values."""
        classes = self.store.target.classes
        return {name: int((self._label_n == number).sum()) for number, name in enumerate(classes)}

    def find(self, name: str) -> Stored:
        """The patch of a name; raises `UnknownName`."""
        parsed = _NAME.fullmatch(name)
        part, row = (int(number) for number in parsed.groups()) if parsed else (len(self.store.parts), 0)
        if part >= len(self.store.parts) or row >= self.store.parts[part].rows:
            raise UnknownName("there is no such patch: GET /patches lists them")
        return self._describe(part, row)

    def _describe(self, part: int, row: int) -> Stored:
        entry, number = self.store.parts[part], int(self._start_n[part]) + row
        return Stored(
            key=bytes(entry.array("key")[row]).decode(),
            slide=bytes(entry.array("slide")[row]).decode() or None,
            split=entry.split,
            label=self.store.target.name_label(self._label_n[number].item()),
            part=part,
            row=row,
        )

    def list_patches(self, offset: int, limit: int, split: str, label: str) -> Page:
        """Some patches in the order of the store: of a split, and of a class, where these are given."""
        wanted_n = np.ones(len(self._label_n), bool)
        if split:
            if split not in self.splits:
                raise UnknownName(f"there is no such split: there are {', '.join(self.splits)}")
            wanted_n &= self._split_n == split
        if label:
            classes = self.store.target.classes
            if label not in classes:
                raise UnknownName(f"there is no such label: there are {', '.join(classes) or 'values'}")
            wanted_n &= self._label_n == classes.index(label)
        numbers = np.flatnonzero(wanted_n)
        patches = []
        for number in numbers[offset : offset + limit].tolist():
            part = int(np.searchsorted(self._start_n, number, "right")) - 1
            patches.append(self._describe(part, number - int(self._start_n[part])))
        return Page(len(numbers), [self.show(patch) for patch in patches])

    def make_urls(self, patch: Stored) -> dict[str, object]:
        """Where its images are, below the service's root; null for what there is not."""
        name, roles = name_patch(patch), self._find_shard(patch).roles if self._images else ()
        return {role: f"patches/{name}/{role}.jpg" if role in roles else None for role in ("he", "ihc")}

    def show(self, patch: Stored) -> dict[str, object]:
        """A patch as JSON."""
        shown = {"id": name_patch(patch), "key": patch.key, "slide": patch.slide, "split": patch.split}
        return shown | show_label(self.store.target, patch.label) | self.make_urls(patch)

    def _find_shard(self, patch: Stored) -> Shard:
        """Raises `DataError` where the shards are gone."""
        if self._images is None:
            raise DataError("the images of the patches are not there: see the log of the service")
        return self._images.find_shard(self.store.parts[patch.part])

    def draw(self, patch: Stored, role: str) -> bytes:
        """The middle of a patch's H&E (`he`) or IHC (`ihc`), as JPEG."""
        he, ihc = read_fields(self._find_shard(patch), patch.row)
        field = he if role == "he" else ihc
        if field is None:
            raise UnknownName("this set has no second image")
        return encode_jpeg(field.image)

    def read_input(self, patch: Stored, size: int) -> np.ndarray:
        """The H&E as a network of this size sees it, uint8 (size, size, 3)."""
        return Reader([self._find_shard(patch)], ("he",), size).read(patch.row).images["he"]


def name_patch(patch: Stored) -> str:
    """What a patch is called in a url."""
    return f"{patch.part}-{patch.row}"


def encode_jpeg(pixels: np.ndarray, quality: int = _QUALITY, subsampling: str = "444") -> bytes:
    """Pixels, uint8 (H, W, 3), as JPEG."""
    content: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling=subsampling)
    return content
