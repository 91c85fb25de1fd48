"""What `lgd build-shards` is asked for, and how it stores images."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lgd.base.errors import require
from lgd.io.location import waits_for_network
from lgd.shards.layouts import check_layout
from lgd.shards.split import parse_split

# A remote answers each request late, but many at once.
_REMOTE_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How images are stored."""

    tile: int
    """Side of the tiles, in pixels; 0 for whole patches."""
    extension: str | None
    """Type to encode to; None keeps the original bytes."""
    quality: int
    """JPEG quality."""

    @classmethod
    def parse(cls, image: str, tile: int) -> "Encoding":
        """The encoding of `--image` and `--tile`; `ConfigError` for an image that is none."""
        form = re.fullmatch(r"(keep)|(png)|jpeg:(\d{1,3})", image)
        quality = int(form[3] or 95) if form else 0
        require(1 <= quality <= 100, f"--image {image}: use keep, png or jpeg:95 (a quality from 1 to 100)")
        assert form is not None
        if form[3]:
            return cls(tile=tile, extension="jpg", quality=quality)
        return cls(tile=tile, extension="png" if form[2] or tile else None, quality=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """What `lgd build-shards` is asked for."""

    layout: str
    """`bci`, `mist`, or `csv` (columns he, ihc, and those of shards/README.md), or one of yours, as `python:...`."""
    root: str | Path
    """Folder or url of the images; for csv the CSV itself, or a folder that holds pairs.csv."""
    out: str | Path
    """Folder or url for the shards; empty, new, or one that holds this very set."""
    split: str = "keep"
    """`keep` the published split, `keep:0.1` carve a validation share off train, or `group:0.8,0.1,0.1`."""
    shard_size: int = 512
    """Samples in one shard."""
    tile: int = 0
    """Side of the square tiles that patches are cut into, in pixels; 0 keeps whole patches."""
    image: str = "keep"
    """`keep` the original bytes (tiles become PNG), or re-encode to `png` or `jpeg:QUALITY`, turned as EXIF says."""
    slides: str | Path = ""
    """CSV (or its url) with the columns key and slide that names the slide of every pair."""
    mpp: float | Literal["unknown"] | None = None
    """Micrometres per pixel of all pairs that do not state it themselves; `unknown` where nobody knows."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Stop at pairs that cannot be used, or skip them and list them in rejected.csv."""
    salt: str = ""
    """Any text; another one draws another split."""
    labelled: int = 0
    """Slides of each level whose levels `train` keeps; those of all others become unknown. 0 keeps all levels."""
    workers: int = 0
    """Processes that check pairs and build shards, under Ray; 0 does it in this process, in threads."""

    def __post_init__(self) -> None:
        check_layout(self.layout)
        parse_split(self.split)
        require(self.shard_size >= 1, f"--shard-size {self.shard_size}: use at least 1")
        require(self.tile >= 0, f"--tile {self.tile}: use 0 for whole patches, or the tile's side")
        require(self.labelled >= 0, f"--labelled {self.labelled}: use 0 (all) or more")
        require(self.workers >= 0, f"--workers {self.workers}: use 0 (no Ray) or more")
        Encoding.parse(self.image, self.tile)
        good = self.known_mpp is None or 0 < self.known_mpp < 100
        require(good, f"--mpp {self.mpp}: use micrometres, such as 0.46")

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
        local = 2 if self.workers else os.cpu_count() or 1
        return max(local, _REMOTE_THREADS) if waits_for_network(self.root) else local
