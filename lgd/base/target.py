"""What is predicted: an ordinal, a class or a number, as a YAML file states it.

    name: Ki67
    kind: number
    unit: "%"
    range: [0, 100]

`lgd build-shards --target FILE` writes it into the set; what is trained on the set, and scored, follows it. LGD's own
are called by their names: `her2` (the default), `her2-binary`, `ki67`.
"""

import functools
import importlib.resources
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, Strict, model_serializer, model_validator

from lgd.base.arguments import suggest_name
from lgd.base.errors import ConfigError, DataError
from lgd.base.plain_yaml import MOST_BYTES, YamlError, read_yaml
from lgd.base.records import Line, Many, Record, Text
from lgd.base.text import escape_text

Label = int | float
"""The number of a class, or a value."""
UNKNOWN = "unknown"
"""Where the samples without a label are counted."""
KNOWN = "known"
"""Where those are counted that have a value."""
NO_CLASS = -1
"""The number of an unknown class; an unknown value is NaN."""

_IDENTITY = ("name", "kind", "classes", "unit")
DEFAULT_TARGET = "her2"
"""Where nothing else is said."""
_MOST_CLASSES = 100
_LARGEST = 1e12
"""Of a value, whose squares are added up, and which is stored as a float32."""
_COLUMNS = {UNKNOWN, KNOWN, *"image slide patches notes unit interval label_set split samples shards mb".split()}
_COLUMNS |= {*"model key group predicted center scanner overall".split()}
"""Of tables that have a column a class, or one of the label."""
_NEEDED = "name, kind (ordinal, class or number), and classes, or of a number unit and range"
_FOREIGN = {
    "ordinal": ("range", "unit"),
    "class": ("range", "unit", "area_percent", "area_note"),
    "number": ("groups", "aliases", "area_percent", "area_note"),
}
_WORDS = {"ordinal": "label", "class": "label", "number": "value"}
_GROUP = Annotated[str, Field(pattern="^[A-Za-z0-9_]{1,40}$")]
_Name = Annotated[Text, Field(max_length=60, pattern=r"^\S(.*\S)?$")]
_End = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]


