"""Check a shard folder end to end: every byte against a digest, every fact against its source.

`lgd verify DIR` runs `verify` and prints what it returns.
"""

import collections
import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lgd.config import LEVEL_NAMES, DataError
from lgd.data.archive import ROLES, Shard, open_shards, read_member, tar_members
from lgd.data.image import check
from lgd.files import digest_of, sha256

_BLOCK = tarfile.BLOCKSIZE
_FIELDS: dict[str, Any] = {
    "key": str,
    "level": (int, type(None)),
    "level_name": (str, type(None)),
    "slide": (str, type(None)),
    "group": str,
    "split": str,
    "source": str,
    "width": int,
    "height": int,
    "mpp": (float, int, type(None)),
    "sha256": dict,
}


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a shard folder, one sentence each; empty where all is well.

    Checks the manifest against the files and their SHA-256, the index against the tar's members (order,
    contiguity, place, length, crc32), every KEY.json, every image by digest and full decode, keys, counts of
    samples and levels, and that no group lies in two splits.
    """
    from multiprocessing.pool import ThreadPool

    from tqdm import tqdm

    folder = Path(folder)
    try:
        manifest, shards = open_shards(folder)
    except DataError as error:
        return str(error).splitlines()
    problems = []
    if digest_of({name: value for name, value in manifest.items() if name != "digest"}) != manifest.get("digest"):
        problems.append(f"{folder / 'manifest.json'}: its digest is not that of its content: it was edited")
    stated = {path.name for shard in shards for path in (shard.path, shard.path.with_suffix(".idx"))}
    extra = {path.name for path in folder.iterdir() if path.suffix in (".tar", ".idx")} - stated
    problems += [f"{folder / name}: is not in the manifest: remove it" for name in sorted(extra)]
    metas: list[tuple[Shard, dict[str, Any]]] = []
    with ThreadPool(os.cpu_count()) as pool:
        for shard in tqdm(shards, desc="verify", unit="shard", disable=None):
            found, read = _verify_shard(shard, pool)
            problems += found
            metas += [(shard, meta) for meta in read]
    if not problems:
        problems = _verify_counts(folder / "manifest.json", manifest, metas)
    return problems + _verify_groups(metas)


def _verify_shard(shard: Shard, pool: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Problems of one shard, and the KEY.json of each sample that could be read."""
    try:
        index = shard.index()
        members = tar_members(shard.path)
    except DataError as error:
        return [str(error)], []
    problems = []
    if sha256(shard.path) != shard.sha256:
        problems.append(f"{shard.path}: its sha256 is not the manifest's: it was damaged or replaced")
    if len(members) != index.size:
        problems.append(f"{shard.path}: has {len(members)} members, but the index has {index.size}")
        return problems, []
    problems += _verify_layout(shard, members, index)
    with open(shard.path, "rb") as stream:
        # The first dot ends the key, for webdataset as for us.
        keys = [members[3 * row].name.partition(".")[0] for row in range(shard.samples)]
        tasks = [(shard, stream.fileno(), key, index[row]) for row, key in enumerate(keys)]
        results = pool.starmap(_verify_sample, tasks)
    for found, _ in results:
        problems += found
    return problems, [meta for _, meta in results if meta is not None]


def _verify_layout(shard: Shard, members: Sequence[tarfile.TarInfo], index: np.ndarray) -> list[str]:
    """Order and contiguity of a tar's members, and the index's offsets and lengths."""
    problems = []
    suffixes = ("json", f"he.{shard.extensions['he']}", f"ihc.{shard.extensions['ihc']}")
    end = 0
    for number, (member, entry) in enumerate(zip(members, index.flat, strict=True)):
        where = f"{shard.path}: member {member.name}"
        key = members[number - number % 3].name.partition(".")[0]
        if not member.isreg() or member.name != f"{key}.{suffixes[number % 3]}" or "/" in member.name:
            problems.append(f"{where}: {key}.{suffixes[number % 3]} is expected here")
        if member.offset != end:
            problems.append(f"{where}: begins at byte {member.offset}, not at {end}: members must be contiguous")
        if (entry["offset"], entry["length"]) != (member.offset_data, member.size):
            problems.append(f"{where}: the index gives another place or length")
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
    return problems


