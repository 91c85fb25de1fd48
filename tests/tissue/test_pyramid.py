import hashlib
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.tissue.pyramid import TILE, write_pyramid


def _draw(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(y / 60) * np.cos(x / 50), 255 * x / width, 255 * y / height]
    return np.stack(waves, -1).astype(np.uint8)


def _read(slide: openslide.OpenSlide, level: int) -> np.ndarray:
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))


def test_openslide_reads_every_level_and_the_scale(tmp_path):
    image = _draw(700, 1100)
    write_pyramid(tmp_path / "a.tif", image, 0.46)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((1100, 700), (550, 350), (275, 175), (137, 87))
        assert [float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy"] == pytest.approx([0.46, 0.46])
        for level in range(4):
            height, width = 700 >> level, 1100 >> level
            side = 2**level
            expected = image[: height * side, : width * side].reshape(height, side, width, side, 3).mean((1, 3))
            read = _read(slide, level)
            assert (read[..., 3] == 255).all()
            assert np.abs(read[..., :3] - expected).mean() < 2.5
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_rows_of_tiles_give_the_bytes_of_the_image(tmp_path):
    image = _draw(513, 600)
    rows = ([image[y : y + TILE, x : x + TILE] for x in range(0, 600, TILE)] for y in range(0, 513, TILE))
    write_pyramid(tmp_path / "a.tif", image, 0.46)
    write_pyramid(tmp_path / "b.tif", rows, 0.46, size=(513, 600))
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 1100), st.integers(1, 1100))
def test_any_size_is_read_back(tmp_path_factory, height, width):
    path = tmp_path_factory.mktemp("sizes") / "a.tif"
    write_pyramid(path, np.full((height, width, 3), 99, np.uint8), 0.46)
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (width, height)
        smallest = _read(slide, slide.level_count - 1)
        assert max(smallest.shape) <= TILE
        assert (np.abs(smallest[..., :3].astype(int) - 99) <= 2).all()


def _lay_sparse(columns: int, present: dict[tuple[int, int], np.ndarray]):
    return ([present.get((row, column)) for column in range(columns)] for row in range(columns))


def test_a_tile_that_is_left_out_is_transparent(tmp_path: Path):
    image = _draw(TILE, TILE)
    write_pyramid(tmp_path / "a.tif", _lay_sparse(5, {(3, 1): image}), 0.5, size=(5 * TILE, 5 * TILE))
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        full = _read(slide, 0)
        there = full[3 * TILE : 4 * TILE, TILE : 2 * TILE]
        assert (there[..., 3] == 255).all()
        assert np.abs(there[..., :3].astype(int) - image).mean() < 2.5
        assert np.count_nonzero(full[..., 3]) == TILE * TILE
        assert _read(slide, 1)[0, 0, 3] == 0
    assert (tmp_path / "a.tif").stat().st_size < 100_000


def test_without_tifffile_one_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"pip install 'lgd\[slides\]'"):
        write_pyramid(tmp_path / "a.tif", _draw(10, 10), 0.46)
    assert not list(tmp_path.iterdir())
