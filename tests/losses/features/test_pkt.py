import math

import numpy as np
import pytest
import torch

from kd_lightning.losses import PKTLoss


def reference(student, teacher):
    """The authors' sums, by numpy: with i = j, and 1e-7 added to both."""
    tables, samples = [], len(student)
    for feature in (student, teacher):
        rows = feature.double().numpy().reshape(samples, -1)
        units = [row / np.linalg.norm(row) for row in rows]
        kernel = np.array([[(np.dot(a, b) + 1) / 2 for b in units] for a in units])
        tables.append([row / row.sum() for row in kernel])
    pairs = [(s, t) for rows in zip(*tables, strict=True) for s, t in zip(*rows, strict=True)]
    return sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in pairs) / samples**2


@pytest.mark.parametrize(("student", "teacher"), [((5, 4), (5, 9)), ((4, 3, 7), (4, 2, 5)), ((6, 3, 4, 4), (6, 8))])
def test_value(randn, student, teacher):
    student, teacher = randn(*student), randn(*teacher, seed=1)
    assert PKTLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9)


def test_ignores_rotation_and_the_length_of_each_sample(randn, rotation):
    student, teacher = randn(5, 6), randn(5, 4, seed=1)
    value = PKTLoss()(student, teacher)
    scaled = student @ rotation(6) * torch.arange(1.0, 6).unsqueeze(1)
    torch.testing.assert_close(PKTLoss()(scaled, teacher @ rotation(4) / 5), value, rtol=1e-10, atol=0)
    assert PKTLoss()(teacher, teacher) == 0 < value
    assert PKTLoss()(7 * teacher @ rotation(4), teacher).item() == pytest.approx(0, abs=1e-16)


def test_opposite_features_stay_finite():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)  # the student's probability is 0
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value = PKTLoss()(student, teacher)
    value.backward()
    one, zero = math.log((0.5 + 1e-7) / (1 + 1e-7)), math.log((0.5 + 1e-7) / 1e-7)
    assert value.item() == pytest.approx((one + zero) / 4, rel=1e-5) and student.grad.isfinite().all()
    assert PKTLoss()(teacher, student).isfinite()


def test_one_sample_teaches_nothing(randn):
    student = randn(1, 6).requires_grad_()
    value = PKTLoss()(student, randn(1, 4, seed=1))
    value.backward()
    assert value == 0 and student.grad.abs().max() == 0


def test_small_differences_are_not_lost_in_float32(randn):
    teacher = randn(32, 64)
    student = teacher + 1e-2 * randn(32, 64, seed=1)
    value = PKTLoss()(student.float(), teacher.float())
    assert value.item() == pytest.approx(reference(student, teacher), rel=0.1)
