import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.losses import HintLoss, OFDLoss


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7), (2, 4, 3, 5)])
def test_value(randn, shape):
    student, teacher = randn(*shape), randn(*shape, seed=1)
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        total += 0 if s <= t <= 0 else (t - s) ** 2
    assert OFDLoss()(student, teacher).item() == pytest.approx(total / shape[0], rel=1e-12)


def test_active_features_are_those_of_hints(randn):
    student, teacher = randn(3, 4, 5), randn(3, 4, 5, seed=1).abs()
    torch.testing.assert_close(OFDLoss()(student, teacher), 2 * HintLoss()(student, teacher))
    assert OFDLoss()(teacher, teacher) == 0


def test_a_student_below_an_inactive_teacher_gets_no_gradient():
    student = torch.tensor([[-5.0, -0.5, 1.0]], requires_grad=True)
    OFDLoss()(student, torch.tensor([[-1.0, -1.0, -1.0]])).backward()
    assert student.grad.tolist() == [[0, 1, 4]]


def test_positions_that_do_not_count():
    student, teacher = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    assert OFDLoss()(student, teacher, Batch(student, mask=mask)) == (1 + 9 + 16) / 2
