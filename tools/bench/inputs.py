"""What the benchmarks stream: native patches, given or drawn, and a shard set of copies of them.

Everything lies in one temporary folder, which the caller removes.
"""

import functools
import multiprocessing
import struct
import zlib
from pathlib import Path
from typing import Any

import simplejpeg

from lgd.base.errors import DataError
from lgd.base.target import UNKNOWN, find_target
from lgd.models.description import Training
from lgd.shards.archive import Shard, read_sample
from lgd.shards.builder import build
from lgd.shards.image import header, kind
from lgd.shards.options import ShardOptions
from lgd.shards.pairs import PatchPair, find_pairs
from lgd.shards.shard_set import ShardFolder
from lgd.tissue.sections import draw_pair
from tools.bench.measure import Settings

HER2 = find_target("her2")
_DRAWN = 16
"""Distinct virtual pairs; each of another slide."""


class Inputs:
    """Images and shards, made when they are first asked for."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder

    @functools.cached_property
    def pairs(self) -> list[PatchPair]:
        """The distinct pairs: those of `--images`, at most as many as are streamed, or drawn ones."""
        if not self.settings.images:
            drawn = self.folder / "drawn"
            draw(drawn, range(min(_DRAWN, self.settings.pairs)), self.settings)
            return find_pairs("bci", drawn, HER2)[0]
        pairs, problems = find_pairs("bci", self.settings.images, HER2)
        if problems:
            raise DataError(f"{self.settings.images}: {problems[0].name}: {problems[0].reason}")
        step = max(1, len(pairs) // self.settings.pairs)
        return pairs[::step][: self.settings.pairs]

    @functools.cached_property
    def contents(self) -> list[bytes]:
        """The H&E files of the distinct pairs."""
        return [pair.he.read_bytes() for pair in self.pairs]

    @functools.cached_property
    def files(self) -> Path:
        """A folder in BCI's layout with `pairs` pairs: the distinct ones under other keys, each with a comment."""
        root = self.folder / "files"
        for role in ("HE", "IHC"):
            (root / role / "train").mkdir(parents=True)
        for number in range(self.settings.pairs):
            pair = self.pairs[number % len(self.pairs)]
            name = f"{number:05d}_train_{HER2.classes[int(pair.label or 0)]}.png"
            for role, path in zip(("HE", "IHC"), pair.images, strict=True):
                (root / role / "train" / name).write_bytes(_with_comment(path.read_bytes(), number))
        return root

    @functools.cached_property
    def shards(self) -> list[Shard]:
        """The shard set of `files`: at least four shards, and one for every worker of a peer."""
        return self._build(self.folder / "shards")

    @functools.cached_property
    def small_shards(self) -> list[Shard]:
        """The same with the H&E at `size` too."""
        return self._build(self.folder / "small-shards", self.settings.size)

    def _build(self, out: Path, he_size: int = 0) -> list[Shard]:
        options = ShardOptions(
            layout="bci",
            root=self.files,
            out=out,
            shard_size=-(-self.settings.pairs // max(4, self.settings.workers)),
            he_size=he_size,
            mpp="unknown",
        )
        build(options)
        return list(ShardFolder.open(out).shards)

    def sample_contents(self, role: str = "he") -> list[bytes]:
        """The bytes of a role of every sample of the shards that have it, in the order of the sample numbers."""
        contents = []
        for shard in self.small_shards if role == "hes" else self.shards:
            file, index = shard.open()
            with file:
                contents += [bytes(read_sample(file, index, row, shard, (role,))[1][role]) for row in range(len(index))]
        return contents

    def described(self) -> dict[str, Any]:
        """The images as a benchmark's facts name them."""
        headers = [header(content, pair.he.name) for content, pair in zip(self.contents, self.pairs, strict=True)]
        sizes = [len(content) for content in self.contents]
        return {
            "images": self.settings.images or "virtual tissue, JPEG 95 4:2:0",
            "distinct": len(sizes),
            "types": sorted({found.extension for found in headers}),
            "pixels": sorted({f"{found.width}x{found.height}" for found in headers}),
            "bytes": {"mean": sum(sizes) / len(sizes), "least": min(sizes), "most": max(sizes)},
        }


def _with_comment(content: bytes, number: int) -> bytes:
    """An image file of the same pixels and other bytes: a shard set takes no file twice."""
    comment = b"%08d" % number
    if kind(content) == "jpg":
        return content[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + content[2:]
    if kind(content) == "png":
        chunk = b"tEXtComment\0" + comment
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        # Behind the signature and the header.
        return content[:33] + chunk + content[33:]
    return content + comment


def draw(root: Path, slides: range, settings: Settings) -> None:
    """Draw one pair a slide into a folder in BCI's layout, in a process a thread: JPEG 95, colours 4:2:0 as BCI's."""
    for role in ("HE", "IHC"):
        (root / role / "train").mkdir(parents=True)
    workers = min(len(slides), settings.workers)
    jobs = [(root, slide, settings.side) for slide in slides]
    if workers == 1:
        for job in jobs:
            _draw(*job)
        return
    # Spawned, because a fork of a process with threads can hang.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(_draw, jobs, chunksize=1)


def _draw(root: Path, slide: int, side: int) -> None:
    he, ihc, truth = draw_pair(0, slide, 0, side)
    name = f"{slide:05d}_train_{HER2.classes[int(truth['level'])]}.png"
    for role, pixels in (("HE", he), ("IHC", ihc)):
        content = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420")
        (root / role / "train" / name).write_bytes(content)


NOT_TRAINED: dict[str, Any] = {
    "training": Training(
        target=HER2,
        marker=None,
        labels=dict.fromkeys((*HER2.classes, UNKNOWN), 0),
        shapes=(),
        virtual=True,
        shards=(),
    ),
    "licence": None,
    "temperature": 1.0,
    "validation": {},
    "inputs": "0" * 64,
    "steps": 0,
    "epochs": 1.0,
    "skipped": 0,
    "engine": "none",
    "workers": 1,
    "versions": {},
}
"""The facts of a network that was not trained, as benchmarks use it."""
