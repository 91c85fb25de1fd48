import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.retrieval.factory import fit_whitening
from lgd.retrieval.index_files import Whitening


def draw(rows=200, dim=8, seed=0):
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.normal(size=(dim, dim)))
    return random.normal(size=(rows, dim)) / np.arange(1, dim + 1) @ turn + 5


def whiten_naively(latents, components):
    """Principal components by a singular value decomposition, scaled to a variance of 1; up to their signs."""
    centred = latents - latents.mean(0)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :components] * np.sqrt(len(latents))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(20, 90), components=st.integers(1, 8), parts=st.integers(1, 7), seed=st.integers(0, 99))
def test_it_is_that_of_its_naive_twin_however_the_latents_come(rows, components, parts, seed):
    latents = draw(rows, seed=seed)
    found = fit_whitening(np.array_split(latents, parts), components).apply(latents)
    expected = whiten_naively(latents, components)
    signs = np.sign((found * expected).sum(0))
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found * signs, expected, atol=5e-3)
    np.testing.assert_allclose(np.cov(found.T, bias=True).reshape(components, -1), np.eye(components), atol=2e-3)


def test_a_ridge_to_latents_whitened_is_the_ridge_to_whitened_latents():
    """Why the map and the whitening can be two files."""
    random = np.random.default_rng(1)
    latents = draw()
    x = np.column_stack([latents[:, :3] + random.normal(size=(200, 3)), np.ones(200)])
    penalty = np.diag([7.0, 7.0, 7.0, 0.0])
    whitening = fit_whitening([latents], 4)

    def fit(y):
        return x @ np.linalg.solve(x.T @ x + penalty, x.T @ y)

    np.testing.assert_allclose(whitening.apply(fit(latents)), fit(whitening.apply(latents)), atol=1e-4)


def test_directions_along_which_nothing_varies_are_left_out():
    flat = np.column_stack([draw(dim=3), np.full((200, 2), 7.0)]) @ np.random.default_rng(2).normal(size=(5, 6))
    assert fit_whitening([flat], 32).axes_Dk.shape == (6, 3)
    assert fit_whitening([draw(rows=4)], 32).axes_Dk.shape == (8, 3), "four latents span three directions"
    with pytest.raises(DataError, match="all latents of the gallery are alike: .* latents.components to 0"):
        fit_whitening([np.ones((9, 4))], 2)
    with pytest.raises(DataError, match="not finite"):
        fit_whitening([np.full((9, 4), np.nan)], 2)


def test_the_axes_point_the_same_way_whatever_the_solver_says():
    axes = fit_whitening([draw()], 5).axes_Dk
    assert (axes[np.abs(axes).argmax(0), range(5)] > 0).all()


def test_a_file_gives_the_same_whitening_again():
    whitening, file = fit_whitening([draw()], 3), io.BytesIO()
    whitening.write(file)
    content = file.getvalue()
    again = Whitening.read(io.BytesIO(content), 8, 3)
    assert np.array_equal(again.mean_D, whitening.mean_D) and np.array_equal(again.axes_Dk, whitening.axes_Dk)
    latents = draw(seed=3)
    assert np.array_equal(again.apply(latents), whitening.apply(latents))
    for odd in (content[:-1], content + b"x", b"", content[:-4] + np.float32(np.nan).tobytes()):
        with pytest.raises(ValueError, match="bytes, and 3 axes of 8 numbers|not finite"):
            Whitening.read(io.BytesIO(odd), 8, 3)
