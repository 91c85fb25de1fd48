"""The pictures behind the answers of a query, from the shards of its store, and the sheet of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lgd.base.errors import require
from lgd.io.location import Location
from lgd.report.contact_sheet import Field, Picture, Query, contact_sheet
from lgd.retrieval.answers import Answer, Stored
from lgd.scoring.images import Mpp, read_image
from lgd.shards.archive import Shard
from lgd.shards.image import resize
from lgd.shards.shard_set import ShardFolder
from lgd.store.store import Store
from lgd.stream.reader import Reader

FIELD, SIDE = 150.0, 330
"""Micrometres and pixels of a patch that are shown: all of a patch of 0.5 mm would leave no membrane visible."""
MOST_QUERIES, MOST_NEIGHBOURS = 100, 30
"""What fits a sheet: matplotlib draws no picture of more than 65,535 pixels a side, and nobody reads one of 10,000."""


class Gallery:
    """The images behind a store, for pictures: it finds the shards where they were when the store was made."""

    def __init__(self, store: Store, known: Sequence[ShardFolder] = ()) -> None:
        """`known`: shard folders that are open already."""
        self.store = store
        self.find_shard = store.open_sources(known, otherwise=", or query without --sheet")

    def read(self, stored: Stored) -> tuple[Field, Field | None]:
        """The H&E and the IHC of a stored patch, as `read_fields`."""
        return read_fields(self.find_shard(self.store.parts[stored.part]), stored.row)

    def show(self, stored: Stored) -> Picture:
        """What stands for a stored patch."""
        he, ihc = self.read(stored)
        return Picture("H&E", he) if ihc is None else Picture("IHC", ihc)


def read_fields(shard: Shard, row: int) -> tuple[Field, Field | None]:
    """The middle of the H&E and, where its set has one, of the IHC of a patch."""
    sample = Reader([shard], [role for role in ("he", "ihc") if role in shard.roles]).read(row)
    fields = {role: cut_middle(image, sample.meta.mpp) for role, image in sample.images.items()}
    return fields["he"], fields.get("ihc")


def cut_middle(image: np.ndarray, mpp: float | None) -> Field:
    """The middle of an image, up to `FIELD` um or `SIDE` pixels wide and high, whichever is more."""
    height, width = image.shape[:2]
    most = max(SIDE, round(FIELD / mpp)) if mpp else SIDE
    rows, columns = min(height, most), min(width, most)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = image[top : top + rows, left : left + columns]
    shrink = max(1.0, max(rows, columns) / SIDE)
    if shrink > 1:
        middle = resize(middle, max(1, round(rows / shrink)), max(1, round(columns / shrink)))
    return Field(middle, mpp and mpp * shrink, columns / width)


def check_sheet(queries: int, k: int) -> None:
    """Raise `ConfigError` where a sheet would be too large to draw."""
    require(
        queries <= MOST_QUERIES and k <= MOST_NEIGHBOURS,
        f"--sheet draws up to {MOST_QUERIES} queries of {MOST_NEIGHBOURS} neighbours, and these are {queries} of {k}: "
        "ask for fewer, or query without --sheet",
    )


def draw_sheet(store: Store, answers: Sequence[Answer], path: Location, mpp: Mpp = None) -> None:
    """Draw each query beside the IHCs of its neighbours (the H&E of those without one), as a PNG.

    `mpp` is what is known of the scale of image files.
    """
    gallery = Gallery(store)
    rows = []
    for answer in answers:
        stored = answer.stored
        if stored:
            he, ihc = gallery.read(stored)
        else:
            assert answer.image is not None
            he, ihc = cut_middle(read_image(Path(answer.image), None), mpp if isinstance(mpp, float) else None), None
        slide, label = (stored.slide, stored.label) if stored else (None, None)
        images = [gallery.show(hit) for hit in answer.neighbours]
        rows.append(Query(answer=answer, slide=slide, label=label, he=he, ihc=ihc, images=images))
    contact_sheet(rows, path, votes=True)
