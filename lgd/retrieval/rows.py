"""Answers as JSON, CSV and a table.

JSON, one object a query (`as_json`):

    image          path of the H&E image, or null
    level          the student's label of the image, or null
    probabilities  class -> the student's probability, or null
    stored         for a query by key its key, slide, split and label; null for an image
    neighbours     nearest first: key, slide, split, level, distance, duplicate_of
    vote           level, shares (class -> share), entropy_bits, labelled
    notes          sentences on the image that its reader must know, such as that it looks like no H&E

CSV, one row a neighbour (`as_rows`): image, predicted, rank, key, slide, split, level, distance, duplicate_of, vote,
vote_share, vote_entropy_bits, vote_labelled, query_key, notes. The columns are the same whatever was asked; new ones
will come at the end. What is unknown is null, and empty in CSV.

`level` is HER2's word for a label; other targets have theirs in its place: `label`, or `value` with `unit` beside it.
Of values the vote is their mean, without shares and entropy.
"""

from collections.abc import Sequence
from dataclasses import asdict

from lgd.base.target import Target
from lgd.retrieval.answers import Answer, Stored
from lgd.scoring.label_sets import round_probabilities, show_label, write_label
from lgd.scoring.notes import join_notes

_EXACT = 9
"""Digits of a stored value, which is a float32."""


def as_json(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """The answers as plain JSON."""
    return [
        {
            "image": answer.image,
            **show_label(answer.target or answer.known, answer.label),
            "probabilities": round_probabilities(answer.probabilities or {}) or None,
            "stored": answer.stored and _show(answer.stored, answer.known),
            "neighbours": [_show(hit, answer.known) for hit in answer.neighbours],
            "vote": _show_vote(answer),
            "notes": list(answer.notes),
        }
        for answer in answers
    ]


def _show(stored: Stored, target: Target, *, as_text: bool = False) -> dict[str, object]:
    """Its fields in their order, the label by its word."""
    shown: dict[str, object] = {}
    for name, value in asdict(stored).items():
        if name == "label":
            shown |= (write_label if as_text else show_label)(target, stored.label, _EXACT)
        elif name not in ("part", "row"):
            shown[name] = value
    return shown


def _show_vote(answer: Answer) -> dict[str, object]:
    vote = asdict(answer.vote)
    return show_label(answer.known, vote.pop("label")) | vote


def as_rows(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """One row a neighbour, for CSV."""
    rows = []
    for answer in answers:
        said = answer.vote
        voted = {
            "vote": show_label(answer.known, said.label)[answer.known.label_word],
            "vote_share": said.shares[str(said.label)] if said.shares and said.labelled else None,
            "vote_entropy_bits": said.entropy_bits,
            "vote_labelled": said.labelled,
            "query_key": answer.stored.key if answer.stored else None,
            "notes": join_notes(answer.notes),
        }
        asked = {"image": answer.image, "predicted": _show_predicted(answer)}
        rows += [
            asked | {"rank": rank} | _show(hit, answer.known) | voted for rank, hit in enumerate(answer.neighbours, 1)
        ]
    return rows


def as_table(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """One row a neighbour and one for the vote of each query, for a person."""
    rows: list[dict[str, object]] = []
    for answer in answers:
        asked: dict[str, object] = {"query": answer.name}
        asked |= {} if answer.stored else {"predicted": _show_predicted(answer)}
        for rank, hit in enumerate(answer.neighbours, 1):
            shown = _show(hit, answer.known, as_text=True) | {"duplicate_of": hit.duplicate_of or "", "notes": ""}
            rows.append(asked | {"rank": str(rank)} | shown)
        blank, said = dict.fromkeys(rows[-1], ""), answer.vote
        voted = {"rank": "vote", "key": _vote_text(answer), "notes": join_notes(answer.notes)}
        rows.append(blank | asked | voted | write_label(answer.known, said.label))
    return rows


def _show_predicted(answer: Answer) -> str | None:
    target = answer.target or answer.known
    return write_label(target, answer.label)[target.label_word]


def _vote_text(answer: Answer) -> str:
    """The shares and the entropy in a few words."""
    said, word = answer.vote, answer.known.label_word
    if not said.labelled:
        return f"no neighbour has a {word}"
    if said.shares is None:
        return f"mean of {said.labelled}"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in said.shares.items() if share)
    return f"{shares} ({said.entropy_bits:.2f} bits)"
