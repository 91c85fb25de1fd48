"""Real slides: a scan of Aperio, and six sections of breast cancer, of which spots on the tissue are known."""

import csv

import numpy as np
import pytest
from PIL import Image

from lgd.scoring.slides import score_slide
from lgd.slides.slide import open_slide
from lgd.slides.tissue_mask import find_tissue
from lgd.tissue.pyramid import write_pyramid
from tests.support.shades import make_scorer

# The sections have 92 million pixels each.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

SECTIONS = ("B4", "C2", "C3", "C4", "C5", "C6")
MPP = 2 * 0.707


@pytest.fixture(scope="module", params=SECTIONS)
def section(request, real_data, tmp_path_factory):
    """A section as a slide of half its resolution, and the places of its spots (N, 2) in pixels."""
    with Image.open(real_data / "her2st" / f"{request.param}.jpg") as image:
        image.draft("RGB", (image.width // 2, image.height // 2))
        pixels = np.asarray(image.convert("RGB"))
    path = tmp_path_factory.mktemp("her2st") / f"{request.param}.tif"
    write_pyramid(path, pixels, MPP)
    with np.load(real_data / "her2st" / "expression.npz", allow_pickle=False) as known:
        yield path, known["xy"][known["section"] == request.param] / 2
    path.unlink()


def test_spots_of_tissue_are_in_the_mask_and_tiles(section, tmp_path):
    path, xy_N2 = section
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
        height, width = tissue.mask_HW.shape
        x_N, y_N = (xy_N2 * (width / slide.width, height / slide.height)).astype(int).T
    assert tissue.mask_HW[y_N, x_N].mean() > 0.93, "spots, all on tissue but for some gaps"
    assert 0.15 < tissue.mask_HW.mean() < 0.85 and tissue.pen < 0.05
    score = score_slide(make_scorer(mpp=MPP, shape=(256, 256)), path, tmp_path)
    assert score.failed == 0 and score.answer.label is not None
    with (tmp_path / path.stem / "tiles.csv").open(newline="") as file:
        tiles = {(int(row["x"]) // score.side, int(row["y"]) // score.side) for row in csv.DictReader(file)}
    assert np.mean([(x // score.side, y // score.side) in tiles for x, y in xy_N2]) > 0.9
    assert len(tiles) * (score.side * MPP / 1000) ** 2 == pytest.approx(tissue.area_mm2, rel=0.2)


def test_a_scan_of_aperio(real_data, tmp_path):
    path = real_data / "wsi" / "cmu_small_region.svs"
    score = score_slide(make_scorer(mpp=0.499), path, tmp_path)
    assert score.inputs.mpp == pytest.approx(0.499) and score.side == 128 and score.failed == 0
    assert score.tiles > 100 and score.answer.label is not None
    with Image.open(tmp_path / path.stem / "heatmap.png") as image:
        assert min(image.size) > 400
