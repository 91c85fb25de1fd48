"""`cached-step` and `cached-vs-recompute`: what streaming with the store costs a step, and what it saves.

Both train the full LGD-Net by the loop's own step, augmented as in training; one core computes, the others read.

`cached-step`: A streams the H&E from shards and joins the store's rows, B has the same batches in memory.

`cached-vs-recompute`: A is the same; B streams the IHC too and runs the frozen teacher in the step. With `: targets`
B's reading threads also compute the domain targets at native resolution, otherwise those come from the store on both
sides. What A can save at most is the ceiling, max(student + teacher, reading of B) / max(student, reading of A), each
measured alone: reading goes on beside the step. The ratio is A by B times the ceiling; the facts have the speed-up.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lgd.config import Config
from lgd.models.teacher import load_teacher
from lgd.shards.image import decode
from lgd.shards.shard_set import ShardSet
from lgd.stain.targets import membrane_grid, nuclei_grid
from lgd.stream.plan import World
from lgd.stream.reader import Encoded, Reader, Sample
from lgd.train.batch import Batch, Step
from lgd.train.tasks import StudentTask, Task
from lgd.train.world import join_world
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Ratio, Settings, alternate
from tools.bench.training import (
    COMPARED,
    HEAD,
    KEPT,
    TAIL,
    Streamed,
    Training,
    again,
    check_curves,
    count_for,
    facts_of,
    ms_a_step,
    prepare,
    rate_of,
    settle,
)

MARK = 0.95
_CPU_BATCH = 4
"""Patches in a forward pass of the teacher on a CPU, as caching has them: more fall out of its caches."""


@contextlib.contextmanager
def stream_student(settings: Settings, inputs: Inputs) -> Iterator[tuple[StudentTask, Streamed]]:
    """The student's task and the steps that it is trained with, in a world of one worker."""
    with join_world() as world:
        config = prepare(settings, inputs)
        task = StudentTask(config, ShardSet.open(config.shard_dirs))
        streamed = Streamed(config, task, world)
        yield task, streamed
        streamed.reader.close()


def step(settings: Settings, inputs: Inputs) -> Outcome:
    """Steps a second of streaming with the store by those over tensors in memory."""
    with stream_student(settings, inputs) as (task, streamed):
        config, world = streamed.config, streamed.world
        kept, model = streamed.kept(), task.build()
        ours_n, bare_n = (curve(config, task, world, model, steps) for steps in (streamed.steps(COMPARED), kept))
        differ = check_curves(ours_n, bare_n, config)
        training = Training(config, task, world, model, "torch")

        def ours() -> Rate:
            return rate_of(training.losses(streamed.steps(HEAD + count + TAIL)), config.train.batch, count)

        def bare() -> Rate:
            return rate_of(training.losses(again(kept, HEAD + count)), config.train.batch, count)

        count = 2
        count = count_for(bare(), settings)
        ratio = alternate(
            "cached-step",
            "steps from shards and store / the same steps in memory",
            MARK,
            ours,
            bare,
            settings.rounds,
        )
        training.close()
        facts = facts_of(config, inputs) | {
            "ms_a_step": ms_a_step(ratio.detail["median_b"], config.train.batch),
            "steps_a_round": count,
            "ms_of_reading_a_step": 1e3 * seconds_a_step(streamed.steps(4 * KEPT)),
            "curves_differ": differ,
        }
        return Outcome(ratios=[ratio], facts=facts)


