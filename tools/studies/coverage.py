"""How often the interval of `lgd.metrics.interval` holds the true value, over few trainings, on drawn numbers.

python tools/studies/coverage.py [--draws N] [--seed N] [--metrics] [--trainings N,N] [--level P]

A score is drawn as slide + training + what this training makes of this slide, all normal. `--metrics` draws levels that
networks answer instead, and looks at kappa and accuracy. Prints, for each number of trainings and each ratio of the
noise of trainings to that of slides, the share of intervals that hold the true value, and their mean width by that of
as many of the values; beside them those of resampling slides and trainings jointly, which was used before.

Shapes: S trainings, G slides, R resamples, n patches.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.markup import markdown_table
from lgd.base.target import DEFAULT_TARGET, find_target
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.metrics import Floats, draws, interval

LEVELS = len(find_target(DEFAULT_TARGET).classes)
RATIOS = (0.0, 0.5, 1.0, 2.0)
SLIDES, PATCHES = 40, 10
SINGLE = {"score": 0.7, "difference": 2.0}
"""Noise of a training on single slides, by what all trainings make of a slide: little in a score, much in a difference
of two methods, which does not see what is alike in both.
"""
NOISE = {"slide": 0.3, "patch": 0.4, "training": 0.4}
"""Of an answer, in levels, before it is rounded: alike for all patches of a slide, for all trainings, neither."""
APART = (np.arange(LEVELS)[:, None] - np.arange(LEVELS)) ** 2.0
WORSE = 1.2
"""Noise of the other method, by that of the first."""

Drawn = Callable[[int, float, int, int], Iterator[tuple[Floats, float]]]
"""Trainings, their noise, draws, seed -> values by training and resample (S, 1 + R), and the true value."""


def resample_jointly(drawn_SR: Floats, level: float, seed: int) -> tuple[float, float]:
    """The percentile interval over slides and trainings, both resampled."""
    trainings, resamples = len(drawn_SR), drawn_SR.shape[1] - 1
    taken_RS = np.random.default_rng(seed).integers(trainings, size=(resamples, trainings))
    mean_R = drawn_SR[taken_RS, np.arange(1, 1 + resamples)[:, None]].mean(axis=1)
    low, high = np.quantile(mean_R, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def measure(cases: Iterator[tuple[Floats, float]], level: float = 0.95) -> list[str]:
    """Coverage and mean width of the interval, and of that of joint resampling."""
    values, found = [], []
    for number, (drawn_SR, truth) in enumerate(cases):
        values.append(drawn_SR[:, 0].mean())
        one = interval(drawn_SR, SLIDES, level)
        assert one.low is not None and one.high is not None
        both = (one.low, one.high), resample_jointly(drawn_SR, level, number)
        found.append([(low <= truth <= high, high - low) for low, high in both])
    coverage_width_22 = np.array(found, np.float64).mean(axis=0)
    width = 2 * ndtri(0.5 + level / 2) * np.std(values)
    return [f"{coverage:.3f}, {one / width:.2f}" for coverage, one in coverage_width_22]


def draw_weights(resamples: int, seed: int) -> Floats:
    """What each slide counts in the whole, and after it in each resample: (1 + R, G)."""
    return np.vstack([np.ones(SLIDES), *draws(SLIDES, resamples, seed, resamples)])


def draw_scores(single: float, trainings: int, noise: float, count: int, seed: int) -> Iterator[tuple[Floats, float]]:
    """Scores; slides have noise of 1 in one training, and 0 is true."""
    random = np.random.default_rng(seed)
    slide = 1 / np.sqrt(1 + single**2)
    for number in range(count):
        if number % 200 == 0:
            weight_RG = draw_weights(1000, seed + number) / SLIDES
        score_GS = slide * random.standard_normal((SLIDES, 1)) + noise * random.standard_normal(trainings)
        score_GS = score_GS + single * slide * random.standard_normal((SLIDES, trainings))
        yield (weight_RG @ score_GS).T, 0.0


def score_counts(metric: str, count_nLL: Floats) -> Floats:
    """Accuracy or quadratic weighted kappa of confusion matrices, (..., 4, 4)."""
    total = count_nLL.sum((-2, -1))
    truth, said = count_nLL.sum(-1), count_nLL.sum(-2)
    value_n: Floats = (
        np.trace(count_nLL, axis1=-2, axis2=-1) / total
        if metric == "accuracy"
        else 1 - (count_nLL * APART).sum((-2, -1)) * total / ((truth @ APART) * said).sum(-1)
    )
    return value_n


def expect(metric: str, noise: float, factor: float) -> tuple[float, float]:
    """Mean and deviation of a metric, on slides without number, over trainings whose answers have another noise each:
    by a factor exp(N(0, noise)).
    """
    place_n, weight_n = np.polynomial.hermite_e.hermegauss(40)
    deviation_n = factor * np.sqrt(sum(one**2 for one in NOISE.values())) * np.exp(noise * place_n)
    bounds = np.arange(LEVELS - 1) + 0.5
    below_nLB = ndtr((bounds - np.arange(LEVELS)[:, None]) / deviation_n[:, None, None])
    value_n = score_counts(metric, np.diff(below_nLB, axis=2, prepend=0.0, append=1.0))
    mean = np.average(value_n, weights=weight_n)
    return float(mean), float(np.sqrt(np.average((value_n - mean) ** 2, weights=weight_n)))


def draw_metric(
    metric: str, paired: bool, trainings: int, noise: float, count: int, seed: int
) -> Iterator[tuple[Floats, float]]:
    """A metric of the first method, or what it has more than the other one on the same patches."""
    random, factors = np.random.default_rng(seed), (1.0, WORSE)[: 1 + paired]
    true = [expect(metric, noise, factor)[0] for factor in factors]
    shape = (trainings, SLIDES, PATCHES)
    place_SG1 = np.arange(trainings * SLIDES).reshape(trainings, SLIDES, 1) * LEVELS**2
    for number in range(count):
        if number % 200 == 0:
            weight_RG = draw_weights(500, seed + number)
        level_G1 = random.integers(LEVELS, size=(SLIDES, 1))
        shared_GP = NOISE["slide"] * random.standard_normal((SLIDES, 1))
        shared_GP = shared_GP + NOISE["patch"] * random.standard_normal(shape[1:])
        values = []
        for factor in factors:
            size_S11 = factor * np.exp(noise * random.standard_normal((trainings, 1, 1)))
            said_SGP = level_G1 + size_S11 * (shared_GP + NOISE["training"] * random.standard_normal(shape))
            cell_SGP = place_SG1 + LEVELS * level_G1 + np.rint(said_SGP).clip(0, LEVELS - 1).astype(np.int64)
            count_SGC = np.bincount(cell_SGP.ravel(), minlength=place_SG1.size * LEVELS**2).reshape(*shape[:2], -1)
            values.append(score_counts(metric, (weight_RG @ count_SGC).reshape(trainings, -1, LEVELS, LEVELS)))
        yield (values[0] - values[1], true[0] - true[1]) if paired else (values[0], true[0])


def find_noise(metric: str, paired: bool, deviation: float) -> float:
    """The noise of trainings that moves a metric, or the difference of two methods, by this deviation."""
    factors = (1.0, WORSE)[: 1 + paired]

    def miss(noise: float) -> float:
        return float(np.hypot.reduce([expect(metric, noise, factor)[1] for factor in factors])) - deviation

    return float(brentq(miss, 0.0, 3.0)) if deviation else 0.0


def list_cells(metrics: bool, seed: int) -> Iterator[tuple[str, str, Drawn, float]]:
    """What is drawn, the ratio of noise, how it is drawn, and the noise of trainings."""
    for kind, single in {} if metrics else SINGLE.items():
        for unit, scale in (("of a score", SLIDES**-0.5), ("of one slide", 1.0)):
            for ratio in RATIOS if unit == "of a score" else RATIOS[1:]:
                yield kind, f"{ratio:g} {unit}", functools.partial(draw_scores, single), ratio * scale
    for metric in ("kappa", "accuracy") if metrics else ():
        for kind in SINGLE:
            draw = functools.partial(draw_metric, metric, kind == "difference")
            deviation = float(np.std([drawn[0, 0] for drawn, _ in draw(1, 0.0, 1000, seed)]))
            for ratio in RATIOS:
                noise = find_noise(metric, kind == "difference", ratio * deviation)
                yield f"{kind} in {metric}", f"{ratio:g} of a score", draw, noise


def run(args: list[str]) -> int:
    """Print the table; returns the exit status."""
    parser = Parser("python tools/studies/coverage.py", "How often the intervals of lgd ablate hold the true value.")
    parser.add_argument("--draws", type=int, default=4000, help="data sets of each row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7_000_000, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--metrics", action="store_true", help="kappa and accuracy instead of normal scores")
    parser.add_argument("--trainings", default="3,5,10", help="how many, by commas (default: %(default)s)")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    asked = parser.parse(args)
    rows = []
    for trainings in map(int, asked.trainings.split(",")):
        for number, (kind, ratio, draw, noise) in enumerate(list_cells(asked.metrics, asked.seed)):
            seed = asked.seed + 10_000 * (100 * trainings + number)
            rows.append([str(trainings), kind, ratio, *measure(draw(trainings, noise, asked.draws, seed), asked.level)])
    heads = ["trainings", "of a", "noise of trainings by that", "coverage, width", "resampled jointly"]
    print_lines(*markdown_table(heads, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("coverage", run, sys.argv[1:]))
