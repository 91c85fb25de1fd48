"""Which teachers `lgd teachers` compares, and of which labels.

Shapes: m training patches.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from lgd.base.errors import ConfigError, DataError, require
from lgd.base.labels import Labels, as_labels, find_known
from lgd.base.target import KNOWN
from lgd.config import Config
from lgd.config_sections import Learns, Source
from lgd.models.encoder import PRESETS
from lgd.models.method import choose_staining
from lgd.models.student import GRIDS
from lgd.report.ablation import slug
from lgd.report.transfer import Patches
from lgd.runs.folder import command
from lgd.shards.archive import Shard
from lgd.shards.repeats import open_disjoint
from lgd.shards.shard_set import ShardSet
from lgd.stream.reader import Reader, in_batches, stream

KINDS = {
    "label": "labels",
    "stain": "the second stain's grid, no label",
    "several": "labels, nuclei and the second stain's grid",
    "parts": "self-supervised, an IHC and a part of it",
    "pairs": "joint with the H&E",
    "random": "random, not trained",
}
"""The teachers that have a name, and their rows; others are frozen encoders."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeachersOptions:
    """What `lgd teachers` is asked for."""

    compare: str = ",".join(KINDS)
    """Teachers, with commas between: `label`, `stain` (the grid of membranes or positive nuclei), `several` (both, and
    nuclei), `parts` and `pairs` (which images belong together), `random`, or a frozen encoder as `teacher.encoder`
    names it."""
    seeds: int = 3
    """Trainings of each teacher and its students; their seeds are run.seed and those after it."""
    fewer: str = ""
    """Shard folder of the same patches with fewer labels (`build-shards --labelled`), for a column of its own."""
    jobs: int = 0
    """Networks that are trained at a time, each in a process of its own under Ray; 0 trains one after the other."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"--seeds {self.seeds}: use at least 1")
        require(self.jobs >= 0, f"--jobs {self.jobs}: use 0 or more")
        require(len({*self.names}) == len(self.names) > 0, f"--compare {self.compare}: name each teacher once")

    @property
    def names(self) -> list[str]:
        """What is compared."""
        return [name.strip() for name in self.compare.split(",") if name.strip()]


def describe_command(config: Config, options: TeachersOptions) -> str:
    """The command line of a comparison."""
    fewer = f" --fewer {shlex.quote(options.fewer)}" if options.fewer else ""
    compared = "" if options.names == [*KINDS] else f" --compare {shlex.quote(','.join(options.names))}"
    return f"{command(config, 'teachers')}{compared} --seeds {options.seeds}{fewer}"


class Row(NamedTuple):
    """A compared teacher."""

    name: str
    runs: list[Config]
    """Of each seed, with this teacher as the run's."""

    @property
    def title(self) -> str:
        """In the table."""
        return KINDS.get(self.name, self.name)

    @property
    def folder(self) -> str:
        """Under `teachers`."""
        return slug(self.name)

    @property
    def learns_labels(self) -> bool:
        """Whether labels teach it."""
        return self._is_trained and "label" in self.runs[0].teacher.learns

    @property
    def learns_grids(self) -> bool:
        """Whether domain targets teach it."""
        return self._is_trained and bool(GRIDS.keys() & {*self.runs[0].teacher.learns})

    @property
    def _is_trained(self) -> bool:
        return self.runs[0].teacher.source == "trained"


def list_rows(config: Config, shards: ShardSet, options: TeachersOptions) -> list[Row]:
    """The runs of all teachers; raises `ConfigError` for one that cannot be."""
    grids = {"membranes": "membranes", "nuclei": "positive"}
    staining = choose_staining(config, shards.target)
    lessons: dict[str, list[str]] = {
        "label": ["label"],
        "stain": [grids.get(staining, "")],
        "several": ["label", "nuclei", grids.get(staining, "")],
        "parts": ["parts"],
        "pairs": ["pairs"],
    }
    rows = []
    for name in options.names:
        source: Source = "trained"
        encoder, learns = config.teacher.encoder, lessons.get(name, ["label"])
        if name == "random":
            source = "random"
        elif name not in KINDS:
            source, encoder = "frozen", name
            kinds = f"{', '.join(KINDS)}, or an encoder such as hf:ORG/NAME"
            require(":" in name or "/" in name, f"--compare names {name!r:.80}: use {kinds}")
        require(
            encoder in PRESETS or source == "frozen",
            f"--compare names {name}, which trains the encoder {encoder}: set teacher.encoder to a preset",
        )
        if "" in learns:
            raise ConfigError(f"--compare names {name}, and the second stain shows {staining}: leave it out")
        folder, runs = f"{config.run.dir}/teachers/{slug(name)}", []
        for seed in range(options.seeds):
            # One that is not trained here is the same for all seeds.
            at = "frozen" if source == "frozen" else f"seed-{seed}"
            teacher = dataclasses.replace(
                config.teacher,
                name=f"{slug(name)}_{at}".replace("-", "_")[-64:],
                dir=f"{folder}/{at}",
                source=source,
                encoder=encoder,
                learns=cast(list[Learns], learns),
            )
            run = dataclasses.replace(config.run, seed=config.run.seed + seed)
            runs.append(dataclasses.replace(config, run=run, teacher=teacher))
        rows.append(Row(name, runs))
    return rows


class Fewer(NamedTuple):
    """The same patches, of which fewer have a label."""

    shards: ShardSet
    label_m: Labels
    """Of the training patches, in the order of the run's shards."""
    slides: dict[str, int]


def read_rows(shards: Sequence[Shard]) -> tuple[Patches, list[int | float | None]]:
    """The patches of some shards, and their labels, without their images."""
    reader = Reader(shards, (), None)
    found = [row for rows, _ in stream(reader, in_batches(range(reader.total), 256), threads=1) for row in rows]
    reader.close()
    metas = [row.meta for row in found]
    return Patches(shards, [one.key for one in metas], [one.group for one in metas]), [row.label for row in found]


def count_slides(shards: ShardSet, patches: Patches, label_m: Labels) -> dict[str, int]:
    """Slides of each label, or of known values."""
    known = find_known(label_m)
    if shards.target.is_number:
        return {KNOWN: len({patches.groups[row] for row in np.flatnonzero(known).tolist()})}
    return {
        name: len({patches.groups[row] for row in np.flatnonzero(label_m == number).tolist()})
        for number, name in enumerate(shards.target.counted)
    }


def open_fewer(path: str, shards: ShardSet, training: Patches) -> Fewer:
    """Raises `DataError` for a folder of other patches."""
    fewer = open_disjoint([path])
    if fewer.target != shards.target:
        raise DataError(f"--fewer {path}: its target is another than that of the run: build it with the same --target")
    patches, labels = read_rows(fewer.of_split("train"))
    of_key = dict(zip(patches.keys, labels, strict=True))
    if of_key.keys() != {*training.keys}:
        lacking = next(iter(of_key.keys() ^ {*training.keys}))
        raise DataError(
            f"--fewer {path}: its split train has other patches than the run, such as {lacking}: build both from the "
            "same pairs and split, with another --labelled"
        )
    label_m = as_labels(shards.target, [of_key[key] for key in training.keys])
    if len(np.unique(label_m[find_known(label_m)])) < 2:
        raise DataError(f"--fewer {path}: fewer than two different {shards.target.label_word}s are in its split train")
    return Fewer(fewer, label_m, count_slides(shards, training, label_m))
