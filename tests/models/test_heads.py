"""Heads of classes, ordinals and numbers, and what their outputs say."""

import math

import pytest
import torch
from torch.nn import functional as F

from lgd.base.target import Target, find_target
from lgd.models.heads import CornHead, log_chain, make_head, read_answers
from lgd.models.losses import distillation_loss, find_known, label_loss
from lgd.shards.manifest import Values

HER2, KI67 = find_target("her2"), find_target("ki67")
NOMINAL = Target(name="tissue", kind="class", classes=("a", "b", "c"), unit=None)
VALUES = Values(mean=20.0, std=8.0, least=1.0, most=60.0)


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_corn_is_the_likelihood_of_a_chain():
    logits, label = 3 * rand(5, 3), torch.tensor([0, 1, 2, 3, -1])
    log_BK = log_chain(logits)
    fast = label_loss(log_BK, label)
    for row, k in enumerate(label.tolist()):
        above = [1 / (1 + math.exp(-x)) for x in logits[row].double().tolist()]
        chances = [math.prod(above[:j]) * (1 - above[j] if j < 3 else 1) for j in range(4)]
        assert log_BK[row].exp().tolist() == pytest.approx(chances, rel=1e-5, abs=1e-7)
        # The binary cross-entropies of the bounds that the label reaches.
        terms = [-math.log(above[j] if k > j else 1 - above[j]) for j in range(3) if k >= j]
        assert float(fast[row]) == pytest.approx(sum(terms), rel=1e-5)


def test_corn_teaches_each_bound_by_the_samples_that_reach_it():
    logits, label = rand(4, 3).requires_grad_(), torch.tensor([1, 3, 0, -1])
    label_loss(log_chain(logits), label).sum().backward()
    above = torch.sigmoid(logits.detach())
    reached = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    passed = (label[:, None] > torch.arange(3)).float()
    assert torch.allclose(logits.grad, (above - passed) * reached, atol=1e-6)


def test_corn_has_sound_probabilities_of_any_finite_logits():
    extremes = torch.tensor([1e4, -1e4, 88.0, -104.0, 0.0])
    logits = torch.cartesian_prod(extremes, extremes, extremes).requires_grad_()
    logs_BK = log_chain(logits)
    assert torch.isfinite(logs_BK).all() and torch.allclose(logs_BK.exp().sum(1), torch.ones(len(logits)), atol=1e-6)
    label_loss(logs_BK, torch.arange(len(logits)) % 4).sum().backward()
    assert torch.isfinite(logits.grad).all()
    coarse = rand(8, 3).bfloat16()
    assert log_chain(coarse).dtype == torch.float32 and torch.equal(log_chain(coarse), log_chain(coarse.float()))


@pytest.mark.parametrize(("target", "ordinal", "kind", "width"), [
    (HER2, None, "Linear", 4),
    (HER2, "corn", "CornHead", 4),
    (NOMINAL, "corn", "Linear", 3),
    (KI67, "corn", "Linear", 1),
])  # fmt: skip
def test_a_target_has_its_head(target, ordinal, kind, width):
    head = make_head(8, target, ordinal)
    assert type(head).__name__ == kind and head(rand(5, 8)).shape == (5, width)
    assert isinstance(head, CornHead) == (kind == "CornHead")


def test_answers_are_probabilities_or_values_within_the_range():
    found = read_answers(rand(5, 4), HER2, None, 2.0)
    assert torch.equal(found, F.softmax(rand(5, 4).double() / 2, dim=1))
    values = read_answers(torch.tensor([[0.0], [1.0], [-100.0], [100.0], [math.nan]]), KI67, VALUES, 1.0)
    assert values[:4, 0].tolist() == [20, 28, 0, 100] and values[4].isnan()
    free = Target(name="score", kind="number", classes=(), unit=None)
    constant = VALUES.model_copy(update={"std": 0.0})
    assert read_answers(torch.tensor([[-100.0]]), free, constant, 1.0).item() == -80


def test_an_unknown_value_teaches_nothing():
    logits = rand(3, 1).requires_grad_()
    label = torch.tensor([0.5, math.nan, -4.0])
    loss = label_loss(logits, label)
    assert find_known(label).tolist() == [True, False, True] and loss[1] == 0
    assert loss[0].item() == pytest.approx(F.smooth_l1_loss(logits[0, 0], label[0]).item())
    loss.sum().backward()
    assert logits.grad[1] == 0 and logits.grad.isfinite().all() and logits.grad[[0, 2]].abs().min() > 0


def test_a_value_is_distilled_by_its_distance():
    student, teacher = rand(4, 1), rand(4, 1) + 1
    twin = F.smooth_l1_loss(student[:, 0], teacher[:, 0], reduction="none")
    assert torch.equal(distillation_loss(student, teacher, 3.0), twin)
