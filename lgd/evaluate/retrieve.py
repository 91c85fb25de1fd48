"""H&E query -> hallucinated latent -> nearest teacher latents.

found = retrieve.query(load_scorer("runs/demo/student"), Store("runs/demo/latents"), [Path("he.png")], k=5)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgd.config import LEVEL_NAMES, ConfigError, DataError
from lgd.data.shards import Shard, open_shards
from lgd.data.stream import Reader
from lgd.evaluate.predict import Scorer, as_row, read_image, score_files
from lgd.files import is_remote, place
from lgd.store.index import Searcher
from lgd.store.latents import Store

# Similarities that are worked out at a time: 32 MB.
_BLOCK = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One neighbour: a stored IHC latent."""

    key: str
    slide: str | None
    split: str
    level: str | None
    """0, 1+, 2+, 3+, or None where it is unknown."""
    distance: float
    """1 - cosine of the hallucinated and the stored latent."""
    part: int
    row: int


def check_pair(scorer: Scorer, store: Store) -> None:
    """Raise `DataError` unless the student hallucinates the latents of the teacher that made the store."""
    if scorer.config.get("method") != "lgd":
        raise DataError("this student has no hallucination stream (method he-only): query with one of method lgd")
    there, asked = store.recipe["teacher"], scorer.config["teacher_sha256"]
    if there != asked:
        raise DataError(
            f"the store {store.folder} was made by another teacher ({there[:12]}) than the one that this student "
            f"hallucinates ({asked[:12]}): use the store that it was trained on, or cache and train again"
        )


def search(searcher: Searcher, store: Store, vectors_nD: np.ndarray, k: int) -> list[list[Hit]]:
    """The k nearest stored latents of each vector, nearest first, in one search."""
    distance_nk, position_nk = searcher.search(vectors_nD, k)
    return [
        [_hit(store, searcher.table[p], float(d)) for d, p in zip(distances, positions, strict=True) if p >= 0]
        for distances, positions in zip(distance_nk, position_nk, strict=True)
    ]


def _hit(store: Store, entry: Any, distance: float) -> Hit:
    part, row = int(entry["part"]), int(entry["row"])
    where = store.parts[part]
    level, slide = int(where.array("level")[row]), bytes(where.array("slide")[row]).decode()
    return Hit(
        key=bytes(entry["key"]).decode(),
        slide=slide or None,
        split=where.split,
        level=None if level < 0 else LEVEL_NAMES[level],
        distance=distance,
        part=part,
        row=row,
    )


def query(scorer: Scorer, store: Store, images: Sequence[Path], k: int) -> list[dict[str, Any]]:
    """For each H&E image its level and probabilities, and its k nearest stored IHC latents as `hits`."""
    check_pair(scorer, store)
    if k < 1:
        raise ConfigError(f"-k is {k}: ask for at least 1 neighbour")
    searcher = Searcher(store)
    scored = list(score_files(scorer, images))
    found = search(searcher, store, np.stack([row["pooled"] for _, row in scored]), k)
    return [
        as_row(str(path), row["probability"]) | {"hits": hits} for (path, row), hits in zip(scored, found, strict=True)
    ]


