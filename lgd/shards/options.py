"""What `lgd build-shards` is asked for, and the samples that follow: tiles of pairs, each on one side of the split.

A group (the slide, else the source patch) never lies on two sides: leakage lives or dies here. It goes to a side by a
hash of its name alone, and stays there whatever else the data set gains or loses.
"""

import collections
import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import simplejpeg
from PIL import features

from lgd.base.arguments import check_bounds
from lgd.base.environment import count_cpus
from lgd.base.errors import ConfigError, DataError, require
from lgd.base.target import UNKNOWN, Label, Target
from lgd.config_sections import NotNegative, Positive
from lgd.io.digests import digest_of
from lgd.io.location import Location, waits_for_network
from lgd.shards.candidate import SPLITS, Cut, SplitRule, split_of
from lgd.shards.layouts import check_layout
from lgd.shards.manifest import Encoding, Entry, Extensions, Mpp, Shape, Split, Values
from lgd.shards.pairs import PatchPair, Source

_DRAWN = "--split group:0.8,0.1,0.1"
# A remote answers each request late, but many at once.
_REMOTE_THREADS = 16


def list_codecs() -> dict[str, str | None]:
    """Versions of the packages that decide the bytes of re-encoded images, and of their tars."""
    # Pillow's wheels compress PNG with zlib-ng, whose bytes are not zlib's.
    deflate = features.version("zlib_ng")
    deflate = f"ng-{deflate}" if deflate else features.version("zlib")
    pillow, tars = features.version("pil"), importlib.metadata.version("webdataset")
    return {"simplejpeg": simplejpeg.__version__, "pillow": pillow, "zlib": deflate, "webdataset": tars}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """What `lgd build-shards` is asked for."""

    layout: str
    """`bci`, `mist`, `csv` (columns he, ihc, and those of shards/README.md), `slides` (a CSV of pairs of slides, which
    are cut into tiles; see docs/slides.md), or one of yours, as `python:...`."""
    root: str | Path
    """Folder or url of the images; for csv and slides the CSV itself, or a folder that holds pairs.csv or
    slides.csv."""
    out: str | Path
    """Folder or url for the shards; empty, new, or one that holds this very set."""
    split: str = "keep"
    """`keep` the published split, `keep:0.1` carve a validation share off train, or `group:0.8,0.1,0.1`."""
    shard_size: Positive = 512
    """Samples in one shard."""
    tile: NotNegative = 0
    """Side of the square tiles that patches or slides are cut into, in pixels; 0 keeps whole patches."""
    image: str = "keep"
    """`keep` the original bytes (tiles become PNG), or re-encode to `png` or `jpeg:QUALITY`, turned as EXIF says."""
    he_size: NotNegative = 0
    """Side at which the H&E is stored once more, in pixels, for training at this `data.size`; 0 stores none."""
    slides: str | Path = ""
    """CSV (or its url) with the columns key and slide that names the slide of every pair."""
    mpp: Mpp | Literal["unknown"] | None = None
    """Micrometres per pixel of all pairs that do not state it themselves; `unknown` where nobody knows; of
    slides, that at which tiles are cut."""
    least_alignment: float | Literal["none"] = 2.0
    """Least alignment of a pair that is cut from slides (about 0.5 where they do not fit); `none` keeps all."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Stop at pairs that cannot be used, or skip them and list them in rejected.csv."""
    salt: str = ""
    """Any text; another one draws another split."""
    target: str | Path = "her2"
    """What the labels are of: her2, her2-binary, ki67, or a YAML file (see docs/targets.md)."""
    center: str = ""
    """Take only pairs of this center (CSV column `center`); `lgd ablate --leave-out center` needs a folder a center."""
    labelled: NotNegative = 0
    """Slides of each class, such as a level, whose labels `train` keeps, or slides in all where labels are numbers;
    those of all others become unknown. 0 keeps all labels."""
    workers: NotNegative = 0
    """Processes that check pairs and build shards, under Ray; 0 does it in this process, in threads."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_layout(self.layout)
        SplitRule.parse(self.split)
        Encoding.parse(self.image, self.tile)
        if self.layout == "slides":
            require(self.tile > 0, "--layout slides cuts tiles: give --tile, such as 256 (pixels)")
            require(isinstance(self.mpp, float), "--layout slides cuts tiles of one scale: give --mpp, such as 0.46")
            require(not self.slides, "--layout slides: name each slide in the column slide of its CSV, not by --slides")
        if self.tile:
            remedy = f"use at most {self.tile}, or larger tiles"
            require(self.he_size <= self.tile, f"--he-size {self.he_size}: is larger than --tile {self.tile}: {remedy}")

    @property
    def cut(self) -> Cut | None:
        """How slides are cut; None for patches."""
        if self.layout != "slides":
            return None
        assert isinstance(self.mpp, float), "it was checked"
        return Cut(self.tile, self.mpp, self.least_alignment != "none")

    @property
    def rule(self) -> SplitRule:
        """How samples are split."""
        return SplitRule.parse(self.split)

    @property
    def encoding(self) -> Encoding:
        """How the images are stored."""
        return Encoding.parse(self.image, self.tile)

    @property
    def known_mpp(self) -> float | None:
        """The scale of all pairs that do not state it themselves, if there is one."""
        return None if self.mpp == "unknown" else self.mpp

    @property
    def threads(self) -> int:
        """Threads of each process; a worker of Ray has about one CPU, and reads while it encodes."""
        local = 2 if self.workers else count_cpus()
        return max(local, _REMOTE_THREADS) if waits_for_network(self.root) else local


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A whole source, or one tile of it, with its place in the set."""

    key: str
    source: Source
    split: str
    row: int = 0
    column: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """All that decides one shard's bytes, and how it is made."""

    path: Location
    samples: tuple[Sample, ...]
    options: ShardOptions
    extensions: Extensions
    building: str
    """Digest of the build that it is of."""
    left: bool
    """Whether an interrupted build left it, with its entry."""


