"""Tables for a person, and CSV that a spreadsheet may open."""

import csv
import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lgd.base.text import UNSEEN
from lgd.io.tables import WIDEST, escape_cell, print_csv, print_table, read_csv, unescape_cell, write_csv

FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
TEXT = st.lists(st.sampled_from([*FORMULA, *"'\";, x1é\\", "\x1b", "\u202e", "\ud800", "=1"]) | st.characters()).map(
    "".join
)


@given(TEXT)
@example("'=1")
@example("''=1")
@example('\'"a"')
@example(" =1")
@example("a\x1b[2J")
@example('x;"=1+1"')
def test_a_text_is_no_formula_and_reads_back(text):
    cell = escape_cell(text)
    assert unescape_cell(cell) == unescape_cell(cell.strip()) == text
    assert not cell or cell[0] not in FORMULA
    assert not UNSEEN.search(cell)
    # A spreadsheet that separates columns by semicolons splits there.
    assert not any(part.lstrip(" '\"")[:1] in tuple("=+-@") for part in cell.split(";")[1:])


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        *((text, text) for text in ("1+", "0", "2+", "H&E", "a-b=c", "'s", "'t Hooft", "''", "O'Hara", "C:\\x01", "é")),
        ("=cmd|'/c calc'!A1", "'=cmd|'/c calc'!A1"),
        ("-5", "'-5"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\uff1d1", "'\uff1d1"),
        ("'=1", "'\"'=1\""),
        ("\t=1", '\'"\\t=1"'),
        ("a;=1", '\'"a;\\u003d1"'),
    ],
)
def test_how_texts_look(value, cell):
    assert escape_cell(value) == cell
    assert unescape_cell(cell) == value


@pytest.mark.parametrize("value", [-1, -0.5, float("-inf"), np.float32(-2), np.int64(-3), None, True])
def test_numbers_stay_as_they_are(value):
    assert escape_cell(value) is value


@pytest.mark.parametrize("cell", ["'", "'a", "'\"", '\'"a"', "'\"a", '\'"=1"', "''=1", "'[1]", "'1", '"', '\'"\\ud8"'])
def test_cells_of_a_user_stay_as_they_are(cell):
    assert unescape_cell(cell) == cell


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=4))
def test_our_reader_undoes_what_our_writer_did(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "escaped.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        write_csv(file, ["=he", "ihc"], [(f"x{he}", ihc) for he, ihc in rows])
    found = [tuple(row.values()) for _, row in read_csv(path, required=("=he", "ihc"))]
    assert found == [(f"x{he}", ihc) for he, ihc in rows]
    assert path.read_text().count("\n") == len(rows) + 1, "a row is a line"


def test_results_as_csv(capsys):
    print_csv([{"image": "=1+1,x.png", "level": "1+", "distance": -0.25, "slide": None}])
    out = capsys.readouterr().out
    assert out == 'image,level,distance,slide\n"\'=1+1,x.png",1+,-0.25,\n'
    assert list(csv.reader(io.StringIO(out)))[1][0] == "'=1+1,x.png"


def test_a_table_is_aligned_harmless_and_bounded(capsys):
    print_table([{"key": "\x1b[2J\nx", "at": 0.5}, {"key": "y" * 10_000, "at": None}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < WIDEST + 50
    assert lines[1].startswith(r"\x1b[2J\nx ") and lines[1].endswith("0.500")
