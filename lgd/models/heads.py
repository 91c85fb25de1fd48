"""The last layer of a network, by the kind of its target, and what its outputs say.

- Classes, ordered or not: a logit a class, trained by cross-entropy.
- An ordinal by `train.ordinal: corn`: the chance of passing each class, given that the one below it is passed (Shi, Cao
  and Raschka 2021). What it gives are the logarithms of the classes' probabilities, so that cross-entropy is the
  likelihood of that chain, and all that reads logits reads these.
- A number: one output, the value in standard deviations from the mean of the training labels.

Shapes: n or B patches, K outputs, J = K - 1 steps between classes.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from lgd.base.target import Target
from lgd.shards.manifest import Values

Ordinal = Literal["corn"]
"""How an ordinal is taught, where not by cross-entropy."""


class CornHead(nn.Linear):
    """Features -> log probability of each class, by conditional chances of passing each one."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes - 1)

    def forward(self, features_BC: torch.Tensor) -> torch.Tensor:
        """(B, C) -> (B, K), whose exponentials sum to 1."""
        return log_chain(super().forward(features_BC))


def log_chain(pass_BJ: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability of each of J + 1 ordered classes, (B, K) float32.

    sigmoid of logit j is the chance that the label is above class j, given that it is not below it; the product of
    these is the chance that it is above class j, which can only fall with j. All logits at 0 mean 1/2, 1/4, 1/8 and so
    on, not equal chances. Being finite for all finite logits, the logarithms serve as logits.
    """
    pass_BJ = pass_BJ.float()
    above_BK = F.pad(F.logsigmoid(pass_BJ).cumsum(dim=1), (1, 0))
    return above_BK + F.pad(F.logsigmoid(-pass_BJ), (0, 1))


def make_head(dim: int, target: Target, ordinal: Ordinal | None) -> nn.Linear:
    """The untrained head of a target on features of a length."""
    if ordinal == "corn" and target.is_ordered:
        return CornHead(dim, target.width)
    return nn.Linear(dim, target.width)


def read_answers(logits_nK: torch.Tensor, target: Target, values: Values | None, temperature: float) -> torch.Tensor:
    """Probabilities (n, K), by a temperature; or of a number values (n, 1) within its range. Float64.

    `values` are those of the training labels. Of logits that are not finite they are NaN or infinite.
    """
    return compute_answers(logits_nK.double(), target, values, temperature)


def compute_answers(logits_nK: torch.Tensor, target: Target, values: Values | None, temperature: float) -> torch.Tensor:
    """As `read_answers`, in the type of the logits."""
    if not target.is_number:
        return (logits_nK / temperature).softmax(dim=1)
    assert values is not None, "a network of a number was taught values"
    value_n1 = values.mean + scale_of(values) * logits_nK
    # To clamp would make an end of the range of what is infinite.
    return (
        value_n1 if target.range is None else torch.where(value_n1.isfinite(), value_n1.clamp(*target.range), torch.nan)
    )


def scale_of(values: Values) -> float:
    """What values are divided by: their standard deviation, or 1 where all are alike."""
    return values.std or 1.0
