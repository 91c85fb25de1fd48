"""Pairs -> byte-identical WebDataset tars + an offset index + a manifest, and back to bytes.

`lgd build-shards` runs `build`. It leaves on disk (format `lgd-shards/2`, described in shards/README.md):

    OUT/{split}-{000000}.tar   KEY.json, KEY.hes.jpg if asked for, KEY.he.EXT and, where there is one, KEY.ihc.EXT of
                               each sample, contiguous
    OUT/{split}-{000000}.idx   offset, length and crc32 of every member
    OUT/patches.npy            what must not lie on two sides of a split (`lgd.shards.manifest.PATCHES`)
    OUT/rejected.csv           what `--on-bad skip` left out
    OUT/manifest.json          what, from where, how many, digests; written last

A killed build goes on where it stopped (`lgd.shards.writer`), and nothing but these files is left at the end. Pairs may
lie behind urls, and so may OUT. One build at a time works in a local folder (`lgd.io.locks`). A url has no lock: there
the first .building.json stays, where the store can do that, and a build that finds another one stops.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

from lgd.base.errors import DataError
from lgd.base.logs import progress
from lgd.base.target import Target, find_target
from lgd.io.digests import digest_of
from lgd.io.files import exists, list_folder, peek_kind, try_writing, write_bytes
from lgd.io.folders import refuse_foreign
from lgd.io.location import Location, as_location, as_output_location
from lgd.io.locks import LOCK, exclusive
from lgd.ray_jobs.cluster import restore_connection
from lgd.ray_jobs.mapping import map_with
from lgd.shards.candidate import SPLITS, Problem, write_problems
from lgd.shards.image import STORED
from lgd.shards.manifest import Extensions, File, Manifest, Options, Recipe, Sources
from lgd.shards.options import (
    ShardJob,
    ShardOptions,
    check_split,
    describe_split,
    list_caveats,
    list_codecs,
    make_samples,
)
from lgd.shards.pairs import (
    PatchPair,
    Source,
    choose_center,
    find_pairs,
    is_virtual,
    leave_out_duplicates,
    make_patch_table,
    refuse_spellings,
    shared_center,
)
from lgd.shards.profiles import describe_profiles
from lgd.shards.shard_set import ShardFolder
from lgd.shards.slide_pairs import leave_out_misaligned
from lgd.shards.writer import FILE, MARKER, Building, begin, check_chunk, clean, finish, require_marker, write_shard

logger = logging.getLogger(__name__)

# Pairs that a worker checks at a time.
_CHUNK = 64

Job = TypeVar("Job")
Result = TypeVar("Result")
Fields = ParamSpec("Fields")


def map_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, name: Callable[[Job], str]
) -> Iterable[Result]:
    """The results of all jobs as they come, from here or from so many workers of Ray; `name` is a job's in messages."""
    if not workers:
        return map(function, jobs)
    return map_with(lambda: function, jobs, workers=workers, option_name="--workers", use_gpus=False, name=name)


def build(options: ShardOptions) -> tuple[Manifest, bool]:
    """Build a shard set; returns its manifest, and whether it was built now rather than found in OUT.

    Raises `DataError` with the full list of unusable pairs, or for an OUT that holds something else, and `ConfigError`
    for a split that these pairs do not have; while another process builds in a local OUT, `TakenError` says so.
    """
    out = _open_target(options.out)
    # A finished set is only read, and may lie where nothing can be written.
    finished = exists(out / "manifest.json")
    lock = contextlib.nullcontext() if finished else exclusive(out, "building shards")
    with lock, restore_connection() if options.workers else contextlib.nullcontext():
        return _build(options, out, finished)


def _build(options: ShardOptions, out: Location, finished: bool) -> tuple[Manifest, bool]:
    target = find_target(str(options.target))
    sources, problems = _check_pairs(options, target)
    options = _choose_image(options, sources)
    for stain, profiles in zip(("H&E", "IHC"), zip(*(source.icc for source in sources), strict=True), strict=False):
        if len({*profiles}) > 1:
            logger.warning("%s", describe_profiles(profiles, f"{stain} images"))
    samples = make_samples(sources, options, target)
    extensions = _choose_extensions(options, sources)
    recipe = _recipe(options, sources, len(problems))
    if finished or exists(out / "manifest.json"):
        return _reuse(out, recipe, target), False
    left = begin(out, recipe)
    if problems:
        write_problems(out / "rejected.csv", problems)

    of_split = {name: [sample for sample in samples if sample.split == name] for name in SPLITS}
    of_split = {name: some for name, some in of_split.items() if some}
    jobs = [
        ShardJob(
            path=path,
            samples=tuple(some[start : start + options.shard_size]),
            options=options,
            extensions=extensions,
            building=recipe.digest,
            left=path.stem in left,
        )
        for name, some in of_split.items()
        for start in range(0, len(some), options.shard_size)
        for path in (out / f"{name}-{start // options.shard_size:06d}.tar",)
    ]
    entries = []
    try:
        with progress(len(samples), "build", "tiles" if options.tile else "pairs") as bar:
            for entry in map_jobs(write_shard, jobs, options.workers, lambda job: str(job.path)):
                entries.append(entry)
                bar.update(entry.samples)
    except DataError:
        clean(out)
        raise
    patches = make_patch_table(sample.source for some in of_split.values() for sample in some)
    write_bytes(out / "patches.npy", patches)
    manifest = Manifest(
        **{name: getattr(recipe, name) for name in Recipe.model_fields},
        target=target,
        extensions=extensions,
        patches=File(bytes=len(patches), sha256=hashlib.sha256(patches).hexdigest()),
        virtual=is_virtual(sources),
        may_leak=any(source.pair.slide is None for source in sources),
        caveats=tuple(list_caveats(samples, options.rule)),
        splits={name: describe_split(options, target, name, some, entries) for name, some in of_split.items()},
        center=shared_center([source.pair for source in sources]),
    )
    require_marker(out, recipe.digest)
    manifest.write(out / "manifest.json")
    finish(out)
    return manifest, True


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