class Target(Record):
    """What is predicted. Two are the same where name, kind, classes, unit and range are."""

    name: _Name
    kind: Literal["ordinal", "class", "number"]
    classes: Annotated[Many[_Name], Field(max_length=_MOST_CLASSES)]
    """Names of the classes, of an ordinal from low to high; none of a number."""
    unit: _Name | None

    # What follows is left out of a document where it is not stated, and where the target is one of LGD's.
    range: Annotated[tuple[_End, _End], Strict(False)] | None = None
    """Least and largest value of a number."""
    word: Annotated[str, Field(pattern="^[a-z]{1,20}$")] | None = None
    """What a label is called."""
    groups: dict[_GROUP, Many[_Name]] | None = None
    """Classes that are scored together against the rest, by AUC."""
    area_percent: Annotated[float, Field(gt=0, lt=100)] | None = None
    """An ordinal's slide also has the highest class that more than so many percent of its patches reach."""
    area_note: Line | None = None
    stains: Literal["membranes", "nuclei"] | None = None
    """What the second stain shows, for domain targets."""
    notes: Many[Line] | None = None
    """Sentences below the scores of a report."""
    aliases: dict[_Name, _Name] | None = None
    """Other spellings of classes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_number = self.kind == "number"
        if is_number and self.classes:
            raise ValueError("field classes is given, and a number has none")
        if not is_number and len(self.classes) < 2:
            raise ValueError(f"field classes has {len(self.classes)}: name two or more")
        for name in _FOREIGN[self.kind]:
            if getattr(self, name) is not None:
                raise ValueError(f"field {name} is given, and kind is {self.kind}, which has none")
        if self.range and not self.range[0] < self.range[1]:
            raise ValueError(f"field range is {list(self.range)}: give the least value and the largest")
        self._check_names()
        return self

    def _check_names(self) -> None:
        aliases, groups = self.aliases or {}, self.groups or {}
        texts = [text.casefold() for text in (*self.classes, *aliases)]
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"field {'aliases' if aliases else 'classes'}: {twice[0]!r} stands there twice: keep one")
        if self.label_word in _COLUMNS:
            raise ValueError(f"field word is {self.word}, the name of a column of results: use another one")
        for name in self.classes:
            if name.casefold() in {*_COLUMNS, "label", self.label_word} or "," in name:
                raise ValueError(f"field classes: {name!r} has a comma, or is the name of a column: use another name")
        stated = {"aliases": aliases.values(), "groups": [name for group in groups.values() for name in group]}
        for field, names in stated.items():
            if unknown := [name for name in names if name not in self.classes]:
                raise ValueError(f"field {field}: {unknown[0]!r} is no class: there are {', '.join(self.classes)}")
        for group, members in groups.items():
            if not 0 < len({*members}) == len(members) < len(self.classes):
                raise ValueError(f"field groups: {group} holds no class, all, or one twice: name some of them")

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        own = shipped_targets().get(self.name)
        known = own is not None and all(getattr(own, name) == getattr(self, name) for name in fields)
        return {name: value for name, value in fields.items() if name in _IDENTITY or not (known or value is None)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes it the same as another."""
        return tuple(getattr(self, name) for name in (*_IDENTITY, "range"))

    @property
    def is_number(self) -> bool:
        """Whether a label is a value, and not the number of a class."""
        return self.kind == "number"

    @property
    def is_ordered(self) -> bool:
        """Whether the classes have an order."""
        return self.kind == "ordinal"

    @property
    def label_word(self) -> str:
        """What a label is called."""
        return self.word or _WORDS[self.kind]

    @property
    def counted(self) -> tuple[str, ...]:
        """Where labelled samples are counted: by class, or in one place where labels are values."""
        return (KNOWN,) if self.is_number else self.classes

    @property
    def width(self) -> int:
        """How many numbers an answer has: a probability a class, or one value."""
        return 1 if self.is_number else len(self.classes)

    @property
    def group_titles(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of each group its title and the numbers of its classes.

        Where none is stated these are the upper classes from each place on of an ordinal, and each class of others.
        """
        names = self.classes
        if self.groups is not None:
            stated = {name: tuple(sorted(map(names.index, group))) for name, group in self.groups.items()}
        elif self.is_ordered or len(names) == 2:
            stated = {f"from_{first}": tuple(range(first, len(names))) for first in range(1, len(names))}
        else:
            stated = {f"{number}_vs_rest": (number,) for number in range(len(names))}
        titles = {}
        for name, group in stated.items():
            upper = self.groups is None and len(group) > 1
            words = f"{names[group[0]]} or higher" if upper else "/".join(names[number] for number in group)
            titles[name] = (f"{words} against rest", group)
        return titles

    def count_of(self, label: Label | None) -> str:
        """Where a sample is counted."""
        if label is None:
            return UNKNOWN
        return KNOWN if self.is_number else self.classes[int(label)]

    def name_label(self, label: Label | None) -> str | float | None:
        """The name of a class, or the value; None where it is unknown."""
        if label is None or label != label or (not self.is_number and label < 0):
            return None
        return float(label) if self.is_number else self.classes[int(label)]

    def format_label(self, label: str | float | None) -> str:
        """What `name_label` gives, for a person."""
        if not isinstance(label, float):
            return label or UNKNOWN
        unit = self.unit or ""
        return f"{float(f'{label:.3g}'):.15g}{' ' if unit and unit != '%' else ''}{unit}"

    def describe_labels(self) -> str:
        """What labels there are, in words."""
        if not self.is_number:
            return ", ".join(self.classes)
        low, high = self.range or (None, None)
        return f"a number below {_LARGEST:g}" if low is None else f"a number from {low:g} to {high:g}"

    def find_problem(self, label: object) -> str | None:
        """Why a value of JSON is no label of this target; None where it is."""
        if self.is_number:
            low, high = self.range or (-_LARGEST, _LARGEST)
            good = type(label) in (int, float) and low <= label <= high  # type: ignore[operator]
            return None if good else f"should be {self.describe_labels()}"
        good = type(label) is int and 0 <= label < len(self.classes)
        return None if good else f"and the set has {len(self.classes)} classes"

    def parse_label(self, text: str) -> Label:
        """The label of a text, as a CSV or a file's name has it; `DataError` says which there are.

        Spreadsheets write 1 as 1.0, and numbers with a comma or their unit; case does not count.
        """
        text = text.strip()
        if self.is_number:
            number = re.sub(r"(\d),(\d{1,2}|\d{4,})$", r"\1.\2", text.removesuffix(self.unit or "").strip())
            if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", number) and not self.find_problem(float(number)):
                return float(number) + 0.0
        elif (label := self._spellings.get(text.casefold())) is not None:
            return label
        raise DataError(f"use {self.describe_labels()}")

    @functools.cached_property
    def _spellings(self) -> dict[str, int]:
        names = {name: name for name in self.classes} | (self.aliases or {})
        known = {text.casefold(): self.classes.index(name) for text, name in names.items()}
        return {f"{text}.0": label for text, label in known.items() if re.fullmatch(r"\d+", text)} | known


def complete_target(target: Target) -> Target:
    """A target, with what a document leaves out where it is one of LGD's."""
    own, bare = shipped_targets().get(target.name), target.model_fields_set <= {*_IDENTITY}
    return own if own is not None and bare and own.identity[:-1] == target.identity[:-1] else target


StatedTarget = Annotated[Target, AfterValidator(complete_target)]
"""A target in a document."""


@functools.cache
def shipped_targets() -> dict[str, Target]:
    """The targets that come with LGD, by their names."""
    return {target.name: target for target in _shipped_files().values()}


@functools.cache
def _shipped_files() -> dict[str, Target]:
    folder = importlib.resources.files("lgd") / "configs" / "targets"
    files = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in folder.iterdir()}
    return {name: _parse_target(text, name) for name, text in sorted(files.items())}


