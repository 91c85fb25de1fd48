"""Text of others on the terminal and in JSON."""

import contextlib
import io
import json
import logging
import os
import pty
import subprocess
import sys
import termios
import unicodedata
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lgd.base.errors import DataError
from lgd.base.logs import progress, show_logs
from lgd.base.text import LONGEST, UNSEEN, dump_json, escape_text, escaped_output, print_json, print_lines
from lgd.cli import main
from lgd.io.files import write_json

HOSTILE = "a\nlgd: verified \x1b[2J\x1b]0;owned\x07\r\t\x9b \u202e\u2066\u200f\u061c\u2028\u200b\udcff\x7f"
TEXT = st.text(st.characters())


def harmless(text: str) -> bool:
    """Nothing in it acts on a terminal but line breaks, and it can be written."""
    return not UNSEEN.search(text.replace("\n", "")) and bool(text.encode() or not text)


def test_what_is_unseen_is_what_unicode_calls_so():
    letters = [chr(n) for n in range(0x110000)]
    named = {letter for letter in letters if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    escaped = set(UNSEEN.findall("".join(letters)))
    assert not named - escaped
    # Of all others only what is drawn without any width.
    known = [letter for letter in escaped - named if unicodedata.category(letter) != "Cn"]
    assert {unicodedata.category(letter) for letter in known} <= {"Mn", "Lo"}
    assert all(
        "VARIATION SELECTOR" in unicodedata.name(letter)
        or "FILLER" in unicodedata.name(letter)
        or "INHERENT" in unicodedata.name(letter)
        or letter == "\u034f"
        for letter in known
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("é 漢字 µm² ملف שלום 1+ 🔬 C:\\data\u00a0\u3000x", None),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202eexe.gnp\u2069", r"\u202eexe.gnp\u2069"),
        ("\udcff\x9b\u2028\ufeff\U000e0041", r"\udcff\x9b\u2028\ufeff\U000e0041"),
    ],
)
def test_only_what_is_unseen_is_escaped(text, shown):
    assert escape_text(text) == (text if shown is None else shown)


def test_of_a_long_text_both_ends_are_shown():
    shown = escape_text(DataError("x" * 1_000_000 + ": remedy"))
    assert len(shown) < LONGEST + 50 and shown.startswith("xxx") and shown.endswith("xxx: remedy")
    assert f"[... {1_000_000 + 8 - LONGEST * 2 // 3 - LONGEST // 3} characters ...]" in shown
    assert escape_text("x" * LONGEST) == "x" * LONGEST


@given(TEXT)
@example(HOSTILE)
def test_a_line_stays_one_harmless_line(text):
    shown = escape_text(text)
    assert harmless(shown) and "\n" not in shown


@given(TEXT, st.sampled_from(["ascii", "latin-1", "utf-8", "cp1252"]))
@example(HOSTILE, "ascii")
def test_a_line_prints_in_any_encoding(text, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, newline="")
    print_lines("é", text, file=stream)
    written = stream.buffer.getvalue().decode(encoding)
    assert harmless(written) and written.count("\n") == 2


def test_the_output_of_libraries_is_escaped_too(capsys):
    with escaped_output():
        print(HOSTILE)
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "f.py", 1))
        sys.stderr.writelines(["x\x1b[0m\n"])
        sys.stderr.write("\r 50%|##\r")
        print("é", flush=True)
    print("\x1b", end="")
    out, err = capsys.readouterr()
    assert out == escape_text(HOSTILE).replace(r"a\n", "a\n") + "\né\n\x1b"
    # A progress bar goes back to the start of its line.
    assert err.endswith("x\\x1b[0m\n\r 50%|##\\r") and harmless(err.replace("\r 50", " 50"))


def test_a_bar_on_a_terminal_moves_and_its_name_does_not(monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with escaped_output(), show_logs(logging.INFO), progress(3, "\x1b[2Jname", "steps") as bar:
            bar.update()
            bar.write("a line", file=sys.stderr)
    shown = ""
    with contextlib.suppress(OSError):
        # Linux tells the end by an error.
        while part := os.read(ours, 100_000):
            shown += part.decode()
    os.close(ours)
    assert r"\x1b[2Jname:" in shown and "\x1b[2J" not in shown
    assert "\ra line\r\n" in shown, "the bar made way for the line"
    assert r"\r" not in shown


def test_a_bar_in_a_log_is_whole_lines(capsys, monkeypatch):
    monkeypatch.setattr("lgd.base.logs.EVERY", 0.0)
    with escaped_output(), show_logs(logging.INFO), progress(2, "\x1b[2J\nname", "steps") as bar:
        bar.update()
    err = capsys.readouterr().err
    assert harmless(err) and all(line.startswith(r"\x1b[2J\nname: ") for line in err.split("\n") if line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from(["utf-8", "ascii", "latin-1"]))
@example({HOSTILE: [HOSTILE]}, "ascii")
def test_json_is_harmless_and_reads_back(document, encoding):
    text = dump_json(document, indent=1, encoding=encoding)
    assert json.loads(text) == document
    assert harmless(text) and text.encode(encoding)


def test_a_number_that_is_none_is_named(tmp_path, capsys):
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"x.json cannot be written: field a.1.b is no finite number"):
            write_json(tmp_path / "x.json", {"a": [1.0, {"b": value}]})
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="field 0.level"):
        print_json([{"level": float("nan")}])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        (HOSTILE,),
        ("verify", HOSTILE),
        ("--debug", "verify", HOSTILE),
        ("train", "--train.batch", "owned\u202e\u2066\u200b\n"),
        ("train", "--config", HOSTILE),
        ("build-shards", "--layout", "bci", "--root", HOSTILE, "--out", "o"),
    ],
)
def test_what_a_message_repeats_is_harmless(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) in (1, 2)
    out, err = capsys.readouterr()
    assert not out and harmless(err) and "owned" in err
    assert len(err.splitlines()) == 1 or "--debug" in args


def test_an_error_of_a_library_is_harmless(capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("lgd.cli._run", fail)
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and r"RuntimeError: a" in err and harmless(err)


def test_names_in_any_bytes_on_a_terminal_without_unicode(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xc3\xa9")
    folder.mkdir()
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-m", "lgd", "verify", folder], capture_output=True, env=environment)
    assert done.returncode == 1
    assert rb"/\udcff\xe9 is no shard folder" in done.stderr
