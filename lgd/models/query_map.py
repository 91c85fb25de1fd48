"""A closed-form map from what a student makes of an H&E to its teacher's latents: what queries compare.

Trained heads answer with the same few IHCs: their loss is of unit length, so that they never learn to shrink towards
the mean where an H&E leaves the IHC open. Ridge regression does. It is fitted on the training pairs when the student
is finished and frozen, changes nothing of it, and lies beside its weights.

Shapes: B samples, S numbers of a student's pooled streams, D length of a latent.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lgd.base.errors import DataError

RIDGE = 1.0
"""Ridge by the mean eigenvalue of the standardised streams' covariance, which is 1: what varies less than the average
is halved or more. Chosen on one development seed (docs/queries.md): a smaller one finds fewer of the own IHCs, and a
larger one, such as that of the least squared error (18), answers with hubs again."""

_BLOCK = 1024
"""Pairs whose products are added up together."""


class QueryMap(nn.Module):
    """A linear map, (B, S) -> (B, D), which is fitted and not trained."""

    def __init__(self, streams: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.zeros(dim, streams))
        self.bias = nn.Buffer(torch.zeros(dim))

    def forward(self, streams_BS: torch.Tensor) -> torch.Tensor:
        """The latents, float32."""
        return F.linear(streams_BS.float(), self.weight, self.bias)


class PairSums:
    """Sums over training pairs, float64, of which a `QueryMap` is made; those of several ranks add up."""

    def __init__(self, streams: int, dim: int, device: str = "cpu") -> None:
        self.streams, self.dim, self.device = streams, dim, device
        self._total = torch.zeros(1 + streams, 1 + streams + dim, dtype=torch.float64, device=device)
        self._waiting: list[torch.Tensor] = []

    def add(self, streams_BS: torch.Tensor, latent_BD: torch.Tensor, weight_B: torch.Tensor | None = None) -> None:
        """Add pairs, which weigh 1 each by default; what the network computes in bf16 does not round the latents."""
        streams_BS, latent_BD = streams_BS.float(), latent_BD.float()
        rows = torch.cat([torch.ones_like(streams_BS[:, :1]), streams_BS, latent_BD], dim=1)
        # Of each product both factors have the square root of the weight.
        self._waiting.append(rows if weight_B is None else rows * weight_B.sqrt()[:, None])
        # Of wide networks the sums take hundreds of megabytes, which are written once a block.
        if sum(map(len, self._waiting)) >= _BLOCK:
            self.total()

    def total(self) -> torch.Tensor:
        """(1 + S, 1 + S + D): the sums of the products of (1, streams) with (1, streams, latent); not a copy."""
        if self._waiting:
            rows = torch.cat(self._waiting).double()
            self._total += rows[:, : 1 + self.streams].T @ rows
            self._waiting.clear()
        return self._total

    def fit(self, ridge: float = RIDGE) -> QueryMap:
        """The map with the least squared error plus `ridge` times n (the sum of the pairs' weights) times the squared
        weights of the streams, each scaled to a standard deviation of 1 (Hoerl and Kennard 1970); the bias is free.

        Raises `DataError` where no pair was added, and for one that is not finite.
        """
        total, streams = self.total().cpu(), self.streams
        if not torch.isfinite(total).all():
            raise DataError("a latent is not finite: the training diverged, lower train.lr")
        if total[0, 0] < 1:
            raise DataError(
                "no training pair could be read, or all weigh 0 by their alignment (student.full_alignment), so that "
                "queries cannot be mapped to the latents"
            )
        mean = total / total[0, 0]
        of_streams, of_latents = mean[0, 1 : 1 + streams], mean[0, 1 + streams :]
        covariance = mean[1:, 1:] - of_streams[:, None] * mean[0, 1:]
        scale = covariance.diagonal().clamp(min=0).sqrt()
        # A stream that never changes says nothing, and rounding leaves it a variance.
        scale[scale <= 1e-6 * of_streams.abs()] = torch.inf
        squares = covariance[:, :streams] / scale / scale[:, None]
        squares += ridge * torch.eye(streams, dtype=torch.float64)
        weight = torch.linalg.solve(squares, covariance[:, streams:] / scale[:, None]) / scale[:, None]
        fitted = QueryMap(streams, self.dim)
        fitted.weight.copy_(weight.T)
        fitted.bias.copy_(of_latents - of_streams @ weight)
        return fitted.to(self.device)