def _check_pairs(options: ShardOptions, target: Target) -> tuple[list[Source], list[Problem]]:
    """The sources that passed every check, in the order of the pairs, and the problems, which `--on-bad` allows."""
    root = as_location(options.root).absolute()
    pairs, problems = find_pairs(options.layout, root, target, options.slides or None, options.cut)
    refuse_spellings(pairs, str(options.slides or (options.root if options.layout in ("csv", "slides") else "")))
    pairs = choose_center(pairs, options.center)
    if options.on_bad == "stop" and all(pair.split for pair in pairs):
        # Minutes before the images are read; of those that may be left out nothing is known yet.
        check_split(pairs, options)
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    sources = []
    with progress(len(pairs), "check", "pairs") as bar:
        check = functools.partial(check_chunk, options)
        for found in map_jobs(check, chunks, options.workers, _name_chunk):
            problems += [entry for entry in found if isinstance(entry, Problem)]
            sources += [entry for entry in found if isinstance(entry, Source)]
            bar.update(len(found))
    sources.sort(key=lambda source: source.pair.key)
    sources, shared = leave_out_duplicates(sources, options.rule.keep, target)
    problems = sorted(problems + shared, key=Problem.order)
    if problems and (options.on_bad == "stop" or not sources):
        lines = [f"  {problem.name}: {problem.reason}" for problem in problems]
        remedy = "leave them out with --on-bad skip" if sources else "no pair is left"
        raise DataError(f"{options.root}: {len(problems)} problems, {remedy}:", *lines)
    if options.cut:
        sources, misaligned = leave_out_misaligned(sources, options.least_alignment)
        problems += misaligned
    return sources, problems


def _name_chunk(pairs: Sequence[PatchPair]) -> str:
    return f"the pairs from {pairs[0].names[0]} to {pairs[-1].names[0]}"


def _choose_image(options: ShardOptions, sources: Sequence[Source]) -> ShardOptions:
    """The options, with `--image png` in place of `keep` where a shard cannot hold the files as they are."""
    others = [source for source in sources if not {*source.extensions} <= {*STORED}]
    if options.encoding.extension or not others:
        return options
    logger.warning(
        "%d of %d pairs are files that shards do not hold (%s), so that all images are stored as PNG, without loss, as "
        "by --image png",
        len(others),
        len(sources),
        ", ".join(sorted({extension for source in others for extension in source.extensions} - {*STORED})),
    )
    return dataclasses.replace(options, image="png")


def _choose_extensions(options: ShardOptions, sources: Sequence[Source]) -> Extensions:
    """The one type of all H&E and of all IHC images; `DataError` names two files that differ."""
    kept, first = options.encoding.extension, sources[0]
    types = [kept or extension for extension in first.extensions]
    for source in sources if not kept else ():
        names = zip(source.pair.names, first.pair.names, strict=True)
        for (name, other), mine, theirs in zip(names, source.extensions, first.extensions, strict=True):
            if mine != theirs:
                raise DataError(
                    f"{other} holds {theirs} and {name} holds {mine}, but a shard set keeps one type a "
                    "stain: use --image png or --image jpeg:95 to re-encode them all"
                )
    small = "jpg" if options.he_size else None
    return Extensions.from_json({"hes": small, "he": types[0], "ihc": types[1] if len(types) == 2 else None})


def _recipe(options: ShardOptions, sources: Sequence[Source], rejected: int) -> Building:
    """What decides the bytes of the set; no path of this machine is in it."""
    facts = [
        (pair.key, pair.names[0], pair.label, pair.slide, pair.split, pair.mpp, pair.origin.as_json(), *source.sha256)
        for source in sources
        for pair in (source.pair,)
    ]
    chosen = ("split", "salt", "shard_size", "tile", "image", "mpp", "labelled")
    return Building(
        layout=options.layout,
        options=Options(he_size=options.he_size or None, **{name: getattr(options, name) for name in chosen}),
        codecs=list_codecs(),
        sources=Sources(pairs=len(sources), rejected=rejected, digest=digest_of(facts)),
    )


def _open_target(text: str | Location) -> Location:
    """OUT as a path or a url that can be written to; `DataError` where something else lies there.

    Nothing of the user's is ever overwritten.
    """
    out = as_output_location(text, "--out").absolute()
    if peek_kind(out, "folder") not in ("folder", None):
        raise DataError(f"{out} is no folder: give --out an empty or new one")
    names = list_folder(out)
    begun = {"manifest.json", MARKER} & names.keys()
    own = {LOCK, *(name for name in names if begun and re.fullmatch(FILE, name))}
    # Of one listing: another builder may begin to write meanwhile.
    refuse_foreign(out, own, "give --out an empty or new one", names)
    try_writing(out / ".manifest.json.0.tmp")
    return out


def _reuse(out: Location, recipe: Building, target: Target) -> Manifest:
    """The manifest of a finished OUT, if it is of this set; versions of codecs may have moved on since."""
    manifest = ShardFolder.open(out).manifest
    differing = [name for name in ("layout", "options", "sources") if getattr(manifest, name) != getattr(recipe, name)]
    differing += ["target"] if manifest.target.as_json() != target.as_json() else []
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
