"""What a slide is (`lgd info SLIDE`): its facts and a picture, and nothing of the patient."""

import json
import os
from pathlib import Path

import numpy as np
import openslide
import pytest
from drawn_slides import draw_tissue, write_tiff
from PIL import Image

from lgd.cli import main
from lgd.slides.slide import open_slide
from lgd.slides.tiles import lay_tiles
from lgd.slides.tissue_mask import find_tissue


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return str(write_tiff(tmp_path_factory.mktemp("slides") / "S.tif", draw_tissue(1000)[0], 0.8))


def test_a_slide_is_described_in_ten_lines(slide, tmp_path, capsys):
    assert main(["info", slide, "--preview", str(tmp_path / "S.png")]) == 0
    out, err = capsys.readouterr()
    facts = {line[:13].strip(): line[13:].strip() for line in out.splitlines()}
    assert len(facts) <= 10 and not err
    assert facts["size"] == "1000 x 1000 px, 0.8 x 0.8 mm" and facts["levels"] == "1:1, 1:2, 1:4"
    assert facts["um per px"] == "0.800" and facts["vendor"] == "generic-tiff" and facts["notes"] == "none"
    with Image.open(tmp_path / "S.png") as picture:
        pixels = np.asarray(picture)
    # The outline of its tissue is blue.
    assert pixels.shape == (1000, 1000, 3) and (pixels == (0, 114, 178)).all(-1).sum() > 1000


def test_json_is_one_document_of_numbers(slide, capsys):
    assert main(["info", slide, "--json", "--mpp", "0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "slide" and document["file"] == slide and document["um_per_px"] == 0.5
    assert document["tissue_mm2"] == pytest.approx(0.31 * 0.25, rel=0.2) and document["pen_share"] == 0


def test_an_empty_slide_says_so(tmp_path, capsys):
    path = write_tiff(tmp_path / "S.tif", draw_tissue(500, stain=(0, 0, 0))[0], 0.8)
    assert main(["info", str(path)]) == 0
    assert "less than 0.1 % of it is tissue: it may be empty, or not stained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["S.tif"], 1, "S.tif does not say its scale: say its micrometres per pixel by --mpp X"),
        (["S.tif", "--mpp", "1000"], 1, "S.tif: mpp is 1000: slides have 0.1 to 2 um a pixel"),
        (["photo.svs"], 1, "photo.svs is a JPEG image and no slide"),
        (["none.svs"], 1, "none.svs does not exist"),
        (["s3://bucket/S.svs"], 2, "s3://bucket/S.svs: slides are read from local files only: fetch it first"),
        (["S.tif", "--mpp", "0.5", "--preview", "S.tif"], 2, "--preview is S.tif: give a name that ends in .png"),
        ([".", "--mpp", "0.5"], 2, "--mpp and --preview are for slides"),
    ],
)
def test_what_cannot_be_described(tmp_path, monkeypatch, capsys, args, status, message):
    monkeypatch.chdir(tmp_path)
    write_tiff("S.tif", draw_tissue(600)[0], mpp=None)
    Image.new("RGB", (9, 9)).save("photo.svs", "JPEG")
    assert main(["info", *args]) == status
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_nothing_of_the_patient_is_read_or_said(tmp_path, monkeypatch, capsys):
    """The real slide has images of its label and of the whole glass, and a user, a date and a file name."""
    folder = os.environ.get("LGD_REAL_DATA")
    if not folder:
        pytest.skip("LGD_REAL_DATA is not set")
    path = Path(folder) / "wsi" / "cmu_small_region.svs"
    read = []
    for name in ("read_associated_image", "get_associated_image_names", "get_associated_image_dimensions"):
        monkeypatch.setattr(openslide.lowlevel, name, lambda *args, name=name: read.append(name))
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: read.append("images")))
    assert main(["info", str(path), "--preview", str(tmp_path / "S.png")]) == 0
    out = capsys.readouterr().out
    with open_slide(path) as slide:
        lay_tiles(slide, find_tissue(slide), 256, 0.5)
        slide.shrink(500)
    assert read == []
    with openslide.OpenSlide(path) as opened:
        private = [opened.properties[f"aperio.{name}"] for name in ("User", "Date", "Filename", "ImageID")]
    assert all(private) and not [text for text in private if text in out]


def test_the_spy_sees_what_is_read(monkeypatch):
    folder = os.environ.get("LGD_REAL_DATA")
    if not folder:
        pytest.skip("LGD_REAL_DATA is not set")
    read = []
    monkeypatch.setattr(openslide.lowlevel, "get_associated_image_names", lambda *_: read.append("names") or [])
    with openslide.OpenSlide(Path(folder) / "wsi" / "cmu_small_region.svs") as opened:
        list(opened.associated_images)
    assert read
