"""What is made of a network when its steps are done: its scores, centre and temperature, and its folder."""

import functools
import math
import platform
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

import lgd
from lgd.base.device import exact_float32
from lgd.base.errors import DataError
from lgd.io.digests import digest_of
from lgd.metrics import Floats, Ints, score
from lgd.models.description import describe_training
from lgd.models.export import save_model
from lgd.models.query_map import PairSums
from lgd.models.student import HallucinatingStudent, Outputs
from lgd.models.teacher import GRID_HEADS, Teacher
from lgd.shards.archive import Shard
from lgd.store.store import Rows
from lgd.stream.plan import eval_numbers
from lgd.stream.reader import Reader, in_batches, stream
from lgd.train.batch import Batch, collate, gather
from lgd.train.prepare import Learner, Prepared
from lgd.train.targets import Targets
from lgd.train.tasks import Network


def forward_split(
    learner: Learner, shards: list[Shard], skip: bool = False, store: Rows | None = None
) -> Iterator[tuple[Batch, Outputs]]:
    """One pass without gradients over this rank's share of the shards: each batch, and what the network gives.

    `skip`: samples that cannot be read are in the batch as invalid ones, instead of raising `DataError`. `store`: of
    the shards' parts, whose rows are then in the batch too.
    """
    engine, world, role, config = learner.engine, learner.engine.world, learner.task.role, learner.task.config
    reader = Reader(shards, (role,), config.data.size)
    # Never more on the device than training puts there.
    batch = max(1, config.train.batch // (world.size * config.train.accumulate))
    rounds = math.ceil(math.ceil(reader.total / world.size) / batch)
    numbers = in_batches(eval_numbers(reader.total, world), batch)
    engine.model.eval()
    with torch.no_grad():
        for samples in stream(reader, numbers, threads=config.data.threads, skip=skip):
            one = collate(samples, np.zeros(len(samples.rows), np.int64), store, 0, turn=False)
            # What comes of it is stored, or decides what is.
            with exact_float32():
                out = engine.forward(one.to(world.device).images[role])
            yield one, out
            rounds -= 1
        # Under ZeRO-3 a forward pass is a collective: a rank with fewer batches joins in with an empty one.
        for _ in range(rounds):
            engine.forward(torch.zeros(1, 3, config.data.size, config.data.size, device=world.device))
    engine.model.train()
    reader.close()


def validate(learner: Learner, shards: list[Shard]) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Logits (n, 4) and levels (n,) of all labelled samples of the shards, on every rank, and their scores.

    Of a network that no label teaches there are none, and the `loss` of all samples is its score.
    """
    if not learner.task.gives_labels:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), {"loss": measure_loss(learner, shards)}
    mine = [(out["logits"].float().cpu().numpy(), one.level_B.numpy()) for one, out in forward_split(learner, shards)]
    pairs = gather(mine, learner.engine.world)
    logits = np.concatenate([np.zeros((0, 4), np.float32), *(a for a, _ in pairs)])
    levels = np.concatenate([np.zeros(0, np.int64), *(b for _, b in pairs)])
    logits, levels = logits[levels >= 0], levels[levels >= 0]
    chances = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    return logits, levels, score(levels, chances) if len(levels) else {}


def measure_loss(learner: Learner, shards: list[Shard]) -> float:
    """The mean loss of the shards' samples, by the weights at the end of training; NaN without a sample."""
    method, store, world = learner.task.method, learner.task.store, learner.engine.world
    assert store is not None, "what is not taught labels is taught rows of a store"
    sums, weights = torch.zeros(2, dtype=torch.float64, device=world.device), method.weights(1.0)
    for batch, out in forward_split(learner, shards, store=Rows(store.parts_of(shards), method.needs)):
        terms = method.losses(out, batch.to(world.device))
        sums[0] += torch.stack([weights[name] * term.double().sum() for name, term in terms.items()]).sum()
        sums[1] += len(batch)
    if world.size > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def centre_latents(learner: Learner, shards: list[Shard]) -> None:
    """Put the origin of the teacher's latents at their mean over the training split, skipping what training skipped."""
    teacher, world = learner.engine.model, learner.engine.world
    assert isinstance(teacher, Teacher)
    sums = torch.zeros(teacher.dim + len(teacher.map_mean) + 1, dtype=torch.float64, device=world.device)
    for batch, out in forward_split(learner, shards, skip=learner.task.config.data.on_bad.skips > 0):
        ones = out["pooled"].new_ones(len(batch), 1)
        rows = torch.cat([out["pooled"], out["map"].mean(dim=(2, 3)), ones], dim=1)
        sums += rows[batch.valid_B.to(rows.device)].double().sum(dim=0)
    if world.size > 1:
        dist.all_reduce(sums)
    mean = (sums[:-1] / sums[-1]).float()
    teacher.centre(mean[: teacher.dim], mean[teacher.dim :])


def fit_query_map(learner: Learner, shards: list[Shard]) -> None:
    """Fit the map that queries go through on the training split's pairs, labelled or not; the network has it then.

    What training skipped is skipped, and of pairs that are not own the latents are those that it was taught with.
    """
    network, task, world = learner.engine.model, learner.task, learner.engine.world
    if task.store is None or not isinstance(network, HallucinatingStudent):
        return
    datasets = task.store.datasets(("pooled",))
    latents = Targets(task.store.parts_of(shards), task.method.pairs, task.config.run.seed, datasets)
    sums = PairSums(network.streams, sum(network.dims), world.device)
    for batch, out in forward_split(learner, shards, task.config.data.on_bad.skips > 0, latents):
        valid_B = batch.valid_B.to(world.device)
        pooled_BD = torch.cat([batch.stored[name] for name in datasets], dim=1)
        sums.add(out["streams"][valid_B], pooled_BD.to(world.device)[valid_B])
    if world.size > 1:
        dist.all_reduce(sums.total())
    network.query_map = sums.fit()


def export(run: Prepared, step: int) -> None:
    """Score the validation split, fit the temperature on it, and publish the network as it is after `step`."""
    learner, engine, log = run.learner, run.learner.engine, run.log
    temperature = 1.0
    scores: dict[str, float] = {}
    if learner.task.trains and (held_out := run.shards.of_split("val")):
        logits, levels, scores = validate(learner, held_out)
        if len(levels):
            temperature = fit_temperature(levels, logits)
        if log:
            log.validation(step, scores, logits, levels)
    weights, _ = engine.state()
    if log:
        assert isinstance(engine.model, Network)
        describe = functools.partial(
            learner.task.describe,
            engine.model,
            size=learner.task.config.data.size,
            training=describe_training(run.shards, labelled=learner.task.gives_labels),
            licence=None,
            temperature=temperature,
            validation={name: value for name, value in scores.items() if math.isfinite(value)},
            inputs=digest_of(run.inputs),
            steps=step,
            epochs=learner.task.epochs * (step / max(1, learner.steps)),
            skipped=len(learner.skipped.numbers),
            engine=engine.name,
            workers=engine.world.size,
            versions={"lgd": lgd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        # The heads of grids have done their work.
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(GRID_HEADS)}
        save_model(learner.task.folder, kept, describe)
        log.summary()
    dist.barrier()


def fit_temperature(level_n: Ints, logits_n4: Floats) -> float:
    """The T in 0.1 to 10 for which softmax(logits / T) has the least NLL (Guo et al. 2017).

    Fit it on labelled patches of the validation split only. Raises `DataError` where a logit is not finite.
    """
    logits = np.asarray(logits_n4, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise DataError("a logit of the validation split is not finite: the training diverged, lower train.lr")
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(level_n)), level_n].mean())

    # Where every patch is right the loss falls for ever as T goes to 0: hence the bounds.
    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(10), np.log(10)), method="bounded").x))
