"""Nuclear stain of virtual tissue, and what is known of each nucleus."""

import dataclasses

import numpy as np
import pytest

from lgd.tissue.drawing import Cells, Tissue, draw_tissue
from lgd.tissue.look import Look
from lgd.tissue.sections import Scene, draw_pair, list_nuclei, share_at, slide_height
from lgd.tissue.staining import NuclearStain, cut_patch, stain_nuclei, summarise_nuclei

NUCLEI = Scene("nuclei")


def _brown(ihc: np.ndarray) -> np.ndarray:
    """How much more blue than red light is absorbed (H, W)."""
    light = ihc.astype(np.float64) / np.percentile(ihc, 99, axis=(0, 1))
    return np.log10(np.maximum(light[..., 0], 0.004)) - np.log10(np.maximum(light[..., 2], 0.004))


@pytest.mark.parametrize("slide", range(3))
def test_the_truth_is_that_of_the_nuclei_that_are_listed(slide):
    _, ihc, truth = draw_pair(3, slide, 0, 192, scene=NUCLEI)
    nuclei = list_nuclei(3, slide, 0, 192)
    assert summarise_nuclei(nuclei).items() <= truth.items()
    assert truth["percent"] == round(100 * truth["ihc_positive_tumour_nuclei"] / truth["ihc_tumour_nuclei"], 1)
    assert len(nuclei.yx) == truth["ihc_nuclei"] and ((nuclei.yx >= 0) & (nuclei.yx < 192)).all()
    assert (nuclei.density[~nuclei.positive] == 0).all() and (nuclei.density[nuclei.positive] > 0.1).all()
    # Positive nuclei are brown in the image, where the list has them.
    row, column = nuclei.yx.astype(int).T
    brown = _brown(ihc)[row, column]
    if nuclei.positive.any():
        assert np.median(brown[nuclei.positive]) > np.quantile(brown[~nuclei.positive], 0.9)


def test_shares_go_from_1_to_90_percent_and_patches_lie_around_their_slide():
    heights = [slide_height(0, slide) for slide in range(200)]
    assert min(heights) < 0.1 and max(heights) > 2.9 and 1.4 < np.mean(heights) < 1.6
    assert (share_at(0), share_at(3)) == pytest.approx((0.01, 0.9))
    slides, patches = [], []
    for slide in range(24):
        _, _, truth = draw_pair(7, slide, 0, 128, scene=NUCLEI)
        if truth["ihc_tumour_nuclei"] > 5:
            slides.append(truth["slide_percent"])
            patches.append(truth["percent"])
    assert np.corrcoef(slides, patches)[0, 1] > 0.7
    assert abs(np.mean(patches) - np.mean(slides)) < 10


def test_a_patch_without_tumour_has_no_share():
    cut = cut_patch(np.random.default_rng(1), *_barren(), 64, neighbouring=True)
    stained, nuclei = stain_nuclei(np.random.default_rng(2), cut, NuclearStain(share=0.5, density=1.0, bleed=0.0), 1.0)
    assert not nuclei.tumour.any() and np.isnan(stained.measured["percent"])


def test_others_than_tumour_are_mostly_negative_and_clones_alike():
    positive = {True: [], False: []}
    for slide in range(12):
        nuclei = list_nuclei(5, slide, 0, 128)
        for kind in positive:
            positive[kind] += nuclei.positive[nuclei.tumour == kind].tolist()
    assert np.mean(positive[False]) < 0.08 < 0.2 < np.mean(positive[True])


def test_darker_stain_makes_the_same_nuclei_darker():
    drawn = []
    for density in (0.5, 1.0):
        tissue = draw_tissue(np.random.default_rng(0), Look(np.random.default_rng(4)), 0.5, 128, False)
        cut = cut_patch(np.random.default_rng(1), *tissue, 128, neighbouring=True)
        stain = NuclearStain(share=0.5, density=density, bleed=0.1)
        drawn.append(stain_nuclei(np.random.default_rng(2), cut, stain, 1.0))
    (faint, one), (dark, other) = drawn
    assert np.array_equal(one.positive, other.positive) and np.array_equal(one.yx, other.yx)
    assert dark.measured["positive_od"] > 1.7 * faint.measured["positive_od"]
    # The cytoplasm is brown too, but less; where all is dark, no blue is left.
    assert (dark.blue[dark.dab > 0.8] < 0.6).all() and 0 < np.median(dark.dab[(dark.dab > 0) & (dark.blue == 1)]) < 0.2


def test_without_coupling_the_he_knows_nothing_of_the_share():
    drawn = [draw_pair(0, 3, 1, 64, coupling=0.0, level=level, scene=NUCLEI) for level in (0.0, 1.3, 3.0)]
    assert all(np.array_equal(he, drawn[0][0]) for he, _, _ in drawn)
    assert not np.array_equal(drawn[0][1], drawn[2][1])
    coupled = [draw_pair(0, 3, 1, 64, coupling=1.0, level=level, scene=NUCLEI)[0] for level in (0.0, 1.3)]
    assert not np.array_equal(*coupled)


def _barren() -> tuple[Tissue, Cells]:
    tissue, cells = draw_tissue(np.random.default_rng(0), Look(np.random.default_rng(0)), 0.5, 64, barren=True)
    return tissue, dataclasses.replace(cells, kind=np.zeros_like(cells.kind))
