"""Pairs -> byte-identical WebDataset tars + an offset index + a manifest, and back to bytes.

`lgd build-shards` runs `build`. It leaves on disk (format `lgd-shards/2`, described in shards/README.md):

    OUT/{split}-{000000}.tar   KEY.json, KEY.he.EXT, KEY.ihc.EXT of each sample, contiguous
    OUT/{split}-{000000}.idx   offset, length and crc32 of every member
    OUT/patches.npy            what must not lie on two sides of a split (`lgd.shards.patches`)
    OUT/rejected.csv           what `--on-bad skip` left out
    OUT/manifest.json          what, from where, how many, digests; written last

A killed build goes on where it stopped (`lgd.shards.building`). Pairs may lie behind urls, and so may OUT.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

from lgd.base.errors import DataError
from lgd.base.logs import progress
from lgd.io.digests import digest_of
from lgd.io.files import exists, write_bytes
from lgd.io.location import Location, as_location
from lgd.io.locks import exclusive
from lgd.ray_jobs.cluster import restore_connection
from lgd.ray_jobs.mapping import map_with
from lgd.shards.archive import write_archive
from lgd.shards.building import (
    Building,
    begin,
    describe_split,
    finish,
    has_entry,
    open_target,
    read_entry,
    require_marker,
    reused,
    split_samples,
    write_entry,
    write_rejected,
)
from lgd.shards.duplicates import leave_out_duplicates, refuse_spellings
from lgd.shards.image import codecs
from lgd.shards.layouts import Problem
from lgd.shards.manifest import (
    HER2,
    Entry,
    Extensions,
    File,
    Manifest,
    Options,
    Sources,
)
from lgd.shards.options import Encoding, ShardOptions
from lgd.shards.pairs import find_pairs
from lgd.shards.patches import FILE, as_patches
from lgd.shards.sources import (
    CheckJob,
    Sample,
    Source,
    assign,
    caveats,
    check_chunk,
    hide_levels,
    members,
    same_types,
)
from lgd.shards.split import parse_split

# Pairs that a worker checks at a time.
_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """All that decides one shard's bytes, and how it is made."""

    path: Location
    samples: tuple[Sample, ...]
    encoding: Encoding
    extensions: dict[str, str]
    mpp: float | None
    threads: int
    building: str
    """Digest of the build that it is of."""
    left: bool
    """Whether an interrupted build left it, with its entry."""


MapJobs = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


def build(options: ShardOptions, map_jobs: MapJobs | None = None) -> tuple[Manifest, bool]:
    """Build a shard set; returns its manifest, and whether it was built now rather than found in OUT.

    `map_jobs(function, jobs)` applies a function to every job, in any order and in any process; by default here, or by
    the workers of Ray that `options` ask for. Raises `DataError` with the full list of unusable pairs, or for an OUT
    that holds something else, and `ConfigError` for a split that these pairs do not have; while another process builds
    in a local OUT, `TakenError` says so.
    """
    out = open_target(options.out)
    # A finished set is only read, and may lie where nothing can be written.
    finished = exists(out / "manifest.json")
    with contextlib.ExitStack() as stack:
        if not finished:
            stack.enter_context(exclusive(out, "building shards"))
        if options.workers:
            stack.enter_context(restore_connection())
        return _build(options, map_jobs or functools.partial(_map_with_workers, options.workers), out, finished)


