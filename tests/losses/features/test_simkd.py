"""SimKD's loss against torch's own pooling and MSE, in float64."""

import pytest
import torch
import torch.nn.functional as F

from kd_lightning import Batch, InputError
from kd_lightning.losses import MSEFeatureLoss, SimKDLoss


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (3, 5), (1, 1)])
def test_pools_the_teachers_map(size):
    student, teacher = torch.randn(3, 5, *size, dtype=torch.float64), torch.randn(3, 5, 8, 8, dtype=torch.float64)
    expected = F.mse_loss(student, F.adaptive_avg_pool2d(teacher, size))
    assert SimKDLoss()(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


def test_limits():
    maps = torch.randn(3, 5, 4, 4)
    assert SimKDLoss()(maps, maps) == 0
    other = torch.randn(3, 5, 4, 4)
    assert SimKDLoss()(maps, other) == MSEFeatureLoss()(maps, other)


def test_gradient():
    student = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: SimKDLoss()(x, teacher), student)
    SimKDLoss()(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher = 300 * torch.randn(2, 3, 2, 2), 300 * torch.randn(2, 3, 4, 4)
    value = SimKDLoss()(student.to(dtype), teacher.to(dtype))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(SimKDLoss()(student, teacher).item(), rel=0.02)


def test_positions_that_do_not_exist():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mask = torch.ones(2, 4, 4)
    mask[:, 2:] = 0
    value = SimKDLoss()(student, teacher, Batch(torch.zeros(2, 1), mask=mask))
    assert value == pytest.approx(F.mse_loss(student[:, :, :2], teacher[:, :, :2]).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3, 4, 4), (2, 4, 4, 4), "maps .* of as many channels, got"),
        ((2, 3), (2, 3), "maps"),
        (
            (2, 3, 8, 2),
            (2, 3, 4, 4),
            r"map \[8, 2\] must not be larger than the teacher's \[4, 4\]; set .*: \[4, 4\]",
        ),
    ],
)
def test_refused(student, teacher, message):
    with pytest.raises(InputError, match=message):
        SimKDLoss()(torch.zeros(student), torch.zeros(teacher))
