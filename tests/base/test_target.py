"""Targets: the files that state them, and labels as texts."""

import json
import math
import re
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lgd.base.errors import ConfigError, DataError
from lgd.base.records import load_json
from lgd.base.target import StatedTarget, Target, complete_target, find_target, shipped_targets
from lgd.shards.manifest import Manifest

HER2, KI67 = find_target("her2"), find_target("ki67")
ROOT = Path(__file__).resolve().parents[2]
CLASS = "name: Subtype\nkind: class\nclasses: [luminal, basal]\n"
NUMBER = "name: Share\nkind: number\n"


def write(folder, text):
    path = folder / "target.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_shipped_file_is_a_target_that_the_package_holds():
    files = {path.stem for path in (ROOT / "configs" / "targets").glob("*.yaml")}
    held = resources.files("lgd") / "configs" / "targets"
    assert {path.name for path in held.iterdir()} == {f"{name}.yaml" for name in files}
    assert len(shipped_targets()) == len(files) and {"her2", "her2-binary", "ki67"} <= files
    for name in files:
        target = find_target(name)
        assert target == find_target(str(ROOT / "configs" / "targets" / f"{name}.yaml"))
        assert target.model_dump() == shipped_targets()[target.name].model_dump()


def test_each_file_of_the_documentation_is_a_target(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "targets.md").read_text(), re.DOTALL)
    targets = [find_target(str(write(tmp_path, block))) for block in blocks]
    assert [target.kind for target in targets] == ["ordinal", "class", "number"]
    listed = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "targets.md").read_text(), re.MULTILINE)
    fields = {name.strip("`") for cell in listed for name in cell.split(", ")}
    assert {*Target.model_fields} <= fields


