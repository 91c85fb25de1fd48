"""The contact sheet of queries: each H&E beside the known IHCs that it resembles, large enough to see membranes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lgd.base.target import UNKNOWN, Target
from lgd.io.location import Location
from lgd.report.figures import (
    GREEN,
    GREY,
    ORANGE,
    RED,
    Image,
    draw_line_legend,
    draw_scale_bar,
    new_figure,
    save_figure,
    shorten,
)
from lgd.retrieval.answers import Answer, Vote

if TYPE_CHECKING:
    from lgd.report.figures import Axes, Figure

# A neighbour's label beside the query's: colour and style of the frame.
_SAME, _NEAR, _BEYOND, _UNKNOWN = (GREEN, "-"), (ORANGE, "--"), (RED, ":"), (GREY, "-.")
_FRAMES = (_SAME, _NEAR, _BEYOND, _UNKNOWN)
ALIKE, NEAR = 0.05, 0.2
"""Up to which share of the range of values two are framed as alike, and as near."""
_PANEL, _SMALL_PANEL = 2.75, 1.9
"""Inches of a panel, the smaller ones on a sheet of more than `_MANY`: a picture of all would take gigabytes."""
_MANY = 120
_CAPTION = 0.95
"""Inches of the six lines that a caption has at most."""


class Field(NamedTuple):
    """The middle of a patch."""

    image: Image
    mpp: float | None
    """Micrometres per pixel; None where unknown."""
    share: float = 1.0
    """Of the patch's width, that is shown."""


class Picture(NamedTuple):
    """What is shown of a patch."""

    stain: str
    """IHC, or H&E of a patch without one."""
    field: Field


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Query:
    """An answer with its pictures, and what is known of the patch that asks."""

    answer: Answer
    slide: str | None
    label: str | float | None
    """The true one, None where unknown; the answer's is the student's."""
    he: Field
    ihc: Field | None
    """Its own IHC, where there is one: never an input of the student, but the query where the patch is a stored one."""
    images: Sequence[Picture]
    """One of each neighbour."""


def contact_sheet(rows: Sequence[Query], path: str | Location, votes: bool = False) -> None:
    """A row a query: its H&E, its own IHC (if any query has one), and its neighbours, with label and distance.

    A patch is shown by its IHC, and by its H&E where it has none. The frame of a neighbour's IHC, and that of the H&E
    for its predicted label, shows how far the label is from the query's true one (`compare_labels`). `votes`: also what
    the labels of all neighbours say together. Where no label is known at all, none is spoken of.
    """
    shown_labels = [
        known for row in rows for known in (row.label, row.answer.label, *(hit.label for hit in row.answer.neighbours))
    ]
    labelled = any(known is not None for known in shown_labels)
    target = rows[0].answer.known
    spread = _spread(target, shown_labels)
    first = 1 + any(row.ihc is not None for row in rows)
    columns = first + max((len(row.images) for row in rows), default=0)
    side = _PANEL if columns * len(rows) <= _MANY else _SMALL_PANEL
    figure = new_figure(side * columns, (side + _CAPTION) * len(rows) + 0.4)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    seen = set()
    for axes, row in zip(grid, rows, strict=True):
        seen.add(_draw_query(axes[:first], row, spread, labelled, votes))
        for rank, (ax, hit, shown) in enumerate(zip(axes[first:], row.answer.neighbours, row.images, strict=False), 1):
            frame, words = compare_labels(row.label, hit.label, target, spread)
            slide = f"slide {shorten(hit.slide or 'unknown')} ({hit.split})"
            label = [f"{target.label_word} {target.format_label(hit.label)}, {words}"] if labelled else []
            twin = [f"near-duplicate of {shorten(hit.duplicate_of)}"] if hit.duplicate_of else []
            stain = ["its H&E: it has no IHC"] if shown.stain == "H&E" else []
            lines = [f"found {rank}, distance {hit.distance:.3f}", shorten(hit.key), slide, *label, *twin, *stain]
            seen.add(_panel(ax, shown.field, lines, frame if labelled else None))
        for ax in axes[first + len(row.images) :]:
            ax.set_axis_off()
    fields = [field for row in rows for field in (row.he, row.ihc, *(shown.field for shown in row.images)) if field]
    _draw_legend(figure, target, seen - {None}, min(field.share for field in fields))
    save_figure(figure, path)


