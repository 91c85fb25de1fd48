"""Virtual centers: how slides are dealt to them, and how unequal they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.tissue.centers import Center
from lgd.tissue.sections import Scene, center_of, draw_pair, slide_level


@given(seed=st.integers(0, 2**32), centers=st.integers(1, 12), block=st.integers(0, 50))
def test_each_center_has_each_level_once_in_4_slides_a_center(seed, centers, block):
    slides = range(4 * centers * block, 4 * centers * (block + 1))
    dealt = {(center_of(seed, slide, centers).number, slide_level(seed, slide)) for slide in slides}
    assert len(dealt) == 4 * centers


@given(seed=st.integers(0, 2**32), centers=st.integers(2, 12), slide=st.integers(0, 999))
def test_a_shortcut_puts_the_levels_in_order_of_the_centers(seed, centers, slide):
    number, level = center_of(seed, slide, centers, 1.0).number, slide_level(seed, slide)
    assert 0 <= number < centers
    # The part of the centers that is the level's, or the one that it shares with others.
    assert number / centers < (level + 1) / 4 and level / 4 < (number + 1) / centers


def test_a_shortcut_moves_as_many_slides_as_asked():
    slides = range(400)
    moved = [sum(center_of(0, s, 4, share).number == slide_level(0, s) for s in slides) for share in (0.0, 0.5, 1.0)]
    assert moved[0] == 100 and 220 < moved[1] < 280 and moved[2] == 400


@pytest.mark.parametrize("centers, scanners", [(1, 1), (2, 2), (3, 2), (4, 3), (7, 4)])
def test_scanners_are_fewer_than_centers_and_all_are_used(centers, scanners):
    assert {Center(number, centers).scanner for number in range(centers)} == set(range(scanners))


def test_centers_look_unequal_and_slides_of_one_alike():
    """Mean colour of the IHC and the H&E: between three centers it varies more than within them."""
    colour = np.array(
        [
            [
                np.concatenate([image.mean((0, 1)) for image in draw_pair(1, slide, 0, 64, scene=scene)[:2]])
                for slide in range(6)
            ]
            for scene in (Scene("nuclei", center=Center(number, 3)) for number in range(3))
        ]
    )
    between, within = colour.mean(1).std(0), colour.std(1).mean(0)
    assert (between > 0.8 * within).all() and between.max() > 15


def test_a_center_changes_no_truth():
    truths = [draw_pair(1, 2, 0, 64, scene=Scene(center=center))[2] for center in (None, Center(0, 3), Center(2, 3))]
    density = [truth.pop("membrane_od") for truth in truths]
    assert truths[0] == truths[1] == truths[2]
    # But how brown it is.
    assert len(set(density)) > 1
