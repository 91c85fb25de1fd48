"""`lgd ablate --leave-out center`: how each method does at a center that none of its networks has seen.

    RUN/leave-out/CENTER/                 a run without that center: teacher, latents, and ablation/ as of `lgd ablate`
    RUN/ablation/leave-out.json, .md      each center's patches, scored by networks that saw the center and by others

Both score the same patches, those of the report's split, and are compared seed by seed. Teachers that no training here
made (`teacher.source` frozen or imported) see no label, so all runs share their latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from lgd.base.errors import DataError, require
from lgd.base.markup import code_block, list_items, markdown_table
from lgd.base.records import Count, Line, Many, Record
from lgd.base.target import DEFAULT_TARGET, StatedTarget, find_target
from lgd.config import Config
from lgd.io.documents import Document
from lgd.io.files import write_bytes
from lgd.io.location import as_location
from lgd.labels.measures import Measures
from lgd.labels.predictions import Predictions, check_same, find_measures
from lgd.metrics import Interval, Ints, interval
from lgd.report.ablation import Ablation, slug
from lgd.report.ablation_table import LGD_NET, draw_runs
from lgd.report.columns import list_compared
from lgd.report.results import format_interval
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet

ALL = "all centers"


class Fold(NamedTuple):
    """A run without one center."""

    center: str
    config: Config
    shards: ShardSet
    """Those of the other centers."""
    scored: list[Shard]
    """Those of the report's split of this one."""
    rows: Ints
    """Which patches these are of all that the whole run scores."""


class Change(Record):
    """A metric of a row, of networks that saw a center and of networks that did not."""

    seen: Interval
    left_out: Interval
    change: Interval
    """Left out minus seen, paired by patch and seed."""
    lgd_minus: Interval | None
    """LGD-Net minus this row, both left out; None of itself."""


class AtCenter(Record):
    """The patches of one center, or of all."""

    patches: Count
    groups: Count
    training_patches: Count
    """Patches of `train` that the networks without it had."""
    rows: dict[Line, dict[Line, Change]]


class LeaveOutDocument(Document):
    """leave-out.json."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("target",)

    FORMAT: ClassVar[str] = "lgd-leave-out/1"
    ABSENT: ClassVar[str] = "run lgd ablate --leave-out center first"
    REMEDY: ClassVar[str] = "run lgd ablate --leave-out center again"

    seeds: Annotated[int, Field(ge=1)]
    resamples: Annotated[int, Field(ge=1)]
    training_patches: Count
    """Patches of `train` of all centers."""
    centers: dict[Line, AtCenter]
    """All of them first, then each one."""
    caveats: Many[Line]
    command: Line
    target: StatedTarget | None = None
    """What is predicted; None for the default target."""

    @property
    def measures(self) -> Measures:
        """The metrics of what is predicted."""
        return find_measures(self.target or find_target(DEFAULT_TARGET))


def make_folds(config: Config, shards: ShardSet) -> list[Fold]:
    """A run without each center.

    Raises `DataError` where the shard folders are not those of two or more centers, each with patches to score, and
    `ConfigError` for a run that no center can be left out of.
    """
    split = config.report.split
    require(
        split != "train",
        "report.split is train, whose patches other networks learnt from: score val or test to leave out centers",
    )
    require(
        config.teacher.source != "trained" or {*config.taught_by} == {config.teacher.name},
        f"student.teachers is {', '.join(config.taught_by)}: without a center only {config.teacher.name} is trained "
        "again; name it alone",
    )
    if lacking := [str(one.folder) for one in shards.folders if one.manifest.center is None]:
        remedy = "build one folder a center by lgd build-shards --center NAME, and name all in data.shards"
        raise DataError(f"{', '.join(lacking)}: patches of several centers, or of unknown ones: {remedy}")
    names = sorted({one.manifest.center for one in shards.folders if one.manifest.center is not None})
    if len(names) < 2:
        raise DataError(f"data.shards is of the center {names[0]} alone: name the folders of two centers or more")
    if len({slug(name) for name in names}) < len(names):
        raise DataError(f"two of the centers {', '.join(names)} have one folder name, {slug(names[0])}: rename one")
    return [_leave_out(config, shards, name) for name in names]


def _leave_out(config: Config, shards: ShardSet, center: str) -> Fold:
    split, folder = config.report.split, f"{config.run.dir}/leave-out/{slug(center)}"
    is_left_out = [one.manifest.center == center for one in shards.folders]
    own, others = (
        ShardSet(tuple(one for one, left in zip(shards.folders, is_left_out, strict=True) if left == wanted))
        for wanted in (True, False)
    )
    if not (scored := own.of_split(split)):
        raise DataError(f"{own.folders[0].folder}: the center {center} has no patches of report.split {split!r}")
    if not others.of_split("train"):
        raise DataError(f"without the center {center} no patches of the split train are left")
    names = [name for name, left in zip(config.shard_dirs, is_left_out, strict=True) if not left]
    config = replace(config, run=replace(config.run, dir=folder), data=replace(config.data, shards=names))
    if config.teacher.source == "trained":
        teacher, latents = (replace(getattr(config, name), dir=f"{folder}/{name}") for name in ("teacher", "latents"))
        config = replace(config, teacher=teacher, latents=latents)
    chosen = [
        np.full(sum(shard.samples for shard in one.shards if shard.split == split), left)
        for one, left in zip(shards.folders, is_left_out, strict=True)
    ]
    return Fold(center, config, others, scored, np.flatnonzero(np.concatenate(chosen)))


def compare_seen(
    config: Config, shards: ShardSet, whole: Ablation, folds: Sequence[Fold], parts: Sequence[Ablation]
) -> str:
    """Write and return the table: what each row of `whole` loses at a center that its networks have not seen.

    `parts` are the same rows of each fold.
    """
    names = [name for name in whole.rows if all(name in part.rows for part in parts)]
    resamples, seed = config.report.bootstrap, config.run.seed
    order = np.argsort(np.concatenate([fold.rows for fold in folds]))
    left_out = {
        name: [_join(runs, order) for runs in zip(*(part.rows[name] for part in parts), strict=True)] for name in names
    }
    taught = sum(shard.samples for shard in shards.of_split("train"))
    centers = {ALL: _compare_rows(whole.rows, left_out, taught, resamples, seed)}
    for fold, part in zip(folds, parts, strict=True):
        seen = {name: [run.select(fold.rows) for run in whole.rows[name]] for name in names}
        without = sum(shard.samples for shard in fold.shards.of_split("train"))
        centers[fold.center] = _compare_rows(seen, {name: part.rows[name] for name in names}, without, resamples, seed)
    document = LeaveOutDocument(
        seeds=whole.document.seeds,
        resamples=resamples,
        training_patches=taught,
        centers=centers,
        caveats=whole.document.caveats,
        command=whole.document.command,
        target=whole.document.target,
    )
    folder = as_location(config.run.dir) / "ablation"
    document.write(folder / "leave-out.json")
    text = format_left_out(document)
    write_bytes(folder / "leave-out.md", text.encode())
    return text


def _join(runs: Sequence[Predictions], order: Ints) -> Predictions:
    """What networks, each without another center, say of the patches of these, in the whole run's order."""
    joined = replace(
        runs[0],
        keys=[key for run in runs for key in run.keys],
        groups=[group for run in runs for group in run.groups],
        label=np.concatenate([run.label for run in runs]),
        output=np.concatenate([run.output for run in runs]),
        sites={},
        places=None,
        conformal=None,
    )
    return joined.select(order)


