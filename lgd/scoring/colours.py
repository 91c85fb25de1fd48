"""The absolute colours of a target, alike in every picture: a label, or a value of the range, has one colour always.

An ordinal and a number go from blue to red (RdYlBu of ColorBrewer, which colour-blind readers can distinguish); classes
without order have the colours of Okabe and Ito (2008).

Shapes: n tiles, K numbers of an answer.
"""

from typing import NamedTuple

import numpy as np

from lgd.base.target import Target
from lgd.metrics import Floats
from lgd.models.description import Training


class Scale(NamedTuple):
    """Colours of values, linear between those of some places."""

    place_A: np.ndarray
    """Of 0 to 1."""
    colour_A3: np.ndarray

    def colour(self, value_n: Floats, ends: tuple[float, float]) -> np.ndarray:
        """uint8 (n, 3): the colours of values; one beyond the ends has the colour of the end, and NaN `NO_ANSWER`."""
        known_n = np.isfinite(value_n)
        place_n = ((np.where(known_n, value_n, ends[0]) - ends[0]) / (ends[1] - ends[0])).clip(0, 1)
        colour_n3 = np.stack([np.interp(place_n, self.place_A, channel_A) for channel_A in self.colour_A3.T], axis=1)
        return np.where(known_n[:, None], colour_n3.round(), NO_ANSWER).astype(np.uint8)


ORDERED = Scale(
    np.array([0, 1 / 3, 1 / 2, 2 / 3, 1]),
    np.array([(44, 123, 182), (171, 217, 233), (250, 240, 180), (253, 174, 97), (215, 25, 28)], float),
)
"""Of an ordinal and a number."""
AMOUNTS = Scale(
    np.linspace(0, 1, 9),
    np.array(
        [
            *[(253, 231, 37), (170, 220, 50), (92, 200, 99), (39, 173, 129), (33, 144, 141)],
            *[(44, 113, 142), (59, 81, 139), (71, 44, 122), (68, 1, 84)],
        ],
        float,
    ),
)
"""Of a channel of a grid: viridis (van der Walt and Smith, CC0) from its light end to the dark one."""
_CLASSES = np.array(
    [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (80, 80, 80)], np.uint8
)
NO_ANSWER = (190, 190, 190)
"""Of what has no answer."""


def grade_answers(target: Target, output_nK: Floats) -> Floats:
    """(n,): the expected number of the class of an ordinal; the value of a number; the most probable class of others.

    NaN where there is no answer.
    """
    if target.is_number:
        return output_nK[:, 0].astype(np.float64)
    if target.is_ordered:
        return output_nK @ np.arange(target.width, dtype=np.float64)
    called_n = np.nan_to_num(output_nK).argmax(1)
    return np.where(np.isfinite(output_nK[:, 0]), called_n, np.nan)


def find_ends(training: Training) -> tuple[float, float]:
    """The grades at the two ends of the colours: of a number without a range those of the training labels."""
    target = training.target
    if not target.is_number:
        return 0.0, float(target.width - 1)
    if target.range:
        return target.range
    values = training.values
    return (values.least, values.most) if values and values.least < values.most else (0.0, 1.0)


def colour_grades(target: Target, grade_n: Floats, ends: tuple[float, float]) -> np.ndarray:
    """uint8 (n, 3): the colours of grades."""
    if target.is_number or target.is_ordered:
        return ORDERED.colour(grade_n, ends)
    known_n = np.isfinite(grade_n)
    grade_n = np.where(known_n, grade_n, 0)
    colour_n3 = _CLASSES[grade_n.astype(np.int64) % len(_CLASSES)]
    return np.where(known_n[:, None], colour_n3, np.array(NO_ANSWER, np.uint8))
