"""The one visible loop: teacher, student and baselines are all trained by `fit`.

Leaves in the task's folder `checkpoints/`, `tensorboard/`, and `log.jsonl` with one line a step; the network itself is
written at the end (`lgd.train.finished`).
"""

import collections
import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lgd.base.errors import DataError, Stopped
from lgd.stream.plan import World, to_device
from lgd.train import checkpoint
from lgd.train.batch import Batch, gather, require_same
from lgd.train.finished import rate_validation, validate
from lgd.train.prepare import Learner, Prepared

Taken = Callable[[], tuple[dict[str, float], bool]]
"""A step that was begun: waits for it, and gives what `take_step` says."""


def fit(run: Prepared, stop: threading.Event) -> checkpoint.Best:
    """Train all steps that are left, or until validation does not become better; the engine has the network to export.

    Returns the best validation. `stop` asks to save a checkpoint and to end, and every rank reads it at each step:
    raises `Stopped` then, and `DataError` for a loss that is no number.
    """
    learner, engine, steps = run.learner, run.learner.engine, run.learner.steps
    settings, folder = learner.task.config.train, learner.task.folder / "checkpoints"
    held_out = run.shards.of_split("val")

    # Resume.
    done, start, best = 0, 0, checkpoint.Best()
    if saved := checkpoint.find(folder, run.inputs, engine.world):
        done, start, best = saved.progress.step, saved.progress.position, saved.progress.best
        learner.skipped.numbers.update(saved.progress.skipped)
        engine.load(saved.weights, saved.moments, done)
    # It is as large as the network with its moments.
    del saved
    mine = f"step {done}, position {start}, weights {engine.digest()}"
    require_same(mine, "the ranks would not begin alike", "Give the same command again", engine.world)
    if engine.world.rank == 0:
        # A kill can come after the last save, and before what it makes superfluous is removed.
        checkpoint.prune(folder, best, settings.keep)
    run.open_log(done)
    log = run.log

    enough = 0 < settings.patience <= best.stale
    taken: collections.deque[Taken] = collections.deque()
    began, waited = time.perf_counter(), 0.0
    for micro, position in run.batches.draw_augmented(start, 0 if enough else steps - done):
        # Step.
        waited += time.perf_counter() - began
        taken.append(take_step(learner, done, micro, stop.is_set()))
        done += 1

        # Log: one step late, so that a GPU has the next to do meanwhile; but before the network is looked at.
        looked_at = done == steps or done % run.every == 0 or done % settings.checkpoint_every == 0
        stopping = False
        while len(taken) > (0 if looked_at or stopping else 1):
            values, asked = taken.popleft()()
            stopping |= asked
            if log:
                log.step(done - len(taken), values, waited)
            waited = 0.0

        # Validate; the last step is validated when the network is exported.
        improved = False
        if held_out and done % run.every == 0 and (done < steps or settings.patience):
            validated = validate(learner, held_out)
            best = best.after(done, rate_validation(learner.task, validated.scores))
            improved = best.step == done
            if log:
                log.validation(done, validated.scores, validated.answer_nK, validated.label_n)
        enough = 0 < settings.patience <= best.stale

        # Save: all ranks give their share, rank 0 writes.
        if improved or stopping or enough or done == steps or done % settings.checkpoint_every == 0:
            weights, moments = engine.state()
            if log:
                # First, so that the log of a run that goes on from here has no gap.
                log.publish()
                skipped = tuple(sorted(learner.skipped.numbers))
                progress = checkpoint.Progress(
                    step=done, position=position, inputs=run.inputs, skipped=skipped, best=best
                )
                checkpoint.save(folder, checkpoint.Checkpoint(progress, weights, moments), settings.keep)
            del weights, moments
            dist.barrier()

        # Stop.
        if enough:
            break
        if stopping and done < steps:
            raise Stopped(f"stopped after step {done} of {steps}; the same command goes on from there")
        began = time.perf_counter()

    # Take the best network.
    if settings.patience and best.step:
        chosen = checkpoint.load_alike(folder / checkpoint.name_step(best.step), run.inputs, engine.world)
        engine.load(chosen.weights, chosen.moments, best.step)
    return best


