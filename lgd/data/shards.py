"""Pairs -> byte-identical WebDataset tars + an offset index + a manifest, and back to bytes.

`lgd build-shards` runs `build`. It leaves on disk (format `lgd-shards/1`, told in shards/README.md):

    OUT/{split}-{000000}.tar   KEY.json, KEY.he.EXT, KEY.ihc.EXT of each sample, contiguous
    OUT/{split}-{000000}.idx   offset, length and crc32 of every member
    OUT/rejected.csv           what `--on-bad skip` left out
    OUT/manifest.json          what, from where, how many, digests; written last

A killed build goes on where it stopped (`lgd.data.building`). Pairs may lie behind urls, and so may OUT.
"""

import collections
import functools
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lgd.config import LEVEL_NAMES
from lgd.data.archive import FORMAT, INDEX, ROLES, Shard, is_whole, open_shards, read_member, write_archive
from lgd.data.building import begin, entry_path, finish, is_finished, open_target, reused, write_rejected
from lgd.data.image import codecs, decode
from lgd.data.pairs import Layout, Problem, find_pairs
from lgd.data.sources import (
    CheckJob,
    Encoding,
    Sample,
    Source,
    assign,
    caveats,
    check_chunk,
    hide_levels,
    members,
    nothing,
    same_types,
)
from lgd.data.split import SPLITS, parse_split
from lgd.errors import DataError, require
from lgd.files import digest_of, exists, is_remote, place, read_json, sha256, upload, write_json
from lgd.progress import progress

__all__ = ["INDEX", "ROLES", "Shard", "ShardOptions", "build", "decode", "open_shards", "read_member"]

# Pairs that a worker checks at a time.
_CHUNK = 64
# A remote answers each request late, but many at once.
_REMOTE_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """What `lgd build-shards` is asked for."""

    layout: Layout
    """The folders of BCI or of MIST, or a CSV: columns he, ihc, and as known key, level, slide, split, mpp."""
    root: str
    """Folder or url of the images; for csv the CSV itself, or a folder that holds pairs.csv."""
    out: str
    """Folder or url for the shards; empty, new, or one that holds this very set."""
    split: str = "keep"
    """`keep` the published split, `keep:0.1` carve a validation share off train, or `group:0.8,0.1,0.1`."""
    shard_size: int = 512
    """Samples in one shard."""
    tile: int = 0
    """Side of the square tiles that patches are cut into, in pixels; 0 keeps whole patches."""
    image: str = "keep"
    """`keep` the original bytes (tiles become PNG), or re-encode to `png` or `jpeg:QUALITY`."""
    slides: str = ""
    """CSV (or its url) with the columns key and slide that names the slide of every pair."""
    mpp: float | None = None
    """Micrometres per pixel of all pairs that do not state it themselves."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Stop at pairs that cannot be used, or skip them and list them in rejected.csv."""
    salt: str = ""
    """Any text; another one draws another split."""
    labelled: int = 0
    """Slides of each level whose levels `train` keeps; those of all others become unknown. 0 keeps all levels."""
    workers: int = 0
    """Processes that check pairs and build shards, under Ray; 0 does it in this process, in threads."""

    def __post_init__(self) -> None:
        parse_split(self.split)
        require(self.shard_size >= 1, f"--shard-size {self.shard_size}: use at least 1")
        require(self.tile >= 0, f"--tile {self.tile}: use 0 for whole patches, or the tile's side")
        require(self.labelled >= 0, f"--labelled {self.labelled}: use 0 (all) or more")
        require(self.workers >= 0, f"--workers {self.workers}: use 0 (no Ray) or more")
        quality = re.fullmatch(r"keep|png|jpeg:(\d{1,3})", self.image)
        good = quality is not None and (quality[1] is None or 1 <= int(quality[1]) <= 100)
        require(good, f"--image {self.image}: use keep, png or jpeg:95 (a quality from 1 to 100)")
        require(self.mpp is None or 0 < self.mpp < 100, f"--mpp {self.mpp}: use micrometres, such as 0.46")

    @property
    def encoding(self) -> Encoding:
        """How the images are stored."""
        kind, _, quality = self.image.partition(":")
        extension = {"keep": "png" if self.tile else None, "png": "png", "jpeg": "jpg"}[kind]
        return Encoding(tile=self.tile, extension=extension, quality=int(quality or 0))

    @property
    def threads(self) -> int:
        """Threads of each process; a worker of Ray has about one CPU, and reads while it encodes."""
        local = 2 if self.workers else os.cpu_count() or 1
        return max(local, _REMOTE_THREADS) if is_remote(self.root) else local


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """All that decides one shard's bytes, and how it is made."""

    path: Path
    samples: tuple[Sample, ...]
    encoding: Encoding
    extensions: tuple[str, str]
    mpp: float | None
    threads: int
    finished: bool
    """Whether an interrupted build left it at its url, with its entry."""