def _map_with_workers(workers: int, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    return map_with(lambda: function, jobs, workers=workers, option_name="--workers", use_gpus=False)


def _build(options: ShardOptions, map_jobs: MapJobs, out: Location, finished: bool) -> tuple[Manifest, bool]:
    sources, problems = _usable(options, map_jobs)
    rule = parse_split(options.split)
    samples = hide_levels(assign(sources, rule, options.salt, options.tile), options.labelled, options.salt)
    kept = options.encoding.extension
    he, ihc = (kept, kept) if kept else same_types(sources)
    extensions = Extensions.from_json({"hes": None, "he": he, "ihc": ihc})
    recipe = _recipe(options, sources, len(problems))
    if finished or exists(out / "manifest.json"):
        return reused(out, recipe), False
    names = begin(out, recipe)
    if problems:
        write_rejected(out, problems)

    of_split = split_samples(samples)
    jobs = _jobs(options, of_split, extensions, out, names, recipe.digest)
    what = "build tiles" if options.tile else "build pairs"
    entries = list(_with_progress(what, write_shard, jobs, len(samples), map_jobs))
    patches = as_patches([sample for some in of_split.values() for sample in some])
    write_bytes(out / FILE, patches)
    manifest = Manifest(
        layout=options.layout,
        options=recipe.options,
        codecs=recipe.codecs,
        sources=recipe.sources,
        target=HER2,
        extensions=extensions,
        patches=File(bytes=len(patches), sha256=hashlib.sha256(patches).hexdigest()),
        # `lgd synth` leaves this file; reports of virtual tissue must say that it is not tissue.
        virtual=_is_virtual(options),
        may_leak=any(source.pair.slide is None for source in sources),
        caveats=tuple(caveats(samples, rule)),
        splits={name: describe_split(options, name, some, entries) for name, some in of_split.items()},
    )
    require_marker(out, recipe.digest)
    manifest.write(out / "manifest.json")
    finish(out)
    return manifest, True


Fields = ParamSpec("Fields")


def _take_fields(kind: Callable[Fields, ShardOptions]) -> Callable[Fields, Manifest]:
    """`build_shards`, with the fields of `ShardOptions` as its arguments."""

    def build_shards(*args: Fields.args, **fields: Fields.kwargs) -> Manifest:
        """Pack pairs of H&E and IHC patches into WebDataset shards, as `lgd build-shards` does.

        It takes the fields of `lgd.shards.builder.ShardOptions`: `layout`, `root` and `out`, and what may be left out.

        Returns:
            The manifest of the set. A finished set of the same pairs and options is not built again.

        Raises:
            ConfigError: For an option that cannot be, or a split that these pairs do not have.
            DataError: With the full list of pairs that cannot be used, or for an `out` that holds something else.

        Example:
            >>> manifest = lgd.build_shards(layout="csv", root="pairs.csv", out="shards", mpp=0.46)
            >>> manifest.splits["train"].samples
        """
        return build(kind(*args, **fields))[0]

    build_shards.__qualname__ = "build_shards"
    build_shards.__signature__ = inspect.signature(kind).replace(return_annotation=Manifest)  # type: ignore[attr-defined]
    return build_shards


build_shards = _take_fields(ShardOptions)


def _is_virtual(options: ShardOptions) -> bool:
    root = as_location(options.root)
    return root.suffix.lower() != ".csv" and exists(root / "synth.json")


def _with_progress(
    what: str, function: Callable[[Any], Any], jobs: Sequence[Any], total: int, map_jobs: MapJobs
) -> Iterator[Any]:
    """The result of every job, as it comes, behind a bar that counts pairs or tiles."""
    does, unit = what.split()
    with progress(total, does, unit) as bar:
        for result in map_jobs(function, jobs):
            bar.update(result.samples if isinstance(result, Entry) else len(result[1]))
            yield result


def _jobs(
    options: ShardOptions,
    of_split: dict[str, list[Sample]],
    extensions: Extensions,
    out: Location,
    names: set[str],
    building: str,
) -> list[ShardJob]:
    """One job a shard; `names` lie in OUT."""
    jobs = []
    for name, samples in of_split.items():
        for start in range(0, len(samples), options.shard_size):
            path = out / f"{name}-{start // options.shard_size:06d}.tar"
            job = ShardJob(
                path=path,
                samples=tuple(samples[start : start + options.shard_size]),
                encoding=options.encoding,
                extensions=extensions.by_role(),
                mpp=options.known_mpp,
                threads=options.threads,
                building=building,
                left=has_entry(path, names),
            )
            jobs.append(job)
    return jobs


def _usable(options: ShardOptions, map_jobs: MapJobs) -> tuple[list[Source], list[Problem]]:
    """The sources that passed every check, in the order of the pairs, and the problems, which `--on-bad` allows."""
    pairs, problems = find_pairs(options.layout, as_location(options.root).absolute(), options.slides or None)
    refuse_spellings(pairs, str(options.slides or (options.root if options.layout == "csv" else "")))
    jobs = [
        CheckJob(
            start=start,
            pairs=tuple(pairs[start : start + _CHUNK]),
            tile=options.tile,
            reencode=options.encoding.extension is not None,
            threads=options.threads,
        )
        for start in range(0, len(pairs), _CHUNK)
    ]
    checked = sorted(
        _with_progress("check pairs", check_chunk, jobs, len(pairs), map_jobs), key=lambda result: result[0]
    )
    sources = [entry for _, found in checked for entry in found if isinstance(entry, Source)]
    more = [entry for _, found in checked for entry in found if isinstance(entry, Problem)]
    sources, shared = leave_out_duplicates(sources, parse_split(options.split))
    problems = sorted(problems + more + shared, key=Problem.order)
    if problems and (options.on_bad == "stop" or not sources):
        lines = [f"  {problem.name}: {problem.reason}" for problem in problems]
        remedy = "leave them out with --on-bad skip" if sources else "no pair is left"
        raise DataError(f"{options.root}: {len(problems)} problems, {remedy}:", *lines)
    return sources, problems


def _recipe(options: ShardOptions, sources: Sequence[Source], rejected: int) -> Building:
    """What decides the bytes of the set; no path of this machine is in it."""
    facts = [
        (pair.key, pair.source, pair.label, pair.slide, pair.split, pair.mpp, pair.origin.as_json(), *source.sha256)
        for source in sources
        for pair in (source.pair,)
    ]
    chosen = ("split", "salt", "shard_size", "tile", "image", "mpp", "labelled")
    return Building(
        layout=options.layout,
        options=Options(he_size=None, **{name: getattr(options, name) for name in chosen}),
        codecs={**codecs(), "webdataset": importlib.metadata.version("webdataset")},
        sources=Sources(pairs=len(sources), rejected=rejected, digest=digest_of(facts)),
    )


def write_shard(job: ShardJob) -> Entry:
    """Write one tar and its index, unless this build left both before it was interrupted; return its manifest entry.

    The entry is published last.
    """
    entry = read_entry(job.path, job.building) if job.left else None
    if entry:
        return entry
    written = write_archive(job.path, _contents(job), job.extensions)
    entry = Entry(file=job.path.name, samples=len(job.samples), **written._asdict())
    write_entry(job.path, job.building, entry)
    return entry


def _contents(job: ShardJob) -> Iterator[tuple[str, list[bytes]]]:
    """The key and the members of each sample."""
    made = members(job.samples, job.encoding, job.mpp, job.threads)
    for sample, contents in zip(job.samples, made, strict=True):
        yield sample.key, contents
    # Before the tar appears: a worker may outlive its command.
    require_marker(job.path.parent, job.building)
