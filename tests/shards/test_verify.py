import functools
import hashlib
import http.server
import io
import json
import random
import shutil
import tarfile
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from lgd.io.digests import digest_of, sha256
from lgd.shards.archive import INDEX
from lgd.shards.builder import build
from lgd.shards.image import encode
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify


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


def rewrite(out, change, shard="train-000000", columns=3):
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
    with path.with_suffix(".idx").open("wb") as stream:
        np.save(stream, np.array(rows, INDEX).reshape(-1, columns))

    def agree(manifest):
        split = shard.split("-")[0]
        idx = sha256(path.with_suffix(".idx"))
        facts = {"bytes": path.stat().st_size, "sha256": sha256(path), "idx_sha256": idx}
        manifest["splits"][split]["shards"][0] |= facts

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


def turned(members):
    """The first H&E with an EXIF orientation, and all digests right."""
    name, content = members[1]
    with Image.open(io.BytesIO(content)) as image, io.BytesIO() as stream:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(stream, "png", exif=exif)
        content = stream.getvalue()
    meta = json.loads(members[0][1])
    meta["sha256"]["he"] = hashlib.sha256(content).hexdigest()
    return [(members[0][0], json.dumps(meta).encode()), (name, content), *members[2:]]


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
            damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
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
    remanifest(out, lambda manifest: manifest["splits"]["train"]["labels"].update({"0": 2, "1+": 0}))
    assert len(verify(out)) == 1 and "split train has samples of labels {'0': 1, '1+': 1, '2+': 1" in verify(out)[0]


def test_wrong_shapes_are_found(out):
    remanifest(out, lambda manifest: manifest["splits"]["train"]["shapes"][0].update(mpp=0.5))
    assert len(verify(out)) == 1 and "width, height and mpp {(8, 8, None): 3}, but {(8, 8, 0.5): 3}" in verify(out)[0]


def test_wrong_patches_are_found(out):
    content = bytearray((out / "patches.npy").read_bytes())
    content[-1] ^= 1
    (out / "patches.npy").write_bytes(content)
    assert len(verify(out)) == 1 and "patches.npy does not match its digest" in verify(out)[0]


def test_a_shard_that_the_manifest_does_not_know(out):
    shutil.copy(out / "train-000000.tar", out / "train-000001.tar")
    assert verify(out) == [f"{out / 'train-000001.tar'}: is not in the manifest: remove it"]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: [m[0], m[2], m[1], *m[3:]], "names b'he0.ihc.png', not he0.he.png"),
        (lambda m: [m[3], *m[1:3], m[0], *m[4:]], "names b'he0.he.png', not he1.he.png"),
        (lambda m: [("dir/" + m[0][0], m[0][1]), *m[1:]], "names b'dir/he0.json', not he0.json"),
        (lambda m: [(n.replace("he0.", "a.b."), c) for n, c in m], "names b'a.b.json', not he0.json"),
        (lambda m: m[:-3], "is no table of 3 samples"),
        (lambda m: [*m[3:6], *m[:3], *m[6:]], "row 1: key he0 is not sorted, it follows he1"),
        (lambda m: [m[0], (m[1][0], m[4][1]), *m[2:]], "its sha256 is not that of KEY.json"),
        (lambda m: [m[0], (m[1][0], m[1][1][:-9]), *m[2:]], "truncated or broken"),
        (lambda m: [m[0], (m[1][0], encode(np.zeros((8, 9, 3), np.uint8), "png")), *m[2:]], "png of 9 x 8 pixels"),
        (lambda m: [m[0], (m[1][0], encode(np.zeros((8, 8, 3), np.uint8), "jpg")), *m[2:]], "he: is no png image"),
        (lambda m: [(m[0][0], b"{"), *m[1:]], "Invalid JSON"),
        (lambda m: [(m[0][0], b"[]"), *m[1:]], "should be an object"),
        (meta_with(extra=1), "field 'extra': extra fields"),
        (meta_with(label=4), "field label is 4, and the set has 4 classes"),
        (meta_with(label=-2), "field label is -2"),
        (meta_with(label=2.5), "field label is 2.5"),
        (meta_with(label=True), "field 'label.int': should be a valid integer"),
        (meta_with(label=None), "'0': 1, '1+': 1, '2+': 1, '3+': 0, 'unknown': 0} is stated"),
        (meta_with(key="other"), "names b'he0.json', not other.json"),
        (meta_with(split="test"), "field split is 'test', but the shard is of train"),
        (meta_with(group="S9"), "slide and group"),
        (meta_with(width=9), "is png of 8 x 8 pixels, but 9 x 8 is stated"),
        (turned, "row 0, he0, he: has EXIF orientation 6: viewers turn or mirror it"),
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
    assert any("key he0 is in train-000000.tar, row 0, too" in problem for problem in verify(out))


