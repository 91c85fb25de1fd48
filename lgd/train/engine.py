"""The optimizer behind the loop, in plain PyTorch; that of `lgd.train.deepspeed_engine` gives the same curve.

All take the same global loss. A loss is the sum over this rank's samples divided by the global count, so the gradient
is the sum over ranks; all engines average over ranks, hence the factor `world.size`.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import xxhash
from torch import nn

from lgd.base.errors import DataError
from lgd.config_sections import Train
from lgd.stream.plan import World

Moments = dict[str, torch.Tensor]
"""AdamW's, float32, by `PARAMETER|exp_avg` and `PARAMETER|exp_avg_sq`."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """A network on its device with AdamW: forward, backward, step; and the full state by parameter name."""

    name: ClassVar[str]

    def __init__(self, model: nn.Module, train: Train, world: World) -> None:
        """Raises `DataError` for a precision that the device does not support."""
        if train.precision == "bf16" and world.device != "cpu" and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name(world.device)
            raise DataError(
                f"train.precision is bf16, which {name} has not: set it to fp32, or use a GPU from Ampere on"
            )
        self.model, self.train, self.world = model, train, world
        # Images come channels-last and convolutions follow them; weights turned alike gain nothing, and DeepSpeed
        # cannot send them.
        model.to(world.device)
        if train.compile:
            model.compile()
        trained = [p for p in model.parameters() if p.requires_grad]
        # Weight decay on matrices and kernels only; norms and biases have one dimension.
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=train.lr, fused=True)

    def digest(self) -> str:
        """Of some of this rank's weights, which all ranks have alike (at ZeRO-3 of those that are not partitioned)."""
        some = [p.detach().flatten()[:64].float() for p in self.model.parameters()]
        return xxhash.xxh3_64_hexdigest(torch.cat(some).cpu().numpy().tobytes())

    @abstractmethod
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the global loss; `last` ends the step's accumulation."""

    def step(self, lr: float) -> torch.Tensor:
        """Clip, update, clear the gradient; returns the norm before clipping, for which nobody waits here."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> tuple[dict[str, torch.Tensor], Moments]:
        """Weights and moments, float32 on the CPU. Every rank must call it; rank 0's is complete."""
        weights = {name: copy_float32(tensor) for name, tensor in self.model.state_dict().items()}
        held = self.optimizer.state
        moments = {
            f"{name}|{moment}": copy_float32(held[p][moment])
            for name, p in self.model.named_parameters()
            if p in held
            for moment in MOMENTS
        }
        return weights, moments

    def load(self, weights: dict[str, torch.Tensor], moments: Moments, steps: int) -> None:
        """Take up a state after `steps` updates."""
        self.model.load_state_dict(weights)
        for name, p in self.model.named_parameters():
            if f"{name}|exp_avg" in moments:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(steps), device=p.device),
                    **{moment: moments[f"{name}|{moment}"].to(p.device, copy=True) for moment in MOMENTS},
                }


class TorchEngine(Engine):
    """Plain PyTorch: DDP between ranks, AdamW, float32 weights; bf16 through autocast."""

    name = "torch"

    def __init__(self, model: nn.Module, train: Train, world: World) -> None:
        super().__init__(model, train, world)
        self.ranks: nn.parallel.DistributedDataParallel | None = None
        if world.size > 1:
            with warnings.catch_warnings():
                # The argument has another name from PyTorch 2.13 on, which older ones do not know.
                warnings.simplefilter("ignore", FutureWarning)
                # Some backbones have parameters that a feature map does not depend on, such as a ViT's mask token.
                self.ranks = nn.parallel.DistributedDataParallel(
                    model, gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=True
                )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        device = torch.device(self.world.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.train.precision == "bf16"):
            out: dict[str, torch.Tensor] = (self.ranks or self.model)(image)
        return out

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        with self.ranks.no_sync() if self.ranks and not last else contextlib.nullcontext():
            torch.autograd.backward(loss * self.world.size)


class StillEngine(Engine):
    """A network that is not trained: forward passes in float32, and no optimizer."""

    name = "none"

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model.to(world.device), world

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = self.model(image)
        return out

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        raise AssertionError("nothing is trained")

    def state(self) -> tuple[dict[str, torch.Tensor], Moments]:
        return {name: copy_float32(tensor) for name, tensor in self.model.state_dict().items()}, {}


def copy_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU."""
    return tensor.detach().float().cpu().clone()
