import itertools
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.shards.archive import read_sample
from lgd.shards.image import decode
from lgd.shards.shard_set import ShardFolder
from lgd.stream.plan import Plan, World, rank_positions
from lgd.stream.reader import Reader, in_batches, stream


@pytest.fixture
def shards(tissue_config, tmp_path):
    """A copy of the shards, to damage."""
    folder = tmp_path / "shards"
    shutil.copytree(tissue_config.shard_dirs[0], folder)
    return ShardFolder.open(folder).shards


ORDER = np.random.default_rng(0).permutation(48)


def read(shards, threads, roles=("he", "ihc"), batch=7, prefetch=4):
    reader = Reader(shards, roles, 64)
    found = list(stream(reader, in_batches(ORDER, batch), threads=threads, prefetch=prefetch))
    reader.close()
    for samples in found:
        for role in roles:
            assert all(np.shares_memory(row.images[role], samples.images[role]) for row in samples.rows)
            assert np.array_equal(samples.images[role], np.stack([row.images[role] for row in samples.rows]))
    return [samples.rows for samples in found]


@pytest.mark.parametrize("prefetch", [0, 4, 100])
def test_any_number_of_threads_gives_the_same_samples_in_order(shards, prefetch):
    one, four = read(shards, 1), read(shards, 4, prefetch=prefetch)
    assert [len(batch) for batch in four] == [7] * 6 + [6]
    flat = [sample for batch in four for sample in batch]
    assert [sample.number for sample in flat] == ORDER.tolist()
    for a, b in zip((sample for batch in one for sample in batch), flat, strict=True):
        assert (a.key, a.label, a.meta, a.shard, a.row) == (b.key, b.label, b.meta, b.shard, b.row)
        assert all(np.array_equal(a.images[role], b.images[role]) for role in ("he", "ihc"))


def test_a_sample_is_what_the_tar_holds(shards):
    """Against a walk over the tars with webdataset, which knows nothing of the index."""
    import webdataset

    walked = []
    for number, shard in enumerate(shards):
        with shard.path.open("rb") as file:
            members = webdataset.tariterators.tar_file_expander([{"url": str(shard.path), "stream": file}])
            for row, sample in enumerate(webdataset.tariterators.group_by_keys(members)):
                walked.append((number, row, sample))
    assert len(walked) == 48
    reader = Reader(shards, ("he", "ihc"), None)
    for number in (0, 7, 8, 19, 20, 47):
        shard, row, raw = walked[number]
        sample = reader.read(number)
        assert (sample.shard, sample.row, sample.key) == (shard, row, raw["__key__"])
        assert sample.label == sample.meta.label and sample.meta.key == sample.key
        for role in ("he", "ihc"):
            assert np.array_equal(sample.images[role], decode(raw[f"{role}.jpg"], "x"))


def test_images_are_shrunk_to_the_size(shards):
    assert Reader(shards, ("he",), 64).read(3).images["he"].shape == (64, 64, 3)
    assert Reader(shards, ("he",), None).read(3).images["he"].shape == (128, 128, 3)


def test_native_images_come_one_by_one(shards):
    (samples,) = stream(Reader(shards, ("he",), None), [range(3)], threads=2)
    assert samples.images == {} and [row.images["he"].shape for row in samples.rows] == 3 * [(128, 128, 3)]


def list_descriptors():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_only_so_many_shards_stay_open(shards, monkeypatch):
    monkeypatch.setattr("lgd.stream.reader.OPEN_SHARDS", 2)
    before = list_descriptors()
    reader = Reader(shards, ("he",), 64)
    numbers = [int(number) for number in reader.first[:-1]]
    assert len(numbers) > 3
    once = [reader.read(number).key for number in numbers]
    assert len(list_descriptors() - before) == 2
    assert [reader.read(number).key for number in numbers] == once
    reader.close()
    assert list_descriptors() == before


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    lanes=st.integers(1, 20),
    world=st.integers(1, 64),
    threads=st.integers(1, 6),
    prefetch=st.integers(0, 5),
    cut=st.integers(0, 500),
)
def test_threads_ranks_and_cuts_do_not_change_what_is_read(tissue_config, seed, lanes, world, threads, prefetch, cut):
    """The plan's order, read by as many ranks, against the same in one thread."""
    reader = Reader(ShardFolder.open(tissue_config.shard_dirs[0]).shards, ())
    plan = Plan(reader.sizes, seed=seed, lanes=lanes)
    alone = [reader.read(int(number)).key for number in plan.samples(np.arange(cut, cut + 2 * world))[1]]
    found = [""] * (2 * world)
    for rank in range(world):
        (positions,) = rank_positions(cut, 2 * world, 1, World(rank=rank, size=world))
        numbers = plan.samples(positions)[1]
        batches = stream(reader, [numbers[:1], numbers[1:]], threads=threads, prefetch=prefetch)
        found[rank::world] = [row.key for samples in batches for row in samples.rows]
    assert found == alone
    reader.close()


