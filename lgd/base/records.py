"""Typed, frozen records: what is read from disk is trusted only as far as its record says.

A part of a document, or one that lies in a file which has a digest, is a plain `Record`; a file of its own is a
`lgd.io.documents.Document`.
"""

from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    Strict,
    ValidationError,
    model_serializer,
)
from pydantic_core import ErrorDetails, from_json

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
Text = Annotated[Line, Field(min_length=1)]

Measured = Annotated[float | None, BeforeValidator(lambda value: None if value != value else value)]
"""A number that was computed; null where it is undefined (NaN)."""

_MOST = 3
"""Wrong fields that a message names."""


class Record(BaseModel):
    """A frozen part of a document: strict types, finite numbers, every field there and no other."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Fields that documents leave out where they are None, so that those without them keep their digests."""

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value is not None or name not in self.OPTIONAL}

    def as_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, fields: object) -> Self:
        """The record of some plain JSON; `ValueError` names the fields that are wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError(explain(error)) from error


def load_json(content: bytes | str | memoryview) -> JsonValue:
    """Plain JSON, which knows no NaN; `ValueError` for anything else."""
    document: JsonValue = from_json(content if isinstance(content, str) else bytes(content), allow_inf_nan=False)
    return document


def explain(error: ValidationError) -> str:
    """The fields that a record refuses, and why, in one line."""
    found = [
        f"field {'.'.join(map(str, one['loc']))[:120]!r}: {_plain(one)}" if one["loc"] else _plain(one)
        for one in error.errors(include_url=False, include_input=False)
    ]
    more = [f"and {len(found) - _MOST} more"] if len(found) > _MOST else []
    return "; ".join(found[:_MOST] + more)


def _plain(error: ErrorDetails) -> str:
    if error.get("ctx", {}).get("pattern") == _LINE or error["type"] == "string_unicode":
        return "should be a text that can be printed, without control characters"
    message = error["msg"].removeprefix("Value error, ").replace("Extra inputs", "extra fields")
    return message.replace("Input should", "should").replace("String should", "should")
