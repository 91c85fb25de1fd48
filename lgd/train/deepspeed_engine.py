"""DeepSpeed as the optimizer behind the loop; its only importer.

Its curve is that of `lgd.train.engine.TorchEngine`, for ZeRO stages 0 to 3.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lgd.base.logs import log_prints
from lgd.base.process_state import default_environment, undo_changes
from lgd.config_sections import Train
from lgd.io.locks import LOCK, hold_lock
from lgd.stream.plan import World
from lgd.train.engine import MOMENTS, Engine, Moments, copy_float32

logger = logging.getLogger(__name__)


def deepspeed_problem() -> str | None:
    """Why DeepSpeed cannot run here, or None."""
    if sys.platform != "linux":
        return "DeepSpeed runs on Linux only"
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: pip install deepspeed"
    if not torch.cuda.is_available() and shutil.which("g++") is None and shutil.which("c++") is None:
        return "DeepSpeed compiles an extension on the CPU and there is no C++ compiler: install g++"
    return None


@contextlib.contextmanager
def deepspeed_environment(device: str) -> Iterator[None]:
    """What DeepSpeed reads where it runs on the CPU, which it otherwise warns about, and where it keeps its extension.

    What its import sets for good is set here before. Its prints are logged: standard output is for results.
    """
    # It is compiled anew whenever the sources that it is made of lie elsewhere.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    made_for = f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}-{environment}"
    extensions = str(Path("~/.cache/lgd-extensions").expanduser() / made_for)
    variables = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": extensions}
    with default_environment(variables), log_prints(logger):
        yield


def build_extension() -> None:
    """Compile DeepSpeed's extension for the CPU in TORCH_EXTENSIONS_DIR, unless it is there.

    PyTorch's own lock on that outlives a killed process, and the next one waits for ever. So a lock of the
    kernel shows that nobody builds. The ninja is that of this environment, which need not be in PATH: one of another
    version takes what this one has compiled for outdated, and compiles it again.
    """
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    remedy = "name a folder on a disk of the node's own in TORCH_EXTENSIONS_DIR"
    with undo_changes() as undo:
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    with undo, hold_lock(folder / LOCK, "compiling", remedy=remedy):
        (folder / ShareMemCommBuilder.NAME / "lock").unlink(missing_ok=True)
        ShareMemCommBuilder().load(verbose=False)


def leave_world() -> None:
    """Destroy the process group; DeepSpeed, where it was used, forgets the groups that it made of it."""
    if "deepspeed" not in sys.modules:
        torch.distributed.destroy_process_group()
        return
    from deepspeed import comm
    from deepspeed.utils import groups

    destroy = comm.destroy_process_group if comm.is_initialized() else torch.distributed.destroy_process_group
    destroy()
    # With the group of an earlier training a later one would fail; DeepSpeed 0.18 keeps it.
    groups._WORLD_GROUP = groups.mesh_device = None


class DeepSpeedEngine(Engine):
    """DeepSpeed with AdamW of PyTorch, ZeRO stages 0 to 3 by the configuration's `deepspeed:` section."""

    name = "deepspeed"

    def __init__(self, model: nn.Module, train: Train, extra: Mapping[str, object], world: World) -> None:
        super().__init__(model, train, world)
        zero = extra.get("zero_optimization")
        # PyTorch's own optimizer on whole tensors.
        self.plain = not (isinstance(zero, dict) and zero.get("stage"))
        settings = {
            "train_batch_size": train.batch,
            "train_micro_batch_size_per_gpu": train.batch // (world.size * train.accumulate),
            "gradient_accumulation_steps": train.accumulate,
            # There DeepSpeed does not give the norm: `step` clips.
            "gradient_clipping": 0.0 if self.plain else train.clip,
            # DeepSpeed's own `bf16` rounds the weights, and on the CPU cannot run frozen BatchNorm.
            "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16"} | _choose_reduced(extra),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            **extra,
        }
        with deepspeed_environment(world.device):
            import deepspeed

            if world.device == "cpu":
                build_extension()
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
            )
        self.model, self.optimizer = self.engine.module, self.zero
        self.stage_3 = hasattr(self.zero, "fp32_partitioned_groups_flat")
        if not self.plain:
            self._prime()

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return cast(dict[str, torch.Tensor], self.engine(image))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed divides by the accumulation steps; the loss is divided by the global count already.
        self.engine.backward(loss * self.world.size * self.train.accumulate)
        if not last:
            self.engine.step()

    def step(self, lr: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.plain:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip or float("inf"))
            self.engine.step()
            return norm
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)

    def _prime(self) -> None:
        """Give the partitioned optimizer the moments that AdamW starts from, so that they can be set before a step.

        DeepSpeed links parameters to moments after the first parameter group's first step, when those of the
        second group do not exist yet, and never again (0.19.8).
        """
        inner = self.zero.optimizer
        parameters = [p for group in inner.param_groups for p in group["params"]]
        for p in self.zero.fp32_partitioned_groups_flat if self.stage_3 else parameters:
            inner.state[p] = {
                "step": torch.tensor(0.0, device=p.device),
                "exp_avg": torch.zeros_like(p.data),
                "exp_avg_sq": torch.zeros_like(p.data),
            }
        if not self.stage_3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def state(self) -> tuple[dict[str, torch.Tensor], Moments]:
        if self.plain:
            return super().state()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        moments: Moments = {}
        weights = {name: copy_float32(buffer) for name, buffer in _buffers(self.model).items()}
        for name, p in self.model.named_parameters():
            weights[name] = copy_float32(safe_get_full_fp32_param(p))
            moments |= {f"{name}|{m}": copy_float32(safe_get_full_optimizer_state(p, m)) for m in MOMENTS}
        return weights, moments

    def load(self, weights: dict[str, torch.Tensor], moments: Moments, steps: int) -> None:
        if self.plain:
            super().load(weights, moments, steps)
            return
        from deepspeed import utils, zero

        set_weight, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if self.stage_3:
            # DeepSpeed's own safe_set_full_* forget what `_take_share` pads (0.19.8).
            set_weight, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        for name, p in self.model.named_parameters():
            set_weight(p, self._take_share(p, weights[name]))
            for moment in MOMENTS if f"{name}|exp_avg" in moments else ():
                set_moment(p, self._take_share(p, moments[f"{name}|{moment}"]), moment)
            # The network computes with copies of its own, which DeepSpeed refreshes after a step only.
            with torch.no_grad(), zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(weights[name])
        for name, buffer in _buffers(self.model).items():
            buffer.copy_(weights[name])
        for held in self.zero.optimizer.state.values():
            held["step"].fill_(steps)

    def _take_share(self, p: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        """What this rank is given of a parameter or of one of its moments, flat: below ZeRO-3 all of it."""
        full = full.to(self.world.device).flatten()
        if not hasattr(p, "ds_tensor"):
            return full
        # It pads what the ranks do not divide.
        size = p.ds_tensor.numel()
        full = nn.functional.pad(full, (0, size * self.world.size - full.numel()))
        return full[size * self.world.rank : size * (self.world.rank + 1)]


def _choose_reduced(extra: Mapping[str, object]) -> dict[str, object]:
    """The modules whose gradients travel in the autocast's type: none, unless `communication_data_type` asks for it.

    That field alone does nothing where DeepSpeed's autocast is used at stages 1 to 3 (0.19.8).
    """
    return {} if extra.get("communication_data_type") == "bf16" else {"lower_precision_safe_modules": []}


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to a network's state, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