Tick = Callable[[int], Any]
MapJobs = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


def build(options: ShardOptions, map_jobs: MapJobs | None = None) -> dict[str, Any]:
    """Build a shard set and return its manifest, with `reused: true` added where OUT already held it.

    `map_jobs(function, jobs)` applies a function to every job, in any order and in any process; by default
    here. Raises `DataError` with the full list of unusable pairs, or for an OUT that holds something else, and
    `ConfigError` for a split that these pairs do not have. One build at a time may write to OUT.
    """
    out = open_target(options.out)
    sources, problems = _usable(options, map_jobs or map)
    rule = parse_split(options.split)
    samples = hide_levels(assign(sources, rule, options.salt, options.tile), options.labelled, options.salt)
    kept = options.encoding.extension
    extensions = (kept, kept) if kept else same_types(sources)
    recipe = _recipe(options, sources, len(problems))
    if exists(out / "manifest.json"):
        return reused(out, recipe)
    names = begin(out, recipe)
    if problems:
        write_rejected(out, problems)

    splits, jobs = _plan(options, samples, extensions, out, names)
    what = "build tiles" if options.tile else "build pairs"
    entries = _with_progress(what, write_shard, jobs, len(samples), options, map_jobs or map)
    done = {entry["file"]: entry for entry in entries}
    assert len(done) == len(jobs), "a shard was lost on its way back"
    for job in jobs:
        splits[job.samples[0].split]["shards"].append(done[job.path.name])

    manifest = {
        "format": FORMAT,
        **{name: recipe[name] for name in ("layout", "options", "codecs", "sources")},
        "classes": list(LEVEL_NAMES),
        "extensions": dict(zip(ROLES, ("json", *extensions), strict=True)),
        # `lgd synth` leaves this file; reports of virtual tissue must say that it is not tissue.
        "virtual": _is_virtual(options),
        "may_leak": any(source.pair.slide is None for source in sources),
        "caveats": caveats(samples, rule),
        "splits": splits,
    }
    manifest["digest"] = digest_of(manifest)
    write_json(out / "manifest.json", manifest)
    finish(out)
    return manifest


def _is_virtual(options: ShardOptions) -> bool:
    root = place(options.root)
    return root.suffix.lower() != ".csv" and exists(root / "synth.json")


def _with_progress(
    what: str, function: Callable[..., Any], jobs: Sequence[Any], total: int, options: ShardOptions, map_jobs: MapJobs
) -> Iterator[Any]:
    """The result of every job, as it comes, behind a bar that counts pairs or tiles."""
    does, unit = what.split()
    with progress(total, does, unit) as bar:
        if options.workers == 0:
            yield from map_jobs(functools.partial(function, tick=bar.update), jobs)
            return
        # A worker is elsewhere: its pairs are counted when its job comes back.
        for result in map_jobs(function, jobs):
            bar.update(result["samples"] if isinstance(result, dict) else len(result[1]))
            yield result


