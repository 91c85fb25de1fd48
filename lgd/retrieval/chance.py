"""How often neighbours that are drawn blindly would agree as much as those that were found.

Shapes: m rows that were searched.
"""

import numpy as np

from lgd.metrics import Floats
from lgd.retrieval.answers import Answer

_DRAWS, _SEED = 10_000, 0


def describe_chance(answer: Answer, label_m: np.ndarray) -> str | None:
    """A sentence on an answer, of the labels of all rows that it could have found; None where it has no labelled
    neighbour.

    Classes: the probability that as many of the drawn rows have the label that won the vote. Values: that the drawn
    rows differ as little.
    """
    vote, target = answer.vote, answer.known
    known_m = label_m[np.isfinite(label_m) if target.is_number else label_m >= 0]
    if not vote.labelled or vote.labelled > len(known_m):
        return None
    n = vote.labelled
    if target.is_number:
        values = [hit.label for hit in answer.neighbours if hit.label is not None]
        spread = float(np.std(np.array(values, float)))
        if n < 2:
            return None
        return (
            f"the values of {n} neighbours have a standard deviation of {spread:.3g}; {n} drawn blindly have one as "
            f"small in {_format_share(_chance_of_spread(known_m, n, spread))} of cases"
        )
    from scipy.stats import hypergeom

    assert vote.shares is not None
    count = round(n * float(vote.shares[str(vote.label)] or 0))
    alike = int((known_m == target.classes.index(str(vote.label))).sum())
    chance = float(hypergeom.sf(count - 1, len(known_m), alike, n))
    return (
        f"{count} of {n} neighbours are {vote.label}; {n} drawn blindly have as many of that in "
        f"{_format_share(chance)} of cases"
    )


def _chance_of_spread(value_m: Floats, n: int, spread: float) -> float:
    """The share of drawings of n values, with repeats, whose standard deviation is not above `spread`."""
    drawn = np.random.default_rng(_SEED).integers(0, len(value_m), (_DRAWS, n))
    return float((np.std(value_m.astype(np.float64)[drawn], axis=1) <= spread).mean())


def _format_share(share: float) -> str:
    return "less than 0.1 %" if share < 0.001 else f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
