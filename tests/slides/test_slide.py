"""A slide opened: its facts, its pixels at any scale, and what is said of files that cannot be read."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from drawn_slides import damage, draw_colours, find_tile, write_ome, write_tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from lgd.base.errors import ConfigError, DataError
from lgd.slides.slide import looks_like_slide, open_slide
from lgd.slides.source import Level, Stated, choose_level, find_scale


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiff(tmp_path_factory.mktemp("slides") / "S 1.tif", draw_colours(1200, 1600))


@pytest.fixture(scope="module")
def drawing():
    return Image.fromarray(draw_colours(1200, 1600))


def test_the_facts_of_a_slide(file):
    with open_slide(file) as slide:
        assert (slide.name, slide.width, slide.height, slide.mpp) == ("S 1", 1600, 1200, pytest.approx(0.5))
        assert slide.bounds == (0, 0, 1600, 1200)
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        assert slide.vendor == "generic-tiff" and slide.notes == ()


def test_pixels_of_level_0_are_those_of_the_file(file):
    with open_slide(file) as slide:
        assert (slide.read(100, 200, 300, 260, 0.5) == draw_colours(1200, 1600)[200:460, 100:400]).all()


def test_what_lies_outside_is_background(file):
    with open_slide(file) as slide:
        beside = slide.read(-100, -50, 200, 200, 0.5)
        assert (beside[:50] == 255).all() and (beside[:, :100] == 255).all()
        assert (beside[50:, 100:] == draw_colours(1200, 1600)[:150, :100]).all()
        assert (slide.read(1600, 1200, 64, 64, 1.0) == 255).all()
        assert slide.read_overview(4.0).scanned_HW.all()


@given(
    st.integers(-300, 1500), st.integers(-300, 1100), st.integers(1, 400), st.sampled_from([0.3, 0.5, 0.7, 1.1, 3.9])
)
def test_a_part_shows_the_same_place_at_every_scale(file, drawing, x, y, side, mpp):
    """Against the drawing, padded with white, and shrunk from level 0."""
    with open_slide(file) as slide:
        pixels = slide.read(x, y, side, side, mpp)
    shown = side * mpp / 0.5
    padded = drawing.crop((x, y, x + int(shown) + 1, y + int(shown) + 1))
    outside = Image.new("L", drawing.size, 255).crop((x, y, x + int(shown) + 1, y + int(shown) + 1))
    padded.paste((255, 255, 255), mask=ImageChops.invert(outside))
    expected = padded.resize((side, side), Image.Resampling.BILINEAR, (0, 0, shown, shown))
    difference = np.abs(pixels.astype(int) - np.asarray(expected))
    # Levels are averages; at the sharp edge to what is outside half a pixel shows.
    assert pixels.shape == (side, side, 3) and difference.mean() < 6


@pytest.mark.parametrize(
    ("given", "stated", "expected"),
    [
        (0.5, [("TIFF resolution", 1000, 1000)], 0.5),
        (None, [("OME-XML", 0.46, 0.46), ("TIFF resolution", 1000, 1000)], 0.46),
        (None, [("MPP", 0.46, 0.462)], 0.461),
        (None, [], "does not say its scale: say its micrometres per pixel by --mpp X"),
        (None, [("TIFF resolution", 0.0274, 0.0274)], "TIFF resolution says 0.0274 um a pixel"),
        (None, [("TIFF resolution", 1000, 1000)], "an error of the program that wrote it"),
        (
            None,
            [("OME-XML", 0.46, 0.46), ("TIFF resolution", 0.25, 0.25)],
            "says 0.46 .*, and its TIFF resolution 0.25",
        ),
        (None, [("MPP", 0.25, 0.5)], "not square, 0.25 x 0.5"),
        (1000.0, [("MPP", 0.5, 0.5)], "mpp is 1000: slides have 0.1 to 2 um a pixel"),
    ],
)
def test_which_scale_counts(given, stated, expected):
    stated = [Stated(*one) for one in stated]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            find_scale("S.tif", given, stated)
    else:
        assert find_scale("S.tif", given, stated)[0] == pytest.approx(expected)


def test_the_level_that_is_read():
    """SLIDES' recipe: 0.46 -> 0.5 is read from level 0 and resampled; 0.499 -> 0.5 is taken as it is."""
    levels = [Level(4000, 3000, 1.0), Level(1000, 750, 4.0), Level(250, 187, 16.03)]
    assert choose_level(levels, 0.5 / 0.46, exact=False) == (0, pytest.approx(1.087, abs=1e-3))
    assert choose_level(levels, 0.5 / 0.499, exact=False) == (0, 1.0)
    assert choose_level(levels, 0.5 / 0.499, exact=True) == (0, pytest.approx(1.002, abs=1e-3))
    assert choose_level(levels, 16, exact=False) == (2, 1.0)
    assert choose_level(levels, 3.9, exact=False)[0] == 0
    assert choose_level(levels, 0.5, exact=False) == (0, 0.5)


