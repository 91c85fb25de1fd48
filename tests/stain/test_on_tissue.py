"""The domain targets of virtual tissue, whose truth is known; they are never told the stains that it was drawn with."""

import numpy as np
import pytest
import torch
from optics import mix, od_to_rgb
from scipy.stats import spearmanr

from lgd.stain.deconvolve import H_E, rgb_to_od, unmix
from lgd.stain.targets import estimate_white, membrane_grid, nuclei_grid
from lgd.tissue.drawing import MPP
from lgd.tissue.sections import draw_pair

SIZE = 192
GREY = 215.0
"""A slide's background is below or above it."""


def image(rgb: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rgb).permute(2, 0, 1)[None]


def count(he: torch.Tensor) -> float:
    """Nuclei in the whole patch."""
    return nuclei_grid(he, 4, MPP).mean().item() * (SIZE * MPP) ** 2 / 1000


@pytest.fixture(scope="module")
def measured() -> dict[str, np.ndarray]:
    """One patch of each of 64 slides: nuclei and membranes as measured, the truth, and the background."""
    rows = []
    for slide in range(64):
        he, ihc, truth = draw_pair(11, slide, 0, SIZE)
        focal, fraction, complete = membrane_grid(image(ihc), 4, MPP)[0].mean((0, 1)).tolist()
        rows.append(
            {
                "found": count(image(he)),
                "focal": focal,
                "fraction": fraction,
                "complete": complete,
                "white": estimate_white(image(he)).mean().item(),
                **truth,
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_nuclei_follow_the_truth_on_white_and_on_grey_backgrounds(measured):
    grey = measured["white"] < GREY
    assert 10 < grey.sum() < 54
    for chosen in (grey, ~grey):
        found, truth = measured["found"][chosen], measured["nuclei"][chosen]
        assert np.corrcoef(found, truth)[0, 1] > 0.8
        # Crowded and pale ones are missed.
        assert 0.75 < found.sum() / truth.sum() < 1.0


def test_membranes_follow_the_truth_on_white_and_on_grey_backgrounds(measured):
    grey = measured["white"] < GREY
    for chosen in (grey, ~grey):
        part = {name: values[chosen] for name, values in measured.items()}
        for name, truth, least in (
            ("focal", part["membrane_od"], 0.8),
            ("fraction", part["stained_fraction"], 0.65),
            ("complete", part["stained_fraction"] * part["membrane_completeness"], 0.75),
        ):
            assert spearmanr(part[name], truth).statistic > least, name
            assert spearmanr(part[name], part["patch_level"]).statistic > 0.75, name


@pytest.mark.parametrize("name", ["focal", "fraction", "complete"])
def test_membranes_rise_with_the_true_level(measured, name):
    means = [measured[name][measured["patch_level"] == level].mean() for level in range(4)]
    assert np.all(np.diff(means) > 0)
    assert means[0] < 0.12


def test_the_stain_of_a_slide_hardly_moves_the_count():
    """Down to 0.85 of the hematoxylin and up to 1.4 of it, with the eosin changed the other way."""
    for slide in (0, 3, 9):
        he = image(draw_pair(11, slide, 0, SIZE)[0])
        white = estimate_white(he)
        stains = unmix(rgb_to_od(he, white), H_E)
        for factor in (0.85, 1.2, 1.4):
            scaled = torch.stack([factor * stains[:, 0], stains[:, 1] / factor, stains[:, 2]], dim=1)
            changed = od_to_rgb(mix(scaled, H_E), white).round().clamp(0, 255).to(torch.uint8)
            assert count(changed) == pytest.approx(count(he), rel=0.2)


def test_a_patch_that_is_only_glass_has_neither():
    for level in (175, 245):
        glass = torch.full((1, 3, SIZE, SIZE), level, dtype=torch.uint8)
        assert count(glass) == 0
        assert membrane_grid(glass, 4, MPP).abs().max() == 0
