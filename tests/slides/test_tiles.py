"""The tiles of a slide: side by side, of its tissue, none left out."""

import numpy as np
import pytest
from drawn_slides import draw_tissue, write_tiff

from lgd.base.errors import DataError
from lgd.slides.slide import open_slide
from lgd.slides.tiles import lay_tiles
from lgd.slides.tissue_mask import find_tissue


@pytest.mark.parametrize(("pixels", "mpp", "side"), [(64, 1.0, 64), (64, 1.7, 109), (100, 0.5, 50), (64, 1.01, 64)])
def test_tiles_are_all_squares_of_a_grid_that_hold_tissue(tmp_path, pixels, mpp, side):
    with open_slide(write_tiff(tmp_path / "slide.tif", draw_tissue(1000)[0], 1.0)) as slide:
        tissue = find_tissue(slide)
        tiles = lay_tiles(slide, tissue, pixels, mpp, least=0.4)
        naive = [(x, y) for y in range(0, 1000, side) for x in range(0, 1000, side) if tissue.share(x, y, side) >= 0.4]
        assert tiles.side == side and tiles.xy_n2.tolist() == list(map(list, naive)) and len(tiles) > 10
        assert tiles.xy_n2.dtype == np.int64
        assert tiles.tissue_n == pytest.approx([tissue.share(*place, side) for place in naive])
        with pytest.raises(DataError, match="no square of 4000 um holds 90% tissue, of which it has 0.31 mm2"):
            lay_tiles(slide, tissue, 4000, 1.0, least=0.9)


def test_an_empty_slide_has_no_tiles(tmp_path):
    with (
        open_slide(write_tiff(tmp_path / "slide.tif", draw_tissue(500, stain=(0, 0, 0))[0], 1.0)) as slide,
        pytest.raises(DataError, match="slide.tif: less than 0.1 % of it is tissue"),
    ):
        lay_tiles(slide, find_tissue(slide), 64, 1.0)
