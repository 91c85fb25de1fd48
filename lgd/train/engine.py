"""The optimizer behind the loop in plain PyTorch; `lgd.train.deepspeed_engine` is its twin.

Both take the same global loss and give the same curve. A loss is the sum over this rank's samples divided by the
global count, so the gradient is the sum over ranks; both engines average over ranks, hence the factor `world.size`.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from lgd.base.errors import DataError
from lgd.config import Train
from lgd.stream.plan import World

logger = logging.getLogger(__name__)

Moments = dict[str, dict[str, torch.Tensor]]
"""Parameter name -> AdamW's `exp_avg` and `exp_avg_sq`, float32."""


class Engine(Protocol):
    """Forward, backward, step; and the full state by parameter name, whatever the partitioning."""

    name: str

    @property
    def model(self) -> Any:
        """The network itself."""
        ...

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the global loss; `last` ends the step's accumulation."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradient; returns the norm before clipping."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], Moments]:
        """Weights and moments, float32 on the CPU. Every rank must call it; rank 0's is complete."""
        ...

    def load(self, weights: dict[str, torch.Tensor], moments: Moments, steps: int) -> None:
        """Take up a state after `steps` updates."""
        ...


def place_model(model: nn.Module, train: Train, world: World) -> nn.Module:
    """The network as both engines train it."""
    if train.precision == "bf16" and world.device != "cpu" and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name(world.device)
        raise DataError(f"train.precision is bf16, which {name} has not: set it to fp32, or use a GPU from Ampere on")
    # Images come channels-last and convolutions follow them; weights turned alike gain nothing, and DeepSpeed cannot
    # send them.
    model.to(world.device)
    if train.compile:
        model.compile()
    return model


def make_adamw(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """The optimizer of both engines."""
    return torch.optim.AdamW(_parameter_groups(model, train.weight_decay), lr=train.lr, fused=True)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only; norms and biases have one dimension."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class TorchEngine:
    """Plain PyTorch: DDP between ranks, AdamW, float32 weights; bf16 through autocast."""

    name = "torch"

    def __init__(self, model: nn.Module, train: Train, world: World) -> None:
        self.model = place_model(model, train, world)
        self.world, self.train = world, train
        self.optimizer = make_adamw(self.model, train)
        self.module: nn.Module = self.model
        if world.size > 1:
            with warnings.catch_warnings():
                # The argument has another name from PyTorch 2.13 on, which older ones do not know.
                warnings.simplefilter("ignore", FutureWarning)
                # Some backbones have parameters that a feature map does not depend on, such as a ViT's mask token.
                self.module = nn.parallel.DistributedDataParallel(
                    self.model, gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=True
                )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        device = torch.device(self.world.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.train.precision == "bf16"):
            out: dict[str, torch.Tensor] = self.module(image)
        return out

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        if last or self.world.size == 1:
            yield
        else:
            assert isinstance(self.module, nn.parallel.DistributedDataParallel)
            with self.module.no_sync():
                yield

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        with self._accumulating(last):
            torch.autograd.backward(loss * self.world.size)

    def step(self, lr: float) -> float:
        limit = self.train.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def state(self) -> tuple[dict[str, torch.Tensor], Moments]:
        weights = {name: t.detach().float().cpu().clone() for name, t in self.model.state_dict().items()}
        return weights, read_moments(self.model, self.optimizer)

    def load(self, weights: dict[str, torch.Tensor], moments: Moments, steps: int) -> None:
        self.model.load_state_dict(weights)
        load_moments(self.model, self.optimizer, moments, steps)


def read_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """Copies of the moments that the optimizer holds so far."""
    return {
        name: {moment: optimizer.state[p][moment].float().cpu().clone() for moment in ("exp_avg", "exp_avg_sq")}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments, steps: int) -> None:
    """Give the optimizer its moments after `steps` updates."""
    for name, p in model.named_parameters():
        if name in moments:
            optimizer.state[p] = {
                "step": torch.tensor(float(steps), device=p.device),
                **{moment: tensor.to(p.device, copy=True) for moment, tensor in moments[name].items()},
            }
