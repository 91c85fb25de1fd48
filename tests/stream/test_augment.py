import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from optics import mix, od_to_rgb

from lgd.stain.deconvolve import EOSIN, H_E, HEMATOXYLIN, rgb_to_od, unmix
from lgd.stream.augment import D4_ORDER, d4, d4_grid, draw, light_jitter, stain_jitter
from lgd.stream.plan import splitmix64

ELEMENTS = torch.arange(D4_ORDER)
SEEDS = st.integers(0, 2**63 - 1)


def corners() -> torch.Tensor:
    """(8, 1, 2, 2): the same labelled square eight times."""
    return torch.tensor([[0, 1], [2, 3]]).expand(D4_ORDER, 1, 2, 2)


def test_elements_are_turns_then_a_flip() -> None:
    turned = d4(corners(), ELEMENTS).flatten(1).tolist()
    assert turned[0] == [0, 1, 2, 3]
    assert turned[1] == [1, 3, 0, 2]  # a quarter turn counter-clockwise
    assert turned[2] == [3, 2, 1, 0]
    assert turned[4] == [1, 0, 3, 2]  # left and right exchanged
    assert turned[5] == [3, 1, 2, 0]  # turned first, flipped then


def test_the_elements_are_a_group() -> None:
    once = d4(corners(), ELEMENTS)
    assert len(set(map(tuple, once.flatten(1).tolist()))) == D4_ORDER
    known = {tuple(x) for x in once.flatten(1).tolist()}
    for k in range(D4_ORDER):
        again = d4(once, torch.full((D4_ORDER,), k)).flatten(1).tolist()
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
    x = torch.randint(0, 256, (D4_ORDER, 3, 32, 32)).float()  # integers: block means are exact in any order

    def grid(image: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(image, 8).permute(0, 2, 3, 1)

    assert torch.equal(grid(d4(x, ELEMENTS)), d4_grid(grid(x), ELEMENTS))
    assert torch.equal(grid(d4(x, ELEMENTS))[..., 0], d4_grid(grid(x)[..., 0], ELEMENTS))


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