def curve(config: Config, task: Task, world: World, model: torch.nn.Module, steps: Iterable[Step]) -> list[float]:
    """The losses of the first steps, from a model's weights as they are; the model is left with them."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = Training(config, task, world, model, "torch")
    losses = list(itertools.islice(training.losses(steps), COMPARED))
    training.close()
    model.load_state_dict(weights)
    return losses


def seconds_a_step(steps: Iterable[Any]) -> float:
    """Seconds that each step takes of those after the first, whatever they are."""
    began = time.perf_counter()
    for count, _ in enumerate(steps):
        if count == 0:
            settle()
            began = time.perf_counter()
    settle()
    return (time.perf_counter() - began) / count


class Taught(Streamed):
    """The steps of training with the teacher run on the IHC, in place of its stored latents."""

    def __init__(self, config: Config, task: StudentTask, world: World) -> None:
        super().__init__(config, task, world, ("he", "ihc"))
        self.teacher = load_teacher(config.teacher.dir)[0].to(world.device)

    def steps(self, count: int) -> Iterator[Step]:
        """The first steps of a run."""
        for step in self.untaught(count):
            yield self.taught(step)

    def untaught(self, count: int) -> Iterator[Step]:
        """The same with the IHC, before the teacher has seen it."""
        return super().steps(count)

    def taught(self, step: Step) -> Step:
        """Run the teacher on a step's IHC."""
        return Step([self._taught(one.to(self.world.device)) for one in step.micro], step.position)

    def _taught(self, batch: Batch) -> Batch:
        latents = self.config.latents
        device = torch.device(self.world.device).type
        ihc_B3HW = batch.images["ihc"]
        pooled, maps = [], []
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=latents.precision == "bf16"):
            for run in torch.split(ihc_B3HW, _CPU_BATCH if device == "cpu" else len(ihc_B3HW)):
                out = self.teacher(run)
                pooled.append(out["pooled"])
                maps.append(F.adaptive_avg_pool2d(out["map"], latents.map))
        # Rounded as the store is, so that both sides train on the same numbers.
        rounded = torch.float16 if latents.dtype == "float16" else torch.float32
        there = {"pooled": torch.cat(pooled).to(rounded).float(), "map": torch.cat(maps).to(rounded).float()}
        return replace(batch, images={"he": batch.images["he"]}, stored=batch.stored | there)


class TaughtWithTargets(Taught):
    """The same with the domain targets computed by the threads that read."""

    def __init__(self, config: Config, task: StudentTask, world: World) -> None:
        super().__init__(config, task, world)
        self.reader = targets = _TargetReader(config, self.reader)
        # What joins a batch with its rows takes those that were just computed.
        self.rows: Any = _TargetRows(targets, config.latents.dtype)


class _TargetReader(Reader):
    """Reads H&E and IHC, and computes the targets of each sample at native resolution."""

    def __init__(self, config: Config, reader: Reader) -> None:
        super().__init__(reader.shards, reader.roles, reader.size)
        self.latents = config.latents
        # By (shard, row), and kept: what is read ahead may hold a sample of two epochs.
        self.made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def decode(self, image: Encoded, out: np.ndarray | None) -> dict[str, np.ndarray]:
        return super().decode(image, out) | {f"{image.role}@native": decode(image.content, image.name)}

    def decode_sample(
        self, sample: Sample, images: list[Encoded], out: dict[str, np.ndarray] | None = None, skip: bool = False
    ) -> Sample:
        sample = super().decode_sample(sample, images, out, skip)
        he_13HW, ihc_13HW = (
            torch.from_numpy(sample.images.pop(f"{role}@native"))[None].permute(0, 3, 1, 2) for role in ("he", "ihc")
        )
        mpp = sample.meta.mpp
        self.made[sample.shard, sample.row] = {
            "nuclei": nuclei_grid(he_13HW, self.latents.nuclei_grid, mpp)[0].numpy(),
            "membrane": membrane_grid(ihc_13HW, self.latents.membrane_grid, mpp)[0].numpy(),
        }
        return sample