def _draw_query(
    axes: "Sequence[Axes]", row: Query, spread: float, labelled: bool, votes: bool
) -> tuple[str, str] | None:
    """The H&E that asks, or is not asked, and its own IHC where there is room for one; returns the frame."""
    answer, target = row.answer, row.answer.known
    word = target.label_word
    true = [f"true {word} {target.format_label(row.label)}"] if labelled else []
    predicted = f", predicted {target.format_label(answer.label)}" if answer.label is not None else ""
    lines = [shorten(Path(answer.name).stem), f"slide {shorten(row.slide or 'unknown')}"]
    lines += [f"{one}{predicted}" for one in true]
    vote = [_vote_line(answer.vote, target)] if votes and labelled else []
    if answer.stored:
        if len(axes) == 1:
            return _panel(axes[0], row.he, ["its stored latent asks", *lines, *vote], None)
        _panel(axes[0], row.he, ["its H&E, not asked", *lines], None)
        return _panel(axes[1], row.ihc, ["IHC query", *true, *vote], None)
    frame, _ = compare_labels(row.label, answer.label, target, spread)
    if len(axes) == 2:
        _panel(axes[1], row.ihc, ["its own IHC", "not given to the student", "", *true], None)
    return _panel(axes[0], row.he, ["H&E query", *lines, *vote], None if answer.label is None else frame)


def _vote_line(said: Vote, target: Target) -> str:
    """The winner, its share and the entropy: all shares would be wider than a panel. Of values their mean."""
    if said.label is None:
        return f"vote {UNKNOWN}"
    if said.shares is None or said.entropy_bits is None:
        return f"vote {target.format_label(said.label)} (mean of {said.labelled})"
    return f"vote {said.label} ({said.shares[str(said.label)]:.2f}), {said.entropy_bits:.2f} bits"


def _spread(target: Target, labels: Sequence[str | float | None]) -> float:
    """By what differences of values are divided: the length of the target's range, or that of the values at hand."""
    values = target.range or [label for label in labels if isinstance(label, float)]
    return (max(values) - min(values) if values else 0.0) or 1.0


def compare_labels(
    true: str | float | None, label: str | float | None, target: Target, spread: float
) -> tuple[tuple[str, str], str]:
    """Colour and style of a frame, and words: how far a label is from the true one.

    Values are alike up to `ALIKE` of the spread, and near up to `NEAR` of it; classes without order are the same or
    others.
    """
    word = target.label_word
    if isinstance(true, float) and isinstance(label, float):
        share = abs(true - label) / spread
        frame = _SAME if share <= ALIKE else _NEAR if share <= NEAR else _BEYOND
        return frame, f"off by {target.format_label(abs(true - label))}"
    # Also of a student that learnt another target than that of the stored patches.
    if true not in target.classes or label not in target.classes:
        return _UNKNOWN, "not comparable"
    if true == label:
        return _SAME, f"same {word}"
    if not target.is_ordered:
        return _BEYOND, f"another {word}"
    steps = abs(target.classes.index(true) - target.classes.index(label))
    return (_NEAR, f"one {word} off") if steps == 1 else (_BEYOND, "further off")


def _panel(
    axes: "Axes", field: Field | None, lines: list[str], frame: tuple[str, str] | None
) -> tuple[str, str] | None:
    """An image with its scale bar, caption and frame, which is returned."""
    axes.set_xticks([])
    axes.set_yticks([])
    if field is None:
        axes.set_facecolor("#EEEEEE")
        axes.set_box_aspect(1)
        axes.text(0.5, 0.5, "no image", transform=axes.transAxes, ha="center", va="center", color="#555555")
    else:
        axes.imshow(field.image)
        draw_scale_bar(axes, field.image.shape[1], field.image.shape[0], field.mpp)
    for spine in axes.spines.values():
        spine.set_visible(frame is not None)
        if frame is not None:
            spine.set(color=frame[0], linestyle=frame[1], linewidth=4)
    axes.set_xlabel("\n".join(lines), fontsize=8, labelpad=5)
    return frame


def _draw_legend(figure: "Figure", target: Target, seen: set[tuple[str, str] | None], share: float) -> None:
    """What the frames that occur mean, and whether a patch is not shown whole."""
    word = target.label_word
    near = f"up to {NEAR:.0%} of the range off" if target.is_number else f"one {word} off"
    beyond = "further off" if target.is_number or target.is_ordered else f"another {word}"
    same = f"up to {ALIKE:.0%} of the range off" if target.is_number else f"same {word}"
    names = dict(zip(_FRAMES, (same, near, beyond, "not comparable"), strict=True))
    shown = {names[frame]: frame for frame in _FRAMES if frame in seen}
    title = [f"Frames: the {word} beside the query's true one."] * bool(shown)
    title += ["Of large patches the middle is shown."] * (share < 1)
    draw_line_legend(figure, "\n".join(title), shown)
