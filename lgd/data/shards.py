"""Pairs -> byte-identical WebDataset tars + an offset index + a manifest, and back to bytes.

`lgd build-shards` runs `build`. It leaves on disk (format `lgd-shards/1`, told in shards/README.md):

    OUT/{split}-{000000}.tar   KEY.json, KEY.he.EXT, KEY.ihc.EXT of each sample, contiguous
    OUT/{split}-{000000}.idx   offset, length and crc32 of every member
    OUT/rejected.csv           what `--on-bad skip` left out
    OUT/manifest.json          what, from where, how many, digests; written last

While it runs, OUT/.building.json tells what is being built, so that a killed build goes on where it stopped.
"""

import collections
import csv
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lgd.config import LEVEL_NAMES, DataError, require
from lgd.data.archive import FORMAT, INDEX, ROLES, Shard, is_whole, open_shards, read_member, write_archive
from lgd.data.image import codecs, decode
from lgd.data.pairs import Layout, Problem, find_pairs
from lgd.data.sources import Encoding, Sample, Source, caveats, check_pairs, members, place, same_types
from lgd.data.split import SPLITS, parse_split
from lgd.files import digest_of, publish, read_json, sha256, write_json

__all__ = ["INDEX", "ROLES", "Shard", "ShardOptions", "build", "decode", "open_shards", "read_member"]

_FILE = r"([A-Za-z0-9_]+-\d{6}\.(tar|idx)|manifest\.json|rejected\.csv|\.building\.json)"
_OURS = re.compile(_FILE)
# What lgd.files.publish leaves behind when it is killed.
_LEFTOVER = re.compile(rf"\.{_FILE}\.\d+\.tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """What `lgd build-shards` is asked for."""

    layout: Layout
    """How the images lie on the disk: the folders of BCI or of MIST, or a CSV with the columns he and ihc."""
    root: str
    """Folder of the images; for csv the CSV itself, or a folder that holds pairs.csv."""
    out: str
    """Folder for the shards; empty, new, or one that holds this very set."""
    split: str = "keep"
    """`keep` the published split, `keep:0.1` carve a validation share off train, or `group:0.8,0.1,0.1`."""
    shard_size: int = 512
    """Samples in one shard."""
    tile: int = 0
    """Side of the square tiles that patches are cut into, in pixels; 0 keeps whole patches."""
    image: str = "keep"
    """`keep` the original bytes (tiles become PNG), or re-encode to `png` or `jpeg:QUALITY`."""
    slides: str = ""
    """CSV with the columns key and slide that names the slide of every pair."""
    mpp: float | None = None
    """Micrometres per pixel of all pairs that do not state it themselves."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Stop at pairs that cannot be used, or skip them and list them in rejected.csv."""
    salt: str = ""
    """Any text; another one draws another split."""
    workers: int = 0
    """Processes that build shards, under Ray; 0 builds in this process."""

    def __post_init__(self) -> None:
        parse_split(self.split)
        require(self.shard_size >= 1, f"--shard-size {self.shard_size}: use at least 1")
        require(self.tile >= 0, f"--tile {self.tile}: use 0 for whole patches, or the tile's side")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """All that decides one shard's bytes."""

    path: Path
    samples: tuple[Sample, ...]
    encoding: Encoding
    extensions: tuple[str, str]
    mpp: float | None


MapShards = Callable[[Callable[[ShardJob], dict[str, Any]], Sequence[ShardJob]], Iterable[dict[str, Any]]]


def build(options: ShardOptions, map_shards: MapShards | None = None) -> dict[str, Any]:
    """Build a shard set and return its manifest, with `reused: true` added where OUT already held it.

    `map_shards(function, jobs)` applies a function to every job, in any order and in any process; by default
    here. Raises `DataError` with the full list of unusable pairs, or for an OUT that holds something else, and
    `ConfigError` for a split that these pairs do not have. One build at a time may write to OUT.
    """
    from tqdm import tqdm

    out = Path(options.out).absolute()
    _refuse_strangers(out)
    sources, problems = _usable(options)
    rule = parse_split(options.split)
    samples = place(sources, rule, options.salt, options.tile)
    kept = options.encoding.extension
    extensions = (kept, kept) if kept else same_types(sources)
    recipe = _recipe(options, sources, len(problems))
    if (out / "manifest.json").exists():
        return _reused(out, recipe)
    _begin(out, recipe)
    if problems:
        _write_rejected(out / "rejected.csv", problems)

    splits, jobs = _plan(options, samples, extensions, out)
    results = (map_shards or map)(write_shard, jobs)
    done = {entry["file"]: entry for entry in tqdm(results, "build", len(jobs), unit="shard", disable=None)}
    assert len(done) == len(jobs), "a shard was lost on its way back"
    for job in jobs:
        splits[job.samples[0].split]["shards"].append(done[job.path.name])

    manifest = {
        "format": FORMAT,
        **{name: recipe[name] for name in ("layout", "options", "codecs", "sources")},
        "classes": list(LEVEL_NAMES),
        "extensions": dict(zip(ROLES, ("json", *extensions), strict=True)),
        # `lgd synth` leaves this file; reports of virtual tissue must say that it is not tissue.
        "virtual": (Path(options.root) / "synth.json").is_file(),
        "may_leak": any(source.pair.slide is None for source in sources),
        "caveats": caveats(samples, rule),
        "splits": splits,
    }
    manifest["digest"] = digest_of(manifest)
    write_json(out / "manifest.json", manifest)
    (out / ".building.json").unlink()
    return manifest


def _plan(
    options: ShardOptions, samples: Sequence[Sample], extensions: tuple[str, str], out: Path
) -> tuple[dict[str, Any], list[ShardJob]]:
    """The manifest's splits, without their shards yet, and one job a shard."""
    splits: dict[str, Any] = {}
    jobs = []
    names = {sample.split for sample in samples}
    for name in sorted(names, key=lambda name: (*SPLITS, name).index(name)):
        mine = [sample for sample in samples if sample.split == name]
        counts = collections.Counter(sample.source.pair.level for sample in mine)
        levels = {label: counts[value] for value, label in enumerate(LEVEL_NAMES)} | {"unknown": counts[None]}
        splits[name] = {"samples": len(mine), "levels": levels, "shards": []}
        for start in range(0, len(mine), options.shard_size):
            job = ShardJob(
                path=out / f"{name}-{start // options.shard_size:06d}.tar",
                samples=tuple(mine[start : start + options.shard_size]),
                encoding=options.encoding,
                extensions=extensions,
                mpp=options.mpp,
            )
            jobs.append(job)
    return splits, jobs


def _usable(options: ShardOptions) -> tuple[list[Source], list[Problem]]:
    """The sources that passed every check, and the problems, which `--on-bad` allows."""
    root = Path(options.root).absolute()
    pairs, problems = find_pairs(options.layout, root, Path(options.slides) if options.slides else None)
    sources, more = check_pairs(pairs, options.tile)
    problems = sorted(problems + more)
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
        "options": {name: getattr(options, name) for name in chosen},
        "codecs": {**codecs(), "webdataset": importlib.metadata.version("webdataset")},
        "sources": {"pairs": len(sources), "rejected": rejected, "digest": digest_of(facts)},
    }


