"""OME-TIFF: levels and scale that OpenSlide does not see, of tiles in any of the ordinary compressions."""

import importlib.util

import numpy as np
import pytest
import tifffile
from drawn_slides import damage, draw_colours, set_compression, write_ome

from lgd.base.errors import DataError
from lgd.slides.slide import looks_like_slide, open_slide

PIXELS = draw_colours(900, 1100)


@pytest.mark.parametrize("tag", [None, 1000.0, 0.46])
def test_the_scale_is_that_of_the_xml(tmp_path, tag):
    path = write_ome(tmp_path / "S.ome.tif", PIXELS, tag=tag)
    with open_slide(path) as slide:
        assert (slide.name, slide.mpp, slide.vendor) == ("S", pytest.approx(0.46), "ome-tiff")
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        unset = ("its OME-XML says 0.46 um a pixel, and its TIFF resolution 1000, which is not used",)
        assert slide.notes == (unset if tag == 1000 else ())
    assert looks_like_slide(path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tag": 0.25}, r"its OME-XML says 0.46 um a pixel, and its TIFF resolution 0.25: say its .* by --mpp X"),
        ({"mpp": 0.0274}, "its OME-XML says 0.0274 um a pixel, which is not between 0.1 and 2"),
        ({"mpp": None}, "does not say its scale"),
        ({"mpp": None, "tag": 1000.0}, "its TIFF resolution says 1000 um a pixel"),
    ],
)
def test_a_scale_that_cannot_be_believed(tmp_path, facts, message):
    path = write_ome(tmp_path / "S.ome.tif", PIXELS, **facts)
    with pytest.raises(DataError, match=message):
        open_slide(path)
    with open_slide(path, 0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("kind", [{}, {"compression": None}, {"predictor": True}, {"jpeg": "RGB"}, {"jpeg": "YCBCR"}])
def test_pixels_are_those_that_were_written(tmp_path, kind):
    with open_slide(write_ome(tmp_path / "S.ome.tif", PIXELS, **kind)) as slide:
        pixels = slide.read(-30, 500, 500, 500, 0.46)
        assert (pixels[:, :30] == 255).all() and (pixels[400:] == 255).all()
        difference = np.abs(pixels[:400, 30:].astype(int) - PIXELS[500:, :470])
        assert difference.max() <= (8 if kind.get("jpeg") else 0)
        small = slide.read(0, 0, 250, 200, 1.84)
        assert np.abs(small.astype(int) - PIXELS[:800, :1000].reshape(200, 4, 250, 4, 3).mean((1, 3))).mean() < 3


def test_a_damaged_tile_is_named_and_others_are_read(tmp_path):
    path = write_ome(tmp_path / "S.ome.tif", PIXELS)
    with tifffile.TiffFile(path) as file:
        first, count = file.pages.first.dataoffsets[6], file.pages.first.databytecounts[6]
    with open_slide(damage(path, first, count)) as slide:
        with pytest.raises(DataError, match="S.ome.tif is damaged at x 300, y 300"):
            slide.read(300, 300, 100, 100, 0.46)
        assert (slide.read(0, 0, 256, 256, 0.46) == PIXELS[:256, :256]).all()


def test_a_file_that_is_cut_short(tmp_path):
    path = write_ome(tmp_path / "S.ome.tif", PIXELS, compression=None)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"S.ome.tif (is|has) .*(damaged|cut short)"), open_slide(path) as slide:
        slide.read(800, 700, 100, 100, 0.46)


def test_what_is_no_picture_of_stained_tissue(tmp_path):
    path = tmp_path / "S.ome.tif"
    tifffile.imwrite(path, PIXELS.astype(np.uint16), ome=True, photometric="rgb", tile=(256, 256))
    with pytest.raises(DataError, match=r"S.ome.tif has 3 channel\(s\) of 16 bits: export it as 8-bit RGB"):
        open_slide(path, 0.5)


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="it is read")
def test_a_compression_that_is_not_read(tmp_path):
    path = write_ome(tmp_path / "S.ome.tif", PIXELS)
    set_compression(path, 5)
    with pytest.raises(DataError, match="S.ome.tif is compressed by LZW: pip install imagecodecs, or export it"):
        open_slide(path)
