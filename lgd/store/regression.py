"""The fit of a probe: labels from latents by a linear map, whose ridge is chosen on left-out groups.

Shapes: n patches, D numbers of a latent, K numbers of an answer.
"""

import warnings
from collections.abc import Iterator

import numpy as np

from lgd.base.labels import Labels
from lgd.base.target import Target
from lgd.metrics import Floats

RIDGES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Weights of half the squared length of the coefficients, beside the mean loss of a patch; the strongest first."""
FOLDS = 5
UNSEEN = -1e4
"""The logit of a class that no training patch has: no temperature gives it a probability."""


def regress_labels(
    latent_nD: Floats, label_n: Labels, group_n: np.ndarray, target: Target
) -> tuple[Floats, Floats, float, dict[float, float]]:
    """Weights (K, D) and biases (K,) from latents to logits, or to the value; the ridge; and by ridge the loss on
    left-out groups: the negative log likelihood, or the squared error.

    The ridge is that of the least loss on left-out groups, whose classes the rest has too; the strongest where no group
    can be left out.
    """
    mean_D, scale_D = latent_nD.mean(0), latent_nD.std(0)
    # What hardly varies says nothing, and dividing by it would blow up what the stored type rounds.
    scale_D[scale_D <= 1e-6 * scale_D.max()] = np.inf
    latent_nD = (latent_nD - mean_D) / scale_D
    losses = _left_out_losses(latent_nD, label_n, group_n, target)
    ridge = min(losses, key=losses.__getitem__, default=RIDGES[0])
    weight_KD, bias_K = _regress(latent_nD, label_n, ridge, target)
    weight_KD = weight_KD / scale_D
    return weight_KD, bias_K - weight_KD @ mean_D, ridge, losses


def _left_out_losses(latent_nD: Floats, label_n: Labels, group_n: np.ndarray, target: Target) -> dict[float, float]:
    sums, rows = dict.fromkeys(RIDGES, 0.0), 0
    for fitted, left_out in _split(latent_nD, label_n, group_n, target):
        if not target.is_number:
            left_out = left_out[np.isin(label_n[left_out], label_n[fitted])]
        if not len(left_out) or len(np.unique(label_n[fitted])) < 2:
            continue
        rows += len(left_out)
        for ridge in RIDGES:
            weight_KD, bias_K = _regress(latent_nD[fitted], label_n[fitted], ridge, target)
            output_nK = latent_nD[left_out] @ weight_KD.T + bias_K
            sums[ridge] += float(_measure_losses(output_nK, label_n[left_out], target).sum())
    return {ridge: loss / rows for ridge, loss in sums.items()} if rows else {}


def _split(
    latent_nD: Floats, label_n: Labels, group_n: np.ndarray, target: Target
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows of other groups, a few times; none where no group can be left out."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    folds, groups = FOLDS, len(np.unique(group_n))
    if target.is_number:
        if groups > 1:
            yield from GroupKFold(min(folds, groups)).split(latent_nD, groups=group_n)
        return
    folds = min(folds, groups, int(np.bincount(label_n).max()))
    with warnings.catch_warnings():
        # Of classes that fewer groups have than there are folds.
        warnings.simplefilter("ignore", UserWarning)
        if folds > 1:
            yield from StratifiedGroupKFold(folds).split(latent_nD, label_n, group_n)


def _measure_losses(output_nK: Floats, label_n: Labels, target: Target) -> Floats:
    from scipy.special import log_softmax

    if target.is_number:
        squared_n: Floats = (output_nK[:, 0] - label_n) ** 2
        return squared_n
    log_nK: Floats = log_softmax(output_nK, axis=1)
    loss_n: Floats = -log_nK[np.arange(len(label_n)), label_n]
    return loss_n


def _regress(latent_nD: Floats, label_n: Labels, ridge: float, target: Target) -> tuple[Floats, Floats]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    if target.is_number:
        # The squared error of values in standard deviations, so that a ridge means the same in any unit.
        spread = float(label_n.std()) or 1.0
        fitted = Ridge(alpha=ridge * len(label_n)).fit(latent_nD, label_n / spread)
        return spread * fitted.coef_[None], np.array([spread * fitted.intercept_])
    with warnings.catch_warnings():
        # A fit that has not ended by then is of a ridge that is too weak, and its loss shows that.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=1 / (ridge * len(label_n)), max_iter=1000, tol=1e-6).fit(latent_nD, label_n)
    weight_kD, bias_k = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        weight_kD, bias_k = np.vstack([-weight_kD, weight_kD]) / 2, np.append(-bias_k, bias_k) / 2
    weight_KD, bias_K = np.zeros((target.width, latent_nD.shape[1])), np.full(target.width, UNSEEN)
    weight_KD[model.classes_], bias_K[model.classes_] = weight_kD, bias_k
    return weight_KD, bias_K
