"""TTM and WTTM: the paper's formulas in float64, and their limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import KDLoss, TTMLoss, WTTMLoss

both = pytest.mark.parametrize("make", [TTMLoss, WTTMLoss])


def randn(seed, rows=7, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, classes, generator=generator, dtype=torch.float64).mul(scale).unbind()


def reference(student, teacher, exponent):
    """Rows of TTM, and U."""
    powers = softmax(teacher.double().numpy(), axis=1) ** exponent
    weight = powers.sum(axis=1)
    rows = rel_entr(powers / weight[:, None], softmax(student.double().numpy(), axis=1)).sum(axis=1)
    return torch.tensor(rows), torch.tensor(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("rows", "classes"), [(7, 5), (1, 2), (4, 100)])
def test_agree_with_the_formulas(rows, classes, exponent, dtype):
    student, teacher = (z.to(dtype) for z in randn(0, rows, classes))
    expected, weight = reference(student, teacher, exponent)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    found = TTMLoss(exponent, "none")(student, teacher)
    torch.testing.assert_close(found.double(), expected, **near)
    weighted = WTTMLoss(exponent, "none")(student, teacher)
    torch.testing.assert_close(weighted.double(), weight * expected, **near)
    assert found.dtype == weighted.dtype == dtype
    mean = WTTMLoss(exponent)(student, teacher)
    torch.testing.assert_close(mean.double(), (weight * expected).mean(), **near)


@both
def test_exponent_1_is_kd_at_temperature_1(make):
    student, teacher = randn(1)
    torch.testing.assert_close(make(1.0)(student, teacher), KDLoss(1.0)(student, teacher))


def test_only_the_teacher_is_softened():
    student, teacher = randn(2)
    assert TTMLoss(0.25)(0.25 * teacher, teacher).item() == pytest.approx(0, abs=1e-14)
    assert WTTMLoss(0.25)(0.25 * teacher, teacher).item() == pytest.approx(0, abs=1e-14)
    student.requires_grad_()
    (found,) = torch.autograd.grad(TTMLoss(0.25)(student, teacher), student)
    (expected,) = torch.autograd.grad(F.cross_entropy(student, (teacher / 4).softmax(dim=1)), student)
    torch.testing.assert_close(found, expected)


def test_weight_of_certain_and_uncertain_teachers():
    """From 1 to C^(1 - g)."""
    teacher = torch.tensor([[1e4, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64)
    student = randn(3, 2, 4)[0]
    ratio = WTTMLoss(0.3, "none")(student, teacher) / TTMLoss(0.3, "none")(student, teacher)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 4**0.7], dtype=torch.float64))


def test_exponent_0_limit_is_a_uniform_target():
    student, teacher = randn(4)
    uniform = rel_entr(np.full((7, 5), 0.2), softmax(student.numpy(), axis=1)).sum(axis=1).mean()
    assert TTMLoss(1e-9)(student, teacher).item() == pytest.approx(uniform, rel=1e-6)


@both
def test_temperature_and_annealing(make):
    student, teacher = randn(5)
    loss = make(0.1)
    assert loss.temperature == 10 and make.task == "multiclass"
    loss.exponent = 0.5
    assert loss.temperature == 2 and loss(student, teacher) == make(0.5)(student, teacher)
    assert repr(loss) == f"{make.__name__}(exponent=0.5, reduction='mean')"
    loss.exponent = 0.0
    with pytest.raises(InputError, match=r"exponent must be finite and above 0, got 0\.0"):
        loss(student, teacher)


@both
@pytest.mark.parametrize("exponent", [0.0, -1.0, math.inf, math.nan])
def test_bad_exponents(make, exponent):
    with pytest.raises(InputError, match=f"exponent must be finite and above 0, got {exponent}"):
        make(exponent)
