"""Pairs -> checked sources -> the samples of each split, and the bytes of each sample's three members.

Everything here is a pure function of files and options, so that a shard comes out the same wherever it is
made.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lgd.base.errors import ConfigError, DataError
from lgd.base.threads import in_threads
from lgd.config import LEVEL_NAMES
from lgd.io.digests import digest_of
from lgd.io.files import read_bytes
from lgd.io.location import Location, MissingError, RemoteError
from lgd.shards.image import Header, check, decode_upright, encode
from lgd.shards.layouts import Problem
from lgd.shards.meta import Digests, PatchMeta
from lgd.shards.options import Encoding
from lgd.shards.pairs import PatchPair
from lgd.shards.split import SplitRule, split_of
from lgd.shards.tags import ORIENTATIONS, read_icc_digest, read_orientation

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A pair whose two images were read and decoded in full."""

    pair: PatchPair
    width: int
    height: int
    extensions: tuple[str, str]
    """True types of the H&E and the IHC: jpg, png or webp."""
    sha256: tuple[str, str]
    """Digests of the H&E and the IHC file."""
    icc: tuple[str | None, str | None]
    """Digests of the colour profiles in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A whole source, or one tile of it, with its place in the set."""

    key: str
    source: Source
    split: str
    row: int = 0
    column: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckJob:
    """Pairs to be checked by one worker."""

    start: int
    """Place of the first of them in the list of all pairs."""
    pairs: tuple[PatchPair, ...]
    tile: int
    """Side of the tiles that each must hold at least one of, in pixels; 0 for whole patches."""
    reencode: bool
    """Whether images are stored anew, which turns those that EXIF says to turn, rather than as they are."""
    threads: int


def _read(path: Location, name: str) -> bytes:
    try:
        return read_bytes(path)
    except MissingError as error:
        raise DataError(f"{name}: is missing: correct it or remove the pair") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}): correct it or remove the pair") from error


def check_pair(pair: PatchPair, tile: int, reencode: bool) -> Source | Problem:
    """Read and fully decode both images of a pair; they must be of one size, and hold at least one tile.

    Sizes are those of the upright images. One that is kept as it is must be stored upright.

    A remote that cannot be reached says nothing of the pair: that raises `RemoteError`.
    """
    try:
        he, ihc = _read(pair.he, pair.source), _read(pair.ihc, pair.ihc_source)
        heads = [_check_upright(he, pair.source, reencode), _check_upright(ihc, pair.ihc_source, reencode)]
        _, width, height = heads[0]
        if heads[0][1:] != heads[1][1:]:
            raise DataError(
                f"{pair.source}: is {width} x {height} pixels but its IHC {pair.ihc_source} is "
                f"{heads[1].width} x {heads[1].height}: register the two, so that they show the same field"
            )
        if min(width, height) < tile:
            raise DataError(
                f"{pair.source}: is {width} x {height} pixels, smaller than --tile {tile}: use a smaller tile"
            )
    except RemoteError:
        raise
    except DataError as error:
        message = str(error)
        name = pair.ihc_source if message.startswith(f"{pair.ihc_source}: ") else pair.source
        return Problem(name, message.removeprefix(f"{name}: "), pair.key, pair.source, pair.ihc_source)
    return Source(
        pair=pair,
        width=width,
        height=height,
        extensions=(heads[0].extension, heads[1].extension),
        sha256=(hashlib.sha256(he).hexdigest(), hashlib.sha256(ihc).hexdigest()),
        icc=(read_icc_digest(he, heads[0].extension), read_icc_digest(ihc, heads[1].extension)),
    )


def _check_upright(content: bytes, name: str, reencode: bool) -> Header:
    """Check an image as `check` does; its type, and its size when it is upright."""
    found = check(content, name)
    orientation = read_orientation(content, found.extension)
    if orientation == 1:
        return found
    if not reencode:
        raise DataError(
            f"{name}: has EXIF orientation {orientation}: viewers show it {ORIENTATIONS[orientation]}, but training "
            "reads the pixels as they are stored: use --image png or --image jpeg:95, which turn them"
        )
    turned = orientation >= 5
    return Header(found.extension, *((found.height, found.width) if turned else (found.width, found.height)))


def check_chunk(job: CheckJob) -> tuple[int, list[Source | Problem]]:
    """The place of a job's first pair, and what was found of each, in order."""
    return job.start, list(in_threads(lambda pair: check_pair(pair, job.tile, job.reencode), job.pairs, job.threads))


def same_types(sources: Sequence[Source]) -> tuple[str, str]:
    """The one type of all H&E and of all IHC images; `DataError` names two files that differ."""
    first = sources[0]
    for source in sources:
        names = [(source.pair.source, first.pair.source), (source.pair.ihc_source, first.pair.ihc_source)]
        for (name, other), mine, theirs in zip(names, source.extensions, first.extensions, strict=True):
            if mine != theirs:
                raise DataError(
                    f"{other} holds {theirs} and {name} holds {mine}, but a shard set keeps one type a "
                    "stain: use --image png or --image jpeg:95 to re-encode them all"
                )
    return first.extensions


