import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optics import mix, od_to_rgb

from lgd.stain.deconvolve import EOSIN, H_E, HEMATOXYLIN, rgb_to_od, unmix
from lgd.stream.plan import (
    ORDER,
    Plan,
    World,
    d4,
    draw,
    eval_numbers,
    light_jitter,
    offsets,
    rank_positions,
    splitmix64,
    stain_jitter,
)

GOLDEN = ("lgd-order/1", [2, 1, 0, 3, 11, 7, 10, 4, 8, 6, 9, 5])

sizes_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def epoch_of(plan, epoch=0):
    """The sample numbers of one epoch, in order."""
    epochs, numbers = plan.samples(np.arange(epoch * plan.total, (epoch + 1) * plan.total))
    assert (epochs == epoch).all()
    return numbers


@settings(max_examples=150)
@given(sizes=sizes_of, seed=st.integers(0, 2**31), lanes=st.integers(1, 200), epoch=st.integers(0, 5))
def test_an_epoch_has_each_sample_once(sizes, seed, lanes, epoch):
    assert np.array_equal(np.sort(epoch_of(Plan(sizes, seed=seed, lanes=lanes), epoch)), np.arange(sum(sizes)))


@settings(max_examples=150)
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


ELEMENTS = torch.arange(8)
SEEDS = st.integers(0, 2**63 - 1)


def corners() -> torch.Tensor:
    """(8, 1, 2, 2): the same labelled square eight times."""
    return torch.tensor([[0, 1], [2, 3]]).expand(8, 1, 2, 2)


def test_elements_are_turns_then_a_flip() -> None:
    turned = d4(corners(), ELEMENTS).flatten(1).tolist()
    assert turned[0] == [0, 1, 2, 3]
    assert turned[1] == [1, 3, 0, 2]  # a quarter turn counter-clockwise
    assert turned[2] == [3, 2, 1, 0]
    assert turned[4] == [1, 0, 3, 2]  # left and right exchanged
    assert turned[5] == [3, 1, 2, 0]  # turned first, flipped then


def test_the_elements_are_a_group() -> None:
    once = d4(corners(), ELEMENTS)
    assert len(set(map(tuple, once.flatten(1).tolist()))) == 8
    known = {tuple(x) for x in once.flatten(1).tolist()}
    for k in range(8):
        again = d4(once, torch.full((8,), k)).flatten(1).tolist()
        assert {tuple(x) for x in again} == known
        assert [0, 1, 2, 3] in again  # some element undoes k


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9))
def test_a_batch_is_its_images_one_by_one(ks: list[int]) -> None:
    x = torch.arange(len(ks) * 2 * 9.0).view(-1, 2, 3, 3)
    naive = []
    for image, k in zip(x.numpy(), ks, strict=True):
        turned = np.rot90(image, k % 4, axes=(1, 2))
        naive.append(turned[:, :, ::-1] if k >= 4 else turned)
    assert np.array_equal(d4(x, np.array(ks)).numpy(), np.stack(naive))


def test_the_input_is_left_alone() -> None:
    x = torch.rand(8, 3, 4, 4)
    before = x.clone()
    d4(x, ELEMENTS).zero_()
    assert torch.equal(x, before)


