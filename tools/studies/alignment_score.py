"""How well `lgd.slides.alignment` knows pairs that fit from those that do not.

python tools/studies/alignment_score.py [--patches BCI] [--slides slides.csv] [--seed N]

Windows of 384 pixels are taken from the patches of a folder in BCI's layout, at 0.46 um, every 160 pixels; and from the
pairs of slides of a CSV that lie in one frame, at their own scale, where half is tissue on both. Each is measured at
its own place, at two places elsewhere (windows that do not overlap it), and 35 um off in four directions. Prints a
table of z, of the AUC of right places against both, of what the bound of `lgd build-shards` keeps of them, and how
many of those that it keeps are right where a third of all pairs is wrong.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lgd.base.arguments import Parser
from lgd.base.errors import DataError
from lgd.base.markup import markdown_table
from lgd.base.target import find_target
from lgd.base.text import print_lines
from lgd.cli import run_command
from lgd.io.location import as_location
from lgd.shards.candidate import Cut
from lgd.shards.pairs import find_pairs
from lgd.slides.alignment import measure_alignment
from lgd.slides.slide import open_slide

HER2 = find_target("her2")
SIDE, STRIDE, MPP, BOUND, MOVED_UM = 384, 160, 0.46, 2.0, 35.0


class Scores(NamedTuple):
    """z of some pairs."""

    right: list[float]
    elsewhere: list[float]
    moved: list[float]


class Field(NamedTuple):
    """Two images of one field, and the corners of the windows in them."""

    he: np.ndarray
    ihc: np.ndarray
    places: list[tuple[int, int]]
    mpp: float


def list_patches(root: str) -> Iterator[Field]:
    """The patches of a folder in BCI's layout."""
    for pair in find_pairs("bci", root, HER2)[0]:
        he, ihc = (np.array(Image.open(str(path)).convert("RGB")) for path in pair.images)
        corners = [range(0, side - SIDE + 1, STRIDE) for side in he.shape[:2]]
        yield Field(he, ihc, [(y, x) for y in corners[0] for x in corners[1]], MPP)


def list_slides(path: str) -> Iterator[Field]:
    """The pairs of slides of a CSV, read whole."""
    pairs, problems = find_pairs("slides", as_location(path), HER2, cut=Cut(SIDE, MPP, True))
    if problems:
        raise DataError(f"{path}: {problems[0].name}: {problems[0].reason}")
    for files in dict.fromkeys(pair.images for pair in pairs):
        images, mpps = [], []
        for file in files:
            with open_slide(str(file)) as slide:
                images.append(slide.read(0, 0, slide.width, slide.height, slide.mpp))
                mpps.append(slide.mpp)
        places = [(pair.region.y, pair.region.x) for pair in pairs if pair.images == files and pair.region]
        yield Field(images[0], images[1], places, mpps[0])


def measure(fields: list[Field], rng: np.random.Generator) -> Scores:
    """Z at the right places, elsewhere and moved."""
    scores = Scores([], [], [])
    windows = [(field, y, x) for field in fields for y, x in field.places]
    for field, y, x in windows:
        he = _cut(field.he, y, x)
        far = [one for one in windows if one[0] is not field or abs(one[1] - y) + abs(one[2] - x) > SIDE]
        by = round(MOVED_UM / field.mpp)
        near = [(field, y + dy, x + dx) for dy, dx in ((by, 0), (-by, 0), (0, by), (0, -by))]
        chosen = [far[one] for one in rng.choice(len(far), min(2, len(far)), replace=False)]
        for found, places in ((scores.right, [(field, y, x)]), (scores.elsewhere, chosen), (scores.moved, near)):
            for other, top, left in places:
                ihc = _cut(other.ihc, top, left)
                if min(top, left) >= 0 and ihc.shape == he.shape:
                    found.append(measure_alignment(he, ihc, field.mpp) or 0.0)
    return scores


def _cut(image: np.ndarray, y: int, x: int) -> np.ndarray:
    return image[y : y + SIDE, x : x + SIDE]


def _auc(right: list[float], wrong: list[float]) -> float:
    return float(np.mean(np.array(right)[:, None] > np.array(wrong)))


def describe(name: str, scores: Scores) -> list[str]:
    """A row of the table."""
    right, elsewhere, moved = (np.array(part) for part in scores)
    kept, wrong = np.mean(right >= BOUND), np.mean(np.append(elsewhere, moved) >= BOUND)
    precision = 2 * kept / (2 * kept + wrong)
    return [
        f"{name} ({len(right)})",
        f"{np.median(right):.1f} ({np.quantile(right, 0.1):.1f})",
        f"{np.median(np.append(elsewhere, moved)):.1f} ({np.quantile(np.append(elsewhere, moved), 0.9):.1f})",
        f"{_auc(scores.right, scores.elsewhere):.3f}",
        f"{_auc(scores.right, scores.moved):.3f}",
        f"{kept:.2f}, {wrong:.3f}",
        f"{precision:.2f}",
    ]


COLUMNS = (
    "windows",
    "z, right place: median (tenth)",
    "wrong place: median (ninth tenth)",
    "AUC, elsewhere",
    "AUC, 35 um off",
    "kept: right, wrong",
    "precision, a third wrong",
)


def run(args: list[str]) -> int:
    """Print the table; returns the exit status."""
    parser = Parser("python tools/studies/alignment_score.py", "How well the alignment knows pairs that fit.")
    parser.add_argument("--patches", default="", help="a folder in BCI's layout")
    parser.add_argument("--slides", default="", help="a CSV of pairs of slides that are registered")
    parser.add_argument("--seed", type=int, default=0, help="of what lies elsewhere (default: %(default)s)")
    asked = parser.parse(args)
    rng, rows = np.random.default_rng(asked.seed), []
    for name, root, list_fields in (("patches", asked.patches, list_patches), ("slides", asked.slides, list_slides)):
        if root:
            rows.append(describe(name, measure([*list_fields(root)], rng)))
    print_lines(*markdown_table(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("alignment_score", run, sys.argv[1:]))
