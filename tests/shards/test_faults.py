"""Damaged shard sets: training's reading path and `lgd verify` both refuse them, and say where."""

import os
import random
import shutil

import numpy as np
import pytest
from forging import (
    FIRST,
    Member,
    agree,
    assert_refused,
    entry_with,
    forge,
    make,
    read_all,
    remanifest,
    settle,
    virtual,
    with_extra,
)

from lgd.base.errors import DataError
from lgd.shards.archive import INDEX
from lgd.shards.shard_set import ShardFolder
from lgd.shards.verify import verify
from lgd.stream.reader import Reader

pytestmark = pytest.mark.faults
KINDS = ("jpg", "png", "webp")


@pytest.fixture(scope="module")
def wholes(request, tmp_path_factory):
    """One set a kind of image; the JPEGs are real patches where there are any."""
    contents = {kind: [virtual(kind, seed) for seed in range(14)] for kind in KINDS}
    try:
        folder = request.getfixturevalue("real_data") / "bci-native"
        names = sorted(path.name for path in folder.glob("HE/test/*"))
        contents["jpg"] = [(folder / stain / "test" / name).read_bytes() for name in names for stain in ("HE", "IHC")]
    except pytest.skip.Exception:
        pass
    return {kind: make(tmp_path_factory.mktemp(kind), contents[kind]) for kind in KINDS}


@pytest.fixture
def copy(wholes, tmp_path):
    """`copy(kind)`: a copy of a set, to damage."""
    return lambda kind: shutil.copytree(wholes[kind], tmp_path / kind)


@pytest.fixture
def out(copy):
    return copy("png")


def test_sets_are_whole_until_they_are_damaged(wholes, out):
    for kind in KINDS:
        assert verify(wholes[kind]) == [] and len(read_all(wholes[kind])) >= 2
    forge(out, lambda members: members)
    assert verify(out) == [] and len(read_all(out)) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_an_image_is_caught(copy, kind, fault_count):
    out, dice = copy(kind), random.Random(kind)
    shards = ShardFolder.open(out).shards
    reader = Reader(shards, ("he", "ihc"), 32)
    for _ in range(fault_count(100)):
        whole = reader.read(dice.randrange(reader.total))
        shard, role = shards[whole.shard], dice.choice(["he", "ihc"])
        entry = reader.open(whole.shard)[1][whole.row, ("json", "he", "ihc").index(role)]
        place = int(entry["offset"]) + dice.randrange(int(entry["length"]))
        bit = 1 << dice.randrange(8)
        flip(shard.path, place, bit)
        with pytest.raises(DataError) as raised:
            reader.read(whole.number)
        told = f"{shard.path}, row {whole.row}, {whole.key}, {role}: its crc32 is not the index's"
        problems = verify(out)
        assert str(raised.value).startswith(told) and any(problem.startswith(told) for problem in problems)
        assert all(shard.name in problem for problem in problems)
        flip(shard.path, place, bit)
    assert verify(out) == []


def flip(path, place, bit):
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ bit]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_tar_is_caught(copy, kind, fault_count):
    out, dice = copy(kind), random.Random(kind)
    shards = ShardFolder.open(out).shards
    path, whole, manifest = shards[0].path, shards[0].path.read_bytes(), (out / "manifest.json").read_bytes()
    edges = [int(place) + shift for place in shards[0].index()["offset"].flat for shift in (-512, 0)]
    edges += [0, 1, len(whole) - 10240, len(whole) - 1024, len(whole) - 512, len(whole) - 1]
    for number in range(fault_count(14)):
        cut = dice.choice(edges) if number % 2 else dice.randrange(len(whole))
        path.write_bytes(whole)
        reader = Reader(shards, ("he", "ihc"), 32)
        last = reader.read(shards[0].samples - 1)
        with path.open("r+b") as stream:
            stream.truncate(cut)
        if cut < int(shards[0].index()[-1, 2]["offset"]):
            # While it is open, only what is asked for can be missed.
            with pytest.raises(DataError, match=rf"{FIRST}\.tar, row {last.row}, .*the file ends after"):
                reader.read(last.number)
        assert_refused(out, FIRST, f"has {cut} bytes, but the manifest says {len(whole)}")
        agree(out)
        assert_refused(out, FIRST)
        (out / "manifest.json").write_bytes(manifest)


