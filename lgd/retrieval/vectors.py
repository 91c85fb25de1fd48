"""The pooled latents of some parts as unit vectors, and exact search among them, in bounded memory.

Exact search is what an index's recall is measured against.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.retrieval.search import import_faiss, unit
from lgd.store.parts import Part

_BLOCK = 16_384
"""Rows that are held as float32: 34 MB at 512 dimensions."""


class UnitVectors:
    """The pooled latents (the first view) of some parts, one row after the other, as unit vectors."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.first = np.cumsum([0, *(part.rows for part in parts)])
        self.rows, self.dim = int(self.first[-1]), parts[0].layout["pooled"].shape[-1]

    def at(self, row_n: np.ndarray) -> np.ndarray:
        """The vectors of some rows, which are sorted: float32 (n, D)."""
        part_n = np.searchsorted(self.first, row_n, "right") - 1
        found = [
            self.parts[number].array("pooled")[row_n[part_n == number] - self.first[number], 0]
            for number in np.unique(part_n).tolist()
        ]
        return _finite(np.concatenate(found))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors, some thousands at a time, with the row of the first: float32 (n, D)."""
        for start in range(0, self.rows, _BLOCK):
            stop = min(start + _BLOCK, self.rows)
            begin, end = np.searchsorted(self.first, (start, stop - 1), "right") - 1
            pieces = [
                self.parts[number].array("pooled")[max(0, start - self.first[number]) : stop - self.first[number], 0]
                for number in range(begin, end + 1)
            ]
            yield start, _finite(np.concatenate(pieces))


def _finite(vectors_nD: np.ndarray) -> np.ndarray:
    vectors_nD = unit(vectors_nD)
    if not np.isfinite(vectors_nD).all():
        raise DataError("the store has latents that are not finite: the teacher diverged, train and cache it again")
    return vectors_nD


def nearest(latents: UnitVectors, queries_nD: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest latents of each query, int64 (n, k), nearest first."""
    faiss = import_faiss()
    best_nk, rows_nk = np.empty((len(queries_nD), 0), np.float32), np.empty((len(queries_nD), 0), np.int64)
    for first, vectors_nD in latents.blocks():
        cosine_nk, found_nk = faiss.knn(queries_nD, vectors_nD, min(k, len(vectors_nD)), faiss.METRIC_INNER_PRODUCT)
        best_nk, rows_nk = np.hstack([best_nk, cosine_nk]), np.hstack([rows_nk, found_nk + first])
        kept_nk = np.argsort(-best_nk, axis=1, kind="stable")[:, :k]
        best_nk, rows_nk = np.take_along_axis(best_nk, kept_nk, 1), np.take_along_axis(rows_nk, kept_nk, 1)
    return rows_nk


def overlap(one_nk: np.ndarray, other_nk: np.ndarray) -> float:
    """Mean share of a row's numbers that are in the other's row too: recall@k, if one is exact."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(one_nk, other_nk, strict=True)]))