def test_her2_in_a_document_is_as_before_there_were_others():
    document = {"name": "HER2", "kind": "ordinal", "classes": ["0", "1+", "2+", "3+"], "unit": None}
    assert HER2.as_json() == document
    field = Manifest.model_fields["target"]
    assert field.annotation is Target and StatedTarget.__metadata__[0] in field.metadata
    read = StatedTarget.__metadata__[0].func(Target.from_json(document))
    assert read.label_word == "level" and read.notes == HER2.notes and [*read.group_titles] == [*HER2.groups]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 0, "holds no target: give it name, kind"),
        ("- a\n", 0, "holds no target"),
        ("kind: number\n", 0, "field 'name': Field required: give it name, kind"),
        ("name: A\nkind: ordnal\nclasses: [a, b]\n", 2, "field 'kind': should be 'ordinal', 'class' or 'number'"),
        (CLASS + "units: x\n", 4, "there is no field units, did you mean unit"),
        ("name: A\nkind: class\n", 0, "field classes has 0: name two or more"),
        ("name: A\nkind: class\nclasses: [a]\n", 3, "field classes has 1: name two or more"),
        ("name: A\nkind: class\nclasses: [a, A]\n", 3, "field classes: 'a' stands there twice: keep one"),
        ("name: A\nkind: class\nclasses: a, b\n", 3, "field 'classes': should be a list"),
        ("name: A\nkind: ordinal\n\nclasses: [0, 1]\n", 4, "a text that could be a number stands in quotes"),
        ("name: A\nkind: class\nclasses: [true, no]\n", 3, "'classes.0': should be a valid string"),
        ("name: A\nkind: class\nclasses: [a, '']\n", 3, "'classes.1': should have at least 1 character"),
        ("name: A\nkind: class\nclasses: [a, 'b,c']\n", 3, "'b,c' has a comma, or is the name of a column"),
        ("name: A\nkind: class\nclasses: [Unknown, b]\n", 3, "'Unknown' has a comma, or is the name of a column"),
        ("name: A\nkind: class\nclasses: [label, b]\n", 3, "'label' has a comma, or is the name of a column"),
        ("name: A\nkind: class\nclasses: [Group, b]\n", 3, "'Group' has a comma, or is the name of a column"),
        ("name: A\nkind: class\nclasses: [label, b]\nword: grade\n", 3, "'label' has a comma, or is the name of a"),
        (f"name: A\nkind: class\nclasses: [a, {'b' * 61}]\n", 3, "'classes.1': should have at most 60 characters"),
        (f"name: A\nkind: class\nclasses: {json.dumps([f'c{i}' for i in range(101)])}\n", 3, "at most 100 items"),
        (f"name: {'A' * 61}\nkind: number\n", 1, "'name': should have at most 60 characters"),
        (CLASS + "unit: '%'\n", 4, "field unit is given, and kind is class, which has none"),
        (CLASS + "range: [0, 1]\n", 4, "field range is given, and kind is class"),
        (CLASS + "groups: {all: [luminal, basal]}\n", 4, "groups: all holds no class, all, or one twice"),
        (CLASS + "groups: {none: []}\n", 4, "groups: none holds no class, all, or one twice"),
        (CLASS + "groups: {g: [her2]}\n", 4, "groups: 'her2' is no class: there are luminal, basal"),
        (CLASS + "groups: {g h: [basal]}\n", 4, "should match pattern"),
        (CLASS + "groups: [basal]\n", 4, "field 'groups': should be a mapping: write it as docs/targets.md shows"),
        (CLASS + "aliases: {b: basaloid}\n", 4, "aliases: 'basaloid' is no class"),
        (CLASS + "aliases: {BASAL: luminal}\n", 4, "aliases: 'basal' stands there twice"),
        (CLASS + "aliases: {1: basal}\n", 4, "'1' is no name of a field: put a name in quotes"),
        (CLASS + "aliases: {' ': basal}\n", 4, "should match pattern"),
        (CLASS + "area_percent: 10\n", 4, "area_percent is given, and kind is class, which has none"),
        (CLASS + "area_note: one\n", 4, "area_note is given, and kind is class, which has none"),
        (CLASS + "word: Level\n", 4, "field 'word': should match pattern"),
        (CLASS + "word: notes\n", 4, "word is notes, the name of a column of results"),
        (CLASS + "stains: cells\n", 4, "field 'stains': should be"),
        (CLASS + "notes: one\n", 4, "field 'notes': should be a list"),
        (NUMBER + "classes: [a, b]\n", 3, "field classes is given, and a number has none"),
        (NUMBER + "aliases: {a: b}\n", 3, "field aliases is given, and kind is number"),
        (NUMBER + "range: [100, 0]\n", 3, "field range is [100.0, 0.0]: give the least value and the largest"),
        (NUMBER + "range: [0]\n", 3, "field 'range.1': Field required"),
        (NUMBER + "range: ['0', '1']\n", 3, "field 'range.0': should be a valid number"),
        (NUMBER + "range: [0, .inf]\n", 3, ".inf is too large, or no number"),
        (NUMBER + "range: [0, 1e30]\n", 3, "'range.1': should be less than or equal to 1000000000000"),
        (NUMBER + "unit: 5\n", 3, "field 'unit': should be a valid string"),
        ("name: !!python/name:os.system A\nkind: number\n", 1, "tags (!) are not read"),
        ("name: &a A\nkind: number\nunit: *a\n", 1, "anchors (&) and aliases (*) are not read"),
        ("name: A\nname: B\nkind: number\n", 2, "'name' is given twice, first in line 1"),
        ("name: [A\n", 2, "no valid YAML"),
    ],
)
def test_a_file_with_an_error_is_refused_with_its_line_and_field(tmp_path, text, line, reason):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        find_target(str(path))
    where = f"{path}, line {line}: " if line else f"{path}"
    assert str(caught.value).startswith(where) and reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: \u00dc\n".encode("latin-1"), "is no file of UTF-8 text: save it as such"),
        (b"#" * (2**20 + 1), "has more than 1,048,576 bytes: name the YAML file of a target"),
    ],
)
def test_what_is_no_such_text_is_refused(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason):
        find_target(str(write(tmp_path, text)))


@pytest.mark.parametrize(
    "name", ["her3", "", ".", "-", "her2.yaml", "missing/t.yaml", "a\0b.yaml", "x" * 5000 + ".yaml"]
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ConfigError, match="^--target ") as caught:
        find_target(name)
    assert len(str(caught.value)) < 400


