"""Check a shard folder end to end: every byte against a digest, every fact against its source.

`lgd verify DIR` runs `verify` and prints what it returns.
"""

import collections
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from typing import BinaryIO

import numpy as np

from lgd.base.environment import count_cpus
from lgd.base.errors import ConfigError, DataError
from lgd.base.logs import progress
from lgd.base.target import UNKNOWN
from lgd.io.digests import matches
from lgd.io.files import list_folder
from lgd.io.location import Location, RemoteError
from lgd.io.remote import drop_damaged
from lgd.shards.archive import Shard, read_sample
from lgd.shards.image import check
from lgd.shards.manifest import Manifest, PatchMeta
from lgd.shards.options import ShardOptions, list_codecs
from lgd.shards.repeats import SEEN, as_seen, find_repeats, unlike_patches
from lgd.shards.shard_set import ShardFolder

_MOST = 100

Fact = tuple[int, PatchMeta]
"""A sample's row, and its KEY.json."""


def verify(folder: str | Location) -> list[str]:
    """Everything that is wrong with a shard folder or url, one sentence each; empty where all is well.

    Checks the manifest's digest and fields, each tar by SHA-256, its index and end, every member's tar header and
    crc32, every KEY.json, every image by digest and full decode, keys and their order, counts of samples and levels,
    patches.npy, that no group lies in two splits, and that no slide has two spellings and no image two uses. Remote
    shards are read through the cache. At most 100 sentences a shard are given. Takes 100 bytes of memory a sample.
    """
    try:
        opened = ShardFolder.read(folder)
    except DataError as error:
        return str(error).splitlines()
    folder, manifest, shards = opened.folder, opened.manifest, opened.shards
    problems = [f"{folder / 'manifest.json'}: {reason}" for reason in _wrong_manifest(manifest, shards)]
    problems += _strangers(folder, shards)
    patches_n = None
    try:
        patches_n = opened.read_patches()
    except DataError as error:
        problems.append(str(error))
    counts: collections.Counter[tuple[str, object]] = collections.Counter()
    seen, unnamed, last = [np.empty(0, SEEN)], False, dict.fromkeys(manifest.splits, "")
    start, total = 0, sum(shard.samples for shard in shards)
    with ThreadPool(count_cpus()) as pool, progress(total, "verify", "samples") as bar:
        for shard in shards:
            found, facts = _verify_shard(shard, pool, bar.update)
            problems += [*found, *_unsorted(shard, facts, last)]
            last[shard.split] = facts[-1][1].key if facts else ""
            for _, meta in facts:
                counts[shard.split, manifest.target.count_of(meta.label)] += 1
                counts[shard.split, (meta.width, meta.height, meta.mpp)] += 1
                unnamed = unnamed or meta.slide is None
            seen.append(as_seen(facts, start, manifest.options.tile > 0))
            if patches_n is not None:
                problems += unlike_patches(shard, facts, patches_n[start : start + shard.samples])
            start += shard.samples
    if not problems:
        problems = [f"{folder / 'manifest.json'}: {reason}" for reason in _wrong_counts(manifest, counts, unnamed)]
    return problems + find_repeats(shards, np.concatenate(seen), patches_n)


def _strangers(folder: Location, shards: Sequence[Shard]) -> list[str]:
    """Tars and indexes that the manifest does not name."""
    try:
        names = [name for name in list_folder(folder) if name.endswith((".tar", ".idx"))]
    except RemoteError:
        # Folders behind http cannot be listed; nothing that is not in the manifest is read from there.
        return []
    known = {shard.name for shard in shards}
    return [f"{folder / name}: is not in the manifest: remove it" for name in names if name[:-4] not in known]


def _wrong_manifest(manifest: Manifest, shards: Sequence[Shard]) -> Iterator[str]:
    """What is wrong with the manifest's fields, but for its counts."""
    chosen = manifest.options.model_dump() | {"he_size": manifest.options.he_size or 0}
    try:
        options = ShardOptions(layout=manifest.layout, root="root", out="out", **chosen)
    except (ConfigError, TypeError, ValueError) as error:
        yield f"field options or layout is malformed ({error})"
        return
    if manifest.codecs.keys() != list_codecs().keys():
        yield f"field codecs is {manifest.codecs!r:.200}"
    pairs, samples = manifest.sources.pairs, sum(shard.samples for shard in shards)
    if pairs > samples or (options.tile == 0 and pairs != samples):
        yield f"field sources states {pairs} pairs, but there are {samples} samples"
    kept, extensions = options.encoding.extension, manifest.extensions
    if kept is not None and {extensions.he, extensions.ihc} - {None} != {kept}:
        yield f"field extensions is {extensions.as_json()!r:.200}, but the options ask for {kept}"
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        last = after is None or after.split != shard.split
        if shard.samples > options.shard_size or (not last and shard.samples < options.shard_size):
            yield f"{shard.name} has {shard.samples} samples, but options.shard_size is {options.shard_size}"


