import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.data.plan import Plan, World, address, eval_numbers, rank_positions

sizes_of = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of, seed=st.integers(0, 2**31), lanes=st.integers(1, 70), epoch=st.integers(0, 5))
def test_an_epoch_has_each_sample_once(sizes, seed, lanes, epoch):
    order = Plan(sizes=sizes, seed=seed, lanes=lanes).order(epoch)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes_of,
    seed=st.integers(0, 1000),
    world=st.integers(1, 8),
    accumulate=st.integers(1, 3),
    per_rank=st.integers(1, 4),
    cut=st.integers(0, 12),
)
def test_ranks_and_restarts_do_not_change_the_order(sizes, seed, world, accumulate, per_rank, cut):
    plan = Plan(sizes=sizes, seed=seed, lanes=4)
    batch, steps = world * accumulate * per_rank, 12

    def used(ranks, first, last):
        """Sample numbers of each step, in the order of positions, as `ranks` ranks draw them."""
        for step in range(first, last):
            positions = [
                np.concatenate(rank_positions(step, batch, accumulate, World(rank=r, size=ranks))) for r in range(ranks)
            ]
            yield np.sort(np.concatenate(positions))

    alone = list(used(1, 0, steps))
    shared = [*used(world, 0, cut), *used(1, cut, steps)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert np.array_equal(np.concatenate(alone), np.arange(steps * batch))
    # Batches run on across epochs: whole epochs within these steps hold each sample once.
    epochs, numbers = plan.samples(np.concatenate(alone))
    for epoch in range(steps * batch // plan.total):
        assert np.array_equal(np.sort(numbers[epochs == epoch]), np.arange(plan.total))


@given(sizes=sizes_of, world=st.integers(1, 64))
def test_evaluation_sees_each_sample_once(sizes, world):
    total = sum(sizes)
    seen = np.concatenate([eval_numbers(total, World(rank=r, size=world)) for r in range(world)])
    assert np.array_equal(np.sort(seen), np.arange(total))


@given(sizes=sizes_of)
def test_addresses_count_through_the_shards(sizes):
    shards, rows = address(sizes, np.arange(sum(sizes)))
    naive = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == naive


def test_orders_differ_by_seed_and_epoch():
    plan = Plan(sizes=(50, 50), seed=1, lanes=2)
    assert not np.array_equal(plan.order(0), plan.order(1))
    assert not np.array_equal(plan.order(0), Plan(sizes=(50, 50), seed=2, lanes=2).order(0))


def test_a_rank_reads_its_own_lanes_when_the_world_divides_them():
    plan = Plan(sizes=(30,) * 8, seed=0, lanes=8)
    shards_of_rank = []
    for rank in range(4):
        positions = np.concatenate([rank_positions(s, 16, 1, World(rank=rank, size=4))[0] for s in range(15)])
        shards_of_rank.append(set(address(plan.sizes, plan.samples(positions)[1])[0].tolist()))
    assert all(len(shards) == 2 for shards in shards_of_rank)
    assert set.union(*shards_of_rank) == set(range(8))
