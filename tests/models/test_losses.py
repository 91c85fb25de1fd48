import math

import numpy as np
import pytest
import torch

from lgd.models import losses


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def naive_hallucination(student: np.ndarray, teacher: np.ndarray, kind: str) -> float:
    """One sample, (D, places): unit length at every place, then a loop over places and channels."""
    channels, places = student.shape
    values = []
    for place in range(places):
        s, t = student[:, place], teacher[:, place]
        s, t = s / math.sqrt(sum(s**2)), t / math.sqrt(sum(t**2))
        if kind == "cosine":
            values.append(1 - sum(a * b for a, b in zip(s, t, strict=True)))
        else:
            scale = math.sqrt(channels)
            values.append(sum(huber(scale * (a - b)) for a, b in zip(s, t, strict=True)) / channels)
    return sum(values) / places


@pytest.mark.parametrize("kind", ["cosine", "smooth-l1"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 3)])
def test_hallucination_is_its_naive_twin(kind, shape):
    student, teacher = rand(*shape), rand(*shape).flip(0) * 7
    fast = losses.hallucination_loss(student, teacher, kind)
    for row in range(len(student)):
        flat = [x[row].reshape(6, -1).double().numpy() for x in (student, teacher)]
        assert float(fast[row]) == pytest.approx(naive_hallucination(*flat, kind), rel=1e-5)
    assert torch.all(losses.hallucination_loss(teacher * 3, teacher, kind).abs() < 1e-6)


def test_level_is_its_naive_twin_and_0_where_unknown():
    logits, level = rand(4, 4), torch.tensor([2, -1, 0, 3])
    fast = losses.label_loss(logits, level)
    for row, k in enumerate(level.tolist()):
        chances = [math.exp(x) for x in logits[row].tolist()]
        expected = -math.log(chances[k] / sum(chances)) if k >= 0 else 0.0
        assert float(fast[row]) == pytest.approx(expected, rel=1e-5)


def test_an_unknown_level_teaches_nothing():
    logits = rand(2, 4).requires_grad_()
    losses.label_loss(logits, torch.tensor([-1, 1])).sum().backward()
    assert torch.all(logits.grad[0] == 0) and torch.any(logits.grad[1] != 0)


def test_pairs_weigh_by_their_alignment_and_1_where_it_is_unknown():
    z_B = torch.tensor([-3.0, 0.0, 0.5, 1.9, 2.0, 7.0, math.nan])
    assert losses.weigh_alignment(z_B, 2.0).tolist() == pytest.approx([0, 0, 0.25, 0.95, 1, 1, 1])


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 2, 2, 3)])
def test_grid_is_its_naive_twin(shape):
    predicted, target = rand(*shape) * 2, rand(*shape).flip(0)
    fast = losses.grid_loss(predicted, target)
    for row in range(len(predicted)):
        cells = zip(predicted[row].flatten().tolist(), target[row].flatten().tolist(), strict=True)
        values = [huber(a - b) for a, b in cells]
        assert float(fast[row]) == pytest.approx(sum(values) / len(values), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "smooth-l1"])
def test_hallucination_gradient_is_the_slope(kind):
    student, teacher = rand(2, 5).requires_grad_(), rand(2, 5).flip(1)
    losses.hallucination_loss(student, teacher, kind).sum().backward()
    step = 1e-2
    for row in range(2):
        for channel in range(5):
            moved = torch.zeros(2, 5)
            moved[row, channel] = step
            up, down = (
                float(losses.hallucination_loss(student.detach() + sign * moved, teacher, kind).double().sum())
                for sign in (1, -1)
            )
            assert float(student.grad[row, channel]) == pytest.approx((up - down) / (2 * step), abs=2e-3)


def test_low_precision_is_computed_in_float32():
    student, teacher = rand(3, 8), rand(3, 8).flip(0)
    low = losses.hallucination_loss(student.bfloat16(), teacher.half(), "smooth-l1")
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, losses.hallucination_loss(student, teacher, "smooth-l1"), rtol=0.05, atol=0.02)


def naive_contrast(student, teacher, queue, allowed, temperature):
    """One sample: softmax over its own latent and the allowed ones."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    own = math.exp(cosine(student, teacher) / temperature)
    others = [math.exp(cosine(student, other) / temperature) for other, ok in zip(queue, allowed, strict=True) if ok]
    return -math.log(own / (own + sum(others)))


def test_contrast_is_its_naive_twin_and_0_without_others():
    student, teacher, queue = rand(5, 6), rand(5, 6).flip(0) * 3, rand(9, 6) * 0.2
    allowed = rand(5, 9) > 0
    allowed[2] = False
    fast = losses.contrast_loss(student, teacher, queue, allowed, 0.2)
    for row in range(5):
        naive = naive_contrast(student[row].tolist(), teacher[row].tolist(), queue.tolist(), allowed[row].tolist(), 0.2)
        assert float(fast[row]) == pytest.approx(naive, rel=1e-4)
    assert float(fast[2]) == 0 and (fast >= 0).all()


def test_what_the_contrast_does_not_allow_has_no_say():
    student, teacher, queue = rand(2, 6).requires_grad_(), rand(2, 6).flip(0), rand(4, 6)
    allowed = torch.tensor([[True, False, True, False]] * 2)
    other = torch.where(allowed[0][:, None], queue, 100 * rand(4, 6).flip(1))
    one, two = (losses.contrast_loss(student, teacher, q, allowed, 0.07) for q in (queue, other))
    assert torch.equal(one, two)
    one.sum().backward()
    assert torch.isfinite(student.grad).all() and torch.any(student.grad != 0)


def test_distillation_is_its_naive_twin_and_0_where_both_agree():
    ours, theirs = rand(3, 4), rand(3, 4).flip(1) * 2
    fast = losses.distillation_loss(ours, theirs, 2.0)
    for row in range(3):
        p, q = (
            [math.exp(x / 2) / sum(math.exp(y / 2) for y in logits) for x in logits]
            for logits in (theirs[row].tolist(), ours[row].tolist())
        )
        naive = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(fast[row]) == pytest.approx(naive, rel=1e-4)
    assert torch.all(losses.distillation_loss(theirs + 5, theirs, 2.0).abs() < 1e-5)


@pytest.mark.parametrize("name", ["contrast", "distillation"])
def test_the_other_gradients_are_the_slope(name):
    x, target, queue = rand(2, 4).double().requires_grad_(), rand(2, 4).flip(1).double(), rand(5, 4).double()
    allowed = torch.ones(2, 5, dtype=torch.bool)

    def loss(x):
        if name == "contrast":
            return losses.contrast_loss(x, target, queue, allowed, 0.3).sum()
        return losses.distillation_loss(x, target, 2.0).sum()

    loss(x).backward()
    step = 1e-2
    for row in range(2):
        for channel in range(4):
            moved = torch.zeros(2, 4, dtype=torch.float64)
            moved[row, channel] = step
            up, down = (float(loss(x.detach() + sign * moved)) for sign in (1, -1))
            assert float(x.grad[row, channel]) == pytest.approx((up - down) / (2 * step), abs=5e-3)
