"""Rows of results: as a table for a person, or as CSV that a spreadsheet may open.

A spreadsheet takes a cell that begins with `=`, `+`, `-` or `@` for a formula. Such a text (never a number) is written
with a `'` before it. One with control or unseen characters, blanks at its ends, a formula after a `;` (where that
separates columns) or a beginning like our escapes is written as `'` and a JSON string. `unescape_cell` undoes both.
"""

import codecs
import csv
import difflib
import io
import json
import logging
import numbers
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TextIO

from lgd.base.errors import DataError
from lgd.base.text import UNSEEN, dump_json, escape_text, print_lines
from lgd.io.files import read_bytes
from lgd.io.location import Location, MissingError

logger = logging.getLogger(__name__)

# OWASP's list and its wide and small forms; tab, carriage return and line feed are unseen.
_FORMULA = "=+@\uff1d\uff0b\uff0d\uff20\ufe62\ufe63\ufe66\ufe6b-"
_ESCAPED = re.compile(f"'[\"{_FORMULA}]")
_INNER = re.compile(f"(;[\\s\"']*)([{_FORMULA}])")

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# What Excel reads and writes before the head.
_SEPARATOR = re.compile('"?sep=([^\r\n"])"?[,;\t]*\r?\n', re.IGNORECASE)
_NEAR = 0.8
"""How alike two names of columns are, of 1, if one may be a slip for the other."""

WIDEST = 500
"""Characters of a cell of a table that are shown."""


def escape_cell(value: object) -> object:
    """A value as a cell of CSV: numbers and None as they are, and as text what no spreadsheet takes for a formula."""
    if value is None or isinstance(value, numbers.Number):
        return value
    text = str(value)
    if text != text.strip() or any(pattern.search(text) for pattern in (UNSEEN, _INNER)) or _ESCAPED.match(text):
        return "'" + _INNER.sub(lambda found: f"{found[1]}\\u{ord(found[2]):04x}", dump_json(text))
    return f"'{text}" if text and text[0] in _FORMULA else text


def unescape_cell(cell: str) -> str:
    """The text of a cell: exactly what `escape_cell` makes of some text becomes that text, all else stays."""
    if not _ESCAPED.match(cell):
        return cell
    text = cell[1:]
    if text[0] == '"':
        try:
            text = json.loads(text)
        except ValueError:
            return cell
    return text if escape_cell(text) == cell else cell


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a head and rows of cells, escaped."""
    csv.writer(file, lineterminator="\n").writerows(map(escape_cell, row) for row in (columns, *rows))


def print_csv(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same columns as CSV."""
    write_csv(sys.stdout, list(rows[0]), ([row[name] for name in rows[0]] for row in rows))


def format_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The lines of a table for a person: rows of the same columns, aligned."""

    def text(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else escape_text(value, WIDEST)

    cells = [[text(name) for name in rows[0]], *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(value.ljust(w) for value, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same columns for a person, aligned."""
    print_lines(*format_table(rows))


def read_csv(
    path: Location, required: Sequence[str], allowed: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV with their line numbers; values are stripped of blanks, and of what `write_csv` escaped.

    In UTF-8 or UTF-16; columns are separated by what a first line `sep=;` says, else by commas, semicolons or tabs,
    whichever the head has most of. Empty rows, and empty cells behind the last column, are passed over. The names of
    `required` and `allowed` columns are found in any case. A note names columns that are not `allowed` (all are where
    none is named); one that is spelled nearly like a missing one is refused.
    """
    try:
        text = _decode(read_bytes(path))
        stated = _SEPARATOR.match(text)
        # Of the head, in which quotes may hide other separators and line breaks.
        head = re.sub('"[^"]*"', "", text).lstrip(" \r\n").partition("\n")[0].partition("\r")[0]
        delimiter = stated[1] if stated else max(",;\t", key=head.count)
        with io.StringIO(text[stated.end() :] if stated else text, newline="") as stream:
            reader = csv.reader(stream, strict=True, delimiter=delimiter, skipinitialspace=True)
            rows = ([unescape_cell(cell.strip()) for cell in row] for row in reader)
            columns = _name_columns(path, next(filter(any, rows), []), required, allowed)
            for row in filter(any, rows):
                number = reader.line_num + bool(stated)
                if len(row) < len(columns) or any(row[len(columns) :]):
                    raise DataError(f"{path}: row {number} has not {len(columns)} values: correct it")
                yield number, dict(zip(columns, row, strict=False))
    except MissingError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): name a CSV that is there") from error
    except (UnicodeDecodeError, csv.Error) as error:
        remedy = "save it as 'CSV UTF-8' in your spreadsheet, or correct it"
        raise DataError(f"{path}: cannot be read as a CSV in UTF-8 ({error}): {remedy}") from error


def _decode(content: bytes) -> str:
    if content.startswith(_UTF_16):
        return content.decode("utf-16")
    # Without its mark, UTF-16 has a zero beside every plain letter.
    zero = content[:2].find(0)
    return content.decode(("utf-16-be", "utf-16-le", "utf-8-sig")[zero])


def _name_columns(path: Location, head: Sequence[str], required: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """The columns of a head, known ones by their known names."""
    known = {name.lower(): name for name in (*required, *allowed)}
    width = max((number for number, name in enumerate(head, 1) if name), default=0)
    columns = [known.get(name.lower(), name or f"column {number}") for number, name in enumerate(head[:width], 1)]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path}: column {', '.join(twice)} is there more than once: keep one of each")
    missing = [name for name in required if name not in columns]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)} (it has {', '.join(columns)}): add it")
    unknown = [name for name in columns if allowed and name not in allowed]
    for name in unknown:
        if near := difflib.get_close_matches(name.lower(), {*allowed} - {*columns}, 1, _NEAR):
            raise DataError(f"{path}: column {name} is unknown, and nearly {near[0]}: rename it to that, or remove it")
    if unknown:
        logger.warning("%s: not read, for lgd does not know such columns: %s", path, ", ".join(unknown))
    return columns
