"""The folder that a build of shards writes to: what may lie in it, how an interrupted build goes on, how it ends.

OUT/.building.json says what is being built, and OUT/.{split}-{000000}.json is a shard's entry of the manifest, which
is published after its tar and its index: a shard is taken over only if its entry is of the same build. All of them are
gone at the end. One build at a time works in a local folder (`lgd.io.locks`). A url has no lock: there the first
.building.json stays, where the store can do that, and a build that finds another one stops.
"""

import collections
import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from lgd.base.errors import DataError
from lgd.base.records import Sha256
from lgd.base.threads import in_threads
from lgd.io.digests import may_have_sha256
from lgd.io.documents import Document, MissingDocument
from lgd.io.files import create_json, list_folder, peek_kind, publish, remove, try_writing
from lgd.io.location import Location, RemoteError, as_output_location
from lgd.io.locks import LOCK, exclusive
from lgd.io.tables import write_csv
from lgd.shards.layouts import Problem
from lgd.shards.manifest import HER2, UNKNOWN, Entry, Manifest, Options, Shape, Sources, Split
from lgd.shards.meta import Text
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.shards.sources import Sample
from lgd.shards.split import SPLITS

_SHARD = r"[A-Za-z0-9_]+-\d{6}"
_FILE = rf"({_SHARD}\.(tar|idx)|\.{_SHARD}\.json|manifest\.json|patches\.npy|rejected\.csv|\.building\.json)"
_OURS = re.compile(_FILE)
# What lgd.io.files.publish leaves behind when it is killed.
_LEFTOVER = re.compile(rf"\.{_FILE}\.[A-Za-z0-9-]+\.tmp")
_REMOVALS = 16
_MARKER = ".building.json"
_ANEW = "remove the folder, and build the set again"


class Building(Document):
    """OUT/.building.json: what decides the bytes of the set that is being built."""

    FORMAT: ClassVar[str] = "lgd-building/2"
    ABSENT: ClassVar[str] = _ANEW
    REMEDY: ClassVar[str] = _ANEW

    layout: Text
    options: Options
    codecs: dict[Text, Text | None]
    sources: Sources


class BuiltShard(Document):
    """OUT/.{split}-{000000}.json: a shard that is there whole."""

    FORMAT: ClassVar[str] = "lgd-built-shard/2"
    ABSENT: ClassVar[str] = _ANEW
    REMEDY: ClassVar[str] = _ANEW

    building: Sha256
    """Digest of the build that it is of."""
    entry: Entry


def open_target(text: str | Location) -> Location:
    """OUT as a path or a url that can be written to; `DataError` where something else lies there.

    Nothing of the user's is ever overwritten.
    """
    out = as_output_location(text, "--out").absolute()
    if peek_kind(out, "folder") not in ("folder", None):
        raise DataError(f"{out} is no folder: give --out an empty or new one")
    names = [name for name in list_folder(out) if name != LOCK and not _LEFTOVER.fullmatch(name)]
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if not foreign and not {"manifest.json", _MARKER} & set(names):
        foreign = names
    if foreign:
        raise DataError(
            f"{out} already holds something else ({', '.join(foreign[:3])}): give --out an empty or new one"
        )
    try_writing(out / ".manifest.json.0.tmp")
    return out


def reused(out: Location, recipe: Building) -> Manifest:
    """The manifest of a finished OUT, if it is of this set; versions of codecs may have moved on since."""
    manifest = ShardFolder.open(out).manifest
    differing = [name for name in ("layout", "options", "sources") if getattr(manifest, name) != getattr(recipe, name)]
    if differing:
        raise DataError(
            f"{out} already holds another shard set (other {', '.join(differing)}): remove it, or "
            "give --out another folder"
        )
    finish(out)
    # What a build that was killed at its very end has left; a build that is alive keeps it.
    if LOCK in list_folder(out):
        with contextlib.suppress(DataError, OSError), exclusive(out, "reusing shards"):
            pass
    return manifest