def _plan(
    options: ShardOptions, samples: Sequence[Sample], extensions: tuple[str, str], out: Path, names: set[str]
) -> tuple[dict[str, Any], list[ShardJob]]:
    """The manifest's splits, without their shards yet, and one job a shard."""
    splits: dict[str, Any] = {}
    jobs = []
    present = {sample.split for sample in samples}
    for name in sorted(present, key=lambda name: (*SPLITS, name).index(name)):
        mine = [sample for sample in samples if sample.split == name]
        counts = collections.Counter(sample.source.pair.level for sample in mine)
        levels = {label: counts[value] for value, label in enumerate(LEVEL_NAMES)} | {"unknown": counts[None]}
        splits[name] = {"samples": len(mine), "levels": levels, "shards": []}
        for start in range(0, len(mine), options.shard_size):
            path = out / f"{name}-{start // options.shard_size:06d}.tar"
            job = ShardJob(
                path=path,
                samples=tuple(mine[start : start + options.shard_size]),
                encoding=options.encoding,
                extensions=extensions,
                mpp=options.mpp,
                threads=options.threads,
                finished=is_remote(out) and is_finished(path, names),
            )
            jobs.append(job)
    return splits, jobs


def _usable(options: ShardOptions, map_jobs: MapJobs) -> tuple[list[Source], list[Problem]]:
    """The sources that passed every check, in the order of the pairs, and the problems, which `--on-bad` allows."""
    root = place(options.root)
    pairs, problems = find_pairs(options.layout, root if is_remote(root) else root.absolute(), options.slides or None)
    jobs = [
        CheckJob(start=start, pairs=tuple(pairs[start : start + _CHUNK]), tile=options.tile, threads=options.threads)
        for start in range(0, len(pairs), _CHUNK)
    ]
    checked = sorted(
        _with_progress("check pairs", check_chunk, jobs, len(pairs), options, map_jobs), key=lambda result: result[0]
    )
    sources = [entry for _, found in checked for entry in found if isinstance(entry, Source)]
    more = [entry for _, found in checked for entry in found if isinstance(entry, Problem)]
    problems = sorted(problems + more, key=Problem.order)
    if problems and (options.on_bad == "stop" or not sources):
        lines = "\n".join(f"  {problem.name}: {problem.reason}" for problem in problems)
        remedy = "leave them out with --on-bad skip" if sources else "no pair is left"
        raise DataError(f"{options.root}: {len(problems)} problems, {remedy}:\n{lines}")
    return sources, problems


def _recipe(options: ShardOptions, sources: Sequence[Source], rejected: int) -> dict[str, Any]:
    """What decides the bytes of the set; no path of this machine is in it."""
    chosen = ("split", "salt", "shard_size", "tile", "image", "mpp")
    facts = [
        (pair.key, pair.source, pair.level, pair.slide, pair.split, pair.mpp, *source.sha256)
        for source in sources
        for pair in (source.pair,)
    ]
    return {
        "format": FORMAT,
        "layout": options.layout,
        # Only where it is set, so that sets that were built before it existed are found again.
        "options": {name: getattr(options, name) for name in (*chosen, *(["labelled"] if options.labelled else []))},
        "codecs": {**codecs(), "webdataset": importlib.metadata.version("webdataset")},
        "sources": {"pairs": len(sources), "rejected": rejected, "digest": digest_of(facts)},
    }


def write_shard(job: ShardJob, tick: Tick = nothing) -> dict[str, Any]:
    """Write one tar and its index, unless an interrupted build left both whole; return its manifest entry.

    For a url they are written here first; the entry is published last. `tick(n)` is told of n pairs more.
    """
    if job.finished:
        tick(len(job.samples))
        return read_json(entry_path(job.path))
    if not is_remote(job.path):
        return _write_here(job, job.path, tick)
    with tempfile.TemporaryDirectory(prefix="lgd-") as folder:
        local = Path(folder) / job.path.name
        entry = _write_here(job, local, tick)
        for suffix in (".tar", ".idx"):
            upload(local.with_suffix(suffix), job.path.with_suffix(suffix))
    write_json(entry_path(job.path), entry)
    return entry


def _write_here(job: ShardJob, path: Path, tick: Tick) -> dict[str, Any]:
    if is_whole(path, len(job.samples)):
        tick(len(job.samples))
    else:
        write_archive(path, _contents(job, tick), job.extensions)
    return {
        "file": path.name,
        "samples": len(job.samples),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def _contents(job: ShardJob, tick: Tick) -> Iterator[tuple[str, list[bytes]]]:
    """The key and the members of each sample."""
    made = members(job.samples, job.encoding, job.mpp, job.threads)
    for sample, contents in zip(job.samples, made, strict=True):
        yield sample.key, contents
        tick(1)
