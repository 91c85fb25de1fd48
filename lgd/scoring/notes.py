"""Notes: what a reader must know of the result of one image. They stand in its row.

A kind of note is one fixed sentence, so that it can be counted: ten thousand images give one line a kind.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lgd.base.errors import DataError
from lgd.models.description import Training
from lgd.stain.checks import find_notes

NO_NUMBER = "the network gives no number for this image, and so no {}: its training diverged"
"""Of the word for a label."""
NO_LABELS = "the network saw no label in training and gives no {}; its latents can be queried"
"""Of the word for a label."""
VIRTUAL = "the network was trained on virtual tissue only: what it says of real tissue means nothing"
_MOST = 20
"""Images that a message lists."""


def collect_notes(training: Training, role: str, image_HW3: np.ndarray, values: Mapping[str, np.ndarray]) -> list[str]:
    """All notes on what a scorer says of one decoded image; each kind of note is added here."""
    notes = find_notes(image_HW3) if role == "he" else []
    word = training.target.label_word
    if "logits" in values and not np.isfinite(values["logits"]).all():
        notes.append(NO_NUMBER.format(word))
    if not training.labelled:
        notes.append(NO_LABELS.format(word))
    if training.virtual:
        notes.append(VIRTUAL)
    return notes


def count_notes(notes_of: Iterable[Sequence[str]], what: str) -> list[str]:
    """One line a kind of note, `3 of 48 images: nearly blank`, in the order in which they were met.

    `notes_of` has the notes of each image (of each `what`).
    """
    rows = [dict.fromkeys(notes) for notes in notes_of]
    counts = Counter(itertools.chain(*rows))
    return [f"{count} of {len(rows)} {what}: {note}" for note, count in counts.items()]


def join_notes(notes: Sequence[str]) -> str:
    """The notes of a row as one cell of a table or a CSV."""
    return "; ".join(notes)


def describe_unusable(reasons: Mapping[str, Sequence[str]], total: int, what: str = "images") -> list[str]:
    """The message on images (or `what`), by name, that cannot be used; none where all can, and a `DataError` where none
    can.
    """
    if not reasons:
        return []
    lines = [f"  {image}: {join_notes(notes)}" for image, notes in reasons.items()]
    more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    message = [f"{len(lines)} of {total} {what} have no answer:", *lines[:_MOST], *more]
    if len(reasons) == total:
        raise DataError(*message)
    return message