def test_a_cut_index_is_caught(out, fault_count):
    path, dice = out / f"{FIRST}.idx", random.Random(0)
    whole = path.read_bytes()
    for number in range(fault_count(18)):
        path.write_bytes(
            whole[: dice.choice([0, 8, 128, len(whole) - 1]) if number % 2 else dice.randrange(len(whole))]
        )
        assert_refused(out, f"{FIRST}.idx does not match its digest")
    path.write_bytes(whole + b"\0")
    assert_refused(out, f"{FIRST}.idx does not match its digest")


@pytest.mark.parametrize("suffix", ["tar", "idx"])
@pytest.mark.parametrize("spoil", [os.unlink, lambda path: (path.unlink(), path.mkdir())], ids=["missing", "folder"])
def test_a_missing_file_is_caught(out, suffix, spoil):
    shards = ShardFolder.open(out).shards
    spoil(out / f"{FIRST}.{suffix}")
    assert_refused(out, f"{FIRST}.{suffix} is missing")
    # And where it goes missing after the run has begun.
    with pytest.raises(DataError, match=rf"{FIRST}\.{suffix} (is missing|cannot be opened)"):
        shards[0].open()


@pytest.mark.parametrize("place", range(9))
def test_a_missing_member_is_caught(out, place):
    forge(out, lambda members: members[:place] + members[place + 1 :])
    assert_refused(out, f"{FIRST}.idx is no table of 3 samples")


def test_missing_samples_are_caught(out):
    forge(out, lambda members: members[:3] + members[6:])
    assert_refused(out, f"{FIRST}.idx is no table of 3 samples")
    shutil.copy(out / "train-000001.idx", out / f"{FIRST}.idx")
    agree(out)
    assert_refused(out, FIRST, "bytes, but its index describes members that end at byte")


@pytest.mark.parametrize("place", range(10))
def test_an_extra_member_is_caught(out, place):
    forge(out, with_extra(place, Member("extra.txt", b"text", listed=False)))
    assert_refused(out, FIRST, "the index places it at byte" if place < 9 else "behind its last sample")


def test_more_members_than_fit_are_caught_at_the_end(out):
    forge(out, with_extra(9, Member("extra.txt", bytes(20000), listed=False)))
    assert_refused(out, FIRST, "but its index describes members that end at byte")


@pytest.mark.parametrize(
    "order, reason",
    [
        ([0, 2, 1, 3, 4, 5, 6, 7, 8], "row 0, p0, he: its tar header names b'p0.ihc.png', not p0.he.png"),
        ([3, 1, 2, 0, 4, 5, 6, 7, 8], "row 0, p1, he: its tar header names b'p0.he.png', not p1.he.png"),
        ([0, 4, 2, 3, 1, 5, 6, 7, 8], "row 0, p0, he: its tar header names b'p1.he.png', not p0.he.png"),
        ([1, 0, 2, 3, 4, 5, 6, 7, 8], "row 0, json: Invalid JSON"),
        ([0, 1, 2, 0, 1, 5, 6, 7, 8], "row 1, p0, ihc: its tar header names b'p1.ihc.png', not p0.ihc.png"),
    ],
)
def test_members_out_of_place_are_caught(out, order, reason):
    forge(out, lambda members: [members[place] for place in order])
    assert_refused(out, FIRST, reason)


