"""What is known of virtual tissue, as tables beside its images: truth.csv, pairs.csv that `build-shards` reads, and
questions.csv that `ablate --transfer` reads.

Each has one row a pair, in the order of the keys.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lgd.base.target import find_target
from lgd.io.files import publish
from lgd.io.tables import write_csv
from lgd.tissue.centers import Center
from lgd.tissue.drawing import MPP
from lgd.tissue.sections import Stain

LEVELS = find_target("her2").classes
"""Of a slide whose membranes are stained, by their numbers."""
_MEASURED: dict[Stain, tuple[str, ...]] = {
    "membranes": (
        *("level", "patch_level", "nuclei", "tumour_nuclei"),
        *("membrane_od", "membrane_completeness", "stained_fraction", "discordant"),
    ),
    "nuclei": (
        *("slide_percent", "percent", "positive_od", "nuclei", "tumour_nuclei"),
        *("ihc_nuclei", "ihc_tumour_nuclei", "ihc_positive_nuclei", "ihc_positive_tumour_nuclei", "discordant"),
    ),
}
_MARKERS: dict[Stain, str] = {"membranes": "HER2", "nuclei": "Ki67"}


class Pair(NamedTuple):
    """One pair to draw."""

    key: str
    slide: int
    patch: int
    split: str
    center: Center | None = None

    @property
    def slide_name(self) -> str:
        """As the tables give it."""
        return f"slide-{self.slide:04d}"

    @property
    def origin(self) -> list[str]:
        """The names of its center and scanner, where there are such."""
        return name_origin(self.center) if self.center else []


def name_origin(center: Center) -> list[str]:
    """The names of a center and its scanner, as the tables give them."""
    return [f"center-{center.number + 1}", f"scanner-{center.scanner + 1}"]


Truth = Mapping[str, float]


def truth_columns(stain: Stain, centers: bool, beyond: bool = False) -> tuple[str, ...]:
    """The head of truth.csv."""
    origin = ("center", "scanner") if centers else ()
    return ("key", "slide", "split", *_measured(stain, beyond), "coupling", *origin)


def _measured(stain: Stain, beyond: bool) -> tuple[str, ...]:
    return _MEASURED[stain] + (("elongation",) if beyond else ())


def write_truth(path: Path, stain: Stain, coupling: float, truths: Mapping[Pair, Truth], beyond: bool) -> None:
    """Write truth.csv; what is undefined is left empty. `beyond`: with the elongation of nuclei."""
    rows = (
        [
            *(pair.key, pair.slide_name, pair.split),
            *(_blank_undefined(truth[name]) for name in _measured(stain, beyond)),
            *(coupling, *pair.origin),
        ]
        for pair, truth in _sort(truths)
    )
    _write(path, truth_columns(stain, any(pair.center for pair in truths), beyond), rows)


def write_pairs(path: Path, stain: Stain, truths: Mapping[Pair, Truth]) -> None:
    """Write pairs.csv: the label is the slide's HER2 level, or the percent of positive tumour nuclei of the patch."""
    centers = ("center", "scanner") if any(pair.center for pair in truths) else ()
    rows = (
        [
            *(f"{folder}/{pair.split}/{pair.key}.png" for folder in ("HE", "IHC")),
            LEVELS[int(truth["level"])] if stain == "membranes" else _blank_undefined(truth["percent"]),
            *(pair.slide_name, pair.split, MPP, _MARKERS[stain], *pair.origin),
        ]
        for pair, truth in _sort(truths)
    )
    _write(path, ("he", "ihc", "label", "slide", "split", "mpp", "marker", *centers), rows)


def write_questions(path: Path, truths: Mapping[Pair, Truth]) -> None:
    """Write questions.csv, of membranes: the H-score is the share of stained cells by their optical density."""
    rows = (
        [
            pair.key,
            round(100 * truth["stained_fraction"] * truth["membrane_od"], 2),
            *(truth[name] for name in ("stained_fraction", "membrane_completeness", "tumour_nuclei", "patch_level")),
        ]
        for pair, truth in _sort(truths)
    )
    _write(path, ("key", "h_score", "stained_share", "completeness", "tumour_nuclei", "level"), rows)


def _sort(truths: Mapping[Pair, Truth]) -> list[tuple[Pair, Truth]]:
    return sorted(truths.items(), key=lambda one: one[0].key)


def _blank_undefined(value: float) -> float | str:
    return value if value == value else ""


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with publish(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        write_csv(stream, columns, rows)
