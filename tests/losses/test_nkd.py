"""NKD: the paper's formula in float64, and its limits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import entr, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import NKDLoss


def randn(seed, rows=7, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * scale
    return *pair, torch.randint(classes, (rows,), generator=generator)


def reference(student, teacher, target, gamma, temperature):
    rows = []
    for s, t, y in zip(student.double().numpy(), teacher.double().numpy(), target.tolist(), strict=True):
        first = -softmax(t)[y] * np.log(softmax(s)[y])
        others_s, others_t = (softmax(np.delete(z, y) / temperature) for z in (s, t))
        rows.append(first - gamma * temperature**2 * (others_t * np.log(others_s)).sum())
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (0.0, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize(("rows", "classes"), [(7, 5), (1, 3), (4, 2), (4, 100)])
def test_agrees_with_the_formula(rows, classes, gamma, temperature, dtype):
    student, teacher, target = randn(0, rows, classes)
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = reference(student, teacher, target, gamma, temperature)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    found = NKDLoss(gamma, temperature, "none")(student, teacher, target)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **near)
    torch.testing.assert_close(NKDLoss(gamma, temperature)(student, teacher, target).double(), expected.mean(), **near)


def test_the_others_do_not_depend_on_the_target_class():
    """The normalisation of the paper's name: the student's logit of the target class is in the first term alone."""
    student, teacher, target = randn(1)
    moved = student.scatter_add(1, target.unsqueeze(1), torch.full((7, 1), 5.0, dtype=torch.float64))
    found = [NKDLoss(gamma=1.0)(s, teacher, target) - NKDLoss(gamma=0.0)(s, teacher, target) for s in (student, moved)]
    torch.testing.assert_close(*found)


def test_smallest_value_and_no_gradient_there():
    """The target class has probability 1; among the others, the student is the teacher."""
    _, teacher, target = randn(2)
    student = teacher.scatter(1, target.unsqueeze(1), 60.0).requires_grad_()
    value = NKDLoss()(student, teacher, target)
    value.backward()
    others = [entr(softmax(np.delete(t, y))).sum() for t, y in zip(teacher.numpy(), target.tolist(), strict=True)]
    assert value.item() == pytest.approx(1.5 * np.mean(others))
    assert student.grad.abs().max() < 1e-12


def test_two_classes_have_the_first_term_alone():
    student, teacher, target = randn(3, classes=2)
    assert torch.equal(NKDLoss(gamma=9.0)(student, teacher, target), NKDLoss(gamma=0.0)(student, teacher, target))


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_bad_gamma(gamma):
    with pytest.raises(InputError, match=f"gamma must be finite and at least 0, got {gamma}"):
        NKDLoss(gamma=gamma)


def test_repr_and_defaults():
    assert repr(NKDLoss()) == "NKDLoss(gamma=1.5, temperature=1.0, reduction='mean')"
