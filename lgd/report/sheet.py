"""The pictures behind the answers of a query, from the shards of its store, and the sheet of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lgd.base.errors import require
from lgd.io.location import Location
from lgd.report.figures import Picture, Query, contact_sheet
from lgd.retrieval.answers import Answer, Stored
from lgd.scoring.images import read_image
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardFolder
from lgd.store.store import Store
from lgd.stream.reader import Reader

MOST_QUERIES, MOST_NEIGHBOURS = 100, 30
"""What fits a sheet: matplotlib draws no picture of more than 65,535 pixels a side, and nobody reads one of 10,000."""


class Gallery:
    """The images behind a store, for pictures: it finds the shards where they were when the store was made."""

    def __init__(self, store: Store, size: int, known: Sequence[ShardFolder] = ()) -> None:
        """`known`: shard folders that are open already."""
        self.store, self.size = store, size
        self._find_shard = store.open_sources(known, otherwise=", or query without --sheet")

    def read(self, stored: Stored) -> tuple[np.ndarray, np.ndarray | None]:
        """The H&E and the IHC of a stored patch, as `read_images`."""
        return read_images(self._find_shard(self.store.parts[stored.part]), stored.row, self.size)

    def show(self, stored: Stored) -> Picture:
        """What stands for a stored patch."""
        he, ihc = self.read(stored)
        return Picture("H&E", he) if ihc is None else Picture("IHC", ihc)


def read_images(shard: Shard, row: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The H&E and, where its set has one, the IHC of a patch, uint8 (size, size, 3)."""
    roles = tuple(role for role in ("he", "ihc") if role in shard.roles)
    images = Reader([shard], roles, size).read(row).images
    return images["he"], images.get("ihc")


def check_sheet(queries: int, k: int) -> None:
    """Raise `ConfigError` where a sheet would be too large to draw."""
    require(
        queries <= MOST_QUERIES and k <= MOST_NEIGHBOURS,
        f"--sheet draws up to {MOST_QUERIES} queries of {MOST_NEIGHBOURS} neighbours, and these are {queries} of {k}: "
        "ask for fewer, or query without --sheet",
    )


def draw_sheet(store: Store, answers: Sequence[Answer], path: Location, size: int = 256) -> None:
    """Draw each query beside the IHCs that it found (the H&E of those without one), as a PNG."""
    gallery = Gallery(store, size)
    rows = []
    for answer in answers:
        stored = answer.stored
        if stored:
            he, ihc = gallery.read(stored)
        else:
            assert answer.image is not None
            he, ihc = read_image(Path(answer.image), size), None
        slide, label = (stored.slide, stored.label) if stored else (None, None)
        images = [gallery.show(hit) for hit in answer.neighbours]
        rows.append(Query(answer=answer, slide=slide, label=label, he=he, ihc=ihc, images=images))
    contact_sheet(rows, path, votes=True)