def test_a_gap_between_members_is_found_even_where_the_index_allows_for_it(out):
    shard = ShardFolder.open(out).shards[0]
    content, index = shard.path.read_bytes(), shard.index().copy()
    end = int(index["offset"][0, 1]) - 512
    header = tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT)
    # The zeros at the end of a tar make room, so that its size stays.
    shard.path.write_bytes(content[:end] + header + content[end:-512])
    index["offset"].reshape(-1)[1:] += 512
    idx = shard.path.with_suffix(".idx")
    with idx.open("wb") as stream:
        np.save(stream, index)
    facts = {"sha256": sha256(shard.path), "idx_sha256": sha256(idx)}
    remanifest(out, lambda manifest: manifest["splits"]["train"]["shards"][0].update(facts))
    assert len(verify(out)) == 1
    assert f"row 0, he: the index places it at byte {end + 1024}, but the members before it" in verify(out)[0]


def test_a_broken_tar_header_is_found(out):
    def spoil(content):
        # The mode, which is no reading path's concern; but tar itself would stop here.
        content[100] ^= 1

    patch(out, spoil)
    assert (
        len(verify(out)) == 1
        and "row 0, he0: the tar header before byte 512 is broken (bad checksum)" in verify(out)[0]
    )


def test_what_follows_the_last_sample_is_found(out):
    def spoil(content):
        content[-700] = 1

    patch(out, spoil)
    assert len(verify(out)) == 1 and "has something behind its last sample" in verify(out)[0]


def patch(out, spoil):
    """Change bytes of the first shard, with a manifest that agrees."""
    path = out / "train-000000.tar"
    content = bytearray(path.read_bytes())
    spoil(content)
    path.write_bytes(content)
    remanifest(out, lambda manifest: manifest["splits"]["train"]["shards"][0].update(sha256=sha256(path)))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.update(extra=1), "field 'extra': extra fields are not permitted"),
        (lambda m: m.pop("codecs"), "field 'codecs': Field required"),
        (lambda m: m.update(layout="tar"), "field options or layout is malformed (--layout is 'tar': use one of bci"),
        (lambda m: m["options"].pop("tile"), "field 'options.tile': Field required"),
        (lambda m: m["options"].update(image="gif"), "field options or layout is malformed (--image gif: use keep"),
        (lambda m: m["options"].update(colour=1), "field 'options.colour': extra fields"),
        (lambda m: m.update(options=7), "field 'options': should be"),
        (lambda m: m["options"].update(image="jpeg:90"), "field extensions is "),
        (lambda m: m["options"].update(shard_size=2), "train-000000 has 3 samples, but options.shard_size is 2"),
        (lambda m: m["codecs"].pop("pillow"), "field codecs is {"),
        (lambda m: m["sources"].update(pairs=5), "field sources states 5 pairs, but there are 4"),
        (lambda m: m.update(sources=[]), "field 'sources': should be"),
        (lambda m: m.update(caveats=[1]), "field 'caveats.0': should be a valid string"),
        (lambda m: m.update(virtual=0), "field 'virtual': should be a valid boolean"),
        (lambda m: m["target"].update(classes=["0", "1"]), "split train counts the labels '0', '1+', '2+'"),
        (lambda m: m["target"].update(kind="number"), "field 'target': field classes is given, and a number has none"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_found(out, change, reason):
    remanifest(out, change)
    assert len(verify(out)) == 1 and verify(out)[0].startswith(f"{out / 'manifest.json'}: {reason}"), verify(out)


def test_a_lost_shard_does_not_hide_what_is_wrong_with_the_others(out):
    (out / "train-000000.idx").unlink()
    (out / "test-000000.idx").write_bytes(b"")
    lost, broken = verify(out)
    assert "train-000000.idx is missing" in lost and "test-000000.idx does not match its digest" in broken


def test_many_problems_of_one_shard_are_summed_up(out, monkeypatch):
    monkeypatch.setattr("lgd.shards.verify._MOST", 2)
    rewrite(out, lambda members: [(name, b"{" if "json" in name else content) for name, content in members])
    *some, rest = verify(out)
    assert len(some) == 2 and rest == f"{out / 'train-000000.tar'}: and 1 more problems"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server that does not tell of every request."""

    def log_message(self, *_):
        pass


@pytest.fixture
def url(out, tmp_path, monkeypatch):
    """The set over the wire, through an empty cache."""
    monkeypatch.setenv("LGD_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(Quiet, directory=out)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_whole_set_behind_a_url_has_no_problems(url, tmp_path):
    assert verify(url) == []
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix in (".tar", ".idx")]) == 4


def test_what_is_wrong_with_a_set_behind_a_url_is_found(url, out):
    content = bytearray((out / "train-000000.tar").read_bytes())
    content[-1] ^= 1
    (out / "train-000000.tar").write_bytes(content)
    (out / "test-000000.idx").unlink()
    damaged, lost = verify(url)
    assert f"{url}/train-000000.tar does not match its digest" in damaged
    assert f"{url}/test-000000.idx is missing" in lost
    (out / "manifest.json").unlink()
    assert len(verify(url)) == 1 and f"{url}/manifest.json is missing" in verify(url)[0]


@pytest.mark.parametrize("splits", [{}, {"train": {"samples": 0, "labels": {}, "shapes": [], "shards": []}}])
def test_a_set_without_shards(out, splits):
    remanifest(out, lambda manifest: manifest.update(splits=splits))
    assert len(verify(out)) == 1 and "splits" in verify(out)[0]
