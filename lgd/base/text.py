r"""Text of others (keys, slides, file names, caveats, messages of libraries) on a terminal and in JSON.

What a terminal obeys or does not show appears as an escape, `\x1b` or `\u202e`; letters of any script stay as they
are. Whatever lgd prints goes through `print_lines`; the command line also escapes all that libraries write.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, cast

from lgd.base.errors import DataError

# All of Unicode's categories Cc, Cf, Cs, Zl and Zp but for the line feed, and what else is drawn without any width:
# joiners, fillers and variation selectors. Tests compare it with Python's own table.
_UNSEEN = (
    "\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
UNSEEN = re.compile(f"[\n{_UNSEEN}]")
"""A character that a terminal obeys or does not show."""
_BUT_BREAKS = re.compile(f"[{_UNSEEN}]")

LONGEST = 5000
"""Characters of a line that are shown: a path of 4,096 bytes and what is said of it fit."""


def escape_text(text: object, longest: int = LONGEST) -> str:
    """`text` on one line, for a person: what is unseen becomes an escape, and of a long text the middle is left out."""
    line = str(text)
    if len(line) > longest:
        left, right = longest * 2 // 3, longest // 3
        line = f"{line[:left]} [... {len(line) - left - right} characters ...] {line[-right:]}"
    return UNSEEN.sub(_escape, line)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def print_lines(*lines: object, file: TextIO | None = None) -> None:
    """Print each on a line of its own, escaped, to standard output or to `file`."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = "".join(escape_text(line) + "\n" for line in lines)
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))
    file.flush()


class _Escaped:
    """A text stream on which nothing acts that is written to it, but for line breaks."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        # A carriage return in front is that of a progress bar.
        bar = text[: text.startswith("\r")]
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = bar + _BUT_BREAKS.sub(_escape, text[len(bar) :])
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        if name == "stream":
            raise AttributeError(name)
        found: object = getattr(self.stream, name)
        return found


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape whatever anybody in this process writes to standard output and standard error, libraries too."""
    with contextlib.ExitStack() as stack:
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            if stream is not None:
                stack.enter_context(redirect(cast(TextIO, _Escaped(stream))))
        yield


def dump_json(document: object, indent: int | None = None, encoding: str = "utf-8") -> str:
    """Strict JSON, in which what is unseen, or is not in `encoding`, is escaped; it reads back as it was.

    Raises `DataError` that names the field of a number which JSON does not know.
    """
    try:
        text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        field = _find_not_finite(document)
        if field is None:
            raise
        raise DataError(f"field {field} is no finite number, and JSON knows no other") from error
    text = _BUT_BREAKS.sub(lambda found: json.dumps(found[0])[1:-1], text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(document, indent=indent, allow_nan=False)
    return text


def _find_not_finite(value: object, at: str = "") -> str | None:
    """The dotted name of the first NaN or infinity in a JSON document."""
    if isinstance(value, float):
        return None if math.isfinite(value) else at or "."
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_find_not_finite(entry, f"{at}.{name}" if at else str(name)) for name, entry in entries)
    return next(filter(None, found), None)


def print_json(document: object) -> None:
    """Print one strict JSON document to standard output."""
    sys.stdout.write(dump_json(document, indent=1, encoding=sys.stdout.encoding or "utf-8") + "\n")
