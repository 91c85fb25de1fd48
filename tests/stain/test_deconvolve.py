import math

import numpy as np
import pytest
import torch
from optics import mix, od_to_rgb
from skimage.color import combine_stains, separate_stains

from lgd.stain.deconvolve import DAB, H_DAB, H_E, rgb_to_od, stain_matrix, unmix

MATRICES = pytest.mark.parametrize("stains", [H_E, H_DAB], ids=["H_E", "H_DAB"])


def random_rgb(*shape: int) -> torch.Tensor:
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_optical_density_is_base_10() -> None:
    rgb = torch.tensor([255, 26, 1, 0], dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    od = rgb_to_od(rgb)[0, 0, 0].tolist()
    assert od == pytest.approx([0.0, -math.log10(26 / 255), math.log10(255), math.log10(255)], abs=1e-6)
    assert rgb_to_od(torch.tensor([[[[200.0]]] * 3]), white=200.0).abs().max() == 0


def test_a_white_per_image_and_channel_is_taken() -> None:
    rgb = random_rgb(2, 3, 4, 5)
    white = torch.tensor([[250.0, 240.0, 230.0], [170.0, 171.0, 172.0]])[:, :, None, None]
    alone = torch.cat([rgb_to_od(rgb[i : i + 1], white[i : i + 1]) for i in range(2)])
    assert torch.equal(rgb_to_od(rgb, white), alone)
    torch.testing.assert_close(od_to_rgb(alone, white), rgb.float(), rtol=1e-5, atol=0)


def test_the_input_is_left_alone() -> None:
    rgb = random_rgb(1, 3, 4, 4).float()
    before = rgb.clone()
    rgb_to_od(rgb)
    assert torch.equal(rgb, before)


@MATRICES
def test_matrices_are_unit_vectors_with_a_perpendicular_residual(stains: torch.Tensor) -> None:
    gram = stains @ stains.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(3, dtype=torch.float64))
    assert gram[2, :2].abs().max() < 1e-12
    assert torch.linalg.det(stains) > 0


@MATRICES
def test_mixing_undoes_unmixing(stains: torch.Tensor) -> None:
    od = rgb_to_od(random_rgb(2, 3, 8, 8))
    torch.testing.assert_close(mix(unmix(od, stains), stains), od, rtol=0, atol=1e-5)


def test_a_pure_stain_is_found_as_its_amount() -> None:
    vector = stain_matrix(DAB, (1.0, 0.0, 0.0))[0]
    od = (0.7 * vector).float().view(1, 3, 1, 1)
    torch.testing.assert_close(unmix(od, H_DAB).flatten(), torch.tensor([0.0, 0.7, 0.0]), rtol=0, atol=1e-6)


@MATRICES
def test_scikit_image_gives_a_sixth(stains: torch.Tensor) -> None:
    rgb = random_rgb(1, 3, 16, 16)
    theirs = separate_stains(rgb[0].permute(1, 2, 0).numpy(), np.linalg.inv(stains.numpy()))
    ours = unmix(rgb_to_od(rgb), stains)[0].permute(1, 2, 0).clamp(min=0).numpy()
    assert ours.max() > 1
    np.testing.assert_allclose(ours, 6 * theirs, atol=1e-5)


@MATRICES
def test_scikit_image_combines_a_sixth_to_the_same_colour(stains: torch.Tensor) -> None:
    amounts = 0.5 * torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    theirs = combine_stains(amounts[0].permute(1, 2, 0).double().numpy() / 6, stains.numpy())
    ours = od_to_rgb(mix(amounts, stains), 1.0)[0].permute(1, 2, 0).clamp(0, 1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
