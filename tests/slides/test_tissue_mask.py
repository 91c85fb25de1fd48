"""The tissue of a slide: of any stain, over glass of any brightness, and nothing on an empty one."""

import numpy as np
import pytest
from drawn_slides import HE, IHC, draw_tissue, write_tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from lgd.slides import tissue_mask
from lgd.slides.slide import open_slide
from lgd.slides.tissue_mask import Tissue, find_tissue
from lgd.tissue.pyramid import write_pyramid

MPP = 1.0


def mask_of(path, where):
    """What was found, the share of the tissue that is kept, and the share of the glass that is taken."""
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
    height, width = tissue.mask_HW.shape
    truth = np.asarray(Image.fromarray(where).resize((width, height)))
    # The blur takes some glass along the edge.
    glass = ~ndimage.binary_dilation(truth, iterations=5)
    return tissue, tissue.mask_HW[truth].mean(), tissue.mask_HW[glass].mean()


@pytest.mark.parametrize("stain", [HE, IHC])
@pytest.mark.parametrize("glass", [215, 240, 255])
def test_tissue_of_any_stain_on_any_glass(tmp_path, stain, glass):
    pixels, where = draw_tissue(1000, glass, stain)
    tissue, kept, taken = mask_of(write_tiff(tmp_path / "slide.tif", pixels, MPP), where)
    assert kept > 0.97 and taken == 0
    assert tissue.white == pytest.approx([glass] * 3, abs=3)
    assert tissue.area_mm2 == pytest.approx(where.sum() * MPP**2 / 1e6, rel=0.1)
    assert tissue.notes == () and not tissue.is_empty


@pytest.mark.parametrize("noise", [0.0, 4.0])
@pytest.mark.parametrize("glass", [180, 230, 255])
def test_an_empty_slide_has_no_tissue(tmp_path, glass, noise):
    pixels, _ = draw_tissue(600, glass, (0, 0, 0), noise=noise)
    with open_slide(write_tiff(tmp_path / "slide.tif", pixels, MPP)) as slide:
        tissue = find_tissue(slide)
    assert tissue.is_empty and not tissue.mask_HW.any()
    assert tissue.notes == ("less than 0.1 % of it is tissue: it may be empty, or not stained",)


@pytest.mark.parametrize("fill", [0, 255])
def test_what_was_not_scanned_is_neither_glass_nor_tissue(tmp_path, fill):
    """Its white is brighter than the glass, over which that would all be tissue."""
    pixels, where = draw_tissue(800, glass=228)
    framed = np.full((1400, 1400, 3), fill, np.uint8)
    framed[300:1100, 300:1100] = pixels
    tissue, kept, taken = mask_of(write_tiff(tmp_path / "slide.tif", framed, MPP), np.pad(where, 300))
    assert kept > 0.97 and taken == 0
    assert tissue.white == pytest.approx([228] * 3, abs=3)


def test_ink_is_reported(tmp_path):
    pixels, where = draw_tissue(1000)
    image = Image.fromarray(pixels)
    for place, colour in zip((250, 350, 450), ((30, 60, 160), (20, 120, 60), (25, 25, 30)), strict=True):
        ImageDraw.Draw(image).line((150, place, 450, place), colour, 60)
    tissue, *_ = mask_of(write_tiff(tmp_path / "slide.tif", np.array(image), MPP), where)
    inked = 3 * 300 * 60 / where.sum()
    assert inked * 0.8 < tissue.pen < inked * 1.6
    assert tissue.notes == (f"{tissue.pen:.0%} of its tissue looks like pen or dye, and is scored like the rest",)


def test_eosin_that_ran_onto_the_glass_is_no_tissue(tmp_path):
    pixels, where = draw_tissue(1000, glass=235)
    halo = ndimage.gaussian_filter(np.where(where, 0.25, 0), 100)
    stained = np.where(where[..., None], pixels, pixels * 10 ** -(halo[..., None] * np.array([0.05, 0.6, 0.2])))
    dense = (halo[~where] * 0.6 > 0.03).mean()
    _, kept, taken = mask_of(write_tiff(tmp_path / "slide.tif", stained.astype(np.uint8), 2.0), where)
    # Where it is steep, at the edge of the tissue, it is taken.
    assert kept > 0.97 and taken < dense / 2


def test_what_is_out_of_focus_is_reported(tmp_path):
    pixels, where = draw_tissue(1000)
    # The second ellipse.
    blurred = pixels.copy()
    blurred[480:] = ndimage.gaussian_filter(pixels[480:].astype(np.float32), (2, 2, 0))
    share = where[480:].sum() / where.sum()
    sharp, *_ = mask_of(write_tiff(tmp_path / "sharp.tif", pixels, MPP), where)
    tissue, *_ = mask_of(write_tiff(tmp_path / "blurred.tif", blurred, MPP), where)
    assert sharp.blurred == 0
    assert 0.1 < tissue.blurred < share + 0.1 and "much less sharp than the rest" in tissue.notes[0]


def test_strips_give_what_the_whole_gives(monkeypatch, tmp_path):
    pixels, _ = draw_tissue(1000)
    path = write_tiff(tmp_path / "slide.tif", pixels, 2.0)
    with open_slide(path) as slide:
        whole = find_tissue(slide)
        monkeypatch.setattr(tissue_mask, "_STRIP", 10_000)
        assert (find_tissue(slide).mask_HW == whole.mask_HW).all() and whole.mask_HW.shape[0] > 500


def test_a_sparse_slide_is_not_empty(tmp_path):
    """All but one corner of 1,280 was not scanned: of what was, much is tissue."""
    pixels, where = draw_tissue(1280)
    rows = ([pixels[row * 256 :][:256, column * 256 :][:, :256] for column in range(5)] for row in range(5))
    count = 30_000 // 256

    def lay_rows():
        for row in rows:
            yield [*row, *[None] * (count - 5)]
        for _ in range(count - 5):
            yield [None] * count

    write_pyramid(tmp_path / "slide.tif", lay_rows(), 0.5, size=(count * 256, count * 256))
    with open_slide(tmp_path / "slide.tif") as slide:
        tissue = find_tissue(slide)
    assert where.sum() < 0.001 * 30_000**2 and not tissue.is_empty
    assert tissue.area_mm2 == pytest.approx(where.sum() * 0.25 / 1e6, rel=0.25)


@given(st.integers(-90, 90), st.integers(-90, 90), st.integers(1, 120), st.sampled_from([1.0, 3.7, 5.6]))
def test_the_share_of_a_square_is_its_area_in_the_mask(x, y, side, downsample):
    mask = np.random.default_rng(x % 5).random((16, 20)) < 0.5
    tissue = Tissue(mask, 2.8, downsample, (255, 255, 255), 0.0, 1.0, 0.0, 0.0, ())

    def overlap(first, place):
        return max(0.0, min(first + side, (place + 1) * downsample) - max(first, place * downsample))

    rows, columns = [overlap(y, place) for place in range(16)], [overlap(x, place) for place in range(20)]
    expected = (np.outer(rows, columns) * mask).sum() / side**2
    assert tissue.share(x, y, side) == pytest.approx(expected, abs=1e-6)