def _compare_rows(
    seen: Mapping[str, Sequence[Predictions]],
    left_out: Mapping[str, Sequence[Predictions]],
    taught: int,
    resamples: int,
    seed: int,
) -> AtCenter:
    first = left_out[LGD_NET][0]
    metrics, groups = list_compared(first.measures), first.labelled_groups
    for name, runs in left_out.items():
        for run, other in zip(runs, seen[name], strict=True):
            check_same(run, other)
    drawn = {
        name: {metric: [draw_runs(of[name], metric, resamples, seed) for of in (seen, left_out)] for metric in metrics}
        for name in left_out
    }
    rows = {
        name: {
            metric: Change(
                seen=interval(seen_SR, groups),
                left_out=interval(left_SR, groups),
                change=interval(left_SR - seen_SR, groups),
                lgd_minus=None if name == LGD_NET else interval(drawn[LGD_NET][metric][1] - left_SR, groups),
            )
            for metric, (seen_SR, left_SR) in row.items()
        }
        for name, row in drawn.items()
    }
    scored = int(first.known.sum())
    return AtCenter(patches=scored, groups=groups, training_patches=taught, rows=rows)


def _describe_patches(document: LeaveOutDocument) -> str:
    without = [f"{name} {at.training_patches}" for name, at in document.centers.items() if name != ALL]
    return (
        f"Networks that left a center out had fewer patches to learn from: of {document.training_patches}, without "
        f"{', without '.join(without)}."
    )


def format_left_out(document: LeaveOutDocument) -> str:
    """The tables in Markdown, one a metric, with what must be known to believe them."""
    measures = document.measures
    lines = [
        f"# Each center left out: {document.seeds} seed{'s' * (document.seeds > 1)}, "
        f"{len(document.centers) - 1} centers\n",
        *list_items([_describe_patches(document), *document.caveats]),
        "",
    ]
    for metric, title in list_compared(measures).items():
        cells = [
            [
                f"{center} ({at.patches} patches, {at.groups} groups)",
                name,
                *(format_interval(one) for one in (change.seen, change.left_out)),
                format_interval(change.change, "+.3f"),
                format_interval(change.lgd_minus, "+.3f") if change.lgd_minus else "",
            ]
            for center, at in document.centers.items()
            for name, row in at.rows.items()
            for change in (row[metric],)
        ]
        head = ["scored", "", "trained on all centers", "without this center", "change", f"{LGD_NET} minus it, without"]
        lines += [f"## {title}\n", *markdown_table(head, cells)]
    lower = [title for name, title in list_compared(measures).items() if name in measures.lower_is_better]
    lines += [
        f"All score the same patches. In the rows of {ALL} each patch is scored by networks that never saw its center. "
        "A change is of both together: of a center that is new, and of fewer patches to learn from. Brackets hold 95 % "
        f"intervals over groups ({document.resamples} resamples)"
        + (" and trainings" if document.seeds > 1 else ", of one training each")
        + "."
        + (f" Of {' and '.join(lower)}, lower is better." if lower else "")
        + "\n",
        f"{code_block(document.command)}\n",
    ]
    return "\n".join(lines)
