"""The latents of some parts as unit vectors, exact search among them, and which FAISS index they get.

Exact search is what an index's recall is measured against. `latents.index: auto` chooses an index by size.

Measured on 2 cores that others shared, one query on one core; vectors of 512
dimensions clustered by level and slide, of a flatter spectrum (1/k) than a teacher's, which is the harder case:

    rows                                 1e3      1e4      1e5     1e6
    exact, ms                            0.08     1.3      14      130
    IVF, queries of the same slides      0.04     0.15     0.22    0.65    at recall@10 0.99 to 0.999

    1e5 rows, queries of other slides    recall@10 with 2.5, 5 and 10 % of the latents probed
    316 cells (sqrt(rows))               0.85     0.95     0.990
    632 cells                            0.89     0.96     0.989
    1264 cells (4 sqrt(rows))            0.94     0.98     0.996
    1e6 rows, 4000 cells                 with 1.6, 3.2 and 6.4 %: 0.90, 0.96, 0.993; 3.8, 6.4 and 9.0 ms

Exact (`Flat`) up to EXACT_ROWS of 512 dimensions, as many numbers in others: that is less than the forward pass which
makes the query. Beyond, `IVFn,SQfp16` with 4 sqrt(rows) cells. It codes what is left of a vector beside its centroid,
which lost no recall to `IVFn,Flat` (0.9998 and 0.9999 at 1e5, all else alike), and takes half the memory and two thirds
of the time. When even that exceeds half of the machine's memory, `IVFn,SQ8`: half of it again, but recall ends at 0.98,
so it wants a lower `latents.recall`. PQ64x4fsr before a refinement reached 0.77 at a k_factor of 16, and 0.18 at the
default 1; to refine takes the float16 vectors too and saves no memory. It is not built.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lgd.base.errors import DataError
from lgd.retrieval.index_files import Whitening, code_bytes
from lgd.retrieval.search import import_faiss
from lgd.store.parts import Part

if TYPE_CHECKING:
    from lgd.retrieval.search import Index, IndexIVF

logger = logging.getLogger(__name__)

EXACT_ROWS = 100_000
TRAIN_ROWS = 40
"""Latents a cell from which the cells are learnt; FAISS asks for 39. At 1e5 rows 256 a cell reached no more than 64."""
_TRAIN_ROUNDS = 10
_BLOCK = 16_384
"""Rows that are held as float32: 34 MB at 512 dimensions."""
_LEAST = 1e-5
"""Variance of a component, by that of the first, below which it is left out: float16 alone leaves 1e-7."""
_QUERIES_AT_ONCE = 256
_ROUNDING = 1e-6
"""By which the cosines of equal vectors may differ."""
_FIT_ROWS = 100_000
"""Latents at most that the whitening is fitted on, evenly spaced."""


def unit(vectors_nD: np.ndarray) -> np.ndarray:
    """Scale each vector to length 1, float32."""
    vectors_nD = np.asarray(vectors_nD, np.float32)
    return np.ascontiguousarray(vectors_nD / np.maximum(np.linalg.norm(vectors_nD, axis=1, keepdims=True), 1e-12))


class UnitVectors:
    """The pooled latents (the first view) of some parts, one row after the other, whitened, as unit vectors."""

    def __init__(
        self, parts: Sequence[Part], whitening: Whitening | None = None, bias_m: np.ndarray | None = None
    ) -> None:
        """Without a whitening they are compared as they are; the bias of a row, float32, follows its vector."""
        self.parts, self.whitening, self.bias_m = parts, whitening, bias_m
        self.first = np.cumsum([0, *(part.rows for part in parts)])
        self.rows, self.latent_dim = int(self.first[-1]), parts[0].layout["pooled"].shape[-1]
        self.dim = whitening.axes_Dk.shape[1] if whitening else self.latent_dim
        self.width = self.dim + (bias_m is not None)

    def latents_at(self, row_n: np.ndarray) -> np.ndarray:
        """The latents of some rows, which are sorted, as they are stored: (n, D)."""
        part_n = np.searchsorted(self.first, row_n, "right") - 1
        found = [
            self.parts[number].array("pooled")[row_n[part_n == number] - self.first[number], 0]
            for number in np.unique(part_n).tolist()
        ]
        return np.concatenate(found)

    def at(self, row_n: np.ndarray) -> np.ndarray:
        """The vectors of some rows, which are sorted: float32 (n, width)."""
        latents_nD = self.latents_at(row_n)
        vectors_nD = unit(self.whitening.apply(latents_nD) if self.whitening else latents_nD)
        if not np.isfinite(vectors_nD).all():
            raise DataError("the store has latents that are not finite: the teacher diverged, train and cache it again")
        return vectors_nD if self.bias_m is None else np.column_stack([vectors_nD, self.bias_m[row_n]])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors, some thousands at a time, with the row of the first: float32 (n, width)."""
        for start in range(0, self.rows, _BLOCK):
            yield start, self.at(np.arange(start, min(start + _BLOCK, self.rows)))


def fit_on_parts(parts: Sequence[Part], components: int) -> Whitening | None:
    """The whitening by the latents of some parts; None of 0 components."""
    if not components:
        return None
    latents = UnitVectors(parts)
    row_n = np.unique(np.linspace(0, latents.rows - 1, min(latents.rows, _FIT_ROWS)).round().astype(np.int64))
    starts = range(0, len(row_n), _BLOCK)
    return fit_whitening((latents.latents_at(row_n[start : start + _BLOCK]) for start in starts), components)


