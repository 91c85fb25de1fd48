"""Whitening: in which space the index and its queries compare latents.

A teacher's latents vary along a few directions far more than along all others, and cosines see only those: the same
few IHCs lie near every query. So the leading principal components of the gallery's training latents are scaled to
equal variance, and all that is compared goes through that. It is linear: a ridge regression to latents, whitened, is
the ridge regression to whitened latents.

Shapes: D length of a latent, k components.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Self

import numpy as np

from lgd.base.errors import DataError

_LEAST = 1e-5
"""Variance of a component, by that of the first, below which it is left out: float16 alone leaves 1e-7."""


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """(latent - mean) @ axes: a vector of uncorrelated numbers of variance 1."""

    mean_D: np.ndarray
    axes_Dk: np.ndarray

    def apply(self, latent_nD: np.ndarray) -> np.ndarray:
        """The compared vectors, (n, k) float32."""
        whitened_nk: np.ndarray = (np.asarray(latent_nD, np.float32) - self.mean_D) @ self.axes_Dk
        return whitened_nk

    def write(self, file: BinaryIO) -> None:
        """Write mean and axes as float32, little-endian."""
        file.write(np.vstack([self.mean_D, self.axes_Dk.T]).astype("<f4").tobytes())

    @classmethod
    def read(cls, file: BinaryIO, latent_dim: int, components: int) -> Self:
        """Read what `write` wrote; `ValueError` for another size or what is not finite."""
        content = file.read()
        if len(content) != 4 * (1 + components) * latent_dim:
            raise ValueError(f"{len(content)} bytes, and {components} axes of {latent_dim} numbers have more or less")
        rows = np.frombuffer(content, "<f4").reshape(1 + components, latent_dim).astype(np.float32)
        if not np.isfinite(rows).all():
            raise ValueError("a number that is not finite")
        return cls(rows[0], np.ascontiguousarray(rows[1:].T))


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
