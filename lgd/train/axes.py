"""The axes along which hallucinated latents are compared, where `student.hallucination_loss` asks for any.

They are those of the stored latents of the training split, alike on every rank.

Shapes: D channels, n rows.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lgd.base.errors import DataError
from lgd.metrics import Floats
from lgd.store.parts import Part

RIDGE = 1.0
"""Added to the eigenvalues, by their mean: what varies less than the average is halved or more, as in `QueryMap`."""


def fit_axes(parts: Sequence[Part], datasets: Sequence[str], kind: str) -> dict[str, torch.Tensor]:
    """For each dataset of latents the axes (D, D) float32 of `losses.axes_loss`.

    `standardised`: each channel by its standard deviation; `whitened`: all principal components. They are scaled so
    that the loss of the mean is 1.
    """
    axes = {}
    for name in datasets:
        if name.partition("@")[0] in ("pooled", "map"):
            axes_DD = make_axes(measure_covariance(parts, name), kind)
            axes[name] = torch.from_numpy(np.ascontiguousarray(axes_DD, np.float32))
    return axes


def measure_covariance(parts: Sequence[Part], name: str) -> Floats:
    """The covariance (D, D) of a dataset's channels over all rows, views and places."""
    count, total_D, squares_DD = 0, np.zeros(1), np.zeros((1, 1))
    for part in parts:
        # (rows, views, D) or (rows, views, D, m, m)
        stored = part.array(name).astype(np.float64)
        stored_nD = np.moveaxis(stored, 2, -1).reshape(-1, stored.shape[2])
        count, total_D = count + len(stored_nD), total_D + stored_nD.sum(0)
        squares_DD = squares_DD + stored_nD.T @ stored_nD
    if not np.isfinite(squares_DD).all():
        raise DataError("the store has latents that are not finite: the teacher diverged, train and cache it again")
    mean_D = total_D / count
    covariance_DD: Floats = squares_DD / count - np.outer(mean_D, mean_D)
    return covariance_DD


def make_axes(covariance_DD: Floats, kind: str) -> Floats:
    """The axes of one kind, from a covariance."""
    if kind == "standardised":
        variance_D = covariance_DD.diagonal()
        varies_D = variance_D > 1e-6 * variance_D.max()
        axes_DD = np.diag(np.where(varies_D, 1 / np.sqrt(np.where(varies_D, variance_D, 1)), 0))
    else:
        variance_D, vectors_DD = np.linalg.eigh(covariance_DD)
        axes_DD = vectors_DD / np.sqrt(variance_D.clip(0) + RIDGE * variance_D.mean())
    scaled: Floats = axes_DD / np.sqrt(np.trace(axes_DD.T @ covariance_DD @ axes_DD))
    return scaled