def test_a_folder_is_no_target(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\): name a YAML file, or one of her2"):
        find_target(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("2+", 2), (" 2+ ", 2), ("2", 2), ("2.0", 2), ("0.0", 0),
        *((text, None) for text in ("4", "4+", "2.5", "-1", "+2", "", "unknown", "nan", "2,0", "1e0")),
    ],
)  # fmt: skip
def test_a_level_as_spreadsheets_write_it(text, label):
    if label is not None:
        assert HER2.parse_label(text) == label
        return
    with pytest.raises(DataError, match=r"use 0, 1\+, 2\+, 3\+"):
        HER2.parse_label(text)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("12", 12.0), ("12.5", 12.5), ("12,5", 12.5), ("12,5 %", 12.5), ("12.5%", 12.5), ("1e1", 10.0), (".5", 0.5),
        ("0", 0.0), ("-0", 0.0), ("100", 100.0), ("1,2345", 1.2345), ("12.", 12.0),
        *((text, None) for text in ("nan", "inf", "-inf", "1e999", "100.1", "-1", "12,5,3", "1,234", "12 5")),
        *((text, None) for text in ("", "%", "high", "0x10", "1_0", "12%%", "1e", "--1", "12.5 ppm", "1+")),
    ],
)  # fmt: skip
def test_a_value_as_spreadsheets_write_it(text, label):
    if label is not None:
        found = KI67.parse_label(text)
        assert found == label and math.copysign(1, found) == 1
        return
    with pytest.raises(DataError, match="use a number from 0 to 100"):
        KI67.parse_label(text)


def test_a_value_without_a_range_is_still_no_infinity(tmp_path):
    target = find_target(str(write(tmp_path, NUMBER)))
    assert target.parse_label("-1e12") == -1e12
    for text in ("1e13", "1e999", "nan"):
        with pytest.raises(DataError, match="use a number below 1e.12"):
            target.parse_label(text)


texts = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=","), min_size=1, max_size=12)
names = texts.filter(lambda text: text == text.strip())


@st.composite
def class_targets(draw):
    kind = draw(st.sampled_from(["ordinal", "class"]))
    classes = draw(st.lists(names, min_size=2, max_size=6, unique_by=str.casefold))
    try:
        return Target.from_json({"name": "A", "kind": kind, "classes": classes, "unit": None})
    except ValueError:
        # The name of a column, or such as are alike once their case does not count.
        return HER2


@given(class_targets())
def test_each_class_is_read_back_from_its_name(target):
    for number, name in enumerate(target.classes):
        assert target.parse_label(name) == target.parse_label(f" {name} ") == number
        assert target.name_label(number) == name == target.count_of(number) and target.find_problem(number) is None
        assert target.format_label(name) == name
    assert target.find_problem(len(target.classes)) and target.find_problem(-1) and target.find_problem(True)
    assert target.find_problem(0.0) and target.name_label(-1) is target.name_label(None) is None
    again = Target.from_json(load_json(json.dumps(target.as_json())))
    assert again == target and hash(again) == hash(target)
    assert all(0 < len(group) < len(target.classes) for _, group in target.group_titles.values())


@given(st.floats(0, 100), st.sampled_from(["", "%", " %"]))
def test_each_value_is_read_back_from_its_text(value, unit):
    assert KI67.parse_label(f"{value!r}{unit}") == value == KI67.name_label(value)
    assert KI67.find_problem(value) is None and KI67.count_of(value) == "known"
    assert float(KI67.format_label(value).removesuffix("%")) == pytest.approx(value, rel=0.006)


@given(st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=100.001), st.just(math.nan), st.booleans(), st.text()))
def test_what_is_outside_is_a_problem(value):
    assert KI67.find_problem(value) == "should be a number from 0 to 100"


@given(st.text(max_size=20))
def test_any_text_is_a_label_or_refused(text):
    for target in (HER2, KI67, find_target("her2-binary")):
        try:
            label = target.parse_label(text)
        except DataError:
            continue
        assert target.find_problem(label) is None


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0%"), (12.3456, "12.3%"), (100.0, "100%"), (0.01234, "0.0123%"), (None, "unknown")]
)
def test_a_value_for_a_person(value, shown):
    assert KI67.format_label(value) == shown
    score = Target(name="H-score", kind="number", classes=(), unit="points")
    assert score.format_label(12345.0) == "12300 points"


def test_targets_of_two_ranges_are_two_and_a_document_leaves_out_what_lgd_knows(tmp_path):
    own = find_target("ki67")
    four = {"name": "Ki67", "kind": "number", "classes": [], "unit": "%"}
    assert own.as_json() == four and complete_target(Target.from_json(four)) is own
    path = tmp_path / "wide.yaml"
    path.write_text('name: Ki67\nkind: number\nunit: "%"\nrange: [0, 200]\n')
    wide = find_target(str(path))
    assert wide != own and hash(wide) != hash(own) and wide.as_json() == {**four, "range": [0, 200]}
