"""Notes: what a reader must know of the result of one image. They stand in its row, and are counted for all images.

A kind of note is one fixed sentence, so that it can be counted: ten thousand images give one line a kind.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_MOST = 20
"""Images that a message lists."""


def count_notes(notes_of: Iterable[Sequence[str]], what: str) -> list[str]:
    """One line a kind of note, `3 of 48 images: nearly blank`, in the order in which they were met.

    `notes_of` has the notes of each image (of each `what`).
    """
    total, counts = 0, Counter[str]()
    for notes in notes_of:
        total += 1
        counts.update(dict.fromkeys(notes, 1))
    return [f"{count} of {total} {what}: {note}" for note, count in counts.items()]


def join_notes(notes: Sequence[str]) -> str:
    """The notes of a row as one cell of a table or a CSV."""
    return "; ".join(notes)


def describe_unusable(reasons: Mapping[str, Sequence[str]], total: int) -> list[str]:
    """The message on images, by name, that cannot be used; none where all can."""
    if not reasons:
        return []
    lines = [f"  {image}: {join_notes(notes)}" for image, notes in reasons.items()]
    more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return [f"{len(lines)} of {total} images have no answer:", *lines[:_MOST], *more]
