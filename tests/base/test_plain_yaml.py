import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lgd.base.plain_yaml import YamlError, check_text, read_yaml, write_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff\ufffe\uffff\u2028\u2029"))
WORDS = st.sampled_from(
    "no yes on ~ null 1e5 1_0 0o7 12:30 007 .5 5. .inf <<  = - ? : 2001-01-01 *a &a !a %a @a".split()
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXTS | WORDS
LEAVES |= st.floats(allow_nan=False, allow_infinity=False)
NAMES = TEXTS | WORDS


@settings(max_examples=50)
@given(st.dictionaries(NAMES, st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(NAMES, x), max_leaves=8)))
def test_what_is_written_reads_back(document):
    assert read_yaml(write_yaml(document)).value == document
    assert read_yaml(json.dumps(document, ensure_ascii=False)).value == document


@settings(max_examples=50)
@given(st.text() | st.text(st.sampled_from("a: -[]{},&*!?|>'\"%#\n\t\\1.e")))
def test_any_text_is_plain_data_or_refused_with_its_line(text):
    try:
        value, lines = read_yaml(text)
    except YamlError as error:
        assert 1 <= error.line <= text.count("\n") + text.count("\r") + 2
        assert str(error).isprintable()
    else:
        json.dumps(value, allow_nan=False)
        assert all(line >= 1 for line in lines.values())


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice, first in line 1"),
        ("a:\n  b: 1\n  'b': 2\n", 3, "'a.b' is given twice, first in line 2"),
        ("a: [{b: 1,\n b: 2}]", 2, "given twice"),
        ("a: 1\nb: &x [1]\n", 2, "anchors"),
        ("a: *x\n", 1, "anchors"),
        ("a: 1\nb: !!python/object/apply:os.system ['touch ran']", 2, "tags"),
        ("a: !x 1", 1, "tags"),
        ("%YAML 1.1\n---\na: 1\n", 1, "directives"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("<<: {a: 1}\n", 1, "no name of a field"),
        ("1: a\n", 1, "'1' is no name of a field"),
        ("null: a\n", 1, "no name of a field"),
        ("? [a]\n: 1\n", 1, "a list or mapping is no name of a field"),
        ("a: 1\nb: .nan\n", 2, "no number"),
        ("a: -.inf", 1, "no number"),
        ("a: 1e999", 1, "no number"),
        ("a: 9223372036854775808", 1, "too large"),
        ('a: "\\e[2J"', 1, "a control character (U+001B)"),
        ('"a\\0": 1', 1, "a control character (U+0000)"),
        ("a: 1\nb: \x1b[2J", 2, "a control character (U+001B)"),
        ("a: |\n  x\n", 1, "a line break"),
        ('a: "\\u0085"', 1, "a line break"),
        ('a: "\\t"', 1, "a tab"),
        ("a: \x9b2J", 1, "a control character (U+009B)"),
        ("a:\n\tb: 1", 2, "no valid YAML"),
        ("a: [1, 2\n", 2, "no valid YAML"),
        ("a: b: c", 1, "no valid YAML"),
        ("a: '" + "x" * 10_001 + "'", 1, "more than 10,000 characters"),
    ],
)
def test_what_is_more_than_plain_data_is_refused(text, line, reason):
    with pytest.raises(YamlError) as caught:
        read_yaml(text)
    assert reason in str(caught.value) and caught.value.line == line and "\n" not in str(caught.value)


def test_words_are_those_of_yaml_1_2():
    text = "{a: no, b: 12:30, c: 2001-01-01, d: 1e-3, e: 0o7, f: true, g: ~, h: 007, i: '1', j: 1., k: x y}"
    assert read_yaml(text).value == {
        "a": "no",
        "b": "12:30",
        "c": "2001-01-01",
        "d": 0.001,
        "e": "0o7",
        "f": True,
        "g": None,
        "h": 7,
        "i": "1",
        "j": 1.0,
        "k": "x y",
    }
    assert read_yaml("# nothing\n").value is None
    assert read_yaml("\ufeffa: 1").lines == {"a": 1}
    assert math.isclose(yaml.safe_load(write_yaml({"a": 1e-05}))["a"], 1e-05)
    check_text("a b")


def test_bombs_are_refused_in_bounded_time_and_memory():
    """Each a megabyte; in a process of its own, since memory that was once had is not given back."""
    code = """
import resource, time
from lgd.base.plain_yaml import MOST_BYTES, YamlError, read_yaml
n = MOST_BYTES
nine = lambda word: "[" + ",".join([word] * 9) + "]"
bombs = {
    "aliases": "".join(f"b{i}: &a{i} {nine(f'*a{i - 1}' if i else 'lol')}\\n" for i in range(10)),
    "flow": "a: " + "[" * n, "maps": "{a: " * (n // 4), "dashes": "- " * (n // 2), "questions": "? " * (n // 2),
    "blocks": "".join(" " * i + "a:\\n" for i in range(1400)), "list": "[" + "1," * (n // 2), "commas": "[" + "," * n,
    "keys": "".join(f"k{i}: 1\\n" for i in range(n // 11)), "lists": "[" + "[]," * (n // 3),
    "directives": "%TAG !a! b\\n" * (n // 11), "documents": "---\\n" * (n // 4), "text": "a: '" + "x" * n + "'",
    "digits": "a: " + "9" * n, "exponent": "a: 1e" + "9" * n, "colons": "a: " + ":" * n, "anchor": "a: &" + "x" * n,
    "block": "a: |\\n" + "  x\\n" * (n // 4), "key": "? |\\n" + " a\\n" * (n // 3) + ": 1", "quotes": "'" * n,
}
read_yaml("a: 1")
for name, text in bombs.items():
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_yaml(text)
        print(name, "was read")
    except YamlError:
        pass
    spent, more = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if spent > 1 or more > 50 * 1024:
        print(name, spent, more)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=Path.cwd())
    assert (done.stdout, done.stderr) == ("", "")
