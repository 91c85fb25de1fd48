"""The transform between two slides, as people write it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.slides.affine import Affine, read_affine

NUMBER = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))
SIX = st.tuples(*[NUMBER] * 6).filter(lambda m: abs(m[0] * m[4] - m[1] * m[3]) > 1e-3)


@given(
    SIX, st.sampled_from([" ", ", ", ";", "\n", "\t"]), st.booleans(), st.lists(st.tuples(NUMBER, NUMBER), min_size=1)
)
def test_numbers_are_read_whatever_separates_them(six, separator, nine, places):
    rows = [list(six[:3]), list(six[3:]), [0, 0, 1]][: 2 + nine]
    texts = [separator.join(str(value) for row in rows for value in row), json.dumps(rows), str(np.array(six).tolist())]
    for text in texts:
        affine = read_affine(text, None)
        assert affine == Affine(*six)
    a, b, c, d, e, f = six
    naive = [(a * x + b * y + c, d * x + e * y + f) for x, y in places]
    assert np.allclose(affine.apply(np.array(places, float)), naive, rtol=1e-9, atol=1e-6)


def test_a_file_of_numbers(tmp_path):
    np.savetxt(tmp_path / "matrix.txt", [[0.5, 0, 3], [0, 0.5, -7], [0, 0, 1]])
    affine = read_affine("matrix.txt", tmp_path)
    assert affine == (0.5, 0, 3, 0, 0.5, -7) and affine.scale == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 5 0 1", "transform is '1 0 5 0 1', which is no affine map: give the six numbers a b c d e f of x' = "),
        ("1 0 5 0 1 7 0 0 2", "is no affine map"),
        ("1 0 5 | 0 1 7", "is no affine map"),
        ("1 2 0 2 4 0", r"transform is singular \(1 2 0 2 4 0\)"),
        ("0 0 0 0 0 0", "is singular"),
        ("matrix.txt", "transform 'matrix.txt' is no file: correct its path, relative to the CSV, or give the six"),
        ("nan 0 0 0 1 0", "is no file"),
        ("1e999 0 0 0 1 0", "is no affine map"),
    ],
)
def test_what_is_no_map_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_affine(text, tmp_path)


def test_a_file_that_holds_something_else(tmp_path):
    (tmp_path / "m.txt").write_bytes(b"\x89PNG" + bytes(range(256)) * 10)
    with pytest.raises(DataError, match="which is no affine map"):
        read_affine("m.txt", tmp_path)
