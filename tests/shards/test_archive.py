"""Other readers of WebDataset tars find the pairs that we find."""

import json
import os

import numpy as np
import pytest
import webdataset

from lgd.shards.archive import read_sample
from lgd.shards.builder import build
from lgd.shards.image import decode, encode
from lgd.shards.options import ShardOptions
from lgd.shards.shard_set import ShardFolder


@pytest.fixture(scope="module", params=["jpg", "png"])
def shards(request, tmp_path_factory):
    """Seven pairs in three shards; the levels and slides of some are unknown."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = ["he,ihc,key,level,slide,split"]
    for number in range(7):
        for stain in ("he", "ihc"):
            small = np.random.default_rng(10 * number + len(stain)).integers(0, 256, (4, 4, 3), np.uint8)
            pixels = np.kron(small, np.ones((6, 6, 1), np.uint8))
            (folder / f"{stain}{number}.png").write_bytes(encode(pixels, request.param))
        facts = f"{number % 4},slide é {number // 2}" if number else ","
        rows.append(f"he{number}.png,ihc{number}.png,key+{number},{facts},{'train' if number < 6 else 'test'}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    build(ShardOptions(layout="csv", root=str(folder), out=str(folder / "out"), shard_size=3))
    return ShardFolder.open(folder / "out").shards


def ours(shard):
    """Every sample of a shard: its document, its H&E and its IHC."""
    file, index = shard.open()
    with file:
        for row in range(shard.samples):
            meta, contents = read_sample(file, index, row, shard, ("he", "ihc"))
            yield meta.as_json(), bytes(contents["he"]), bytes(contents["ihc"])


def test_webdataset_finds_the_same_pairs(shards):
    for shard in shards:
        he, ihc = (f"{role}.{shard.extensions[role]}" for role in ("he", "ihc"))
        theirs = list(webdataset.WebDataset(str(shard.path), shardshuffle=False))
        found = [(json.loads(sample["json"]), sample[he], sample[ihc]) for sample in theirs]
        assert found == list(ours(shard)) and len(found) == shard.samples
        assert [sample["__key__"] for sample in theirs] == [meta["key"] for meta, _, _ in found]


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_finds_the_same_pairs(shards, tmp_path, monkeypatch, streaming):
    # Read when the package is imported: it must not look for its server.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = {"train": [str(shard.path) for shard in shards]}
    theirs = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    mine = [sample for shard in shards for sample in ours(shard)]
    he, ihc = (f"{role}.{shards[0].extensions[role]}" for role in ("he", "ihc"))
    rows = 0
    for theirs_row, (meta, he_content, ihc_content) in zip(theirs, mine, strict=True):
        assert theirs_row["__key__"] == meta["key"] and theirs_row["json"] == meta
        for name, content in ((he, he_content), (ihc, ihc_content)):
            difference = np.array(theirs_row[name].convert("RGB")).astype(int) - decode(content, name)
            # Pillow's JPEG decoder smooths chroma a little differently.
            assert np.abs(difference).max() <= 2
        rows += 1
    assert rows == 7
    raw = theirs.decode(False) if streaming else theirs.cast_column(he, datasets.Image(decode=False))
    assert [row[he]["bytes"] for row in raw] == [content for _, content, _ in mine]


def test_a_student_reads_each_sample_at_once_and_stops_before_the_ihc(shards, monkeypatch):
    reads = []
    pread = os.pread

    def counted(descriptor, length, offset):
        reads.append((offset, offset + length))
        return pread(descriptor, length, offset)

    file, index = shards[0].open()
    monkeypatch.setattr(os, "pread", counted)
    for roles, expected in (((), 1), (("he",), 1), (("ihc",), 2), (("he", "ihc"), 1), (("ihc", "he"), 1)):
        reads.clear()
        _, contents = read_sample(file, index, 1, shards[0], roles)
        assert len(reads) == expected and contents.keys() == set(roles)
        ends = (index["offset"] + index["length"])[1].tolist()
        assert reads[0][0] == int(index[1, 0]["offset"]) - 512
        assert reads[-1][1] == ends[2 if "ihc" in roles else 1 if roles else 0]
    file.close()