def take_step(learner: Learner, step: int, micro: list[Batch], stop: bool) -> Taken:
    """Begin an update, which `step` others came before; the batches are augmented, and on this rank's device.

    What it returns waits for it, and gives what is logged of it (the global loss terms before it, learning rate,
    gradient norm, skipped samples), and whether any rank was asked to stop. Every rank calls both; `DataError` for a
    loss or a gradient that is no number.
    """
    config, engine, skipped = learner.task.config, learner.engine, learner.skipped
    # Dropout and the like are drawn alike after a restart.
    torch.manual_seed(step_seed(config.run.seed, step, engine.world.rank))
    bad = {n: error for batch in micro for n, error in batch.errors.items() if n not in skipped.numbers}
    names, total, each = backward(learner, micro, step / learner.steps, [len(bad) > 0, stop])
    rate = learning_rate(step, learner.steps, config.train.lr, config.train.warmup)
    norm = engine.step(rate)
    wait = _fetch(torch.cat([total, norm.reshape(1)]))

    def read() -> tuple[dict[str, float], bool]:
        *numbers, any_bad, stopping, norm = wait()
        if any_bad:
            skipped.add({n: error for n, error in bad.items() if n not in skipped.numbers}, engine.world)
        values = dict(zip(names, numbers, strict=True))
        advice = "lower train.lr, or look at these patches; checkpoints before this step are kept"
        if not math.isfinite(values["loss"]):
            keys = not_finite(micro, each, engine.world)
            raise DataError(f"the loss is {values['loss']} at step {step + 1}, {keys}: {advice}")
        if not math.isfinite(norm):
            keys = f"in a batch with {list_keys(micro)}"
            raise DataError(f"the gradient's norm is {norm} at step {step + 1}, {keys}: {advice}")
        return values | {"lr": rate, "grad_norm": norm, "skipped": len(skipped.numbers)}, stopping > 0

    return read


def backward(
    learner: Learner, micro: list[Batch], progress: float, flags: Sequence[bool]
) -> tuple[list[str], torch.Tensor, list[torch.Tensor]]:
    """Forward and backward of all micro-batches.

    Gives the names of the loss terms; their global values, and of each flag how many ranks have raised it; and the
    terms of each sample. The ranks talk while they compute, counts beside the first forward pass and values beside the
    last backward pass: each time that all wait for the slowest costs, for it is another one each time.
    """
    task, engine, world = learner.task, learner.engine, learner.engine.world
    counts = to_device(
        torch.tensor([[batch.label_count, batch.valid_count] for batch in micro]).sum(dim=0), world.device
    )
    wait_for_counts = _add_up(counts, world)
    weights = task.method.weights(progress)
    sums: dict[str, torch.Tensor] = {}
    each = []
    for number, batch in enumerate(micro):
        values = task.method.losses(engine.forward(batch.images[task.role]), batch)
        each.append(torch.stack([value.detach() for value in values.values()]))
        if number == 0:
            wait_for_counts()
            labelled, valid = counts.clamp(min=1)
        terms = {
            name: (value * batch.valid_B).sum() / (labelled if name == "level" else valid)
            for name, value in values.items()
        }
        terms["loss"] = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach()
        last = number == len(micro) - 1
        if last:
            raised = to_device(torch.tensor(flags, dtype=torch.float32), world.device)
            total = torch.cat([torch.stack(list(sums.values())), raised])
            wait_for_total = _add_up(total, world)
        engine.backward(terms["loss"], last=last)
    wait_for_total()
    return list(sums), total, each


def _fetch(values: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers from the device; what is returned waits for them, and not for what it is given later."""
    copied = values.to("cpu", non_blocking=True)
    copying = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def wait() -> list[float]:
        if copying:
            copying.synchronize()
        return copied.tolist()

    return wait


def _add_up(values: torch.Tensor, world: World) -> Callable[[], Any]:
    """Begin to sum `values` over the ranks, in place; what is returned waits for that."""
    if world.size == 1:
        return lambda: None
    work: dist.Work = dist.all_reduce(values, async_op=True)
    return work.wait


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's random draws on a rank."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little") >> 1


def list_keys(micro: list[Batch]) -> str:
    """The first keys of a step."""
    return ", ".join([key for batch in micro for key in batch.keys][:4])


def not_finite(micro: list[Batch], each: list[torch.Tensor], world: World) -> str:
    """Which samples of all ranks have a loss term that is no finite number; every rank calls this."""
    keys = []
    for batch, values in zip(micro, each, strict=True):
        wrong_B = (~torch.isfinite(values)).any(dim=0) & batch.valid_B
        keys += [key for key, wrong in zip(batch.keys, wrong_B.tolist(), strict=True) if wrong]
    found = gather(keys[:4], world)
    return f"by {', '.join(found[:4])}" if found else f"in a batch with {list_keys(micro)}"


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return 0.5 * peak * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