def test_a_swapped_index_is_caught(out):
    first, second = (out / f"train-00000{number}.idx" for number in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    index = np.load(first)
    assert (index["offset"] == np.load(second)["offset"]).all(), "the test wants an index that fits"
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert_refused(out, f"{out / FIRST}.idx does not match its digest")
    for number in (0, 1):
        agree(out, f"train-00000{number}")
    assert_refused(out, f"{out / FIRST}.tar, row 0, json: its crc32 is not the index's")
    second.write_bytes(contents[1])
    for changed, reason in (
        (index[::-1], "row 0, json: the index places it at byte"),
        (np.ascontiguousarray(index[:, [0, 2, 1]]), "row 0, he: the index places it at byte"),
        (index.astype(INDEX.newbyteorder(">")), "is no table of 3 samples"),
        (np.asfortranarray(index), "is no table of 3 samples"),
    ):
        with first.open("wb") as stream:
            np.save(stream, changed)
        agree(out)
        assert_refused(out, FIRST, reason)


def test_any_flipped_bit_of_an_index_is_caught(out, fault_count):
    path, dice = out / f"{FIRST}.idx", random.Random(0)
    for _ in range(fault_count(100)):
        place, bit = dice.randrange(path.stat().st_size), 1 << dice.randrange(8)
        flip(path, place, bit)
        assert_refused(out, FIRST)
        flip(path, place, bit)


def test_shards_that_changed_places_are_caught(out):
    for suffix in ("tar", "idx"):
        (out / f"{FIRST}.{suffix}").rename(out / f"swap.{suffix}")
        (out / f"test-000000.{suffix}").rename(out / f"{FIRST}.{suffix}")
        (out / f"swap.{suffix}").rename(out / f"test-000000.{suffix}")
    with pytest.raises(DataError, match=f"{FIRST}.tar has .* but the manifest says"):
        read_all(out)
    assert any(f"{FIRST}.idx does not match its digest" in problem for problem in verify(out))
    agree(out, samples=1)
    agree(out, "test-000000", samples=3)
    assert_refused(out, f"{FIRST}.tar, row 0, p6, json: field split is 'test', but the shard is of train")


def test_shards_of_one_size_that_changed_places_are_found_by_verify(out):
    # Reading does not compute a tar's digest, but that of its index.
    for suffix in ("tar", "idx"):
        (out / f"{FIRST}.{suffix}").rename(out / f"swap.{suffix}")
        (out / f"train-000001.{suffix}").rename(out / f"{FIRST}.{suffix}")
        (out / f"swap.{suffix}").rename(out / f"train-000001.{suffix}")
    problems = verify(out)
    for number in (0, 1):
        assert any(
            problem.startswith(f"{out}/train-00000{number}.idx does not match its digest") for problem in problems
        )
        agree(out, f"train-00000{number}")
    assert verify(out) == [
        f"{out}/train-000000.tar, row 0, p3: its row of patches.npy is another sample's (group, he, ihc)",
        f"{out}/train-000001.tar, row 0: key p0 is not sorted, it follows p5",
        f"{out}/train-000001.tar, row 0, p0: its row of patches.npy is another sample's (group, he, ihc)",
    ]


@pytest.mark.parametrize(
    "change, reason",
    [
        (entry_with(samples=2), "split train has 6 samples, its shards 5"),
        (
            lambda manifest: (entry_with(samples=2)(manifest), settle(manifest["splits"]["train"])),
            "no table of 2",
        ),
        (
            lambda manifest: (entry_with(samples=4)(manifest), settle(manifest["splits"]["train"])),
            "no table of 4",
        ),
        (entry_with(bytes=20480), f"{FIRST}.tar has 51200 bytes, but the manifest says 20480"),
        (
            lambda manifest: manifest["extensions"].update(he="jpg"),
            "he: is no jpg image",
        ),
    ],
)
def test_a_manifest_that_disagrees_is_caught(out, change, reason):
    remanifest(out, change)
    assert_refused(out, reason)


@pytest.mark.parametrize(
    "change", [entry_with(sha256="0" * 64), lambda m: m["splits"]["train"]["labels"].update({"0": 1, "1+": 1})]
)
def test_facts_that_reading_does_not_use_are_checked_by_verify(out, change):
    remanifest(out, change)
    assert len(verify(out)) == 1 and "manifest" in verify(out)[0]


def test_an_edited_manifest_is_caught(out, fault_count):
    path, dice = out / "manifest.json", random.Random(0)
    whole = path.read_text()
    digits = [place for place, letter in enumerate(whole) if letter.isdigit()]
    for _ in range(fault_count(100)):
        place = dice.choice(digits)
        path.write_text(whole[:place] + str((int(whole[place]) + dice.randrange(1, 10)) % 10) + whole[place + 1 :])
        with pytest.raises(DataError, match="manifest"):
            ShardFolder.open(out)
        assert "manifest" in verify(out)[0]