def find_target(name: str) -> Target:
    """The target of a YAML file, or the one of LGD that is called so.

    Raises `ConfigError` for a file that cannot be read or states none; it names the file, the line and the field.
    """
    files, shown = _shipped_files(), escape_text(name, 200)
    remedy = f"name a YAML file, or one of {', '.join(files)}"
    if name.lower() in files:
        return files[name.lower()]
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"--target {shown}: {remedy}")
    try:
        with Path(name).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"--target {shown} cannot be read ({error.strerror or error}): {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"--target {shown} is no file of UTF-8 text: save it as such") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"--target {shown} has more than {MOST_BYTES:,} bytes: name the YAML file of a target")
    return complete_target(_parse_target(text, shown))


def _parse_target(text: str, name: str) -> Target:
    try:
        plain = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{name}, line {error.line}: {error}") from error
    if not isinstance(plain.value, dict):
        raise ConfigError(f"{name} holds no target: give it {_NEEDED}")
    for field in [field for field in plain.value if field not in Target.model_fields]:
        near = suggest_name(field, Target.model_fields)
        raise ConfigError(f"{name}, line {plain.lines[field]}: there is no field {field:.60}{near}")
    try:
        return Target.from_json({"classes": [], "unit": None} | plain.value)
    except ValueError as error:
        text = str(error).replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
        text += "; a text that could be a number stands in quotes" if "valid string" in text else ""
        stated = re.match(r"field ('?)(\w+)", text)
        line = plain.lines.get(stated[2]) if stated else None
        if stated and stated[1]:
            text += f": give it {_NEEDED}" if stated[2] in ("name", "kind") else ": write it as docs/targets.md shows"
        raise ConfigError(f"{name}{f', line {line}' if line else ''}: {text}") from error
