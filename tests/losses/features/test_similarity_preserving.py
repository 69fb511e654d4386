import numpy as np
import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.losses import SimilarityPreservingLoss


def reference(student, teacher):
    total, samples = 0.0, len(student)
    grams = []
    for feature in (student, teacher):
        rows = feature.double().numpy().reshape(samples, -1)
        grams.append(np.array([[np.dot(a, b) for b in rows] for a in rows]))
    for of_student, of_teacher in zip(*grams, strict=True):
        difference = of_student / np.linalg.norm(of_student) - of_teacher / np.linalg.norm(of_teacher)
        total += np.sum(difference**2)
    return total / samples**2


@pytest.mark.parametrize(("student", "teacher"), [((5, 4), (5, 9)), ((4, 3, 7), (4, 2, 5)), ((6, 3, 4, 4), (6, 8))])
def test_value(randn, student, teacher):
    student, teacher = randn(*student), randn(*teacher, seed=1)
    value = SimilarityPreservingLoss()(student, teacher)
    assert value.item() == pytest.approx(reference(student, teacher), rel=1e-11)


def test_ignores_scale_and_rotation(randn, rotation):
    student, teacher = randn(5, 6), randn(5, 4, seed=1)
    loss = SimilarityPreservingLoss()
    value = loss(student, teacher)
    torch.testing.assert_close(loss(3 * student @ rotation(6), teacher @ rotation(4) / 5), value, rtol=1e-12, atol=0)
    assert loss(teacher, teacher) == 0
    assert loss(teacher @ rotation(4), teacher).item() == pytest.approx(0, abs=1e-28)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(student[order], teacher[order]), value, rtol=1e-12, atol=0)


def test_one_sample_teaches_nothing(randn):
    student = randn(1, 6).requires_grad_()
    value = SimilarityPreservingLoss()(student, randn(1, 4, seed=1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-30) and student.grad.abs().max() < 1e-15


def test_a_zero_feature_has_a_zero_row():
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert SimilarityPreservingLoss()(student, teacher) == 1 / 4


def test_positions_that_do_not_count_are_as_if_not_there(randn):
    student, teacher = randn(4, 3, 6), randn(4, 5, 6, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0]] * 4)
    value = SimilarityPreservingLoss()(student, teacher, Batch(student, mask=mask))
    positions = [0, 1, 3]
    assert value.item() == pytest.approx(reference(student[:, :, positions], teacher[:, :, positions]), rel=1e-11)
