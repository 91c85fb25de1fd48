"""Check a shard folder end to end: every byte against a digest, every fact against its source.

`lgd verify DIR` runs `verify` and prints what it returns.
"""

import collections
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lgd.config import LEVEL_NAMES
from lgd.data.archive import Shard, missing, read_manifest, read_sample
from lgd.data.image import check, codecs
from lgd.data.meta import FIELDS
from lgd.data.shards import ShardOptions
from lgd.errors import ConfigError, DataError
from lgd.files import list_folder
from lgd.progress import progress
from lgd.urls import RemoteError, is_remote, place

_SEEN = np.dtype([("key", "<u8"), ("group", "<u8"), ("shard", "<i4"), ("row", "<i4")])
"""What is kept of each sample: its address, and 64 bits of a digest of its key and group."""
_MOST = 100
_MANIFEST = "format layout options codecs sources classes extensions virtual may_leak caveats splits digest".split()
_OPTIONS = "split salt shard_size tile image mpp".split()

Facts = list[dict[str, Any]]


def verify(folder: str | Path) -> list[str]:
    """Everything that is wrong with a shard folder or url, one sentence each; empty where all is well.

    Checks the manifest's digest and fields, each tar by SHA-256, its index and end, every member's tar header and
    crc32, every KEY.json, every image by digest and full decode, keys and their order, counts of samples and levels,
    and that no group lies in two splits. Remote shards are read through the cache. At most 100 sentences a shard are
    given. Takes 24 bytes of memory a sample.
    """
    from multiprocessing.pool import ThreadPool

    try:
        folder = place(folder)
        manifest, shards = read_manifest(folder)
    except DataError as error:
        return str(error).splitlines()
    lost = {} if is_remote(folder) else missing(folder, shards)
    problems = [problem for found in lost.values() for problem in found]
    problems += [f"{folder / 'manifest.json'}: {reason}" for reason in _wrong_manifest(manifest, shards)]
    problems += _strangers(folder, shards)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    seen, unnamed, last = [np.empty(0, _SEEN)], False, dict.fromkeys(manifest["splits"], "")
    total = sum(shard.samples for shard in shards)
    with ThreadPool(os.cpu_count()) as pool, progress(total, "verify", "samples") as bar:
        for number, shard in enumerate(shards):
            found, metas = ([], []) if shard.name in lost else _verify_shard(shard, pool, bar)
            problems += [*found, *_unsorted(shard, metas, last)]
            last[shard.split] = metas[-1]["key"] if metas else ""
            counts.update((shard.split, meta["level_name"] or "unknown") for meta in metas)
            unnamed = unnamed or any(meta["slide"] is None for meta in metas)
            entries = [(_hash(meta["key"]), _hash(meta["group"]), number, meta["row"]) for meta in metas]
            seen.append(np.array(entries, _SEEN))
    if not problems:
        problems = [f"{folder / 'manifest.json'}: {reason}" for reason in _wrong_counts(manifest, counts, unnamed)]
    every = np.concatenate(seen)
    return problems + _same_keys(shards, every) + _leaks(shards, every)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _strangers(folder: Path, shards: Sequence[Shard]) -> list[str]:
    """Tars and indexes that the manifest does not name."""
    try:
        names = [name for name in list_folder(folder) if name.endswith((".tar", ".idx"))]
    except RemoteError:
        # Folders behind http cannot be listed; nothing that is not in the manifest is read from there.
        return []
    known = {shard.name for shard in shards}
    return [f"{folder / name}: is not in the manifest: remove it" for name in names if name[:-4] not in known]


def _wrong_manifest(manifest: dict[str, Any], shards: Sequence[Shard]) -> Iterator[str]:
    """What is wrong with the manifest's fields, but for its counts."""
    if sorted(manifest) != sorted(_MANIFEST):
        yield f"its fields are {', '.join(sorted(manifest))}, but should be {', '.join(sorted(_MANIFEST))}"
        return
    versions, sources, chosen = (manifest[name] for name in ("codecs", "sources", "options"))
    try:
        if manifest["layout"] not in ("bci", "mist", "csv") or not set(_OPTIONS) <= set(chosen):
            raise ValueError("a field is missing, or the layout is unknown")
        options = ShardOptions(layout=manifest["layout"], root="root", out="out", **chosen)
    except (ConfigError, TypeError, ValueError) as error:
        yield f"field options or layout is malformed ({error})"
        return
    if not isinstance(versions, dict) or versions.keys() != {*codecs(), "webdataset"}:
        yield f"field codecs is {versions!r:.200}"
    pairs = sources.get("pairs") if isinstance(sources, dict) else None
    samples = sum(shard.samples for shard in shards)
    if type(pairs) is not int or pairs > samples or (options.tile == 0 and pairs != samples):
        yield f"field sources is {sources!r:.200}, but there are {samples} samples"
    kept = options.encoding.extension
    if kept is not None and {manifest["extensions"][role] for role in ("he", "ihc")} != {kept}:
        yield f"field extensions is {manifest['extensions']!r:.200}, but the options ask for {kept}"
    if not isinstance(manifest["caveats"], list) or not all(isinstance(text, str) for text in manifest["caveats"]):
        yield f"field caveats is {manifest['caveats']!r:.200}, but should be a list of sentences"
    if type(manifest["virtual"]) is not bool:
        yield f"field virtual is {manifest['virtual']!r:.200}, but should be true or false"
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        last = after is None or after.split != shard.split
        if shard.samples > options.shard_size or (not last and shard.samples < options.shard_size):
            yield f"{shard.name} has {shard.samples} samples, but options.shard_size is {options.shard_size}"