def test_a_slide_is_read_by_threads_and_other_processes(file):
    with open_slide(file) as slide:
        places = [(x, y) for x in range(0, 1400, 100) for y in range(0, 1000, 100)]
        expected = [slide.read(*place, 64, 64, 0.7) for place in places]
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(lambda place: slide.read(*place, 64, 64, 0.7), places)
        assert all((one == other).all() for one, other in zip(expected, read, strict=True))
        with pickle.loads(pickle.dumps(slide)) as other:
            assert (other.read(*places[5], 64, 64, 0.7) == expected[5]).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photo.svs", "jpeg", "photo.svs is a JPEG image and no slide, whatever it is called"),
        ("text.tif", b"The slide was sent by post.", "text.tif is no slide: use a format of OpenSlide"),
        ("empty.svs", b"", "empty.svs is no slide"),
        ("folder.svs", None, "folder.svs is a folder: name a slide that lies in it"),
        ("none.svs", ..., "none.svs does not exist"),
        ("short.svs", "half", "short.svs is a TIFF that is cut short, damaged, or without tiles"),
        ("plain.tif", "untiled", "plain.tif is a TIFF that is cut short, damaged, or without tiles"),
    ],
)
def test_what_is_no_slide(tmp_path, file, name, content, message):
    path = tmp_path / name
    if content == "jpeg":
        Image.fromarray(draw_colours(100, 100)).save(path, "JPEG")
    elif content == "untiled":
        Image.fromarray(draw_colours(100, 100)).save(path)
    elif content == "half":
        # Its directories stand at the end.
        path.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    elif content is None:
        path.mkdir()
    elif content is not ...:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_slide(path)
    # A slide that is damaged is one: opening it says so.
    assert looks_like_slide(path) == (name == "short.svs")


def test_urls_are_refused():
    with pytest.raises(ConfigError, match="slides are read from local files only"):
        open_slide("s3://bucket/slide.svs")


def test_a_small_tiled_tiff_is_a_patch(tmp_path, file):
    assert looks_like_slide(file)
    assert not looks_like_slide(write_tiff(tmp_path / "patch.tif", draw_colours(300, 300), levels=1))


def test_a_damaged_tile_fails_alone(tmp_path):
    """OpenSlide keeps an error for good, and other threads that read with the same handle get it too."""
    pixels = draw_colours(1280, 1280)
    path = write_tiff(tmp_path / "slide.tif", pixels, compression="deflate")
    damage(path, *find_tile(path, 7))
    places = [(x, y) for y in range(0, 1280, 256) for x in range(0, 1280, 256)] * 4

    def read(place):
        try:
            x, y = place
            return bool((slide.read(x, y, 256, 256, 0.5) == pixels[y : y + 256, x : x + 256]).all())
        except DataError as error:
            return str(error)

    with open_slide(path) as slide, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(read, places))
    for place, answer in zip(places, answers, strict=True):
        if place == (512, 256):
            assert answer.startswith(f"{path} is damaged at x 512, y 256: ")
        else:
            assert answer is True


FORKED = """
import multiprocessing, sys
from lgd.slides.slide import open_slide

def read(place):
    return slide.read(*place, 64, 64, 0.5).tobytes()

places = [(x, y) for x in range(0, 1400, 60) for y in range(0, 1000, 60)]
with open_slide(sys.argv[1]) as slide:
    expected = [read(place) for place in places]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for _ in range(10):
            assert pool.map_async(read, places, 10).get(60) == expected
"""


def test_a_child_that_was_forked_reads_its_own_file(tmp_path):
    """They share the place in an open file: both read what the other has just moved it to.

    In a process of its own, which has no threads: a fork of another can hang.
    """
    path = write_ome(tmp_path / "slide.ome.tiff", draw_colours(1200, 1600))
    done = subprocess.run([sys.executable, "-c", FORKED, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_slide_that_is_closed_waits_for_its_readers(file):
    """In a process of its own: without that, OpenSlide takes the process with it."""
    code = f"""
import threading, time
from lgd.slides.slide import open_slide

def read():
    try:
        while True:
            slide.read(0, 0, 1600, 1200, 0.5)
    except ValueError as error:
        ended.append(str(error))

for _ in range(3):
    ended, slide = [], open_slide({str(file)!r})
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    slide.close()
    for thread in threads:
        thread.join()
    assert ended == [f"{{slide.path}} is closed"] * 4, ended
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
