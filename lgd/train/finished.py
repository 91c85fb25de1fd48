"""What is made of a network when its steps are done: its scores, centre and temperature, and its folder."""

import functools
import math
import platform
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import lgd
from lgd.base.device import exact_float32
from lgd.base.errors import DataError
from lgd.base.labels import Labels, as_labels, find_known
from lgd.io.digests import digest_of
from lgd.labels.conformal import calibrate
from lgd.labels.predictions import find_measures
from lgd.metrics import Floats, Ints
from lgd.models.description import describe_training
from lgd.models.export import save_model
from lgd.models.heads import read_answers, scale_of
from lgd.models.query_map import PairSums
from lgd.models.student import HallucinatingStudent, Outputs
from lgd.models.teacher import ONLY_TRAINED, Teacher
from lgd.shards.archive import Shard
from lgd.store.store import Rows
from lgd.stream.plan import eval_numbers
from lgd.stream.reader import Reader, in_batches, stream
from lgd.train.batch import Batch, collate, gather
from lgd.train.prepare import Learner, Prepared
from lgd.train.targets import Targets
from lgd.train.tasks import Network, Task


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
            first = np.zeros(len(samples.rows), np.int64)
            one = collate(samples, first, store, None, target=learner.task.target, values=learner.task.values)
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


class Validated(NamedTuple):
    """What a network says of the labelled samples of a split, on every rank."""

    label_n: Labels
    logits_nK: Floats
    """As the network gives them, float32."""
    groups: list[str]
    """Slide of each, or its source patch where slides are unknown."""
    answer_nK: Floats
    """Probabilities, or values (n, 1), at a temperature of 1."""
    scores: dict[str, float]
    """By metric; of a network that grids teach, and no label, the `loss` of all samples; none of one that only compares
    images."""


def validate(learner: Learner, shards: list[Shard]) -> Validated:
    """Score the labelled samples of the shards; of a network that no label teaches there are none."""
    task, target = learner.task, learner.task.target
    labels, logits, groups = [as_labels(target, [])], [np.zeros((0, target.width), np.float32)], list[str]()
    if task.gives_labels:
        for label_n, logits_nK, group_n in gather([*_forward_labels(learner, shards)], learner.engine.world):
            labels.append(label_n)
            logits.append(logits_nK)
            groups += group_n
    label_n: Labels = np.concatenate(labels)  # type: ignore[no-redef]
    logits_nK, known_n = np.concatenate(logits), find_known(label_n)
    label_n, logits_nK = label_n[known_n], logits_nK[known_n]
    groups = [groups[row] for row in np.flatnonzero(known_n).tolist()]
    taught_grids = not task.gives_labels and task.store is not None
    scores: dict[str, float] = {"loss": measure_loss(learner, shards)} if taught_grids else {}
    answer_nK = logits_nK.astype(np.float64)
    if len(label_n):
        answer_nK = read_answers(torch.from_numpy(logits_nK), target, task.values, 1.0).numpy()
        scores = find_measures(target).score(label_n, answer_nK)
    return Validated(label_n, logits_nK, groups, answer_nK, scores)


def _forward_labels(learner: Learner, shards: list[Shard]) -> Iterator[tuple[Labels, np.ndarray, list[str]]]:
    """Of each batch of `forward_split` the labels as they are stored, the logits, and the groups."""
    values = learner.task.values
    for batch, out in forward_split(learner, shards):
        label_n: Labels = batch.label_B.numpy()
        if values is not None and learner.task.target.is_number:
            label_n = values.mean + scale_of(values) * label_n.astype(np.float64)
        yield label_n, out["logits"].float().cpu().numpy(), batch.groups


def rate_validation(task: Task, scores: Mapping[str, float]) -> float:
    """The score by which the best network is chosen: higher is better; NaN where there is none."""
    if "loss" in scores:
        return -scores["loss"]
    sign = -1 if task.metric in find_measures(task.target).lower_is_better else 1
    return sign * scores.get(task.metric, math.nan)


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

    What training skipped is skipped, pairs weigh as in training by their alignment, and of pairs that are not own the
    latents are those that it was taught with.
    """
    network, task, world = learner.engine.model, learner.task, learner.engine.world
    if task.store is None or not isinstance(network, HallucinatingStudent):
        return
    datasets = task.store.datasets(("pooled",))
    latents = Targets(task.store.parts_of(shards), task.method.pairs, task.config.run.seed, datasets)
    sums = PairSums(network.streams, sum(network.dims), world.device)
    for batch, out in forward_split(learner, shards, task.config.data.on_bad.skips > 0, latents):
        batch = batch.to(world.device)
        valid_B, weight_B = batch.valid_B, task.method.weigh_pairs(batch)
        pooled_BD = torch.cat([batch.stored[name] for name in datasets], dim=1)
        sums.add(out["streams"][valid_B], pooled_BD[valid_B], None if weight_B is None else weight_B[valid_B])
    if world.size > 1:
        dist.all_reduce(sums.total())
    network.query_map = sums.fit()


def export(run: Prepared, step: int) -> None:
    """Score the validation split, fit the temperature on it, and publish the network as it is after `step`."""
    learner, engine, log = run.learner, run.learner.engine, run.log
    temperature, conformal, target = 1.0, None, run.learner.task.target
    scores: dict[str, float] = {}
    if learner.task.trains and (held_out := run.shards.of_split("val")):
        validated = validate(learner, held_out)
        scores = validated.scores
        if len(validated.label_n):
            if not target.is_number:
                temperature = fit_temperature(validated.label_n.astype(np.int64), validated.logits_nK)
            elif not np.isfinite(validated.logits_nK).all():
                raise DataError("a value of the validation split is not finite: the training diverged, lower train.lr")
            logits_nK = torch.from_numpy(validated.logits_nK)
            answer_nK = read_answers(logits_nK, target, learner.task.values, temperature).numpy()
            conformal = calibrate(target.kind, answer_nK, validated.label_n, validated.groups)
        if log:
            log.validation(step, scores, validated.answer_nK, validated.label_n)
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
            conformal=conformal,
            validation={name: value for name, value in scores.items() if math.isfinite(value)},
            inputs=digest_of(run.inputs),
            steps=step,
            epochs=learner.task.epochs * (step / max(1, learner.steps)),
            skipped=len(learner.skipped.numbers),
            engine=engine.name,
            workers=engine.world.size,
            versions={"lgd": lgd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        )
        # The heads of grids, and what compared two images, have done their work.
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(ONLY_TRAINED)}
        save_model(learner.task.folder, kept, describe)
        log.summary()
    dist.barrier()


def fit_temperature(label_n: Ints, logits_nK: Floats) -> float:
    """The T in 0.1 to 10 for which softmax(logits / T) has the least NLL (Guo et al. 2017).

    Fit it on labelled patches of the validation split only. Raises `DataError` where a logit is not finite.
    """
    logits = np.asarray(logits_nK, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise DataError("a logit of the validation split is not finite: the training diverged, lower train.lr")
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(label_n)), label_n].mean())

    # Where every patch is right the loss falls for ever as T goes to 0: hence the bounds.
    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(10), np.log(10)), method="bounded").x))
