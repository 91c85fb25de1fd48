"""Rows of results on standard output: as a table or as CSV."""

import csv
import sys
from typing import Any


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same columns as CSV."""
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same columns for a person, aligned."""

    def text(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
