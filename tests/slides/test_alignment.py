"""The alignment of two images: high where they show one field, whatever the stain, and about 0 elsewhere."""

import numpy as np
import pytest
from PIL import Image
from sections import draw_section
from sklearn.metrics import roc_auc_score

from lgd.slides.alignment import measure_alignment

MPP, SIDE, MOVED = 0.46, 384, 76


@pytest.fixture(scope="module")
def sections():
    return draw_section("he", 4, 896, 896), draw_section("ihc", 4, 896, 896)


def auc(high, low):
    return roc_auc_score([1] * len(high) + [0] * len(low), high + low)


def cut(image, y, x):
    return image[y : y + SIDE, x : x + SIDE]


def test_only_what_shows_one_field_is_aligned(sections):
    he, ihc = sections
    places = [(y, x) for y in (120, 380) for x in (120, 380)]
    true = [measure_alignment(cut(he, *at), cut(ihc, *at), MPP) for at in places]
    moved = [measure_alignment(cut(he, y, x), cut(ihc, y + MOVED, x), MPP) for y, x in places]
    other = [measure_alignment(cut(he, *at), cut(ihc, *places[-1 - n]), MPP) for n, at in enumerate(places)]
    assert min(true) > 5 and max(moved + other) < 2.5 and np.median(moved + other) < 1.5


def test_a_scanner_that_is_darker_or_finer_changes_little(sections):
    he, ihc = (cut(image, 300, 300) for image in sections)
    z = measure_alignment(he, ihc, MPP)
    assert measure_alignment((he * 0.8).astype(np.uint8), (ihc * 0.9).astype(np.uint8), MPP) == pytest.approx(z, 0.1)
    finer = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in (he, ihc)]
    assert measure_alignment(*finer, MPP / 2) == pytest.approx(z, 0.25)


def test_glass_has_nothing_to_compare(sections):
    glass = np.full((SIDE, SIDE, 3), 240, np.uint8)
    assert measure_alignment(glass, cut(sections[1], 300, 300), MPP) is None
    assert measure_alignment(glass, glass, MPP) is None


def test_real_neighbouring_sections(real_data):
    """Two patches only: the same places, against places elsewhere and 35 um away."""
    true, moved, other = [], [], []
    for path in sorted((real_data / "bci-native" / "HE" / "test").iterdir()):
        he, ihc = (
            np.array(Image.open(one).convert("RGB")) for one in (path, path.parents[2] / "IHC" / "test" / path.name)
        )
        places = [(y, x) for y in (0, 320, 640) for x in (0, 320, 640)]
        for n, (y, x) in enumerate(places):
            true.append(measure_alignment(cut(he, y, x), cut(ihc, y, x), MPP))
            moved.append(measure_alignment(cut(he, y, x), cut(ihc, y - MOVED if y else MOVED, x), MPP))
            other.append(measure_alignment(cut(he, y, x), cut(ihc, *places[(n + 4) % 9]), MPP))
    assert auc(true, moved) >= 0.95 and auc(true, other) >= 0.95
    assert np.mean(np.array(true) >= 2) > 0.8 and np.mean(np.array(moved + other) >= 2) < 0.1


def test_slides_that_are_not_registered(real_data):
    """The negative control, shrunk far below what the score is made for: still not called aligned."""
    folder, z = real_data / "birl-unregistered", []
    for he, ihc in (("Izd2-29-041-w35_HE", "Izd2-29-041-w35_proSPC"), ("Rat-Kidney_HE", "Rat-Kidney_PanCytokeratin")):
        images = [np.array(Image.open(folder / f"{name}.jpg").convert("RGB")) for name in (he, ihc)]
        height, width = (min(image.shape[axis] for image in images) for axis in (0, 1))
        places = [(y, x) for y in range(0, height - SIDE, 200) for x in range(0, width - SIDE, 200)]
        z += [measure_alignment(*(cut(image, *at) for image in images), MPP) for at in places]
    assert np.median(z) < 1.5
