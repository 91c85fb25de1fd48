"""What `lgd verify` finds twice in sets that `lgd build-shards` would not have built."""

import hashlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from forging import forge, make, remanifest, virtual

from lgd.base.spelling import canonical_group
from lgd.io.digests import hash_64
from lgd.shards.archive import read_sample
from lgd.shards.builder import build
from lgd.shards.manifest import PATCHES
from lgd.shards.options import ShardOptions
from lgd.shards.repeats import SEEN, find_repeats
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify


@pytest.fixture
def out(tmp_path):
    """Shards of p0, p1 and p2 in train and of p3 in test, each of a slide of its own."""
    return make(tmp_path, [virtual("png", seed) for seed in range(8)])


def forge_sample(out, row, name, he=None, ihc=None, **facts):
    """Give a sample other images and other facts in KEY.json; digests agree."""

    def change(members):
        three = members[3 * row : 3 * row + 3]
        contents = [he or three[1].content, ihc or three[2].content]
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        meta = json.loads(three[0].content) | facts | {"sha256": dict(zip(("he", "ihc"), digests, strict=True))}
        new = [json.dumps(meta).encode(), *contents]
        members[3 * row : 3 * row + 3] = [m._replace(content=c) for m, c in zip(three, new, strict=True)]
        return members

    forge(out, change, name)


def repatch(out):
    """Let patches.npy tell the truth about the samples."""
    rows = []
    for shard in ShardFolder.open(out).shards:
        file, index = shard.open()
        with file:
            for row in range(shard.samples):
                meta = read_sample(file, index, row, shard, ())[0]
                digests = [meta.sha256.he, meta.sha256.ihc]
                numbers = [int.from_bytes(bytes.fromhex(digest[:16]), "little") for digest in digests]
                rows.append((*numbers, hash_64(canonical_group(meta.group))))
    write_patches(out, np.array(rows, PATCHES))


def write_patches(out, table):
    np.save(out / "patches.npy", table)
    content = (out / "patches.npy").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    remanifest(out, lambda manifest: manifest.update(patches=facts))


def one_file(stain, key, shard, row, other_stain, other, other_shard, other_row):
    return (
        f"the {stain} of {key} ({shard}-000000.tar, row {row}) and the {other_stain} of {other} "
        f"({other_shard}-000000.tar, row {other_row}) are one file, byte for byte: keep the right one"
    )


@pytest.mark.parametrize(
    ("row", "name", "changes", "told"),
    [
        (1, "train-000000", {"he": 0}, [one_file("H&E", "p0", "train", 0, "H&E", "p1", "train", 1)]),
        (
            *(0, "test-000000", {"he": 2, "ihc": 3}),
            [one_file(stain, "p1", "train", 1, stain, "p3", "test", 0) for stain in ("H&E", "IHC")],
        ),
        (2, "train-000000", {"ihc": 4}, [one_file("H&E", "p2", "train", 2, "IHC", "p2", "train", 2)]),
        (0, "test-000000", {"ihc": 0}, [one_file("H&E", "p0", "train", 0, "IHC", "p3", "test", 0)]),
        (
            *(0, "test-000000", {"slide": "s01", "group": "s01"}),
            ["slides 'S1' (train) and 's01' (test) are one name in other spellings: name each slide in one way"],
        ),
        (0, "test-000000", {"slide": "S10", "group": "S10"}, []),
    ],
)
def test_what_a_set_holds_twice_is_found(out, row, name, changes, told):
    images = {stain: virtual("png", changes[stain]) for stain in ("he", "ihc") if stain in changes}
    forge_sample(out, row, name, **{**changes, **images})
    assert any("its row of patches.npy is another sample's" in problem for problem in verify(out))
    repatch(out)
    assert sorted(verify(out)) == told


def test_patches_that_are_not_of_the_set_are_found(out):
    table = np.load(out / "patches.npy")
    table["group"][1] = table["he"][3] = 5
    write_patches(out, table)
    assert verify(out) == [
        f"{out}/train-000000.tar, row 1, p1: its row of patches.npy is another sample's (group)",
        f"{out}/test-000000.tar, row 0, p3: its row of patches.npy is another sample's (he)",
    ]
    (out / "patches.npy").write_bytes(b"")
    assert len(verify(out)) == 1 and "patches.npy has 0 bytes instead of" in verify(out)[0]


@pytest.mark.parametrize("options", [{"tile": 24}, {"image": "jpeg:90"}])
def test_of_tiles_and_new_encodings_the_files_are_compared_that_they_come_from(out, tmp_path, options):
    build(ShardOptions(layout="csv", root=str(tmp_path), out=str(tmp_path / "other"), **options))
    assert verify(tmp_path / "other") == []
    table = np.load(tmp_path / "other" / "patches.npy")
    table["he"][-1] = table["he"][0]
    write_patches(tmp_path / "other", table)
    (problem,) = verify(tmp_path / "other")
    assert problem.startswith("the H&E of p0") and "and the H&E of p3" in problem and "are one file" in problem


def test_many_samples_are_compared_in_time():
    dice = np.random.default_rng(0)
    count, size = 300_000, 1000
    seen, table = np.zeros(count, SEEN), np.zeros(count, PATCHES)
    for name in ("key", "group"):
        seen[name] = dice.integers(1, 2**63, count, np.uint64)
    seen["pair"], seen["known"] = seen["key"], True
    seen["number"] = np.arange(count)
    for name in ("he", "ihc"):
        table[name] = dice.integers(1, 2**63, count, np.uint64)
    table["group"] = seen["group"]
    shards = [SimpleNamespace(samples=size, split="train") for _ in range(count // size)]
    began = time.process_time()
    assert find_repeats(shards, seen, table) == []
    # 0.3 s on a quiet machine.
    assert time.process_time() - began < 10
