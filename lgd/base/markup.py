"""Markdown of text that others wrote: rendered it shows that text and nothing else, whatever renders it.

No heading, HTML, link, image, list, fence, formula or cell of a table comes of it. What looks like an address stands as
code, so that it becomes no link. CommonMark, GitHub's dialect and Python-Markdown (TensorBoard, mkdocs) agree on the
escapes that are used. Text without such characters, and intervals as `[0.65, 0.77]`, stay as they are.
"""

import re
from collections.abc import Sequence

from lgd.base.text import escape_text

_ADDRESS = re.compile(r"([^\s`|\\<>&]*(?://|@|\bwww\.)[^\s`|\\<>&]*)", re.IGNORECASE)
_MARKUP = re.compile(
    r"""
    (?P<interval> \[ (?: [-+]?[0-9.]+,[ ][-+]?[0-9.]+ | – ) \] (?![(\[:]) )
    | (?P<slash> [\\*\[\]{|] | (?<![^\W_])_ | _(?![^\W_]) )
    | (?P<entity> [`<~$] | &(?=\#|\w+;) )
    """,
    re.VERBOSE,
)
# What opens a heading, a quote, a list or a rule where a block begins; the match ends before what is to be escaped.
_OPENING = re.compile(r"(?=[#>]|[-+](?:\s|-|$))|\d+(?=[.)](?:\s|$))")

LONGEST = 2000
MOST = 100
"""Characters of a text, and texts of a list, that are shown."""


def escape_markdown(text: object) -> str:
    """`text` as one line of Markdown that shows it."""
    line = escape_text(text, LONGEST).strip()
    # Every other part is an address.
    parts = enumerate(_ADDRESS.split(line))
    escaped = "".join(f"`{part}`" if number % 2 else _MARKUP.sub(_escape, part) for number, part in parts)
    opening = _OPENING.match(escaped)
    return f"{escaped[: opening.end()]}\\{escaped[opening.end() :]}" if opening else escaped


def _escape(found: re.Match[str]) -> str:
    if found["interval"]:
        return found[0]
    return f"\\{found[0]}" if found["slash"] else f"&#{ord(found[0])};"


def list_items(texts: Sequence[str]) -> list[str]:
    """The lines of a list of texts; of a long list the middle is left out."""
    lines = [f"- {escape_markdown(text) or '–'}" for text in texts]
    if len(lines) > MOST:
        lines[MOST // 2 : -MOST // 2] = [f"- ({len(lines) - MOST} more)"]
    return lines


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and the blank one after it."""
    rule = "|" + " --- |" * len(head)
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in (head, *rows)]
    return [lines[0], rule, *lines[1:], ""]


def code_block(line: str) -> str:
    """One line as a block of code, such as a command."""
    return f"    {escape_text(line)}"
