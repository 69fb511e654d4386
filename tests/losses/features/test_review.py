import numpy as np
import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.features.review import ReviewLoss

SHAPES = [(3, 4), (2, 1, 8, 8), (2, 2, 7, 5), (2, 2, 4, 9), (2, 3, 2, 2), (2, 3, 1, 1), (2, 3, 9), (1, 1, 3, 4, 5)]


def randn(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()


def by_hand(student, teacher, mask=None):
    """Areas as of torch.nn.AdaptiveAvgPool, one by one."""
    student, teacher = student.numpy(), teacher.numpy()
    sides = student.shape[2:]
    mask = np.ones(student.shape[:1] + sides, bool) if mask is None else mask.numpy()
    rows = []
    for s, t, m in zip(student, teacher, mask, strict=True):
        value = total = 0.0
        levels = [sides] + [(level,) * len(sides) for level in (4, 2, 1) if sides and level < min(sides)]
        for number, level in enumerate(levels):
            errors = []
            for area in np.ndindex(*level):
                cut = tuple(
                    slice(i * side // n, -((-(i + 1) * side) // n))
                    for i, n, side in zip(area, level, sides, strict=True)
                )
                inside = np.atleast_1d(m[cut])
                if inside.any():
                    means = (
                        np.atleast_2d(f[(slice(None), *cut)].reshape(len(f), -1))[:, inside.ravel()].mean(1)
                        for f in (s, t)
                    )
                    errors.append(np.mean((next(means) - next(means)) ** 2))
            value += np.mean(errors) / 2**number if errors else 0
            total += 1 / 2**number
        rows.append(value / total)
    return np.mean(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_by_hand_and_gradient(shape):
    student, teacher = randn(shape)
    found = ReviewLoss()(student, teacher)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(by_hand(student, teacher), rel=1e-10)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ReviewLoss()(s, teacher), [student])


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (2, 3, 7, 5), (3, 2, 9)])
def test_masked_positions_count_nowhere(shape):
    student, teacher = randn(shape)
    mask = torch.rand(shape[:1] + shape[2:], generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0, :3] = False
    mask[-1] = False  # no position counts
    batch = Batch(torch.zeros(len(student), 1), mask=mask)
    found = ReviewLoss()(student, teacher, batch)
    assert found.item() == pytest.approx(by_hand(student, teacher, mask), rel=1e-10)
    other = student.masked_fill(~mask.unsqueeze(1), 1e6)
    torch.testing.assert_close(ReviewLoss()(other, teacher, batch), found, rtol=1e-12, atol=0)


def test_limits():
    teacher = randn((2, 3, 8, 8))[1]
    assert ReviewLoss()(teacher, teacher) == 0
    assert ReviewLoss()(teacher + 2, teacher).item() == pytest.approx(4)  # a constant error stays at all levels
    stripes = torch.ones(8, 8).double()
    stripes[::2] = -1  # averages to 0
    assert ReviewLoss()(teacher + stripes, teacher).item() == pytest.approx(1 / 1.875)
    empty = torch.zeros(0, 3, 8, 8, requires_grad=True)
    ReviewLoss()(empty, torch.zeros(0, 3, 8, 8)).backward()
    assert ReviewLoss()(empty, torch.zeros(0, 3, 8, 8)) == 0


def test_no_gradient_into_the_teacher():
    student, teacher = (x.requires_grad_() for x in randn((2, 3, 8, 8)))
    ReviewLoss()(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (x.to(dtype) for x in randn((2, 3, 8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        found = ReviewLoss()(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(by_hand(student.double(), teacher.double()), rel=1e-5)
    large = torch.full((1, 1, 64, 64), 300.0, dtype=dtype)  # its square is beyond float16
    assert ReviewLoss()(large, torch.zeros_like(large)) == 300.0**2


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"must have one shape, got \[2, 3, 4, 4\] and \[2, 3, 8, 8\]; a projector"):
        ReviewLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
