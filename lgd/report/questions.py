"""Questions that training never asked: their answers by patch, and how well small probes of frozen features give them.

A CSV has the answers, numbers, in a column each, by key. Of the patches whose answer is known few are drawn, many
times; a ridge regression from features to the answer is fitted on these (its ridge by leave-one-out), and scored on
others.

Shapes: m patches to draw from, t scored patches, F features, Q questions, U draws, G groups, K values of an answer, R
resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.io.tables import read_csv
from lgd.metrics import Floats, Ints, draws

SIZES = (30, 100, 300)
"""How many patches a probe is fitted on."""
DRAWS = 20
_ALPHAS = np.logspace(-1, 5, 13)
_MOST_STEPS = 10
"""Different whole numbers that an answer in steps, such as a level, has at most."""
_BLOCK = 4_000_000
MEASURES = {"r2": "R²", "kappa": "quadratic weighted kappa", "auc": "AUC of the lowest two steps"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of patches, and the answers that are known, by key."""

    name: str
    answers: dict[str, float]

    @property
    def steps(self) -> Floats | None:
        """The values of an answer in steps, such as levels 0 to 3; None of a quantity."""
        values = np.unique([*self.answers.values()])
        in_steps = 1 < len(values) <= _MOST_STEPS and (values == values.round()).all()
        return values if in_steps else None

    @property
    def measures(self) -> tuple[str, ...]:
        """By what its answers are scored."""
        return ("r2",) if self.steps is None else ("kappa", "auc")

    def find(self, keys: Sequence[str]) -> Floats:
        """The answers of some patches, NaN where unknown."""
        return np.array([self.answers.get(key, np.nan) for key in keys], np.float64)


def read_questions(path: Location) -> list[Question]:
    """The columns of a CSV beside `key`; raises `DataError` for a cell that is no number, and where there is none."""
    answers: dict[str, dict[str, float]] = {}
    keys = set[str]()
    for number, row in read_csv(path, ("key",)):
        key = row.pop("key")
        if key in keys:
            raise DataError(f"{path}: row {number}: key {key!r:.80} is there more than once: keep one")
        keys.add(key)
        for name, cell in row.items():
            known = answers.setdefault(name, {})
            if cell:
                known[key] = _read_number(path, number, name, cell)
    if not answers:
        raise DataError(f"{path}: has no column beside key: add one a question, with a number for each patch")
    if empty := [name for name, known in answers.items() if not known]:
        raise DataError(f"{path}: column {', '.join(empty)} is empty: give a number for some patches, or remove it")
    return [Question(name, known) for name, known in answers.items()]


