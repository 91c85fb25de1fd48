"""JSON documents as typed, frozen records: what is read from disk is trusted only as far as its record says.

    class Store(Document):
        FORMAT: ClassVar = "lgd-latents/2"
        ABSENT: ClassVar = "run lgd cache-latents"
        REMEDY: ClassVar = "delete it and run lgd cache-latents again"
        rows: Annotated[int, Field(ge=1)]

    Store(rows=3).write(path)
    Store.read(path).rows

A document on disk has `format` (with its version) first and `digest` last: the SHA-256 of all the rest in canonical
JSON. A part of a document, or one that lies in a file which has a digest, is a plain `Record`.
"""

import functools
import json
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from lgd.errors import DataError
from lgd.files import digest_of, read_parsed, write_json
from lgd.urls import Location

Value = TypeVar("Value")

Many = Annotated[tuple[Value, ...], Strict(False)]
"""A JSON array."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
# Escapes for terminals, line breaks, and halves of letters that cannot be written to any file.
_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"
Line = Annotated[str, Field(pattern=_LINE, max_length=100_000)]
"""A text without control characters."""

Measured = Annotated[float | None, BeforeValidator(lambda value: None if value != value else value)]
"""A number that was computed; null where it is undefined (NaN)."""

_MOST = 3
"""Wrong fields that a message names."""


class Record(BaseModel):
    """A frozen part of a document: strict types, finite numbers, every field there and no other."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    def as_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """The record of some plain JSON; `ValueError` names the fields that are wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError(explain(error)) from error


class Document(Record):
    """A record that lies on disk as a file of its own."""

    FORMAT: ClassVar[str]
    """Name and version of the format."""
    ABSENT: ClassVar[str]
    """What to do where the file is missing."""
    REMEDY: ClassVar[str]
    """What to do where it is broken, edited or of another version."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of format and fields, in canonical JSON."""
        return digest_of({"format": self.FORMAT, **self.as_json()})

    def model_copy(self, **changes: Any) -> Self:
        """A changed copy, with a digest of its own."""
        copy = super().model_copy(**changes)
        copy.__dict__.pop("digest", None)
        return copy

    def document(self) -> dict[str, Any]:
        """What lies on disk."""
        return {"format": self.FORMAT, **self.as_json(), "digest": self.digest}

    def write(self, path: str | Location) -> None:
        """Publish the document at `path`."""
        write_json(path, self.document())

    @classmethod
    def read(cls, path: str | Location) -> Self:
        """The document at `path`; `DataError` names the file, the field and the remedy.

        It is a `MissingDocument` where there is no such file. A wrong one at a url is read once more before it is
        believed to be wrong.
        """
        try:
            return read_parsed(path, lambda content: cls.parse(content, str(path)))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingDocument(f"{path} is missing: {cls.ABSENT}") from error

    @classmethod
    def parse(cls, content: bytes, name: str) -> Self:
        """The document of a file's content; `name` names it in errors."""
        try:
            found = load_json(content)
        except ValueError as error:
            raise DataError(f"{name} is not valid JSON ({error}): {cls.REMEDY}") from error
        said = found.get("format") if isinstance(found, dict) else None
        if said != cls.FORMAT:
            kind, version = cls.FORMAT.split("/")
            other = isinstance(said, str) and said.startswith(f"{kind}/")
            why = f"this version of lgd reads format {version} only" if other else f"it should be {cls.FORMAT}"
            raise DataError(f"{name}: field format is {said!r:.80}, {why}: {cls.REMEDY}")
        try:
            digest = found.pop("digest", None)
            if digest_of(found) != digest:
                raise ValueError("its digest is not that of its content: it was edited or damaged")
            del found["format"]
            document = cls.from_json(found)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: {error}: {cls.REMEDY}") from error
        document.__dict__["digest"] = digest
        return document


class MissingDocument(DataError, FileNotFoundError):
    """There is no such document yet."""


def load_json(content: bytes | str | memoryview) -> Any:
    """Plain JSON, which knows no NaN; `ValueError` for anything else."""
    try:
        return _JSON.decode(content if isinstance(content, str) else str(content, "utf-8"))
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def explain(error: ValidationError) -> str:
    """The fields that a record refuses, and why, in one line."""
    found = [
        f"field {'.'.join(map(str, one['loc']))[:120]!r}: {_plain(one)}" if one["loc"] else _plain(one)
        for one in error.errors(include_url=False, include_input=False)
    ]
    more = [f"and {len(found) - _MOST} more"] if len(found) > _MOST else []
    return "; ".join(found[:_MOST] + more)


def _plain(error: Any) -> str:
    if error.get("ctx", {}).get("pattern") == _LINE or error["type"] == "string_unicode":
        return "should be a text that can be printed, without control characters"
    message: str = error["msg"].removeprefix("Value error, ").replace("Extra inputs", "extra fields")
    return message.replace("Input should", "should").replace("String should", "should")
