"""Sets to damage, and forged ones whose index, digests and manifest all agree with them."""

import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from lgd.base.errors import DataError
from lgd.io.digests import digest_of, sha256
from lgd.shards.archive import INDEX
from lgd.shards.builder import build
from lgd.shards.image import encode
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify
from lgd.stream.reader import Reader

FIRST = "train-000000"


def saved(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.new("RGB", (48, 48), "pink")).save(stream, kind, **options)
    return stream.getvalue()


def virtual(kind, seed):
    pixels = np.kron(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
    if kind == "jpg":
        return encode(pixels, "jpg")
    # Uncompressed PNG: all have the same length, so that an index fits another shard's tar.
    return saved(kind, Image.fromarray(pixels), **({"compress_level": 0} if kind == "png" else {"lossless": True}))


def make(folder, contents):
    """A set of the given images, H&E and IHC in turn: shards of three samples, the last pair in test."""
    rows = ["he,ihc,key,level,slide,split"]
    for number in range(len(contents) // 2):
        names = [f"{stain}{number}.png" for stain in ("he", "ihc")]
        for name, content in zip(names, contents[2 * number :], strict=False):
            (folder / name).write_bytes(content)
        split = "test" if number == len(contents) // 2 - 1 else "train"
        rows.append(f"{names[0]},{names[1]},p{number},{number % 3 + 1},S{number},{split}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(folder), out=str(folder / "out"), shard_size=3))
    return folder / "out"


def read_all(out):
    reader = Reader(ShardFolder.open(out).shards, ("he", "ihc"), 32)
    return [reader.read(number) for number in range(reader.total)]


def assert_refused(out, *facts):
    """Assert that reading and verifying refuse the set, that both name the facts, and that a remedy is told."""
    with pytest.raises(DataError) as raised:
        read_all(out)
    problems = verify(out)
    for fact in facts:
        assert fact in str(raised.value)
        assert any(fact in problem for problem in problems), (fact, problems)
    assert problems and any(remedy in str(raised.value) for remedy in ("fetch it again", "cut it", "convert"))


def remanifest(out, change):
    """Edit the manifest; its digest agrees."""
    manifest = json.loads((out / "manifest.json").read_text())
    manifest.pop("digest")
    change(manifest)
    (out / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))


def agree(out, name=FIRST, **facts):
    """Let the manifest tell the truth about a changed tar."""
    path = out / f"{name}.tar"
    split, number = name.split("-")

    def change(manifest):
        entry = manifest["splits"][split]["shards"][int(number)]
        files = {"bytes": path.stat().st_size, "sha256": sha256(path), "idx_sha256": sha256(path.with_suffix(".idx"))}
        entry |= files | facts
        settle(manifest["splits"][split])

    remanifest(out, change)


def settle(part):
    """Let the counts of a split agree with its shards."""
    samples = sum(shard["samples"] for shard in part["shards"])
    fullest = max(part["labels"], key=part["labels"].get)
    part["labels"][fullest] += samples - part["samples"]
    part["shapes"][0]["samples"] += samples - part["samples"]
    part["samples"] = samples


class Member(NamedTuple):
    """A member to write, and whether the index knows it."""

    name: str
    content: bytes
    type: bytes = tarfile.REGTYPE
    listed: bool = True
    format: int = tarfile.USTAR_FORMAT
    pax: Mapping[str, str] = MappingProxyType({})

    def header(self):
        info = tarfile.TarInfo("overridden" if self.pax else self.name)
        info.size, info.type, info.pax_headers = len(self.content), self.type, self.pax
        info.linkname = "/etc/passwd" if self.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
        return info.tobuf(self.format)


def forge(out, change, name=FIRST, columns=3, **facts):
    """Write a shard with changed members, of which a sample has `columns`; its index and the manifest agree with it."""
    path = out / f"{name}.tar"
    with tarfile.open(path) as tar:
        members = [Member(info.name, tar.extractfile(info).read()) for info in tar]
    rows, stream = [], io.BytesIO()
    for member in change(members):
        stream.write(member.header())
        if member.listed:
            rows.append((stream.tell(), len(member.content), zlib.crc32(member.content)))
        stream.write(member.content + bytes(-len(member.content) % 512))
    stream.write(bytes(1024))
    path.write_bytes(stream.getvalue() + bytes(-stream.tell() % 10240))
    write_index(path.with_suffix(".idx"), np.array(rows, INDEX), columns)
    agree(out, name, **facts)


def write_index(path, entries, columns=3):
    with path.open("wb") as stream:
        np.save(stream, entries.reshape(-1, columns) if entries.size % columns == 0 else entries)


def with_content(place, content):
    return lambda members: [*members[:place], members[place]._replace(content=content), *members[place + 1 :]]


def with_extra(place, member):
    return lambda members: [*members[:place], member, *members[place:]]


def entry_with(**facts):
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(facts)