@pytest.mark.parametrize("threads", [2, 4])
def test_all_threads_share_a_batch_however_small(shards, threads):
    together = threading.Barrier(threads, timeout=60)

    class Meeting(Reader):
        def decode(self, image, out):
            together.wait()
            return super().decode(image, out)

    (samples,) = stream(Meeting(shards, ("he",), 64), [range(8)], threads=threads)
    assert len(samples.rows) == 8


def test_a_thread_reads_the_bytes_of_some_samples_before_it_decodes_them(shards):
    done = []

    class Noting(Reader):
        def read_bytes(self, number, skip=False):
            done.append(("read", number))
            return super().read_bytes(number, skip)

        def decode(self, image, out):
            done.append(("decode", image.name))
            return super().decode(image, out)

    list(stream(Noting(shards, ("he",), 64), [range(20)], threads=1))
    runs = [(what, len(list(some))) for what, some in itertools.groupby(done, lambda one: one[0])]
    assert runs == [("read", 8), ("decode", 8), ("read", 8), ("decode", 8), ("read", 4), ("decode", 4)]


def test_an_abandoned_stream_waits_for_no_thread(shards):
    """Garbage collection may close it in a thread that holds what the reading threads wait for."""
    wait = threading.Event()

    class Slow(Reader):
        def open(self, shard):
            assert shard == 0 or wait.wait(60)
            return super().open(shard)

    reader = Slow(shards, ("he",), 64)
    batches = stream(reader, in_batches(range(reader.total), 4), threads=2, prefetch=2)
    assert next(batches).rows[0].number == 0
    closing = threading.Thread(target=batches.close)
    closing.start()
    closing.join(30)
    waited = closing.is_alive()
    wait.set()
    closing.join()
    assert not waited


def test_a_bad_sample_can_be_skipped_and_says_why(shards):
    damage(shards[1], 2, "he")
    bad = shards[0].samples + 2
    (samples,) = stream(Reader(shards, ("he",), 64), [[bad - 1, bad, bad + 1]], threads=2, skip=True)
    before, skipped, after = samples.rows
    assert not before.error and not after.error
    assert (skipped.number, skipped.shard, skipped.row, skipped.label) == (bad, 1, 2, None)
    assert "train-000001.tar, row 2" in skipped.error and "crc32" in skipped.error
    assert not samples.images["he"][1].any() and samples.images["he"][2].any()


def test_a_shard_that_cannot_be_opened_is_never_skipped(shards):
    shards[1].path.unlink()
    batches = stream(Reader(shards, ("he",), 64), [[0], [shards[0].samples]], threads=1, skip=True)
    with pytest.raises(DataError, match=r"train-000001\.tar"):
        list(batches)


def damage(shard, row, role):
    """Flip one bit in the middle of a member."""
    entry = shard.index()[row, shard.roles.index(role)]
    with shard.path.open("r+b") as file:
        place = int(entry["offset"]) + int(entry["length"]) // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_only_the_members_that_are_asked_for_are_read(shards):
    before = read(shards, 2, roles=("he",))
    key = Reader(shards, ()).read(shards[0].samples + 2).key
    for row in range(shards[1].samples):
        damage(shards[1], row, "ihc")
    after = read(shards, 2, roles=("he",))
    for a, b in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        assert a.images.keys() == {"he"} and np.array_equal(a.images["he"], b.images["he"])
    with pytest.raises(DataError) as caught:
        Reader(shards, ("ihc",), 64).read(shards[0].samples + 2)
    message = str(caught.value)
    assert str(shards[1].path) in message and f"{key}, ihc" in message and "crc32" in message
    with pytest.raises(DataError, match=r"train-000001\.tar, row \d, .*ihc: its crc32"):
        read(shards, 2, roles=("he", "ihc"))


