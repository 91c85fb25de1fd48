"""YAML as plain data: mappings by names, lists, texts, numbers, true, false and null, and nothing else.

What runs code (tags), grows when it is read (anchors), or has two meanings (a name given twice, several documents) is
refused, with its line, after at most a second and some megabytes. Words are those of YAML 1.2: `no` and `12:30` are
texts.
"""

import math
import re
from typing import Any, NamedTuple

import yaml
from pydantic import JsonValue

MOST_BYTES = 2**20
_MOST_VALUES, _MOST_LEVELS, _MOST_CHARACTERS = 10_000, 30, 10_000
_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# In a file; a text may not even hold a tab or a break of its line.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_UNWELCOME = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# libyaml is thirty times as fast, and not everywhere.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlError(ValueError):
    """A text is no YAML, or more than plain data; its message is one line."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class Plain(NamedTuple):
    """What a text holds."""

    value: Any
    lines: dict[str, int]
    """The line of each name, by its dotted path from the top; names inside lists have none."""


def read_yaml(text: str) -> Plain:
    """The plain data of one YAML document, which JSON is too, None for an empty one; raises `YamlError`."""
    text = text.removeprefix("\ufeff")
    if found := _CONTROL.search(text):
        raise YamlError(text.count("\n", 0, found.start()) + 1, _holds(found[0]))
    lines: dict[str, int] = {}
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=_LOADER)
        return Plain(None if node is None else _value(node, "", lines), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(mark.line + 1 if mark else 1, f"no valid YAML ({reason})") from error
    except yaml.YAMLError as error:
        raise YamlError(1, "no valid YAML (a character that it does not allow)") from error


def _check_events(text: str) -> None:
    """Raise `YamlError` before anything is built that could be large, or deep, or run."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        line = event.start_mark.line + 1  # type: ignore[union-attr]
        if isinstance(event, yaml.DocumentStartEvent) and (event.version or event.tags):
            raise YamlError(line, "directives (%) are not read: remove it")
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            quotes = "write the value out, or put a text in quotes"
            raise YamlError(line, f"anchors (&) and aliases (*) are not read: {quotes}")
        if getattr(event, "tag", None):
            raise YamlError(line, "tags (!) are not read: remove it, or put a text in quotes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise YamlError(line, f"nested deeper than {_MOST_LEVELS} levels")
        if number > 2 * _MOST_VALUES:
            raise YamlError(line, f"more than {_MOST_VALUES:,} values")


def _value(node: yaml.Node, path: str, lines: dict[str, int]) -> JsonValue:
    """The plain value of a node at a dotted path; notes the lines of the names below it."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, f"{path}[]", {}) for child in node.value]
    values: dict[str, JsonValue] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str) or (key == "<<" and not key_node.style):
            what = f"{key_node.value!r:.60}" if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise YamlError(line, f"{what} is no name of a field: put a name in quotes")
        name = f"{path}.{key}" if path else key
        if key in values:
            raise YamlError(line, f"{name!r:.120} is given twice, first in line {lines.get(name, line)}: keep one")
        lines[name] = line
        values[key] = _value(child, name, lines)
    return values


def _scalar(node: yaml.ScalarNode) -> JsonValue:
    text: str = node.value
    line = node.start_mark.line + 1
    check_text(text, line)
    if not node.style:
        if text in _NULLS:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
            return _number(text, line)
    return text


def check_text(text: str, line: int = 1) -> None:
    """Raise `YamlError` for a text that is very long or holds control characters, line breaks or halves of letters."""
    if len(text) > _MOST_CHARACTERS:
        raise YamlError(line, f"a text of more than {_MOST_CHARACTERS:,} characters")
    if found := _UNWELCOME.search(text):
        raise YamlError(line, _holds(found[0]))


def _number(text: str, line: int) -> int | float:
    whole = _INTEGER.fullmatch(text) is not None
    if whole and len(text) <= 20 and -(2**63) <= int(text) < 2**63:
        return int(text)
    number = math.inf if whole or _NOT_FINITE.fullmatch(text) else float(text)
    if not math.isfinite(number):
        raise YamlError(line, f"{text:.40} is too large, or no number: use a finite one of at most 64 bits")
    return number


def _holds(character: str) -> str:
    kind = "a line break" if character in "\n\r\x85" else "a tab" if character == "\t" else "a control character"
    return f"a text holds {kind} (U+{ord(character):04X}), and none may: remove it"


class _Dumper(yaml.SafeDumper):
    """Quotes each text that `read_yaml` would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("+-.0123456789"))


def write_yaml(document: object) -> str:
    """Plain data as YAML that `read_yaml` reads back."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
