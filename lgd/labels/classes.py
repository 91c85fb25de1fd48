"""The metrics of classes, ordered or not.

Where classes are ordered, quadratic weighted kappa and within-one accuracy stand beside accuracy; of others kappa is
Cohen's.

- `macro_f1`: mean over the classes that occur as label or as answer.
- `kappa`: undefined where label and answer are one and the same class.
- `within_one`: share at most one class away. `sensitivity_K`: share of class number K that was called so.
- `auc_GROUP`: a group of classes (`Target.group_titles`) against the rest, by the sum of their probabilities.
- `ece`: expected calibration error of the most probable class, 10 equal-width bins (Naeini et al. 2015).
- `brier`: sum over the classes of the squared error, 0 to 2 (Brier 1950).
"""

import numpy as np

from lgd.base.labels import Labels
from lgd.base.target import Target
from lgd.labels.measures import Measures
from lgd.metrics import Floats, Ints

BINS = 10
"""Equal-width bins of confidence behind ECE and the reliability diagram."""


class ClassMeasures(Measures):
    """The metrics of an ordinal or of classes."""

    main = "kappa"
    choices = ("kappa", "macro_f1", "accuracy")
    lower_is_better = frozenset({"ece", "brier"})

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        count = self.classes = len(target.classes)
        self.groups = {f"auc_{name}": list(numbers) for name, (_, numbers) in target.group_titles.items()}
        within = {"within_one": f"within one {target.label_word}"} if target.is_ordered and count > 2 else {}
        self.sensitivities = {f"sensitivity_{number}": name for number, name in enumerate(target.classes)}
        self.answers = ("accuracy", "macro_f1", "kappa", *within, *self.sensitivities)
        self.names = (*self.answers, *self.groups, "ece", "brier")
        self.ranked = frozenset(self.groups)
        kappa = "quadratic weighted kappa" if target.is_ordered else "Cohen's kappa"
        self.headline = {"accuracy": "accuracy", "kappa": kappa, "macro_f1": "macro-F1", **within, "ece": "ECE"}
        # Each number of a class, and how much two of them disagree.
        self._class_K = np.arange(count)
        distance_KK = abs(self._class_K[:, None] - self._class_K).astype(np.float64)
        self._near_KK = distance_KK <= 1
        self._disagreement_KK = distance_KK**2 if target.is_ordered else (distance_KK > 0).astype(np.float64)
        # Columns of the sums: confusion matrix, correct minus confidence of each bin, squared error.
        self._confusion, self._gaps = slice(0, count**2), slice(count**2, count**2 + BINS)
        self._squared = count**2 + BINS

    def sum_patches(self, label_n: Labels, output_nK: Floats) -> Floats:
        row, said = np.arange(len(label_n)), output_nK.argmax(1)
        label_n = label_n.astype(np.int64)
        sums = np.zeros((len(label_n), self._squared + 1))
        sums[row, self.classes * label_n + said] = 1
        sums[row, self._gaps.start + bin_confidences(output_nK)] = (said == label_n) - output_nK.max(1)
        sums[:, self._squared] = ((output_nK - (label_n[:, None] == self._class_K)) ** 2).sum(1)
        return sums

    def read_sums(self, sums_RS: Floats) -> dict[str, Floats]:
        confusion_RKK = sums_RS[:, self._confusion].reshape(-1, self.classes, self.classes)
        truth, said = confusion_RKK.sum(2), confusion_RKK.sum(1)
        right = np.diagonal(confusion_RKK, axis1=1, axis2=2)
        total = truth.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.einsum("ri,ij,rj->r", truth, self._disagreement_KK, said) / total
            values = {
                "accuracy": right.sum(1) / total,
                "macro_f1": np.nanmean(2 * right / (truth + said), axis=1),
                "kappa": 1 - (confusion_RKK * self._disagreement_KK).sum((1, 2)) / expected,
                "within_one": (confusion_RKK * self._near_KK).sum((1, 2)) / total,
                "ece": abs(sums_RS[:, self._gaps]).sum(1) / total,
                "brier": sums_RS[:, self._squared] / total,
            }
            recall = right / truth
        return values | {name: recall[:, number] for number, name in enumerate(self.sensitivities)}

    def rank_patches(self, name: str, label_n: Labels, output_nK: Floats, weight_Rn: Floats) -> Floats:
        """The chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
        positive_n, score_n = np.isin(label_n, self.groups[name]), output_nK[:, self.groups[name]].sum(1)
        order = np.argsort(score_n, kind="stable")
        starts = np.flatnonzero(np.diff(score_n[order], prepend=-1.0))
        weight, positive = weight_Rn[:, order], positive_n[order]
        positives = np.add.reduceat(weight * positive, starts, axis=1)
        negatives = np.add.reduceat(weight * ~positive, starts, axis=1)
        wins = (positives * (negatives.cumsum(1) - negatives / 2)).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            area: Floats = wins / (positives.sum(1) * negatives.sum(1))
        return area

    def find_supported(self, sums_GS: Floats) -> frozenset[str]:
        """A sensitivity needs two groups that hold its class, an AUC two on either side."""
        held_GK = sums_GS[:, self._confusion].reshape(-1, self.classes, self.classes).sum(2) > 0
        sides = {name: [[number]] for number, name in enumerate(self.sensitivities)}
        for name, group in self.groups.items():
            sides[name] = [group, [number for number in range(self.classes) if number not in group]]
        return frozenset(
            name for name in self.names if all(held_GK[:, side].any(1).sum() >= 2 for side in sides.get(name, ()))
        )


def count_confusion(label_n: Labels, answer_n: Ints, classes: int) -> Ints:
    """(K, K) counts, a row a true class, a column a predicted one. Patches without a label are left out."""
    known_n = label_n >= 0
    cells = classes * label_n[known_n].astype(np.int64) + answer_n[known_n]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def bin_confidences(probability_nK: Floats) -> Ints:
    """(n,) bin of each patch's highest probability: bin b holds b/10 <= p < (b+1)/10, the last one also 1."""
    bin_n: Ints = np.minimum((probability_nK.max(1) * BINS).astype(np.int64), BINS - 1)
    return bin_n