def _verify_shard(shard: Shard, pool: ThreadPool, advance: Callable[[int], object]) -> tuple[list[str], list[Fact]]:
    """Problems of one shard, and the KEY.json and row of each sample that could be read.

    A remote that cannot be reached says nothing of the shard: that raises `RemoteError`.
    """
    try:
        file, index = shard.open()
        if drop_damaged(shard.path, shard.sha256, file):
            file.close()
            file, index = shard.open()
    except RemoteError:
        raise
    except DataError as error:
        advance(shard.samples)
        return [str(error)], []
    problems = []
    with file:
        if not matches(file, shard.sha256):
            problems.append(f"{shard.path}: its sha256 is not the manifest's: it was damaged or replaced")
        facts = []
        for found, meta in pool.imap(lambda row: _verify_sample(shard, file, index, row), range(shard.samples)):
            problems += found
            facts += [meta] if meta else []
            advance(1)
    if len(problems) > _MOST:
        problems[_MOST:] = [f"{shard.path}: and {len(problems) - _MOST} more problems"]
    return problems, facts


def _verify_sample(shard: Shard, file: BinaryIO, index: np.ndarray, row: int) -> tuple[list[str], Fact | None]:
    """Problems of one sample, and its facts."""
    try:
        meta, contents = read_sample(file, index, row, shard, shard.roles)
    except DataError as error:
        return [str(error)], None
    where = f"{shard.path}, row {row}, {meta.key}"
    problems = []
    for offset in index["offset"][row].tolist():
        try:
            tarfile.TarInfo.frombuf(os.pread(file.fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE), "ascii", "")
        except tarfile.HeaderError as error:
            problems.append(f"{where}: the tar header before byte {offset} is broken ({error})")
    for role, view in contents.items():
        content = bytes(view)
        # What was made of the H&E has no digest in KEY.json.
        if role != "hes" and hashlib.sha256(content).hexdigest() != meta.sha256.as_json().get(role):
            problems.append(f"{where}, {role}: its sha256 is not that of KEY.json")
        try:
            found = check(content, f"{where}, {role}")
        except DataError as error:
            problems.append(str(error))
            continue
        width, height = (shard.he_size, shard.he_size) if role == "hes" else (meta.width, meta.height)
        if found[1:] != (width, height):
            problems.append(
                f"{where}, {role}: is {found.extension} of {found.width} x {found.height} pixels, but "
                f"{width} x {height} is stated"
            )
    return problems, (row, meta)


def _unsorted(shard: Shard, facts: Sequence[Fact], last: dict[str, str]) -> list[str]:
    """The first key that is not in its place; `last`: the last key of the shard before, by split."""
    before = last[shard.split]
    for row, meta in facts:
        if meta.key < before:
            return [f"{shard.path}, row {row}: key {meta.key} is not sorted, it follows {before}"]
        before = meta.key
    return []


def _wrong_counts(manifest: Manifest, counts: collections.Counter[tuple[str, object]], unnamed: bool) -> Iterator[str]:
    """The manifest's counts against the samples; reported only where every sample could be read."""
    for name, split in manifest.splits.items():
        labels = {label: counts[name, label] for label in (*manifest.target.counted, UNKNOWN)}
        if split.labels != labels:
            yield f"split {name} has samples of labels {labels}, but {split.labels!r:.200} is stated"
        shapes = {(shape.width, shape.height, shape.mpp): shape.samples for shape in split.shapes}
        found = {shape: count for (of, shape), count in counts.items() if of == name and isinstance(shape, tuple)}
        if shapes != found:
            yield f"split {name} has samples of width, height and mpp {found!r:.200}, but {shapes!r:.200} is stated"
    if manifest.may_leak != unnamed:
        yield f"field may_leak is {manifest.may_leak}, but should be {unnamed}"