def _verify_shard(shard: Shard, pool: Any, bar: Any) -> tuple[list[str], Facts]:
    """Problems of one shard, and the KEY.json and row of each sample that could be read."""
    try:
        file, index = shard.open()
    except DataError as error:
        bar.update(shard.samples)
        return [str(error)], []
    problems = []
    with file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:  # type: ignore[arg-type]
            problems.append(f"{shard.path}: its sha256 is not the manifest's: it was damaged or replaced")
        metas = []
        for found, meta in pool.imap(lambda row: _verify_sample(shard, file, index, row), range(shard.samples)):
            problems += found
            metas += [meta] if meta else []
            bar.update()
    if len(problems) > _MOST:
        problems[_MOST:] = [f"{shard.path}: and {len(problems) - _MOST} more problems"]
    return problems, metas


def _verify_sample(
    shard: Shard, file: BinaryIO, index: np.ndarray, row: int
) -> tuple[list[str], dict[str, Any] | None]:
    """Problems of one sample, and the fields of its KEY.json that later checks need, with its row."""
    try:
        meta, contents = read_sample(file, index, row, shard, ("he", "ihc"))
    except DataError as error:
        return [str(error)], None
    where = f"{shard.path}, row {row}, {meta['key']}"
    problems = []
    if meta.keys() != FIELDS.keys():
        problems.append(f"{where}, json: its fields are not {', '.join(FIELDS)}: build the set again")
    for offset in index["offset"][row].tolist():
        try:
            tarfile.TarInfo.frombuf(os.pread(file.fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE), "ascii", "")
        except tarfile.HeaderError as error:
            problems.append(f"{where}: the tar header before byte {offset} is broken ({error})")
    for role, view in contents.items():
        content = bytes(view)
        if hashlib.sha256(content).hexdigest() != meta["sha256"].get(role):
            problems.append(f"{where}, {role}: its sha256 is not that of KEY.json")
        try:
            found = check(content, f"{where}, {role}")
        except DataError as error:
            problems.append(str(error))
            continue
        if found[1:] != (meta["width"], meta["height"]):
            problems.append(
                f"{where}, {role}: is {found.extension} of {found.width} x {found.height} pixels, but "
                f"{meta['width']} x {meta['height']} is stated"
            )
    return problems, {name: meta[name] for name in ("key", "group", "slide", "level_name")} | {"row": row}


def _unsorted(shard: Shard, metas: Facts, last: dict[str, str]) -> list[str]:
    """The first key that is not in its place; `last`: the last key of the shard before, by split."""
    before = last[shard.split]
    for meta in metas:
        if meta["key"] < before:
            return [f"{shard.path}, row {meta['row']}: key {meta['key']} is not sorted, it follows {before}"]
        before = meta["key"]
    return []


def _wrong_counts(
    manifest: dict[str, Any], counts: collections.Counter[tuple[str, str]], unnamed: bool
) -> Iterator[str]:
    """The manifest's counts against the samples; told only where every sample could be read."""
    for split, part in manifest["splits"].items():
        levels = {name: counts[split, name] for name in (*LEVEL_NAMES, "unknown")}
        if part.get("levels") != levels:
            yield f"split {split} has samples of levels {levels}, but {part.get('levels')!r:.200} is stated"
    for field, true in (("may_leak", unnamed), ("classes", list(LEVEL_NAMES))):
        if manifest[field] != true:
            yield f"field {field} is {manifest[field]!r:.200}, but should be {true}"


def _same_keys(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Keys that occur twice."""
    order = np.argsort(seen["key"], kind="stable")
    twice = np.flatnonzero(np.diff(seen["key"][order]) == 0)
    return [
        f"{shards[here['shard']].path}, row {here['row']}: key {_named(shards, here, 'key')} is in "
        f"{shards[before['shard']].path.name}, row {before['row']}, too"
        for before, here in ((seen[order[place]], seen[order[place + 1]]) for place in twice[:_MOST])
    ]


def _leaks(shards: Sequence[Shard], seen: np.ndarray) -> list[str]:
    """Groups on two sides of the split."""
    if not len(seen):
        return []
    names = sorted({shard.split for shard in shards})
    of_shard = np.array([names.index(shard.split) for shard in shards], np.int32)
    order = np.argsort(seen["group"], kind="stable")
    splits = of_shard[seen["shard"][order]]
    starts = np.flatnonzero(np.diff(seen["group"][order], prepend=~seen["group"][order[:1]]))
    # Between two starts lies one group.
    ends = np.append(starts[1:], len(order))
    several = np.minimum.reduceat(splits, starts) != np.maximum.reduceat(splits, starts)
    return [
        f"group {_named(shards, seen[order[start]], 'group')} lies in the splits "
        f"{' and '.join(names[split] for split in np.unique(splits[start:end]))}: the set leaks"
        for start, end in np.column_stack([starts, ends])[several][:_MOST]
    ]


def _named(shards: Sequence[Shard], place: np.void, field: str) -> str:
    """The key or group of a sample, read again."""
    shard = shards[place["shard"]]
    file, index = shard.open()
    with file:
        return read_sample(file, index, int(place["row"]), shard, ())[0][field]
