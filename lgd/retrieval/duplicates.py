"""Near-duplicates among the neighbours of a query: the query itself, or a nearer neighbour, once more."""

from collections.abc import Sequence

import numpy as np

from lgd.retrieval.index_document import IndexDocument

NEAR_DUPLICATE = 0.001
"""Cosine distance below which a neighbour is marked, of latents as they are. Measured with a small teacher of virtual
tissue: float16 moves a distance by less than 1e-7. Real IHC saved again as JPEG of quality 90 lies at 5e-5 from itself
(median; 95 % within 5e-4), moved by one pixel at 5e-4 (95 % within 2.5e-3). Of 480 different patches the nearest other
one lies at 6e-3 (median), but 11 pairs of them below 0.001: a mark is a reason to look, not a proof."""
NEAR_WHITENED = 0.05
"""The same of whitened latents, where patches lie further apart. Of 180 different virtual patches and 22 real ones the
nearest other one lay at 0.43 and 0.51 (median), never below 0.19; saved as JPEG of quality 90 they lay at 0.004 from
themselves (0.032 at most), moved by one pixel at 0.04 and 0.02 (95 % within 0.09 and 0.05)."""
_ENOUGH_AXES = 16
"""With fewer, different patches can lie as close as that."""


def choose_near(document: IndexDocument) -> float:
    """Below which distance neighbours in an index are near-duplicates."""
    return NEAR_WHITENED if document.whitening and document.dim >= _ENOUGH_AXES else NEAR_DUPLICATE


def near_duplicates(
    keys: Sequence[str], distance_k: np.ndarray, vectors_kD: np.ndarray, near: float = NEAR_DUPLICATE
) -> list[str | None]:
    """For each neighbour, nearest first, `query` or the key of the nearest neighbour before it that it repeats.

    `distance_k` is that to the query; `vectors_kD` are of length 1; `near` is the distance of `choose_near`.
    """
    found: list[str | None] = []
    for rank, distance in enumerate(distance_k):
        before = np.flatnonzero(1 - vectors_kD[:rank] @ vectors_kD[rank] < near)
        found.append("query" if distance < near else keys[before[0]] if len(before) else None)
    return found