def assign(sources: Sequence[Source], rule: SplitRule, salt: str, tile: int) -> list[Sample]:
    """Give every source its split and cut it into tiles; sorted by key.

    Raises `ConfigError` that names `--split` where there is nothing to keep, and `DataError` where it would
    put one slide on two sides.
    """
    published = {source.pair.split for source in sources}
    if rule.keep and None in published:
        name = next(source.pair.source for source in sources if source.pair.split is None)
        raise ConfigError(f"--split keep: {name} has no published split: use --split group:0.8,0.1,0.1")
    if rule.keep and rule.shares and "val" in published:
        raise ConfigError("--split keep:SHARE would add to the published val: use --split keep")
    samples = []
    for source in sources:
        pair = source.pair
        split = split_of(rule, pair.group, pair.split, salt)
        assert split is not None
        if not tile:
            samples.append(Sample(key=pair.key, source=source, split=split))
            continue
        for row, column in itertools.product(range(source.height // tile), range(source.width // tile)):
            key = f"{pair.key}_y{row}_x{column}"
            samples.append(Sample(key=key, source=source, split=split, row=row, column=column))
    _refuse_leak(samples)
    return sorted(samples, key=lambda sample: sample.key)


def hide_levels(samples: list[Sample], labelled: int, salt: str) -> list[Sample]:
    """Samples of which, in train, only so many groups of each level keep their level; 0 leaves all as they are.

    Which ones depends on their names and the salt alone. The level of a group is the highest of its patches. Raises
    `ConfigError` where a level has fewer groups than that.
    """
    if not labelled:
        return samples
    level_of: dict[str, int] = {}
    for sample in samples:
        pair = sample.source.pair
        if sample.split == "train" and pair.label is not None:
            level_of[pair.group] = max(pair.label, level_of.get(pair.group, 0))
    kept: set[str] = set()
    for level, name in enumerate(LEVEL_NAMES):
        groups = [group for group, highest in level_of.items() if highest == level]
        if len(groups) < labelled:
            raise ConfigError(f"--labelled {labelled}: train has {len(groups)} slides of level {name}: use fewer")
        kept.update(sorted(groups, key=lambda group: digest_of([salt, "labelled", group]))[:labelled])
    return [
        sample
        if sample.split != "train" or sample.source.pair.group in kept
        else replace(sample, source=replace(sample.source, pair=replace(sample.source.pair, label=None)))
        for sample in samples
    ]


def _refuse_leak(samples: Sequence[Sample]) -> None:
    sides: dict[str, set[str]] = {}
    for sample in samples:
        sides.setdefault(sample.source.pair.group, set()).add(sample.split)
    leaking = sorted(group for group, splits in sides.items() if len(splits) > 1)
    if leaking:
        raise DataError(
            f"--split keep puts {len(leaking)} slides on two sides, such as {leaking[0]} in "
            f"{' and '.join(sorted(sides[leaking[0]]))}: use --split group:0.8,0.1,0.1"
        )


def caveats(samples: Sequence[Sample], rule: SplitRule) -> list[str]:
    """Sentences that every report on these samples must repeat."""
    unknown = sum(sample.source.pair.slide is None for sample in samples)
    said = []
    if unknown:
        said.append(
            f"The slides of {unknown} of {len(samples)} samples are unknown: one slide may lie on both sides "
            "of the split, and a score on it may be inflated by slides seen in training."
        )
    present = {sample.split for sample in samples}
    for split, share in rule.shares.items():
        if share > 0 and split not in present and (not rule.keep or "train" in present):
            said.append(f"The split {split} is empty: there are too few groups for its share of {share:g}.")
    return said


def members(
    samples: Iterable[Sample], encoding: Encoding, mpp: float | None, threads: int = 1
) -> Iterator[list[bytes]]:
    """The json, H&E and IHC bytes of each sample, in order; sources are read and encoded in threads.

    Raises `DataError` for a source that is no longer the file that was checked.
    """
    groups = (list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.source))
    for made in in_threads(lambda group: _members_of(group, encoding, mpp), groups, threads):
        yield from made


def _members_of(samples: Sequence[Sample], encoding: Encoding, mpp: float | None) -> list[list[bytes]]:
    """The members of samples of one source."""
    source = samples[0].source
    images = [_reread(source, stain) for stain in (0, 1)]
    if encoding.extension is None:
        described = (_describe(sample, source.sha256, source.width, source.height, mpp) for sample in samples)
        return [[description, *images] for description in described]
    names = (source.pair.source, source.pair.ihc_source)
    decoded = [decode_upright(content, name) for content, name in zip(images, names, strict=True)]
    made = []
    for sample in samples:
        tile_h, tile_w = encoding.tile or source.height, encoding.tile or source.width
        top, left = sample.row * tile_h, sample.column * tile_w
        cut = [pixels[top : top + tile_h, left : left + tile_w] for pixels in decoded]
        images = [encode(pixels, encoding.extension, encoding.quality) for pixels in cut]
        digests = [hashlib.sha256(content).hexdigest() for content in images]
        made.append([_describe(sample, digests, tile_w, tile_h, mpp), *images])
    return made


def _reread(source: Source, stain: int) -> bytes:
    name = (source.pair.source, source.pair.ihc_source)[stain]
    content = _read((source.pair.he, source.pair.ihc)[stain], name)
    if hashlib.sha256(content).hexdigest() != source.sha256[stain]:
        raise DataError(f"{name}: changed while the shards were built: build them again")
    return content


def _describe(sample: Sample, digests: Sequence[str], width: int, height: int, mpp: float | None) -> bytes:
    """KEY.json; `digests` are those of the H&E and the IHC."""
    pair, icc = sample.source.pair, sample.source.icc
    meta = PatchMeta(
        key=sample.key,
        label=pair.label,
        slide=pair.slide,
        group=pair.group,
        split=sample.split,
        source=pair.source,
        width=width,
        height=height,
        mpp=pair.mpp or mpp,
        icc=Digests(he=icc[0], ihc=icc[1]),
        sha256=Digests(he=digests[0], ihc=digests[1]),
        **pair.origin.as_json(),
    )
    return json.dumps(meta.as_json(), ensure_ascii=False, allow_nan=False).encode()