@pytest.mark.parametrize("role", ["json", "he"])
@pytest.mark.faults
def test_a_damaged_member_stops_the_stream(shards, role):
    damage(shards[2], 1, role)
    with pytest.raises(DataError, match=rf"{shards[2].name}\.tar, row 1, .*{role}: its crc32"):
        read(shards, 2, roles=("he",))


def test_a_stream_can_be_left_and_its_reader_used_again(shards):
    reader = Reader(shards, ("he",), 64)
    some = stream(reader, in_batches(ORDER, 4), threads=2)
    assert len(next(some).rows) == 4
    some.close()
    reader.close()
    assert reader.read(int(ORDER[0])).number == ORDER[0]


def test_batches_are_asked_for_no_further_than_the_prefetch(shards):
    asked = []

    def numbers():
        for number in range(40):
            asked.append(number)
            yield np.array([number])

    samples = stream(Reader(shards, (), 64), numbers(), threads=1, prefetch=3)
    next(samples)
    assert len(asked) == 4
    samples.close()


@pytest.fixture
def small_he(small_he_shards, tmp_path):
    """A copy of the shards that have the H&E at 64 px too, to damage."""
    folder = tmp_path / "small-he"
    shutil.copytree(small_he_shards, folder)
    return ShardFolder.open(folder).shards


def test_the_he_of_the_readers_size_is_read_where_it_is_stored(shards, small_he):
    native = [sample for batch in read(shards, 1) for sample in batch]
    small = [sample for batch in read(small_he, 2) for sample in batch]
    for one, other in zip(native, small, strict=True):
        assert one.meta == other.meta and one.number == other.number
        assert np.array_equal(one.images["ihc"], other.images["ihc"])
        there = small_he[other.shard]
        with there.path.open("rb") as file:
            stored = read_sample(file, there.index(), other.row, there, ("hes",))[1]["hes"]
        assert np.array_equal(other.images["he"], decode(stored, "x"))
        assert not np.array_equal(one.images["he"], other.images["he"])


@pytest.mark.parametrize("size", [None, 32, 128])
def test_at_any_other_size_the_native_he_is_read(shards, small_he, size):
    for number in (0, 9, 47):
        images = [Reader(some, ("he", "ihc"), size).read(number).images for some in (shards, small_he)]
        assert all(np.array_equal(images[0][role], images[1][role]) for role in ("he", "ihc"))


def test_sets_with_and_without_a_small_he_are_mixed(shards, small_he):
    mixed = Reader([*shards, *small_he], ("he",), 64)
    alone = [Reader(some, ("he",), 64) for some in (shards, small_he)]
    (found,) = stream(mixed, [np.arange(mixed.total)], threads=2)
    wanted = [reader.read(number).images["he"] for reader in alone for number in range(reader.total)]
    assert np.array_equal(found.images["he"], np.stack(wanted))


def test_of_the_two_he_images_only_one_is_read(shards, small_he):
    for shard in small_he:
        for row in range(shard.samples):
            damage(shard, row, "he")
    read(small_he, 2, roles=("he",))
    damage(small_he[1], 2, "hes")
    bad = small_he[0].samples + 2
    with pytest.raises(DataError, match=r"train-000001\.tar, row 2, .*, he: its crc32"):
        Reader(small_he, ("he",), 32).read(bad)
    with pytest.raises(DataError, match=r"train-000001\.tar, row 2, .*, hes: its crc32"):
        read(small_he, 2, roles=("he",))
    (samples,) = stream(Reader(small_he, ("he",), 64), [[bad, bad + 1]], threads=1, skip=True)
    assert "hes: its crc32" in samples.rows[0].error and not samples.rows[1].error
    assert not samples.images["he"][0].any() and samples.images["he"][1].any()


def test_in_batches_loses_nothing():
    assert [run.tolist() for run in in_batches(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]
    assert in_batches(np.arange(0), 2) == []
