"""The folder that a build of shards writes to, and what a worker does for it: it checks pairs, and writes shards.

All that lies in a shard is a pure function of files and options, so that it comes out the same wherever it is made.
OUT/.building.json says what is being built, and OUT/.{split}-{000000}.json is a shard's entry of the manifest, which
is published after its tar and its index: a shard is taken over only if its entry is of the same build.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from zlib_ng.zlib_ng import crc32

from lgd.base.errors import DataError
from lgd.base.records import Sha256
from lgd.base.threads import in_threads
from lgd.io.digests import may_have_sha256, sha256
from lgd.io.documents import Document, MissingDocument
from lgd.io.files import create_json, list_folder, publish, read_bytes, remove
from lgd.io.location import Location, MissingError, RemoteError
from lgd.shards.archive import INDEX
from lgd.shards.candidate import Problem
from lgd.shards.image import check, decode, decode_upright, encode, read_profile
from lgd.shards.manifest import Digests, Entry, PatchMeta, Recipe
from lgd.shards.options import Sample, ShardJob, ShardOptions
from lgd.shards.pairs import PatchPair, Source
from lgd.shards.slide_pairs import check_region, map_slides, read_region
from lgd.slides.slide import Slide

MARKER = ".building.json"
_SHARD = r"[A-Za-z0-9_]+-\d{6}"
FILE = rf"({_SHARD}\.(tar|idx)|\.{_SHARD}\.json|manifest\.json|patches\.npy|rejected\.csv|\.building\.json)"
"""A name in OUT."""
LEFTOVER = re.compile(rf"\.{FILE}\.[A-Za-z0-9-]+\.tmp")
"""What lgd.io.files.publish leaves behind when it is killed."""
_REMOVALS = 16
_ANEW = "remove the folder, and build the set again"


class Building(Recipe):
    """OUT/.building.json: what is being built."""

    FORMAT: ClassVar[str] = "lgd-building/2"
    ABSENT: ClassVar[str] = _ANEW
    REMEDY: ClassVar[str] = _ANEW


class BuiltShard(Document):
    """OUT/.{split}-{000000}.json: a shard that is there whole."""

    FORMAT: ClassVar[str] = "lgd-built-shard/2"
    ABSENT: ClassVar[str] = _ANEW
    REMEDY: ClassVar[str] = _ANEW

    building: Sha256
    """Digest of the build that it is of."""
    entry: Entry


def begin(out: Location, recipe: Building) -> set[str]:
    """Mark OUT as being built from this recipe, or see that an interrupted build was of the same.

    Returns the stems of the shards that this one left whole, each with its entry.
    """
    marker = out / MARKER
    names = set(list_folder(out))
    begun = MARKER in names or not create_json(marker, recipe.document())
    if begun and Building.read(marker) != recipe:
        raise DataError(
            f"{out} holds an unfinished build of something else (other options, sources or codecs): "
            "remove it, or give --out another folder"
        )
    _remove(out, filter(LEFTOVER.fullmatch, names))
    stems = {name.removesuffix(".tar") for name in names}
    return {stem for stem in stems if {f"{stem}.tar", f"{stem}.idx", f".{stem}.json"} <= names}


def clean(out: Location) -> None:
    """Remove what workers had half-written that were ended because another one failed."""
    _remove(out, filter(LEFTOVER.fullmatch, list_folder(out)))


def finish(out: Location) -> None:
    """Remove what only an unfinished build needs; its marker last."""
    names = list_folder(out)
    # Workers that were lost on the way have left files too.
    _remove(out, (name for name in names if LEFTOVER.fullmatch(name) or re.fullmatch(rf"\.{_SHARD}\.json", name)))
    _remove(out, {MARKER} & names.keys())


def _remove(out: Location, names: Iterable[str]) -> None:
    for _ in in_threads(lambda name: remove(out / name), names, _REMOVALS):
        pass


def check_chunk(options: ShardOptions, pairs: Sequence[PatchPair]) -> list[Source | Problem]:
    """What is found of each pair, in order."""
    if options.cut:
        return list(map_slides(check_region, pairs, lambda pair: pair, options.threads))
    return list(in_threads(lambda pair: check_pair(pair, options), pairs, options.threads))


def check_pair(pair: PatchPair, options: ShardOptions) -> Source | Problem:
    """Read and fully decode the images of a pair; they must be of one size, and hold at least one tile.

    Sizes are those of the upright images. One that is kept as it is must be stored upright.

    A remote that cannot be reached says nothing of the pair: that raises `RemoteError`.
    """
    turns = options.encoding.extension is not None
    try:
        images = [_read(path, name) for path, name in zip(pair.images, pair.names, strict=True)]
        he, *others = headers = [check(content, name, turns) for content, name in zip(images, pair.names, strict=True)]
        for ihc in others:
            if he[1:] != ihc[1:]:
                raise DataError(
                    f"{pair.names[0]}: is {he.width} x {he.height} pixels but its IHC {pair.names[1]} is "
                    f"{ihc.width} x {ihc.height}: register the two, so that they show the same field"
                )
        for option, side in (("tile", options.tile), ("he-size", options.he_size)):
            if min(he[1:]) < side:
                what = f"is {he.width} x {he.height} pixels, smaller than --{option} {side}: use a smaller one"
                raise DataError(f"{pair.names[0]}: {what}")
    except RemoteError:
        raise
    except DataError as error:
        message = str(error)
        name = next((name for name in pair.names if message.startswith(f"{name}: ")), pair.names[0])
        return pair.problem(message.removeprefix(f"{name}: "), name)
    return Source(
        pair=pair,
        width=he.width,
        height=he.height,
        extensions=tuple(one.extension for one in headers),
        sha256=tuple(hashlib.sha256(content).hexdigest() for content in images),
        icc=tuple(map(read_profile, images)),
    )


def _read(path: Location, name: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        reason = "is missing" if isinstance(error, MissingError) else f"cannot be read ({error.strerror})"
        raise DataError(f"{name}: {reason}: correct it or remove the pair") from error


def write_shard(job: ShardJob) -> Entry:
    """Write one tar and its index, unless this build left both before it was interrupted; return its manifest entry.

    The entry is published last.
    """
    entry = _read_entry(job.path, job.building) if job.left else None
    if entry is None:
        entry = _write_archive(job)
        require_marker(job.path.parent, job.building)
        BuiltShard(building=job.building, entry=entry).write(_entry_path(job.path))
    return entry


def _entry_path(tar: Location) -> Location:
    """Where the entry of a shard lies until the set is finished."""
    return tar.with_name(f".{tar.stem}.json")


def _read_entry(tar: Location, building: str) -> Entry | None:
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


def require_marker(out: Location, building: str) -> None:
    """Raise `DataError` unless OUT is still being built by this build, which has this digest."""
    with contextlib.suppress(MissingDocument):
        if Building.read(out / MARKER).digest == building:
            return
    raise DataError(
        f"{out} is not being built by this command any more ({out / MARKER} is gone, or of other options): let the "
        "other build end, or give --out another folder"
    )


def _write_archive(job: ShardJob) -> Entry:
    """Publish a tar, then its index beside it."""
    import webdataset

    roles = job.extensions.by_role()
    suffixes = [extension if role == "json" else f"{role}.{extension}" for role, extension in roles.items()]
    groups = (list(group) for _, group in itertools.groupby(job.samples, key=lambda sample: sample.source))
    make, threads = functools.partial(_make_members, job.options), job.options.threads
    if job.options.cut:
        members = map_slides(make, groups, lambda group: group[0].source.pair, threads)
    else:
        members = in_threads(make, groups, threads)
    crcs: list[int] = []
    with publish(job.path) as temporary:
        form = {"user": "lgd", "group": "lgd", "mtime": 0, "encoder": False}
        with temporary.open("wb") as stream, webdataset.TarWriter(stream, **form) as writer:
            for key, contents in itertools.chain.from_iterable(members):
                for suffix, content in zip(suffixes, contents, strict=True):
                    # One call a member: of one call's members the writer keeps the alphabetical order.
                    writer.write({"__key__": key, suffix: content})
                    crcs.append(crc32(content))
        # Before the tar appears: a worker may outlive its command.
        require_marker(job.path.parent, job.building)
        # Read back rather than computed, so that the index cannot disagree with the tar.
        with tarfile.open(temporary, "r:") as tar:
            rows = [(member.offset_data, member.size, crc) for member, crc in zip(tar, crcs, strict=True)]
        size, digest = temporary.stat().st_size, sha256(temporary)
    index = np.array(rows, dtype=INDEX).reshape(-1, len(roles))
    with publish(job.path.with_suffix(".idx")) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, index, allow_pickle=False)
        idx_digest = sha256(temporary)
    return Entry(file=job.path.name, samples=len(job.samples), bytes=size, sha256=digest, idx_sha256=idx_digest)


def _make_members(
    options: ShardOptions, samples: Sequence[Sample], slides: Sequence[Slide] = ()
) -> list[tuple[str, list[bytes]]]:
    """The key of each of the samples of one source, and the bytes of its members, in their order.

    Raises `DataError` for a source that is no longer the file that was checked.
    """
    source, encoding = samples[0].source, options.encoding
    names = source.pair.names
    if slides:
        return [_encode_tile(samples[0], read_region(source, slides), options)]
    images = [_read(path, name) for path, name in zip(source.pair.images, names, strict=True)]
    for content, name, digest in zip(images, names, source.sha256, strict=True):
        if hashlib.sha256(content).hexdigest() != digest:
            raise DataError(f"{name}: changed while the shards were built: build them again")
    if encoding.extension is None:
        return [(sample.key, _order_members(sample, images, source.sha256, options)) for sample in samples]
    decoded = [decode_upright(content, name) for content, name in zip(images, names, strict=True)]
    made = []
    for sample in samples:
        tile_h, tile_w = options.tile or source.height, options.tile or source.width
        top, left = sample.row * tile_h, sample.column * tile_w
        cut = [pixels[top : top + tile_h, left : left + tile_w] for pixels in decoded]
        made.append(_encode_tile(sample, cut, options))
    return made


def _encode_tile(sample: Sample, tiles: Sequence[np.ndarray], options: ShardOptions) -> tuple[str, list[bytes]]:
    """The key and the members of a sample, from the pixels of its H&E and IHC."""
    extension, quality = options.encoding
    assert extension is not None, "tiles are encoded"
    images = [encode(pixels, extension, quality) for pixels in tiles]
    digests = [hashlib.sha256(content).hexdigest() for content in images]
    return sample.key, _order_members(sample, images, digests, options)


def _order_members(
    sample: Sample, images: Sequence[bytes], digests: Sequence[str], options: ShardOptions
) -> list[bytes]:
    """The members of a sample, in their order, of which its H&E and IHC are given."""
    small = []
    if options.he_size:
        # What the stream would make of the H&E, so that a network sees the same where it is given the H&E alone.
        small = [encode(decode(images[0], sample.key, options.he_size), "jpg")]
    return [_describe(sample, digests, options), *small, *images]


def _describe(sample: Sample, digests: Sequence[str], options: ShardOptions) -> bytes:
    """KEY.json; `digests` are those of the H&E and the IHC."""
    source, pair = sample.source, sample.source.pair
    meta = PatchMeta(
        key=sample.key,
        label=pair.label,
        slide=pair.slide,
        group=pair.group,
        split=sample.split,
        source=pair.names[0],
        width=options.tile or source.width,
        height=options.tile or source.height,
        mpp=pair.mpp or options.known_mpp,
        icc=Digests.of([profile.sha256 if profile else None for profile in source.icc]),
        sha256=Digests.of(digests),
        **dict(pair.origin),
    )
    return json.dumps(meta.as_json(), ensure_ascii=False, allow_nan=False).encode()
