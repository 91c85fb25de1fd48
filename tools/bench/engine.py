"""`engine`: what our loop reaches of a bare loop of the same engine, model, threads and numerics.

A is the loop of training over steps in memory: counts, augmentation (none here), masked losses, agreement between
ranks, log. B is a loop written by hand over the same tensors, with PyTorch alone, or with DeepSpeed's own engine, and
nothing else. Its facts also hold how fast our loop is under DeepSpeed, stage 0, by what it is under plain PyTorch.
"""

import contextlib
import copy
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lgd.config import Config
from lgd.shards.shard_set import ShardSet
from lgd.stream.plan import World
from lgd.train.batch import Batch, Step
from lgd.train.deepspeed_engine import deepspeed_problem
from lgd.train.loop import learning_rate
from lgd.train.tasks import StudentTask
from lgd.train.world import join_world
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Ratio, Settings, compare, taking_turns
from tools.bench.training import (
    COMPARED,
    STEPS,
    Streamed,
    Training,
    again,
    check_curves,
    count_for,
    facts_of,
    ms_a_step,
    prepare,
    settle,
    with_data,
)

MARK = 0.98


class Bare:
    """A training loop of one process as it is written by hand."""

    def __init__(self, config: Config, model: nn.Module, device: str) -> None:
        self.config, self.model, self.device = config, model.to(device).train(), device
        self.rates = [learning_rate(step, STEPS, config.train.lr, config.train.warmup) for step in range(STEPS)]
        parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.train.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer: Any = torch.optim.AdamW(groups, lr=config.train.lr, fused=True)
        self.done = 0

    def loss(self, out: dict[str, torch.Tensor], batch: Batch, step: int) -> torch.Tensor:
        """The weighted loss of a batch of which every sample is valid and labelled."""
        student, stored = self.config.student, batch.stored
        rising = min(1.0, step / STEPS / student.warmup) * student.hallucination_weight

        def distance(name: str) -> torch.Tensor:
            ours, theirs = (F.normalize(there[name].float(), dim=1) for there in (out, stored))
            scale = ours.shape[1] ** 0.5
            return F.smooth_l1_loss(scale * ours, scale * theirs)

        return (
            F.cross_entropy(out["logits"].float(), batch.label_B)
            + rising * (distance("pooled") + 0.5 * distance("map"))
            + student.nuclei_weight * F.smooth_l1_loss(out["nuclei"].float(), torch.log1p(stored["nuclei"]))
            + student.membrane_weight * F.smooth_l1_loss(out["membrane"].float(), stored["membrane"])
        )

    def update(self, batch: Batch, step: int) -> torch.Tensor:
        """One step; gives the loss, which nobody waits for."""
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bf16):
            out = self.model(batch.images["he"])
        loss = self.loss(out, batch, step)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def losses(self, steps: Iterable[Step]) -> Iterator[torch.Tensor]:
        """Train; gives the loss after each step."""
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[self.done]
            yield self.update(step.micro[0], self.done)
            self.done += 1


class BareDeepSpeed(Bare):
    """The same with DeepSpeed's engine, as its documentation has it."""

    def __init__(self, config: Config, model: nn.Module, device: str) -> None:
        super().__init__(config, model, device)
        import deepspeed

        settings = {
            "train_batch_size": config.train.batch,
            "gradient_clipping": config.train.clip,
            "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )

    def update(self, batch: Batch, step: int) -> torch.Tensor:
        """One step; gives the loss, which nobody waits for."""
        loss = self.loss(self.engine(batch.images["he"]), batch, step)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


BARE = {"torch": Bare, "deepspeed": BareDeepSpeed}


class Pair:
    """Our loop and a bare one, on one engine, from the same weights over the same steps."""

    def __init__(
        self, name: str, config: Config, task: StudentTask, world: World, model: nn.Module, kept: list[Step]
    ) -> None:
        self.config, self.kept = config, kept
        self.ours = Training(config, task, world, copy.deepcopy(model), name)
        self.bare = BARE[name](config, copy.deepcopy(model), world.device)

    def check(self) -> float:
        """Compare the loss curves of the first steps; returns the largest relative difference."""
        ours = self.ours.losses(again(self.kept, COMPARED))
        bare = map(float, self.bare.losses(again(self.kept, COMPARED)))
        return check_curves(ours, bare, self.config)

    def start(self, loop: Training | Bare) -> Callable[[int], None]:
        """What takes so many further steps of a loop, over the same steps again and again."""
        losses = loop.losses(itertools.cycle(self.kept))

        def take(steps: int) -> None:
            for _ in itertools.islice(losses, steps):
                pass
            settle()

        return take


def rates(a: Callable[[int], None], b: Callable[[int], None], batch: int, count: int) -> tuple[Rate, Rate]:
    """The samples a second of two loops over `count` steps each.

    On a CPU after each step the other side has its turn; a GPU is given many steps ahead, which that would forbid.
    """
    steps = count if torch.cuda.is_available() else 1
    return taking_turns(lambda: a(steps), lambda: b(steps), steps * batch, count // steps)


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """DeepSpeed, and the compiler that it starts, write to standard output, where only results may go."""
    sys.stdout.flush()
    there = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(there, 1)
        os.close(there)


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Steps a second of our loop by those of a bare loop, of both engines."""
    with to_stderr(), join_world() as world:
        return _run(settings, inputs, world)


def _run(settings: Settings, inputs: Inputs, world: World) -> Outcome:
    config = with_data(prepare(settings, inputs), augment="none")
    facts = facts_of(config, inputs)
    task = StudentTask(config, ShardSet.open(config.shard_dirs))
    streamed = Streamed(config, task, world)
    kept, model = streamed.kept(), task.build()
    streamed.reader.close()
    pairs: dict[str, Pair] = {}
    loops: dict[str, tuple[Callable[[int], None], Callable[[int], None]]] = {}
    ratios, batch = [], config.train.batch
    for name in BARE:
        ratio_name, compared = f"engine: {name}", f"our loop / a bare {name} loop, steps in memory"
        problem = deepspeed_problem() if name == "deepspeed" else None
        if problem:
            ratios.append(Ratio(name=ratio_name, compared=compared, value=None, mark=MARK, missing=problem))
            continue
        pairs[name] = pair = Pair(name, config, task, world, model, kept)
        differ = pair.check()
        ours, bare = loops[name] = pair.start(pair.ours), pair.start(pair.bare)
        count = count_for(rates(ours, bare, batch, 3)[1], settings)
        # Bound now: the loop's variables go on.
        measure = functools.partial(rates, ours, bare, batch, count)
        ratio = compare(ratio_name, compared, MARK, measure, settings.rounds)
        facts[name] = {
            "ms_a_step": ms_a_step(ratio.detail["median_b"], config.train.batch),
            "steps_a_round": count,
            "curves_differ": differ,
        }
        ratios.append(ratio)
    if len(pairs) == len(BARE):
        count = facts["torch"]["steps_a_round"]
        over = compare(
            "deepspeed over torch",
            "our loop under DeepSpeed, stage 0 / under plain PyTorch",
            0.0,
            lambda: rates(loops["deepspeed"][0], loops["torch"][0], batch, count),
            settings.rounds,
        )
        facts["deepspeed_over_torch"] = {"value": over.value, **over.detail}
    for pair in pairs.values():
        pair.ours.close()
    return Outcome(ratios=ratios, facts=facts)