def check_split(pairs: Sequence[PatchPair], options: ShardOptions) -> None:
    """Raise `ConfigError` that names `--split` where there is nothing to keep or to carve off.

    And `DataError` where the published split has other names than LGD's, or one slide would lie on two sides.
    """
    rule = options.rule
    for pair in pairs if rule.keep else ():
        if pair.split is None:
            raise ConfigError(f"--split keep: {pair.names[0]} has no published split: use {_DRAWN}")
        if pair.split not in SPLITS:
            raise DataError(
                f"--split keep: {pair.names[0]} is of the split {pair.split!r}: call it train (or training), val "
                f"(valid, validation, dev) or test (testing), in any case, or draw another split by {_DRAWN}"
            )
        if rule.shares and pair.split == "val":
            raise ConfigError("--split keep:SHARE would add to the published val: use --split keep")
    sides: dict[str, set[str | None]] = {}
    for pair in pairs:
        sides.setdefault(pair.group, set()).add(split_of(rule, pair.group, pair.split, options.salt))
    if leaking := sorted(group for group, splits in sides.items() if len(splits) > 1):
        raise DataError(
            f"--split keep puts {len(leaking)} slides on two sides, such as {leaking[0]} in "
            f"{' and '.join(sorted(map(str, sides[leaking[0]])))}: use {_DRAWN}"
        )


def make_samples(sources: Sequence[Source], options: ShardOptions, target: Target) -> list[Sample]:
    """Give every source its split and cut it into tiles; sorted by key. Raises as `check_split`."""
    check_split([source.pair for source in sources], options)
    rule, tile = options.rule, options.tile
    samples = []
    for source in sources:
        pair = source.pair
        split = split_of(rule, pair.group, pair.split, options.salt)
        assert split is not None, "it was checked"
        # What is cut from slides is a tile already.
        cuts = tile and not pair.region
        rows, columns = (source.height // tile, source.width // tile) if cuts else (1, 1)
        for row, column in itertools.product(range(rows), range(columns)):
            key = f"{pair.key}_y{row}_x{column}" if cuts else pair.key
            samples.append(Sample(key=key, source=source, split=split, row=row, column=column))
    return _hide_labels(sorted(samples, key=lambda sample: sample.key), target, options.labelled, options.salt)


def _hide_labels(samples: list[Sample], target: Target, labelled: int, salt: str) -> list[Sample]:
    """Samples of which, in train, only so many groups of each class keep their label; 0 leaves all as they are.

    Which ones depends on their names and the salt alone. The class of a group is the highest of its patches. Of a
    number so many groups in all keep theirs. Raises `ConfigError` where there are fewer groups than that; a class that
    train does not have at all has none to keep.
    """
    if not labelled:
        return samples
    label_of: dict[str, Label] = {}
    for sample in samples:
        pair = sample.source.pair
        if sample.split == "train" and pair.label is not None:
            label_of[pair.group] = max(pair.label, label_of.get(pair.group, 0))
    groups_of: dict[str, list[str]] = {}
    for group, label in label_of.items():
        groups_of.setdefault(target.count_of(label), []).append(group)
    if not groups_of:
        raise ConfigError(f"--labelled {labelled}: no slide of train has a label: leave it out")
    kept: set[str] = set()
    for name, groups in sorted(groups_of.items(), key=lambda one: target.counted.index(one[0])):
        if len(groups) < labelled:
            which = "with a value" if target.is_number else f"of {target.label_word} {name}"
            raise ConfigError(f"--labelled {labelled}: train has {len(groups)} slides {which}: use fewer")
        kept.update(sorted(groups, key=lambda group: digest_of([salt, "labelled", group]))[:labelled])
    return [
        sample
        if sample.split != "train" or sample.source.pair.group in kept
        else replace(sample, source=replace(sample.source, pair=replace(sample.source.pair, label=None)))
        for sample in samples
    ]


def list_caveats(samples: Sequence[Sample], rule: SplitRule) -> list[str]:
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


def describe_split(
    options: ShardOptions, target: Target, name: str, samples: Sequence[Sample], entries: Sequence[Entry]
) -> Split:
    """A split of the manifest; the shards are those of `entries`, in any order, that are of it."""
    labels = [sample.source.pair.label for sample in samples]
    counts = collections.Counter(map(target.count_of, labels))
    tile = options.tile
    shapes = collections.Counter(
        (tile or source.width, tile or source.height, source.pair.mpp or options.known_mpp)
        for source in (sample.source for sample in samples)
    )
    commonest = sorted(shapes.items(), key=lambda entry: (-entry[1], *entry[0][:2], entry[0][2] or 0))
    return Split(
        samples=len(samples),
        labels={name: counts[name] for name in (*target.counted, UNKNOWN)},
        shapes=tuple(
            Shape(width=width, height=height, mpp=mpp, samples=count) for (width, height, mpp), count in commonest
        ),
        shards=tuple(sorted((one for one in entries if one.file.rpartition("-")[0] == name), key=lambda one: one.file)),
        values=Values.of(labels) if target.is_number else None,
    )
