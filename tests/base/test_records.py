import json
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from web import Web

from lgd.base.errors import DataError
from lgd.base.records import Count, Line, Many, Record, Sha256, load_json
from lgd.io.digests import digest_of
from lgd.io.documents import Document, MissingDocument


class Inner(Record):
    counts: dict[str, Many[Count]]
    ratio: float | None


class Example(Document):
    FORMAT: ClassVar[str] = "lgd-example/2"
    ABSENT: ClassVar[str] = "run lgd example"
    REMEDY: ClassVar[str] = "run lgd example again"

    name: Line
    weights: Sha256
    rows: Annotated[int, Field(ge=1)]
    inner: Inner


GOOD = Example(name="a", weights="0" * 64, rows=3, inner=Inner(counts={"train": (1, 2)}, ratio=1))


def sealed(fields: dict[str, Any]) -> bytes:
    """A document that was edited together with its digest."""
    fields = {name: value for name, value in fields.items() if name != "digest"}
    return json.dumps(fields | {"digest": digest_of(fields)}).encode()


def test_what_was_written_reads_back(tmp_path):
    GOOD.write(tmp_path / "a.json")
    found = Example.read(tmp_path / "a.json")
    assert found == GOOD and found.digest == GOOD.digest
    assert next(iter(json.loads((tmp_path / "a.json").read_text()))) == "format"


def test_a_changed_copy_has_another_digest():
    assert GOOD.digest != GOOD.model_copy(update={"rows": 4}).digest


def test_a_missing_document_is_told_with_what_to_run(tmp_path):
    with pytest.raises(MissingDocument, match="a.json is missing: run lgd example$"):
        Example.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"rows": "3"}, "field 'rows': should be a valid integer"),
        ({"rows": True}, "field 'rows'"),
        ({"rows": 0}, "field 'rows'"),
        ({"name": "a\x1b[31m"}, "field 'name'"),
        ({"name": None}, "field 'name'"),
        ({"weights": "../victim/x"}, "field 'weights'"),
        ({"weights": "0" * 64 + "\n"}, "field 'weights'"),
        ({"inner": {"counts": {"train": [1, -1]}, "ratio": None}}, "field 'inner.counts.train.1'"),
        ({"inner": {"counts": {}}}, "field 'inner.ratio': Field required"),
        ({"more": 1}, "field 'more': extra fields are not permitted"),
        ({"format": "lgd-example/1"}, "this version of lgd reads format 2 only"),
        ({"format": "lgd-other/2"}, "it should be lgd-example/2"),
    ],
)
def test_odd_fields_are_named(edit, message):
    with pytest.raises(DataError) as told:
        Example.parse(sealed(GOOD.document() | edit), "F")
    assert message in str(told.value) and str(told.value).startswith("F: ")
    assert str(told.value).endswith(": run lgd example again") and "\x1b" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"null", b"[" * 100_000, b'{"rows": ' + b"9" * 5000 + b"}"])
def test_what_is_no_document_is_one_message(content):
    with pytest.raises(DataError, match="run lgd example again$"):
        Example.parse(content, "F")


@settings(max_examples=300)
@given(st.data())
def test_no_flipped_bit_is_read(data):
    content = bytearray(json.dumps(GOOD.document()).encode())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    try:
        found = Example.parse(bytes(content), "F")
    except DataError:
        return
    assert found == GOOD


def test_no_number_is_not_a_number():
    with pytest.raises(ValueError, match="expected value at line 1 column 7"):
        load_json('{"a": NaN}')
    with pytest.raises(ValueError, match="field 'ratio'"):
        Inner.from_json({"counts": {}, "ratio": float("inf")})


def test_a_document_that_was_harmed_on_its_way_is_read_once_more():
    whole = json.dumps(GOOD.document()).encode()
    flipped, cut = whole.replace(b'"rows": 3', b'"rows": 7'), whole[:-9] + b" " * 9
    with Web() as web:
        url, _, _ = web.put("a.json", whole)
        for harmed in (flipped, cut, bytes(len(whole))):
            web.faults["a.json"] = [harmed]
            assert Example.read(url) == GOOD
        assert web.asked["a.json"] == [None, "no-cache"] * 3
        web.faults["a.json"] = [flipped, flipped]
        with pytest.raises(DataError, match="a.json: its digest is not that of its content"):
            Example.read(url)
        with pytest.raises(MissingDocument, match="b.json is missing: run lgd example$"):
            Example.read(f"{web.url}/b.json")