def fit_whitening(blocks: Iterable[np.ndarray], components: int) -> Whitening:
    """The whitening by the `components` leading principal components of the latents in some blocks (n, D).

    Fewer where the latents do not vary along so many. Raises `DataError` where they do not vary at all, and for latents
    that are not finite.
    """
    rows, total_D, squares_DD = 0, np.zeros(1), np.zeros((1, 1))
    for block_nD in blocks:
        latent_nD = np.asarray(block_nD, np.float64)
        rows, total_D = rows + len(latent_nD), total_D + latent_nD.sum(0)
        squares_DD = squares_DD + latent_nD.T @ latent_nD
    if not np.isfinite(squares_DD).all():
        raise DataError("the store has latents that are not finite: the teacher diverged, train and cache it again")
    mean_D = total_D / max(rows, 1)
    variance_D, axes_DD = np.linalg.eigh(squares_DD / max(rows, 1) - np.outer(mean_D, mean_D))
    # The largest first.
    variance_D, axes_DD = variance_D[::-1], axes_DD[:, ::-1]
    kept = min(components, int((variance_D > _LEAST * max(variance_D[0], 0)).sum()), max(rows - 1, 0))
    if not kept:
        raise DataError("all latents of the gallery are alike: train the teacher again, or set latents.components to 0")
    # An axis may point either way: the same on every machine.
    signs_k = np.sign(axes_DD[np.abs(axes_DD[:, :kept]).argmax(0), np.arange(kept)])
    axes_Dk = axes_DD[:, :kept] * signs_k / np.sqrt(variance_D[:kept])
    return Whitening(mean_D.astype(np.float32), np.ascontiguousarray(axes_Dk, np.float32))


def nearest(latents: UnitVectors, queries_nD: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest latents of each query, int64 (n, k), nearest first."""
    faiss = import_faiss()
    heap = faiss.ResultHeap(len(queries_nD), k, keep_max=True)
    for first, vectors_nD in latents.blocks():
        cosine_nk, row_nk = faiss.knn(queries_nD, vectors_nD, min(k, len(vectors_nD)), faiss.METRIC_INNER_PRODUCT)
        heap.add_result(cosine_nk, row_nk + first)
    heap.finalize()
    nearest_nk: np.ndarray = heap.I
    return nearest_nk


def measure_recall(latents: UnitVectors, queries_nD: np.ndarray, truth_nk: np.ndarray, found_nk: np.ndarray) -> float:
    """Recall@k: the mean share of a query's k answers whose cosine is at least that of its k-th nearest latent.

    Equal vectors, as of copies of a patch, count alike, whichever of them are the answers. `truth_nk` is of `nearest`;
    -1 in `found_nk` is no answer.
    """
    good = 0
    for start in range(0, len(queries_nD), _QUERIES_AT_ONCE):
        few = slice(start, start + _QUERIES_AT_ONCE)
        row_m, number_nk = np.unique(np.column_stack([truth_nk[few, -1], found_nk[few]]), return_inverse=True)
        vectors_mD = latents.at(np.maximum(row_m, 0))
        cosines = [np.einsum("nd,nd->n", queries_nD[few], vectors_mD[number_n]) for number_n in number_nk.T]
        least_n, cosine_nk = cosines[0], np.stack(cosines[1:], axis=1)
        good += int(np.count_nonzero((cosine_nk >= least_n[:, None] - _ROUNDING) & (found_nk[few] >= 0)))
    return good / found_nk.size


def choose_factory(rows: int, dim: int, memory: int) -> tuple[str, str]:
    """The factory string for so many latents on a machine with so many bytes of memory, and why, in one sentence."""
    # A search takes as long as its numbers are many: of 32 whitened components 1.6 million rows are no more.
    exact = EXACT_ROWS * 512 // dim
    if rows <= exact:
        return "Flat", f"up to {exact} vectors of {dim} numbers an exact search takes some milliseconds"
    cells = round(4 * math.sqrt(rows))
    size = rows * code_bytes("IVF1,SQfp16", dim)
    if size <= memory / 2:
        return f"IVF{cells},SQfp16", f"beyond {exact} vectors an IVF index is faster, and float16 costs no recall"
    return (
        f"IVF{cells},SQ8",
        f"as float16 the latents take {size / 1e9:.1f} GB, more than half of this machine's {memory / 1e9:.1f} GB",
    )


def train_index(latents: UnitVectors, factory: str, seed: int) -> tuple["IndexIVF", int]:
    """An empty index that has its cells and its coding, and on how many latents it was trained."""
    faiss = import_faiss()
    index: IndexIVF = faiss.index_factory(latents.width, factory, faiss.METRIC_INNER_PRODUCT)
    sampled = min(latents.rows, TRAIN_ROWS * index.nlist)
    row_n = np.random.default_rng(seed).choice(latents.rows, sampled, replace=False, shuffle=False)
    sample_nD = latents.at(np.sort(row_n))
    options = faiss.ClusteringParameters()
    # Centroids of length 1: the nearest by inner product would else be the longest.
    options.niter, options.seed, options.spherical = _TRAIN_ROUNDS, seed % 2**31, True
    options.min_points_per_centroid, options.max_points_per_centroid = 1, TRAIN_ROWS
    clustering = faiss.Clustering(latents.width, index.nlist, options)
    clustering.train(sample_nD, move_to_gpu(faiss.IndexFlatIP(latents.width)))
    index.quantizer.add(faiss.vector_to_array(clustering.centroids).reshape(index.nlist, latents.width))
    # With its cells there, this learns the ranges of SQ8 only.
    index.train(sample_nD)
    return index, sampled


def move_to_gpu(index: "Index") -> "Index":
    """A flat index on the first GPU where FAISS can use one, else the index itself."""
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    try:
        moved: Index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        moved.search(np.zeros((1, index.d), np.float32), 1)
        return moved
    except RuntimeError as error:
        logger.warning("[index] on the CPU, FAISS cannot use the GPU: %s", str(error).splitlines()[0])
        return index