def _verify_sample(shard: Shard, fd: int, key: str, row: np.ndarray) -> tuple[list[str], dict[str, Any] | None]:
    """Problems of one sample, and its KEY.json."""
    problems = []
    where = f"{shard.path}: {key}"
    contents: dict[str, bytes] = {}
    for role, entry in zip(ROLES, row, strict=True):
        try:
            contents[role] = read_member(fd, entry, f"{where}.{role}")
        except DataError as error:
            problems.append(str(error))
    if "json" not in contents:
        return problems, None
    try:
        meta = json.loads(contents["json"])
        wrong = _wrong_fields(meta, key, shard.split)
    except (ValueError, TypeError) as error:
        meta, wrong = None, f"no valid JSON ({error})"
    if wrong:
        return [*problems, f"{where}.json: {wrong}: build the set again"], None
    for role in ("he", "ihc"):
        if role not in contents:
            continue
        if hashlib.sha256(contents[role]).hexdigest() != meta["sha256"].get(role):
            problems.append(f"{where}.{role}: its sha256 is not that of KEY.json")
        try:
            found = check(contents[role], f"{where}.{role}")
        except DataError as error:
            problems.append(str(error))
            continue
        if found != (shard.extensions[role], meta["width"], meta["height"]):
            problems.append(
                f"{where}.{role}: is {found.extension} of {found.width} x {found.height} pixels, but "
                f"{shard.extensions[role]} of {meta['width']} x {meta['height']} is stated"
            )
    return problems, meta


def _wrong_fields(meta: Any, key: str, split: str) -> str:
    """What is wrong with a KEY.json, or nothing."""
    if not isinstance(meta, dict) or meta.keys() != _FIELDS.keys():
        return f"its fields are not {', '.join(_FIELDS)}"
    for name, kinds in _FIELDS.items():
        if not isinstance(meta[name], kinds) or isinstance(meta[name], bool):
            return f"field {name} is {meta[name]!r}"
    level, name = meta["level"], meta["level_name"]
    if (level, name) not in {(None, None), *enumerate(LEVEL_NAMES)}:
        return f"fields level and level_name are {level!r} and {name!r}"
    if meta["key"] != key or meta["split"] != split:
        return f"fields key and split are {meta['key']} and {meta['split']}"
    if meta["slide"] is not None and meta["group"] != meta["slide"]:
        return f"fields slide and group are {meta['slide']} and {meta['group']}"
    return ""


def _verify_counts(path: Path, manifest: dict[str, Any], metas: Sequence[tuple[Shard, Any]]) -> list[str]:
    """The manifest's counts against the samples; told only where every sample could be read."""
    problems = []
    for split, part in manifest["splits"].items():
        mine = [meta for shard, meta in metas if shard.split == split]
        counts = collections.Counter(meta["level_name"] or "unknown" for meta in mine)
        levels = {name: counts[name] for name in (*LEVEL_NAMES, "unknown")}
        if (part.get("samples"), part.get("levels")) != (len(mine), levels):
            problems.append(f"{path}: split {split} has {len(mine)} samples of levels {levels}, not as stated")
    for field, true in (
        ("may_leak", any(meta["slide"] is None for _, meta in metas)),
        ("classes", list(LEVEL_NAMES)),
    ):
        if manifest.get(field) != true:
            problems.append(f"{path}: field {field} is {manifest.get(field)}, but should be {true}")
    return problems


def _verify_groups(metas: Sequence[tuple[Shard, Any]]) -> list[str]:
    """Keys that occur twice, and groups on two sides of the split."""
    problems = []
    owner: dict[str, Shard] = {}
    sides: dict[str, set[str]] = {}
    for shard, meta in metas:
        if owner.setdefault(meta["key"], shard) is not shard:
            problems.append(f"{shard.path}: key {meta['key']} is in {owner[meta['key']].path.name} too")
        sides.setdefault(meta["group"], set()).add(meta["split"])
    for group, splits in sorted(sides.items()):
        if len(splits) > 1:
            problems.append(f"group {group} lies in the splits {' and '.join(sorted(splits))}: the set leaks")
    return problems
