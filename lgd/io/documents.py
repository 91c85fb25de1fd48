"""JSON documents on disk, as typed and frozen records.

    class Store(Document):
        FORMAT: ClassVar = "lgd-latents/2"
        ABSENT: ClassVar = "run lgd cache-latents"
        REMEDY: ClassVar = "delete it and run lgd cache-latents again"
        rows: Annotated[int, Field(ge=1)]

    Store(rows=3).write(path)
    Store.read(path).rows

A document on disk has `format` (with its version) first and `digest` last: the SHA-256 of all the rest in canonical
JSON. A part of a document is a plain `Record`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import JsonValue

from lgd.base.errors import DataError
from lgd.base.records import Record, load_json
from lgd.io.digests import digest_of
from lgd.io.files import read_bytes, write_json
from lgd.io.location import Location, as_location


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

    def model_copy(self, *, update: Mapping[str, object] | None = None, deep: bool = False) -> Self:
        """A changed copy, with a digest of its own."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("digest", None)
        return copy

    def document(self) -> dict[str, JsonValue]:
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
            content = read_bytes(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingDocument(f"{path} is missing: {cls.ABSENT}") from error
        try:
            return cls.parse(content, str(path))
        except DataError:
            if isinstance(as_location(path), Path):
                raise
        # It may have been cut on its way.
        return cls.parse(read_bytes(path, fresh=True), str(path))

    @classmethod
    def parse(cls, content: bytes, name: str) -> Self:
        """The document of a file's content; `name` names it in errors."""
        try:
            found = load_json(content)
        except ValueError as error:
            raise DataError(f"{name} is not valid JSON ({error}): {cls.REMEDY}") from error
        said = found.get("format") if isinstance(found, dict) else None
        if not isinstance(found, dict) or said != cls.FORMAT:
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
