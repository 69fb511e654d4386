"""RLD: the paper's formula in float64, and its limits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import DKDLoss, RLDLoss


def randn(seed, rows=9, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * scale
    return *pair, torch.randint(classes, (rows,), generator=generator)


def reference(student, teacher, target, alpha, beta, temperature, confidence_temperature):
    rows = []
    for s, t, y in zip(student.double().numpy(), teacher.double().numpy(), target.tolist(), strict=True):
        most, true = softmax(t / confidence_temperature).max(), softmax(s / confidence_temperature)[y]
        first = rel_entr(most, true) + rel_entr(1 - most, 1 - true)
        left = [c for c in range(len(t)) if t[c] < t[y]]
        second = rel_entr(softmax(t[left] / temperature), softmax(s[left] / temperature)).sum() if left else 0.0
        rows.append(alpha * confidence_temperature**2 * first + beta * temperature**2 * second)
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.5, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize(("temperature", "confidence"), [(4.0, None), (1.0, None), (4.0, 1.0)])
@pytest.mark.parametrize(("rows", "classes"), [(9, 5), (1, 3), (4, 2), (4, 100)])
def test_agrees_with_the_formula(rows, classes, temperature, confidence, alpha, beta, dtype):
    student, teacher, target = randn(0, rows, classes)
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = reference(student, teacher, target, alpha, beta, temperature, confidence or temperature)
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    found = RLDLoss(alpha, beta, temperature, confidence, "none")(student, teacher, target)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **near)
    mean = RLDLoss(alpha, beta, temperature, confidence)(student, teacher, target)
    torch.testing.assert_close(mean.double(), expected.mean(), **near)


def test_a_right_teacher_is_dkd():
    student, teacher, _ = randn(1)
    target = teacher.argmax(dim=1)
    torch.testing.assert_close(RLDLoss()(student, teacher, target), DKDLoss()(student, teacher, target))


def test_classes_ranked_above_the_true_one_do_not_count():
    student, teacher, _ = randn(2)
    target = teacher.sort(dim=1, descending=True).indices[:, 2]
    above = teacher > teacher.gather(1, target.unsqueeze(1))
    assert above.sum(dim=1).tolist() == [2] * 9
    loss = RLDLoss(alpha=0.0)
    torch.testing.assert_close(loss(student, teacher + 7 * above, target), loss(student - 3 * above, teacher, target))
    assert loss(student, teacher, target) > 0


def test_true_class_that_is_last_or_equal():
    """No class is left; those as likely as the true one do not count, either."""
    student, teacher, _ = randn(3)
    student.requires_grad_()
    value = RLDLoss(alpha=0.0)(student, teacher, teacher.argmin(dim=1))
    value.backward()
    assert value == 0 and student.grad.abs().max() == 0
    assert RLDLoss(alpha=0.0)(student, torch.ones(9, 5).double(), teacher.argmin(dim=1)) == 0


def test_confidence_goes_to_the_true_class_of_a_wrong_teacher():
    teacher, target = torch.tensor([[3.0, 0.0, 0.0]]).double(), torch.tensor([1])
    student = torch.tensor([[0.0, 3.0, 0.0]]).double()
    assert RLDLoss(beta=0.0)(student, teacher, target).item() == pytest.approx(0, abs=1e-14)
    assert RLDLoss(beta=0.0)(teacher, teacher, target) > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"alpha must be finite and at least 0, got -1\.0"),
        ({"beta": math.nan}, r"beta must be finite and at least 0, got nan"),
        ({"confidence_temperature": 0.0}, r"confidence_temperature must be finite and above 0, got 0\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        RLDLoss(**arguments)


def test_repr_and_defaults():
    expected = "alpha=1.0, beta=8.0, temperature=4.0, confidence_temperature=None, reduction='mean'"
    assert repr(RLDLoss()) == f"RLDLoss({expected})"
