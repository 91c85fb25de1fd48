"""How often the label sets of `lgd.labels.conformal` hold the true label of new slides, in drawn worlds.

python tools/studies/conformal.py [--worlds N] [--seed N] [--slides N,N] [--out FILE]

In a world slides are drawn with a label and an unequal number of patches, and answers of a network that errs for all
patches of a slide alike, and for each patch too. Thresholds and temperature are fitted on the same few slides, as at
the end of training, and 200 new slides are scored. Prints, for each kind of target and number of slides, the mean
coverage over worlds with its 95 % interval, by patch (each slide counting once) and by slide, the size of the sets, and
the coverage by patch of thresholds from patches that were pooled. `--out` leaves the same, and more, as JSON.

Shapes: n patches, K classes, G slides, W worlds.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, softmax, stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.markup import markdown_table
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.labels.conformal import (
    By,
    Conformal,
    Kind,
    average_slides,
    calibrate,
    find_threshold,
    measure_intervals,
    measure_label_misfits,
    measure_sets,
)
from lgd.metrics import Floats, Ints
from lgd.train.finished import fit_temperature

COVERAGE, NEW_SLIDES = 0.9, 200
RANGE = (0.0, 100.0)
"""Of a number, as of a percentage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What is predicted, and how badly."""

    name: str
    kind: Kind
    classes: int = 1
    slide: float = 0.6
    """Deviation of an answer that all patches of a slide share: in classes, or of a number in tenths of its range."""
    patch: float = 0.5
    """That of a single patch."""
    small: float = 1.0
    """How much more slides of less than ten patches are off than others."""
    networks: int = 1
    """Of so many equally good networks the one that does best on the calibration slides is taken."""


WORLDS = (
    World(name="ordinal of 2", kind="ordinal", classes=2),
    World(name="ordinal of 3", kind="ordinal", classes=3),
    World(name="ordinal of 4", kind="ordinal", classes=4),
    World(name="ordinal of 5", kind="ordinal", classes=5),
    World(name="ordinal of 10", kind="ordinal", classes=10),
    World(name="3 classes", kind="class", classes=3),
    World(name="6 classes", kind="class", classes=6),
    World(name="number", kind="number"),
    World(name="ordinal of 4, small slides worse", kind="ordinal", classes=4, small=2.0),
    World(name="ordinal of 4, a good network", kind="ordinal", classes=4, slide=0.2, patch=0.2),
    World(name="ordinal of 4, best of 10 networks", kind="ordinal", classes=4, networks=10),
)


def draw_slides(world: World, slides: int, random: np.random.Generator) -> tuple[Ints | Floats, Ints]:
    """True labels of patches, (n,), and their slides, (n,). A slide has 2 to 80 patches, half have less than ten."""
    slide_n = np.repeat(np.arange(slides), np.exp(random.normal(np.log(10), 0.8, size=slides)).astype(int).clip(2, 80))
    if world.kind != "number":
        return random.integers(world.classes, size=slides)[slide_n], slide_n
    value_n = RANGE[1] * random.beta(0.7, 1.8, size=slides)[slide_n] + random.normal(scale=8.0, size=len(slide_n))
    return value_n.clip(*RANGE), slide_n


def draw_answers(world: World, label_n: Ints | Floats, slide_n: Ints, random: np.random.Generator) -> Floats:
    """Logits (n, K) of a network that is too sure of itself, or values (n, 1)."""
    width = world.classes if world.kind == "class" else 1
    factor_G1 = np.where(np.bincount(slide_n) < 10, world.small, 1.0)[:, None]
    shared_GW = world.slide * factor_G1 * random.standard_normal((len(factor_G1), width))
    error_nW = shared_GW[slide_n] + world.patch * random.standard_normal((len(slide_n), width))
    if world.kind == "number":
        # Larger values are harder, and pulled towards the mean.
        answer_nK: Floats = (0.9 * label_n + 4 + (5 + label_n / 10) * error_nW[:, 0])[:, None]
    elif world.kind == "class":
        answer_nK = 6 * ((label_n[:, None] == np.arange(world.classes)) + error_nW)
    else:
        answer_nK = -(((label_n[:, None] + error_nW) - np.arange(world.classes)) ** 2) / (2 * 0.3**2)
    return answer_nK


def draw_network(world: World, label_n: Ints | Floats, slide_n: Ints, random: np.random.Generator) -> Floats:
    """Answers of the network that does best on these slides, by its likelihood."""
    answers = [draw_answers(world, label_n, slide_n, random) for _ in range(world.networks)]
    if world.networks == 1:
        return answers[0]
    rows = np.arange(len(label_n))
    return max(answers, key=lambda logits_nK: log_softmax(logits_nK, axis=1)[rows, label_n].mean())


def measure_world(world: World, slides: int, random: np.random.Generator) -> dict[str, float]:
    """Coverage and size in one world."""
    label_n, slide_n = draw_slides(world, slides, random)
    logits_nK = draw_network(world, label_n, slide_n, random)
    new_label_n, new_slide_n = draw_slides(world, NEW_SLIDES, random)
    new_nK = draw_answers(world, new_label_n, new_slide_n, random)
    if world.kind != "number":
        temperature = fit_temperature(label_n.astype(np.int64), logits_nK)
        logits_nK, new_nK = softmax(logits_nK / temperature, axis=1), softmax(new_nK / temperature, axis=1)
    found = calibrate(world.kind, logits_nK, label_n, [f"{number}" for number in slide_n], COVERAGE)
    misfit_n = measure_label_misfits(world.kind, logits_nK, label_n)
    pooled = found.model_copy(update={"patch": find_threshold(misfit_n, np.arange(len(misfit_n)), COVERAGE)})
    new_GK, new_label_G = average_slides(new_nK, new_slide_n), average_slides(new_label_n.astype(float), new_slide_n)
    measured: dict[str, float] = {}
    rows: list[tuple[str, By, Conformal, Floats, Ints | Floats, Ints]] = [
        ("patch", "patch", found, new_nK, new_label_n, new_slide_n),
        ("pooled", "patch", pooled, new_nK, new_label_n, new_slide_n),
        ("slide", "slide", found, new_GK, new_label_G, np.arange(NEW_SLIDES)),
    ]
    for name, by, sets, output, label, slides_n in rows:
        names = [f"{number}" for number in slides_n]
        if world.kind == "number":
            one = measure_intervals(sets.find_intervals(output[:, 0], by, RANGE), label.astype(float), names, 1, 0)
        else:
            one = measure_sets(sets.find_sets(output, by), label.astype(np.int64), names, 1, 0)
        values = {"coverage": one.coverage, "size": one.size}
        if one.single:
            values["single"] = one.single
        if name != "pooled":
            values |= {f"coverage of class {number}": value for number, value in enumerate(one.by_class)}
        measured |= {f"{name} {of}": value.value for of, value in values.items() if value.value is not None}
    return measured


def summarise(value_W: Floats) -> dict[str, float]:
    """Mean over worlds with its 95 % interval, and what one world in twenty stays below."""
    half = stdtrit(len(value_W) - 1, 0.975) * value_W.std(ddof=1) / np.sqrt(len(value_W))
    summary = {"mean": value_W.mean(), "low": value_W.mean() - half, "high": value_W.mean() + half}
    return {name: round(float(one), 5) for name, one in (summary | {"p05": np.quantile(value_W, 0.05)}).items()}


def run(args: list[str]) -> int:
    """Print the table; returns the exit status."""
    parser = Parser("python tools/studies/conformal.py", "How often label sets hold the true label of new slides.")
    parser.add_argument("--worlds", type=int, default=200, help="worlds of each row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=9_100_000, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--slides", default="10,20,50", help="that calibrate, by commas (default: %(default)s)")
    parser.add_argument("--out", help="JSON file of the numbers")
    asked = parser.parse(args)
    rows, numbers = [], []
    for world_number, world in enumerate(WORLDS):
        for slides in map(int, asked.slides.split(",")):
            random = np.random.default_rng([asked.seed, world_number, slides])
            measured = [measure_world(world, slides, random) for _ in range(asked.worlds)]
            summary = {name: summarise(np.array([one[name] for one in measured])) for name in measured[0]}
            numbers.append({"world": world.name, "slides": slides, "worlds": asked.worlds, **summary})
            patch, slide, pooled = (summary[f"{name} coverage"] for name in ("patch", "slide", "pooled"))
            held = [f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in (patch, slide, pooled)]
            size = [f"{summary[f'{name} size']['mean']:.2f}" for name in ("patch", "slide", "pooled")]
            promised = f"{np.ceil(COVERAGE * (slides + 1) - 1e-9) / (slides + 1):.3f}"
            rows.append([world.name, str(slides), held[0], size[0], held[1], size[1], promised, held[2], size[2]])
    heads = ["world", "slides", "by patch", "size", "by slide", "size", "expected", "pooled", "size"]
    print_lines(*markdown_table(heads, rows))
    if asked.out:
        lines = ",\n".join(json.dumps(row) for row in numbers)
        head = f'{{"seed": {asked.seed}, "coverage": {COVERAGE}, "rows": ['
        Path(asked.out).write_text(f"{head}\n{lines}\n]}}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("conformal", run, sys.argv[1:]))