def _refuse_strangers(out: Path) -> None:
    """Refuse a folder in which something else lies; nothing of the user's is ever overwritten."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is no folder: give --out an empty or new one")
    names = sorted(path.name for path in out.iterdir() if not _LEFTOVER.fullmatch(path.name))
    strangers = [name for name in names if not _OURS.fullmatch(name)]
    if not strangers and not {"manifest.json", ".building.json"} & set(names):
        strangers = names
    if strangers:
        raise DataError(
            f"{out} already holds something else ({', '.join(strangers[:3])}): give --out an empty or new one"
        )


def _reused(out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a finished OUT, if it is of this set; versions of codecs may have moved on since."""
    manifest, _ = open_shards(out)
    differing = [name for name in ("layout", "options", "sources") if manifest.get(name) != recipe[name]]
    if differing:
        raise DataError(
            f"{out} already holds another shard set (other {', '.join(differing)}): remove it, or "
            "give --out another folder"
        )
    return {**manifest, "reused": True}


def _begin(out: Path, recipe: dict[str, Any]) -> None:
    """Mark OUT as being built from this recipe, or see that an interrupted build was of the same."""
    marker = out / ".building.json"
    if marker.exists():
        if read_json(marker) != recipe:
            raise DataError(
                f"{out} holds an interrupted build of something else (other options, sources or codecs): "
                "remove it, or give --out another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()
    if not marker.exists():
        write_json(marker, recipe)


def _write_rejected(path: Path, problems: Sequence[Problem]) -> None:
    with publish(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", "he", "ihc", "reason"])
        for problem in problems:
            where = problem.he or problem.ihc
            reason = problem.reason if where == problem.name else f"{problem.name}: {problem.reason}"
            writer.writerow([problem.key, problem.he, problem.ihc, reason])


def write_shard(job: ShardJob) -> dict[str, Any]:
    """Write one tar and its index, unless an interrupted build left both whole; return its manifest entry."""
    if not is_whole(job.path, len(job.samples)):
        contents = members(job.samples, job.encoding, job.mpp)
        keys = (sample.key for sample in job.samples)
        write_archive(job.path, zip(keys, contents, strict=True), job.extensions)
    size = job.path.stat().st_size
    return {"file": job.path.name, "samples": len(job.samples), "bytes": size, "sha256": sha256(job.path)}