class _TargetRows:
    """What a `_TargetReader` made, as rows of a store."""

    def __init__(self, reader: _TargetReader, dtype: str) -> None:
        self.reader, self.dtype = reader, dtype

    def read(
        self, part_n: Sequence[int], row_n: Sequence[int], key_n: Sequence[str], view_n: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Nuclei (n, g, g) and membrane (n, m, m, 3), in the store's type."""
        made = [self.reader.made[address] for address in zip(part_n, row_n, strict=True)]
        return {name: np.stack([one[name] for one in made]).astype(self.dtype) for name in made[0]}


def recompute(settings: Settings, inputs: Inputs) -> Outcome:
    """Steps a second with the store by those with the teacher in the step, as a share of what can be saved."""
    with stream_student(settings, inputs) as (task, streamed):
        config, world = streamed.config, streamed.world
        model, facts = task.build(), facts_of(config, inputs)
        training = Training(config, task, world, model, "torch")
        ratios = []
        for name, kind in (("cached-vs-recompute", Taught), ("cached-vs-recompute: targets", TaughtWithTargets)):
            sides = Sides(settings, streamed, kind(config, task, world), training)
            differ = sides.check()
            what = "the teacher" if kind is Taught else "teacher and targets"
            compared = f"steps with the store / those with {what} in them x the ceiling"
            ratio = alternate(name, compared, MARK, sides.ours, sides.theirs, settings.rounds)
            facts[name] = sides.facts(ratio) | {"curves_differ": differ}
            ratios.append(ratio)
            sides.taught.reader.close()
        training.close()
        return Outcome(ratios=ratios, facts=facts)


class Sides:
    """Training with the store, training without it, and what the parts of both cost alone."""

    def __init__(self, settings: Settings, streamed: Streamed, taught: Taught, training: Training) -> None:
        self.streamed, self.taught, self.training = streamed, taught, training
        self.batch = settings.train_batch
        self.kept = streamed.kept()
        self.untaught = list(taught.untaught(KEPT))
        self.reading = [seconds_a_step(side(2 * KEPT)) for side in (streamed.steps, taught.untaught)]
        self.count = 2
        self.count = count_for(self.in_memory(), settings)
        self.costs: list[dict[str, float]] = []

    def check(self) -> float:
        """Compare the loss curves of both sides, from the same weights; returns the largest relative difference."""
        learner, config = self.training.learner, self.training.learner.task.config
        run = (config, learner.task, learner.engine.world, learner.task.build())
        ours_n, theirs_n = (curve(*run, side.steps(COMPARED)) for side in (self.streamed, self.taught))
        return check_curves(ours_n, theirs_n, config)

    def in_memory(self) -> Rate:
        """The student's step alone."""
        return rate_of(self.training.losses(again(self.kept, HEAD + self.count)), self.batch, self.count)

    def ours(self) -> Rate:
        """Training with the store."""
        steps = self.streamed.steps(HEAD + self.count + TAIL)
        return rate_of(self.training.losses(steps), self.batch, self.count)

    def theirs(self) -> Rate:
        """Training with the teacher, as fast as the ceiling of this round makes it."""
        student = self.in_memory()
        teaching = rate_of(map(self.taught.taught, again(self.untaught, HEAD + self.count)), self.batch, self.count)
        student_s, teacher_s = (rate.seconds / self.count for rate in (student, teaching))
        read_s, read_both_s = self.reading
        ceiling = max(student_s + teacher_s, read_both_s) / max(student_s, read_s)
        self.costs.append({"student": student_s, "teacher": teacher_s, "ceiling": ceiling})
        steps = self.taught.steps(HEAD + self.count + TAIL)
        rate = rate_of(self.training.losses(steps), self.batch, self.count)
        return rate._replace(seconds=rate.seconds / ceiling)

    def facts(self, ratio: Ratio) -> dict[str, Any]:
        """The costs, medians over the rounds, in milliseconds a step, the ceiling, and what was saved."""
        found = {name: statistics.median(cost[name] for cost in self.costs) for name in self.costs[0]}
        rounds = zip(ratio.detail["rounds"], self.costs, strict=True)
        return {
            "ms_a_step": {
                "student": 1e3 * found["student"],
                "teacher": 1e3 * found["teacher"],
                "reading": 1e3 * self.reading[0],
                "reading_without_the_store": 1e3 * self.reading[1],
            },
            "ceiling": found["ceiling"],
            "speed_up": statistics.median(one["ratio"] * cost["ceiling"] for one, cost in rounds),
            "steps_a_round": self.count,
        }