def test_grids_turn_with_the_image() -> None:
    x = torch.randint(0, 256, (8, 3, 32, 32)).float()  # integers: block means are exact in any order

    def grid(image: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(image, 8).permute(0, 2, 3, 1)

    assert torch.equal(grid(d4(x, ELEMENTS)), d4(grid(x), ELEMENTS, (1, 2)))
    assert torch.equal(grid(d4(x, ELEMENTS))[..., 0], d4(grid(x)[..., 0], ELEMENTS, (1, 2)))


def test_only_squares_turn() -> None:
    with pytest.raises(ValueError, match="squares"):
        d4(torch.zeros(1, 3, 4, 5), torch.tensor([1]))


@given(SEEDS, st.lists(st.tuples(SEEDS, SEEDS), min_size=1, max_size=12), st.integers(1, 6), st.data())
def test_draws_do_not_depend_on_the_batch(seed: int, keys: list[tuple[int, int]], n: int, data) -> None:
    epoch, sample = np.array(keys, np.int64).T
    together = draw(seed, epoch, sample, "view", n)
    assert together.shape == (len(keys), n) and together.dtype == np.float64
    assert (together >= 0).all() and (together < 1).all()
    cut = data.draw(st.integers(0, len(keys)))
    parts = [draw(seed, epoch[s], sample[s], "view", n) for s in (slice(cut), slice(cut, None))]
    assert np.array_equal(np.concatenate(parts), together)
    # The first numbers stay when more are drawn.
    assert np.array_equal(draw(seed, epoch, sample, "view", n + 2)[:, :n], together)


def test_draws_are_uniform_and_independent() -> None:
    sample = np.arange(20000)
    draws = [draw(0, 0 * sample + epoch, sample, "view", 3) for epoch in (0, 1)]
    draws += [draw(1, 0 * sample, sample, "view", 3), draw(0, 0 * sample, sample, "stain", 3)]
    columns = np.concatenate(draws, axis=1)
    counts = np.stack([np.histogram(column, bins=16, range=(0, 1))[0] for column in columns.T])
    expected = len(sample) / 16
    chi_squared = ((counts - expected) ** 2 / expected).sum(1)
    assert chi_squared.max() < 45  # of 15 degrees of freedom: one column in 12,000 is above
    correlation = np.corrcoef(columns.T) - np.eye(12)
    assert np.abs(correlation).max() < 0.035  # five standard errors
    neighbours = np.corrcoef(columns[:-1, 0], columns[1:, 0])[0, 1]
    assert abs(neighbours) < 0.035


def test_the_hash_is_splitmix64() -> None:
    # The first two outputs of the published generator from the seed 0.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_draws_are_pinned() -> None:
    # Golden: a resumed run must meet the same augmentation with any later version.
    drawn = draw(7, np.array([0, 3]), np.array([0, 12345]), "stain", 2)
    golden = [[0.24590363275771, 0.34336793927081843], [0.6405382795446514, 0.44466587499775767]]
    np.testing.assert_array_equal(drawn, golden)


def test_without_sigma_the_image_is_unchanged() -> None:
    rgb = torch.randint(0, 256, (4, 3, 16, 16)).float()
    assert torch.equal(stain_jitter(rgb, np.random.default_rng(0).random((4, 6)), 0.0), rgb)
    assert torch.equal(stain_jitter(rgb.to(torch.uint8), np.random.default_rng(0).random((4, 6)), 0.0), rgb)


def test_jitter_scales_each_stain_by_its_own_factor() -> None:
    sigma, n = 0.1, 500
    amounts = torch.tensor([0.4, 0.3, 0.05]).view(1, 3, 1, 1).expand(n, 3, 2, 2)
    rgb = od_to_rgb(mix(amounts, H_E))
    u = draw(0, np.zeros(n, np.int64), np.arange(n), "stain", 6)
    factor = unmix(rgb_to_od(stain_jitter(rgb, u, sigma)), H_E) / amounts
    torch.testing.assert_close(factor, factor[..., :1, :1].expand_as(factor), rtol=0, atol=1e-4)
    change = (factor[..., 0, 0] - 1) / sigma
    assert change.abs().max() < 2.01
    assert change.mean(0).abs().max() < 0.2
    # A normal that is cut at two standard deviations has 0.96 of its deviation left.
    torch.testing.assert_close(change.std(0), torch.full((3,), 0.96), rtol=0, atol=0.1)
    assert np.abs(np.corrcoef(change.T.numpy()) - np.eye(3)).max() < 0.2


def test_jitter_stays_in_range_and_keeps_glass_white() -> None:
    rgb = torch.randint(0, 256, (8, 3, 8, 8)).float()
    rgb[:, :, 0, 0] = 255.0
    out = stain_jitter(rgb, draw(0, np.zeros(8, np.int64), np.arange(8), "stain", 6), 0.49)
    assert out.min() >= 0 and out.max() <= 255 and not torch.equal(out, rgb)
    assert (out[:, :, 0, 0] == 255).all()


def test_jitter_knows_hematoxylin_from_eosin() -> None:
    # Uniforms of which only the first normal is far from zero: cos(2 pi / 4) is 0.
    u = torch.tensor([[0.8, 0.8, 0.8, 0.0, 0.25, 0.25]])
    for vector, moves in ((HEMATOXYLIN, True), (EOSIN, False)):
        rgb = od_to_rgb(0.5 * torch.tensor(vector).view(1, 3, 1, 1))
        assert ((stain_jitter(rgb, u, 0.2) - rgb).abs().max() > 1) == moves


def test_light_jitter_scales_the_whole_image_and_overexposes() -> None:
    sigma, n = 0.1, 500
    rgb = torch.randint(40, 200, (n, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    u = draw(0, np.zeros(n, np.int64), np.arange(n), "light", 2)
    gain = light_jitter(rgb, u, sigma) / rgb
    torch.testing.assert_close(gain, gain[:, :1, :1, :1].expand_as(gain), rtol=1e-5, atol=0)
    change = gain[:, 0, 0, 0].log() / sigma
    assert change.abs().max() < 2.01 and change.mean().abs() < 0.2
    torch.testing.assert_close(change.std(), torch.tensor(0.96), rtol=0, atol=0.1)
    assert torch.equal(light_jitter(rgb, u, 0.0), rgb)
    bright = light_jitter(torch.full((n, 3, 1, 1), 250, dtype=torch.uint8), u, sigma)
    assert bright.max() == 255 and bright.min() > 250 * np.exp(-2.01 * sigma)
