import math

import numpy as np
import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.losses import CosineLoss


def reference(student, teacher):
    """The cosine distance of each position, by numpy, (B, P)."""
    student, teacher = (f.detach().double().numpy().reshape(*f.shape[:2], -1) for f in (student, teacher))
    rows = []
    for s, t in zip(student, teacher, strict=True):
        norms = np.sqrt((s**2).sum(0)) * np.sqrt((t**2).sum(0))
        rows.append(1 - (s * t).sum(0) / norms)
    return np.array(rows)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7), (2, 4, 3, 5)])
def test_value(randn, shape):
    student, teacher = randn(*shape), randn(*shape, seed=1)
    assert CosineLoss()(student, teacher).item() == pytest.approx(reference(student, teacher).mean(), rel=1e-12)


def test_each_sample_counts_alike_whatever_its_positions(randn):
    student, teacher = randn(3, 4, 5), randn(3, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
    rows = reference(student, teacher)
    expected = (rows[0].mean() + rows[1, 0] + rows[2, 1:3].mean()) / 3
    value = CosineLoss()(student, teacher, Batch(student, mask=mask))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_ignores_the_lengths_and_lies_between_0_and_2(randn):
    feature = randn(4, 6)
    assert CosineLoss()(feature, feature) == 0
    assert CosineLoss()(3 * feature, feature / 7).item() == pytest.approx(0, abs=1e-15)
    assert CosineLoss()(-3 * feature, feature).item() == pytest.approx(2)
    assert CosineLoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([[5.0, 0.0]])) == 1


def test_features_of_length_0(randn):
    teacher, zero = randn(2, 3), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = CosineLoss()(zero, teacher)
    value.backward()
    assert value == 1 and (zero.grad == 0).all()
    student = teacher.clone().requires_grad_()
    value = CosineLoss()(student, torch.zeros(2, 3))
    value.backward()
    assert value == 0 and (student.grad == 0).all()


def test_the_gradient_turns_the_student_towards_the_teacher():
    student = torch.tensor([[1.0, 1.0]], requires_grad=True)
    CosineLoss()(student, torch.tensor([[0.0, 3.0]])).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, -1.0]]) / math.sqrt(8))