def _read_number(path: Location, row: int, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise DataError(
            f"{path}: row {row}: column {name} is {cell!r:.80}: give a number (of levels their place, from 0), leave "
            "the cell empty, or remove the column"
        )
    return value


def draw_rows(known_m: np.ndarray, size: int, seed: int) -> Iterator[Ints]:
    """Places of so many patches among those whose answers are known, bool (m,): the same whatever the features are."""
    place_n = np.flatnonzero(known_m)
    for number in range(DRAWS):
        yield np.sort(np.random.default_rng([seed, size, number]).choice(place_n, size, replace=False))


def answer_by_probes(features_mF: Floats, asked_tF: Floats, answer_mQ: Floats, size: int, seed: int) -> Floats:
    """What probes of `size` patches say of others, (U, t, Q); all questions are known of the same patches.

    Features are scaled by their deviation over all patches that are drawn from, of which no answer is needed.
    """
    from sklearn.linear_model import RidgeCV

    mean_F, scale_F = features_mF.mean(0), features_mF.std(0)
    # A feature that never changes says nothing, and rounding leaves it a deviation.
    scale_F[scale_F <= 1e-6 * abs(mean_F)] = np.inf
    scaled_mF, scaled_tF = (features_mF - mean_F) / scale_F, (asked_tF - mean_F) / scale_F
    said = []
    for row_n in draw_rows(np.asarray(~np.isnan(answer_mQ).any(1)), size, seed):
        probe = RidgeCV(_ALPHAS, alpha_per_target=True).fit(scaled_mF[row_n], answer_mQ[row_n])
        said.append(probe.predict(scaled_tF).reshape(len(asked_tF), -1))
    return np.stack(said)


def score_answers(
    said_Ut: Floats, answer_t: Floats, groups: Sequence[str], steps: Floats | None, resamples: int, seed: int
) -> dict[str, Floats]:
    """Each measure of answers that are all known, mean over the draws, and after it that of each resample: (1 + R,).

    Resamples are of groups, the same ones for whoever answers.
    """
    names, group_t = np.unique(groups, return_inverse=True)
    counts = [np.ones((1, len(names))), *draws(len(names), resamples, seed, _BLOCK // max(1, len(names)))]
    count_RG = np.concatenate(counts)
    if steps is None:
        return {"r2": _explained(said_Ut, answer_t, group_t, count_RG)}
    return {
        "kappa": _kappa(said_Ut, answer_t, group_t, count_RG, steps),
        "auc": _auc(said_Ut, answer_t, group_t, count_RG, steps),
    }


def _explained(said_Ut: Floats, answer_t: Floats, group_t: Ints, count_RG: Floats) -> Floats:
    """1 - squared error / squared deviation from the mean of the resample."""

    def add(value_t: Floats) -> Floats:
        sums: Floats = count_RG @ np.bincount(group_t, value_t, count_RG.shape[1])
        return sums

    error_R = add(((said_Ut - answer_t) ** 2).mean(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_R = add(answer_t**2) - add(answer_t) ** 2 / add(np.ones_like(answer_t))
        explained_R: Floats = np.where(spread_R > 0, 1 - error_R / spread_R, np.nan)
    return explained_R


def _kappa(said_Ut: Floats, answer_t: Floats, group_t: Ints, count_RG: Floats, steps_K: Floats) -> Floats:
    """Of answers that are rounded to the nearest step."""
    width, groups = len(steps_K), count_RG.shape[1]
    true_t = np.searchsorted(steps_K, answer_t)
    place_K = np.arange(width)
    weight_KK = (place_K[:, None] - place_K) ** 2
    kappa = []
    for said_t in said_Ut:
        said_t = abs(said_t[:, None] - steps_K).argmin(1)
        cell_t = (group_t * width + true_t) * width + said_t
        table_GKK = np.bincount(cell_t, minlength=groups * width**2).reshape(groups, -1)
        table_RKK = (count_RG @ table_GKK).reshape(-1, width, width)
        chance_RKK = table_RKK.sum(2)[:, :, None] * table_RKK.sum(1)[:, None] / table_RKK.sum((1, 2))[:, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            kappa.append(1 - (table_RKK * weight_KK).sum((1, 2)) / (chance_RKK * weight_KK).sum((1, 2)))
    mean_R: Floats = np.mean(kappa, axis=0)
    return mean_R


def _auc(said_Ut: Floats, answer_t: Floats, group_t: Ints, count_RG: Floats, steps_K: Floats) -> Floats:
    """How often a patch of the second step is said to be above one of the first, ties counting half."""
    low_n, high_n = (np.flatnonzero(answer_t == step) for step in steps_K[:2])
    groups = count_RG.shape[1]
    of_low, of_high = (np.eye(groups)[group_t[place_n]] for place_n in (low_n, high_n))
    above_GG = np.zeros((groups, groups))
    for said_t in said_Ut:
        high, low = said_t[high_n, None], said_t[low_n]
        above_GG += of_high.T @ ((high > low) + 0.5 * (high == low)) @ of_low / len(said_Ut)
    pairs_R = (count_RG @ of_high.sum(0)) * (count_RG @ of_low.sum(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        auc_R: Floats = np.where(pairs_R > 0, ((count_RG @ above_GG) * count_RG).sum(1) / pairs_R, np.nan)
    return auc_R