def as_json(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `query` as plain JSON, with `neighbours`."""
    hidden = ("part", "row")
    return [
        {name: value for name, value in row.items() if name != "hits"}
        | {"neighbours": [{n: v for n, v in asdict(hit).items() if n not in hidden} for hit in row["hits"]]}
        for row in rows
    ]


class Gallery:
    """The images behind a store, for pictures: it finds the shards where they were when the store was made."""

    def __init__(self, store: Store, size: int) -> None:
        self.store = store
        shards: dict[str, Shard] = {}
        for folder in store.document["sources"]["shards"]:
            if not is_remote(place(folder)) and not Path(folder).is_dir():
                raise DataError(
                    f"the shards of this store were in {folder}, which is gone: put them back, or query without --sheet"
                )
            shards |= {shard.sha256: shard for shard in open_shards(folder)[1]}
        lost = [p.name for p in store.parts if p.tar_sha256 not in shards]
        if lost:
            raise DataError(
                f"the shards of {store.folder} changed since it was made ({lost[0]}): run lgd cache-latents"
            )
        self.reader = Reader([shards[p.tar_sha256] for p in store.parts], ("ihc",), size)

    def image(self, hit: Hit) -> np.ndarray:
        """The IHC of a neighbour, uint8 (size, size, 3)."""
        return self.reader.read(int(self.reader.first[hit.part]) + hit.row).images["ihc"]


def draw_sheet(store: Store, rows: Sequence[dict[str, Any]], path: Path, size: int = 256) -> None:
    """Draw each query of `query` beside the IHCs that it found, as a PNG."""
    from lgd.evaluate.figures import Query, contact_sheet

    gallery = Gallery(store, size)
    contact_sheet(
        [
            Query(
                key=Path(row["image"]).stem,
                slide=None,
                level=None,
                predicted=LEVEL_NAMES.index(row["level"]),
                he=read_image(Path(row["image"]), size),
                ihc=None,
                neighbours=[as_neighbour(hit, gallery) for hit in row["hits"]],
            )
            for row in rows
        ],
        path,
    )


def as_neighbour(hit: Hit, gallery: Gallery) -> Any:
    """A hit with its picture."""
    from lgd.evaluate.figures import Neighbour

    return Neighbour(
        key=hit.key,
        slide=hit.slide,
        split=hit.split,
        level=None if hit.level is None else LEVEL_NAMES.index(hit.level),
        distance=hit.distance,
        image=gallery.image(hit),
    )


def retrieval(
    queries_nD: NDArray[np.float64], gallery_mD: NDArray[np.float64], own_index_n: NDArray[np.int64]
) -> dict[str, float]:
    """Rank of each query's own pair by cosine: `median_rank`, and `recall_at_1`, `_5`, `_10`.

    `own_index_n` is the gallery row of each query's pair. Ties with it count half. `chance_median_rank` and
    `chance_recall_at_1`, `_5`, `_10` are those of a blind guess; `queries` and `gallery` are n and m.
    Raises `DataError` for shapes that disagree, an empty side, or latents that are not finite.
    """
    n, m = len(queries_nD), len(gallery_mD)
    if not n or not m or queries_nD.shape[1:] != gallery_mD.shape[1:] or own_index_n.shape != (n,):
        raise DataError(
            f"queries of shape {queries_nD.shape}, gallery of shape {gallery_mD.shape} and own rows of shape "
            f"{own_index_n.shape} do not fit: give (n, D), (m, D) and (n,), none empty"
        )
    gallery = _unit(gallery_mD)
    ranks = np.empty(n)
    block = max(1, _BLOCK // m)
    for start in range(0, n, block):
        rows = slice(start, start + block)
        similarity = _unit(queries_nD[rows]) @ gallery.T
        own = np.take_along_axis(similarity, own_index_n[rows, None], axis=1)
        ties = (similarity == own).sum(1) - 1
        ranks[rows] = 1 + (similarity > own).sum(1) + ties / 2
    found = {
        "queries": n,
        "gallery": m,
        "median_rank": float(np.median(ranks)),
        "chance_median_rank": (m + 1) / 2,
    }
    for k in (1, 5, 10):
        found |= {f"recall_at_{k}": float((ranks <= k).mean()), f"chance_recall_at_{k}": min(k, m) / m}
    return found


def _unit(x_nD: NDArray[np.float64]) -> NDArray[np.float64]:
    x_nD = np.asarray(x_nD, dtype=np.float64)
    if not np.isfinite(x_nD).all():
        raise DataError("a latent is not finite: the training diverged, lower train.lr")
    return x_nD / np.maximum(np.linalg.norm(x_nD, axis=1, keepdims=True), 1e-12)
