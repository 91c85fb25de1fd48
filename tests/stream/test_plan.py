import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.stream.plan import ORDER, Plan, World, eval_numbers, offsets, rank_positions

GOLDEN = ("lgd-order/1", [2, 1, 0, 3, 11, 7, 10, 4, 8, 6, 9, 5])

sizes_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def epoch_of(plan, epoch=0):
    """The sample numbers of one epoch, in order."""
    epochs, numbers = plan.samples(np.arange(epoch * plan.total, (epoch + 1) * plan.total))
    assert (epochs == epoch).all()
    return numbers


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of, seed=st.integers(0, 2**31), lanes=st.integers(1, 200), epoch=st.integers(0, 5))
def test_an_epoch_has_each_sample_once(sizes, seed, lanes, epoch):
    assert np.array_equal(np.sort(epoch_of(Plan(sizes, seed=seed, lanes=lanes), epoch)), np.arange(sum(sizes)))


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes_of,
    seed=st.integers(0, 1000),
    lanes=st.integers(1, 70),
    world=st.integers(1, 64),
    accumulate=st.integers(1, 3),
    per_rank=st.integers(1, 3),
    cut=st.integers(0, 10**4),
)
def test_ranks_and_restarts_do_not_change_the_order(sizes, seed, lanes, world, accumulate, per_rank, cut):
    batch, steps = world * accumulate * per_rank, 8

    def used(plan, ranks, start, last):
        """Epoch and number of each position, as `ranks` ranks draw them from position `start` on, step by step."""
        for position in range(start, last, batch):
            for micro in range(accumulate):
                mine = [rank_positions(position, batch, accumulate, World(rank=r, size=ranks)) for r in range(ranks)]
                drawn = [plan.samples(positions[micro]) for positions in mine]
                together = np.empty((2, batch // accumulate), np.int64)
                for rank, (epochs, numbers) in enumerate(drawn):
                    together[0, rank::ranks], together[1, rank::ranks] = epochs, numbers
                yield together

    # A plan of its own after the cut, as a restarted process has.
    start, end = cut * batch, (cut + steps) * batch
    middle = start + (steps // 2) * batch
    alone = np.stack(Plan(sizes, seed=seed, lanes=lanes).samples(np.arange(start, end)))
    first = used(Plan(sizes, seed=seed, lanes=lanes), world, start, middle)
    second = used(Plan(sizes, seed=seed, lanes=lanes), 1, middle, end)
    assert np.array_equal(alone, np.concatenate([*first, *second], axis=1))


@given(sizes=sizes_of, world=st.integers(1, 64))
def test_evaluation_sees_each_sample_once_and_no_rank_waits_for_more_than_one(sizes, world):
    total = sum(sizes)
    shares = [eval_numbers(total, World(rank=r, size=world)) for r in range(world)]
    assert [number for share in shares for number in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(sizes=sizes_of)
def test_firsts_count_through_the_shards(sizes):
    naive = [sum(sizes[:shard]) for shard in range(len(sizes) + 1)]
    assert offsets(sizes).tolist() == naive


def test_orders_differ_by_seed_epoch_and_lanes():
    plan = Plan((50, 50), seed=1, lanes=2)
    assert not np.array_equal(epoch_of(plan, 0), epoch_of(plan, 1))
    assert not np.array_equal(epoch_of(plan), epoch_of(Plan((50, 50), seed=2, lanes=2)))
    assert not np.array_equal(epoch_of(plan), epoch_of(Plan((50, 50), seed=1, lanes=4)))


def test_the_order_is_the_one_that_its_name_stands_for():
    """Whoever changes the order names it anew: checkpoints and finished networks depend on the name."""
    order = epoch_of(Plan((3, 5, 4), seed=7, lanes=2), epoch=1)
    assert (ORDER, order.tolist()) == GOLDEN


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_place_of_its_lane_is_as_likely_for_a_sample(lanes):
    plan = Plan((6, 6), seed=0, lanes=lanes)
    places = np.array([np.flatnonzero(epoch_of(plan, epoch) == 7)[0] for epoch in range(3000)])
    lane = np.arange(12) % lanes == places[0] % lanes
    counts = np.bincount(places, minlength=12)
    assert (counts[~lane] == 0).all()
    expected = 3000 / lane.sum()
    assert np.abs(counts[lane] - expected).max() < 4 * np.sqrt(expected)


def same_slide(numbers, slide, batch):
    """The expected share of a batch that comes from the slide of one of its samples."""
    whole = numbers[: len(numbers) // batch * batch].reshape(-1, batch)
    shares = []
    for row in whole:
        counts = np.unique(slide[row], return_counts=True)[1]
        shares.append((counts**2).sum() / batch**2)
    return float(np.mean(shares))


@pytest.mark.parametrize(("slides", "a_slide", "shard", "lanes", "batch"), [
    (51, 76, 512, 64, 32),  # BCI's training split
    (51, 76, 512, 64, 256),
    (51, 76, 64, 64, 64),
    (1000, 20, 64, 64, 64),
    (200, 300, 128, 64, 96),  # a slide fills several shards; half as many samples again as lanes
    (40, 1000, 1000, 16, 24),
])  # fmt: skip
def test_a_batch_is_mixed_nearly_as_by_a_full_shuffle(slides, a_slide, shard, lanes, batch):
    """On shards built in slide order."""
    total = slides * a_slide
    slide = np.arange(total) // a_slide
    sizes = [min(shard, total - start) for start in range(0, total, shard)]
    planned = np.mean([same_slide(epoch_of(Plan(sizes, seed=s, lanes=lanes)), slide, batch) for s in range(2)])
    shuffled = same_slide(np.random.default_rng(0).permutation(total), slide, batch)
    assert planned <= 1.5 * shuffled


@pytest.mark.parametrize("world", [1, 2, 8, 16, 64])
def test_a_node_reads_its_share_of_the_shards_and_keeps_it(world):
    """Where the world divides the lanes. It reads exactly its samples; here whole shards count, as they are fetched."""
    sizes = np.random.default_rng(1).integers(80, 100, 24 * world)
    plan = Plan(sizes, seed=3, lanes=64)
    first = offsets(sizes)
    for rank in range(world):
        shards = []
        for epoch in range(2):
            start = -(-epoch * plan.total // world) * world
            numbers = plan.samples(np.arange(start + rank, start + plan.total, world))[1]
            shards.append(set(np.unique(np.searchsorted(first, numbers, side="right") - 1).tolist()))
        read = sum(int(sizes[shard]) for shard in shards[0])
        assert read <= 1.1 * plan.total / world
        assert len(shards[0] ^ shards[1]) <= 2


BILLION = """
import sys, tracemalloc
import numpy as np
from lgd.stream.plan import Plan
for world in (1, 64):
    tracemalloc.start()
    plan = Plan(np.full(10**5, 10**4), seed=0, lanes=64)
    position = 3 * 10**9 - 64
    for _ in range(4):
        # Over the border of two epochs.
        numbers = plan.samples(np.arange(position, position + 64, world))[1]
        assert 0 <= numbers.min() and numbers.max() < 10**9
        position += 64
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_memory_is_bounded_at_a_billion_samples():
    # A process of its own: beside threads that other tests have left, tracing can end the process.
    done = subprocess.run([sys.executable, "-c", BILLION], capture_output=True, text=True, check=True)
    peaks = list(map(int, done.stdout.split()))
    assert len(peaks) == 2 and max(peaks) < 32e6