def begin(out: Location, recipe: Building) -> set[str]:
    """Mark OUT as being built from this recipe, or see that an interrupted build was of the same; what lies there."""
    marker = out / _MARKER
    names = set(list_folder(out))
    begun = _MARKER in names or not create_json(marker, recipe.document())
    if begun and Building.read(marker) != recipe:
        raise DataError(
            f"{out} holds an unfinished build of something else (other options, sources or codecs): "
            "remove it, or give --out another folder"
        )
    _remove(out, filter(_LEFTOVER.fullmatch, names))
    return names


def require_marker(out: Location, building: str) -> None:
    """Raise `DataError` unless OUT is still being built by this build, which has this digest."""
    try:
        if Building.read(out / _MARKER).digest == building:
            return
    except MissingDocument:
        pass
    raise DataError(
        f"{out} is not being built by this command any more ({out / _MARKER} is gone, or of other options): let the "
        "other build end, or give --out another folder"
    )


def write_rejected(out: Location, problems: Sequence[Problem]) -> None:
    """Publish OUT/rejected.csv: what was left out, and why."""
    with publish(out / "rejected.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        rows = []
        for problem in problems:
            where = problem.he or problem.ihc
            reason = problem.reason if where == problem.name else f"{problem.name}: {problem.reason}"
            rows.append([problem.key, problem.he, problem.ihc, reason])
        write_csv(stream, ["key", "he", "ihc", "reason"], rows)


def _entry_path(tar: Location) -> Location:
    return tar.with_name(f".{tar.stem}.json")


def write_entry(tar: Location, building: str, entry: Entry) -> None:
    """Tell that this build has published a shard and its index."""
    require_marker(tar.parent, building)
    BuiltShard(building=building, entry=entry).write(_entry_path(tar))


def has_entry(tar: Location, names: set[str]) -> bool:
    """Whether a shard, its index and its entry are among the names that lie in OUT."""
    return {tar.name, tar.with_suffix(".idx").name, _entry_path(tar).name} <= names


def read_entry(tar: Location, building: str) -> Entry | None:
    """The entry of a shard that this build finished before it was interrupted; None for any other.

    Of a local one the digests are compared; one behind a url appeared whole, and is not downloaded.
    """
    try:
        built = BuiltShard.read(_entry_path(tar))
    except RemoteError:
        raise
    except DataError:
        return None
    entry, idx = built.entry, tar.with_suffix(".idx")
    same = built.building == building and entry.file == tar.name
    return entry if same and may_have_sha256(tar, entry.sha256) and may_have_sha256(idx, entry.idx_sha256) else None


def finish(out: Location) -> None:
    """Remove what only an unfinished build needs; its marker last."""
    names = list_folder(out)
    _remove(out, (name for name in names if re.fullmatch(rf"\.{_SHARD}\.json", name)))
    _remove(out, {_MARKER} & names.keys())


def _remove(out: Location, names: Iterable[str]) -> None:
    for _ in in_threads(lambda name: remove(out / name), names, _REMOVALS):
        pass


def split_samples(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each split, in the order of the manifest."""
    present = {sample.split for sample in samples}
    names = sorted(present, key=lambda name: (*SPLITS, name).index(name))
    return {name: [sample for sample in samples if sample.split == name] for name in names}


def describe_split(options: ShardOptions, name: str, samples: Sequence[Sample], entries: Sequence[Entry]) -> Split:
    """A split of the manifest; the shards are those of `entries`, in any order, that are of it."""
    counts = collections.Counter(sample.source.pair.label for sample in samples)
    tile = options.tile
    shapes = collections.Counter(
        (tile or source.width, tile or source.height, source.pair.mpp or options.known_mpp)
        for source in (sample.source for sample in samples)
    )
    commonest = sorted(shapes.items(), key=lambda item: (-item[1], *item[0][:2], item[0][2] or 0))
    mine = [entry for entry in entries if entry.file.rpartition("-")[0] == name]
    return Split(
        samples=len(samples),
        labels={label: counts[value] for value, label in enumerate(HER2.classes)} | {UNKNOWN: counts[None]},
        shapes=tuple(
            Shape(width=width, height=height, mpp=mpp, samples=count) for (width, height, mpp), count in commonest
        ),
        shards=tuple(sorted(mine, key=lambda entry: entry.file)),
    )
