import io
import json
import random
import shutil
import tarfile
import zlib

import numpy as np
import pytest

from lgd.data.archive import INDEX, open_shards
from lgd.data.image import encode
from lgd.data.shards import ShardOptions, build
from lgd.data.verify import verify
from lgd.files import digest_of, sha256


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small set of two splits, four samples; tests copy it."""
    folder = tmp_path_factory.mktemp("verify")
    rows = ["he,ihc,level,slide,split"]
    for number in range(4):
        for stain in ("he", "ihc"):
            seed = 10 * number + len(stain)
            pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            (folder / f"{stain}{number}.png").write_bytes(encode(pixels, "png"))
        rows.append(f"he{number}.png,ihc{number}.png,{number},S{number},{'train' if number < 3 else 'test'}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(folder), out=str(folder / "out")))
    return folder / "out"


@pytest.fixture
def out(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def rewrite(out, change, shard="train-000000"):
    """Write a shard anew with changed members, with an index, digests and counts that all agree with it."""
    path = out / f"{shard}.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    members = change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        rows = [(m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read())) for m in tar]
    with open(path.with_suffix(".idx"), "wb") as stream:
        np.save(stream, np.array(rows, INDEX).reshape(-1, 3))

    def agree(manifest):
        split = shard.split("-")[0]
        manifest["splits"][split]["shards"][0] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}

    remanifest(out, agree)


def remanifest(out, change):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest.pop("digest")
    change(manifest)
    (out / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))


def meta_with(**changes):
    """A change of the first sample's KEY.json."""

    def change(members):
        meta = json.loads(members[0][1]) | changes
        return [(members[0][0], json.dumps(meta).encode()), *members[1:]]

    return change


def test_a_whole_set_has_no_problems(whole, out):
    assert verify(whole) == []
    rewrite(out, lambda members: members)
    assert verify(out) == []


def test_a_set_that_is_not_there(tmp_path):
    assert len(verify(tmp_path)) == 1 and "manifest.json is missing" in verify(tmp_path)[0]


@pytest.mark.faults
def test_any_flipped_bit_in_a_tar_or_index_is_found(whole, out):
    dice = random.Random(1)
    for suffix in ("tar", "idx"):
        path = out / f"train-000000.{suffix}"
        content = path.read_bytes()
        for _ in range(15):
            damaged = bytearray(content)
            # A few bits of numpy's header mean nothing, such as those of blanks; every entry's bit counts.
            start = len(content) - 9 * INDEX.itemsize if suffix == "idx" else 0
            damaged[dice.randrange(start, len(content))] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            problems = verify(out)
            assert problems and all("train-000000" in problem for problem in problems)
        path.write_bytes(content)
    assert verify(out) == []


def test_an_edited_manifest_is_found(out):
    path = out / "manifest.json"
    path.write_text(path.read_text().replace('"may_leak": false', '"may_leak": true'))
    assert [problem.split(": ")[1] for problem in verify(out)] == [
        "its digest is not that of its content",
    ]


def test_a_leak_that_is_not_confessed_is_found(out):
    remanifest(out, lambda manifest: manifest.update(may_leak=True))
    assert verify(out) == [f"{out / 'manifest.json'}: field may_leak is True, but should be False"]


def test_wrong_counts_are_found(out):
    def change(manifest):
        manifest["splits"]["train"]["levels"]["0"] = 2

    remanifest(out, change)
    assert len(verify(out)) == 1 and "split train has 3 samples of levels" in verify(out)[0]


def test_a_shard_that_the_manifest_does_not_know(out):
    shutil.copy(out / "train-000000.tar", out / "train-000001.tar")
    assert verify(out) == [f"{out / 'train-000001.tar'}: is not in the manifest: remove it"]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: [m[0], m[2], m[1], *m[3:]], "he0.he.png is expected here"),
        (lambda m: [m[3], *m[1:3], m[0], *m[4:]], "is expected here"),
        (lambda m: [("dir/" + m[0][0], m[0][1]), *m[1:]], "is expected here"),
        (lambda m: [(n.replace("he0.", "a.b."), c) for n, c in m], "a.json is expected here"),
        (lambda m: m[:-3], "is no index of 3 samples"),
        (lambda m: [m[0], (m[1][0], m[4][1]), *m[2:]], "its sha256 is not that of KEY.json"),
        (lambda m: [m[0], (m[1][0], m[1][1][:-9]), *m[2:]], "truncated or broken"),
        (lambda m: [m[0], (m[1][0], encode(np.zeros((8, 9, 3), np.uint8), "png")), *m[2:]], "png of 9 x 8 pixels"),
        (lambda m: [m[0], (m[1][0], encode(np.zeros((8, 8, 3), np.uint8), "jpg")), *m[2:]], "is jpg of 8 x 8"),
        (lambda m: [(m[0][0], b"{"), *m[1:]], "no valid JSON"),
        (lambda m: [(m[0][0], b"[]"), *m[1:]], "its fields are not"),
        (meta_with(extra=1), "its fields are not"),
        (meta_with(level=4), "level and level_name"),
        (meta_with(level=-2, level_name="2+"), "level and level_name"),
        (meta_with(level=True), "field level is True"),
        (meta_with(level=None, level_name=None), "not as stated"),
        (meta_with(key="other"), "key and split are other"),
        (meta_with(split="test"), "fields key and split are he0 and test"),
        (meta_with(group="S9"), "slide and group"),
        (meta_with(width=9), "but png of 9 x 8 is stated"),
        (meta_with(slide="S3", group="S3"), "group S3 lies in the splits test and train: the set leaks"),
    ],
)
def test_a_wrong_set_is_found_even_where_its_digests_agree(out, change, reason):
    rewrite(out, change)
    problems = verify(out)
    assert any(reason in problem for problem in problems), problems


def test_a_key_in_two_shards_is_found(out):
    def rename(members):
        meta = json.loads(members[0][1]) | {"key": "he0"}
        return [("he0" + name[3:], json.dumps(meta).encode() if "json" in name else c) for name, c in members]

    rewrite(out, rename, "test-000000")
    assert any("key he0 is in train-000000.tar too" in problem for problem in verify(out))


def test_a_gap_between_members_is_found(out):
    shard = open_shards(out)[1][0]
    content = shard.path.read_bytes()
    entry = shard.index()[0, 0]
    end = int(entry["offset"]) + -(-int(entry["length"]) // 512) * 512
    header = tarfile.TarInfo("a.txt")
    shard.path.write_bytes(content[:end] + header.tobuf(tarfile.USTAR_FORMAT) + content[end:])
    remanifest(
        out,
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(
            bytes=shard.path.stat().st_size, sha256=sha256(shard.path)
        ),
    )
    assert any("10 members, but the index has 9" in problem for problem in verify(out))
