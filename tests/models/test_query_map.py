import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.models.query_map import PairSums, QueryMap


def make_pairs(rows=60, streams=7, dim=4, seed=0):
    """Streams of unlike scales and far from 0, and latents that follow from them but for noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, streams)) * np.logspace(-2, 3, streams) + np.linspace(0, 500, streams)
    y = (x - x.mean(0)) / x.std(0) @ random.normal(size=(streams, dim)) + random.normal(size=(rows, dim)) + 3
    # Networks give float32.
    return x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)


def fit_naively(x, y, ridge):
    """Ridge regression of centred latents on standardised streams; weights and bias of the streams as they are."""
    mean, scale = x.mean(0), x.std(0)
    z = (x - mean) / scale
    weights = np.linalg.solve(z.T @ z + ridge * len(x) * np.eye(x.shape[1]), z.T @ (y - y.mean(0))) / scale[:, None]
    return weights, y.mean(0) - mean @ weights


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("lgd.models.query_map._BLOCK", 16)


def fit_map(x, y, ridge=0.1, parts=1):
    sums = PairSums(x.shape[1], y.shape[1])
    for rows in np.array_split(np.arange(len(x)), parts):
        sums.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    return sums.fit(ridge)


def test_a_pair_counts_by_its_weight():
    """One of weight 0 is left out, and one of weight 3 counts as three."""
    x, y = make_pairs(rows=12)
    sums = PairSums(x.shape[1], y.shape[1])
    sums.add(torch.from_numpy(x), torch.from_numpy(y), torch.tensor([0.0, 3.0, *[1.0] * 10]))
    rows = [1, 1, *range(1, 12)]
    expected, found = fit_map(x[rows], y[rows]), sums.fit(0.1)
    np.testing.assert_allclose(found.weight.numpy(), expected.weight.numpy(), rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(2, 40),
    streams=st.integers(1, 9),
    dim=st.integers(1, 5),
    parts=st.integers(1, 6),
    ridge=st.sampled_from([1e-3, 0.1, 3.0]),
    seed=st.integers(0, 99),
)
def test_the_map_is_that_of_its_naive_twin_however_the_pairs_come(rows, streams, dim, parts, ridge, seed):
    x, y = make_pairs(rows, streams, dim, seed)
    weights, bias = fit_naively(x, y, ridge)
    found = fit_map(x, y, ridge, parts)
    expected = x @ weights + bias
    with torch.no_grad():
        mapped = found(torch.from_numpy(x)).numpy()
    # The map is float32.
    np.testing.assert_allclose(mapped, expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(found.weight.numpy().T, weights, rtol=2e-4, atol=1e-6 * np.abs(weights).max())


def test_the_sums_of_ranks_add_up():
    x, y = (torch.from_numpy(some) for some in make_pairs())
    whole, halves = PairSums(7, 4), [PairSums(7, 4), PairSums(7, 4)]
    whole.add(x, y)
    halves[0].add(x[::2], y[::2])
    halves[1].add(x[1::2], y[1::2])
    halves[0].total().add_(halves[1].total())
    for name, tensor in whole.fit().state_dict().items():
        torch.testing.assert_close(halves[0].fit().state_dict()[name], tensor, rtol=1e-6, atol=0)


def test_streams_in_bf16_do_not_round_the_latents():
    x, y = (torch.from_numpy(some).float() for some in make_pairs())
    rough, fine = PairSums(7, 4), PairSums(7, 4)
    rough.add(x.bfloat16(), y)
    fine.add(x.bfloat16().float(), y)
    assert all(torch.equal(*pair) for pair in zip(rough.fit().buffers(), fine.fit().buffers(), strict=True))


def test_a_stream_that_never_changes_has_no_weight():
    x, y = make_pairs()
    dead = np.insert(x, [2, 5], [1e4 / 3, 0.0], axis=1)
    found, expected = fit_map(dead, y), fit_map(x, y)
    assert (found.weight[:, [2, 6]] == 0).all()
    kept = [column for column in range(9) if column not in (2, 6)]
    torch.testing.assert_close(found.weight[:, kept], expected.weight, rtol=1e-4, atol=1e-7)


def test_more_ridge_shrinks_towards_the_mean():
    x, y = make_pairs()
    spreads = [float(fit_map(x, y, ridge)(torch.from_numpy(x)).std(0).mean()) for ridge in (1e-6, 0.1, 1, 10, 1e6)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 1e-4
    torch.testing.assert_close(
        fit_map(x, y, 1e9)(torch.from_numpy(x))[0], torch.from_numpy(y.mean(0)).float(), rtol=1e-4, atol=1e-4
    )


def test_no_pairs_and_pairs_that_are_not_finite_are_told():
    with pytest.raises(DataError, match="no training pair could be read"):
        PairSums(3, 2).fit()
    sums = PairSums(3, 2)
    sums.add(torch.full((1, 3), torch.nan), torch.zeros(1, 2))
    with pytest.raises(DataError, match="not finite: the training diverged"):
        sums.fit()


def test_the_map_has_tensors_and_nothing_to_train():
    assert [*QueryMap(3, 2).parameters()] == []
    assert {name: tuple(t.shape) for name, t in QueryMap(3, 2).state_dict().items()} == {"weight": (2, 3), "bias": (2,)}
