import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr

from kd_lightning.errors import InputError
from kd_lightning.losses import DISTLoss


def randn(seed, batch=7, classes=5, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * scale).to(dtype))


def reference_rows(student, teacher, beta, gamma, temperature):
    p_s, p_t = (softmax(z.double().numpy() / temperature, axis=1) for z in (student, teacher))
    rows = np.array([1 - np.corrcoef(s, t)[0, 1] for s, t in zip(p_s, p_t, strict=True)])
    columns = [1 - pearsonr(s, t).statistic for s, t in zip(p_s.T, p_t.T, strict=True)] if len(p_s) > 1 else 0.0
    return torch.tensor(temperature**2 * (beta * rows + gamma * np.mean(columns)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(2.0, 2.0, 4.0), (1.0, 0.0, 1.0), (0.0, 3.0, 10.0)])
@pytest.mark.parametrize(("seed", "batch", "classes"), [(0, 7, 5), (1, 1, 3), (2, 9, 10), (3, 32, 2)])
def test_agrees_with_reference_and_reductions(seed, batch, classes, beta, gamma, temperature, dtype):
    student, teacher = randn(seed, batch, classes, dtype)
    expected = reference_rows(student, teacher, beta, gamma, temperature)
    rows = DISTLoss(beta, gamma, temperature, "none")(student, teacher)
    mean = DISTLoss(beta, gamma, temperature)(student, teacher)
    # Float32 correlations are good to about 1e-7, which T² and the weights multiply.
    atol = 1e-6 * max(1.0, temperature**2 / 4) if dtype == torch.float32 else 1e-10
    assert rows.shape == (batch,) and rows.dtype == mean.dtype == dtype
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=atol)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradcheck(temperature):
    pair = [z.requires_grad_() for z in randn(4)]
    assert torch.autograd.gradcheck(DISTLoss(temperature=temperature), pair)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_match_is_zero_and_minimal(dtype, scale):
    _, teacher = randn(5, 16, 10, dtype, scale)
    student = teacher.clone().requires_grad_()
    value = DISTLoss()(student, teacher)
    value.backward()
    assert abs(value.item()) < 1e-6 and student.grad.abs().max() < 1e-3


def test_tiny_probabilities_count_like_any_others():
    student, teacher = randn(6, dtype=torch.float32, scale=1.0)
    student[:, 0] -= 60
    teacher[:, 0] -= 70
    expected = reference_rows(student, teacher, 0.0, 1.0, 1.0).mean()
    torch.testing.assert_close(DISTLoss(0.0, 1.0, 1.0)(student, teacher).double(), expected, rtol=1e-5, atol=0)


def test_linear_relation_is_a_perfect_match():
    probability = randn(7)[1].softmax(1)
    student = (0.3 * probability + 0.7 / 5).log()
    assert DISTLoss(temperature=1.0)(student, probability.log()).item() == pytest.approx(0, abs=1e-12)


def test_constant_rows_and_columns_of_the_teacher_count_nothing():
    student, teacher = randn(8, 3, 4)
    rows_only = DISTLoss(2.0, 0.0, reduction="none")
    teacher[1] = 0.1
    values = rows_only(student, teacher)
    assert values[1] == 0 and (values[[0, 2]] > 0).all()
    alike = teacher[:1].expand(3, 4)
    assert DISTLoss(0.0, 2.0)(student, alike) == 0
    assert DISTLoss(0.0, 2.0)(student[:1], teacher[:1]) == 0
    # Constant but for rounding: one class always has a tenth of the probability, whatever the others do.
    for dtype in (torch.float32, torch.float64):
        probability = torch.cat([torch.full((3, 1), 0.1), 0.9 * randn(9, 3, 3)[1].softmax(1)], 1)
        teacher = probability.log().to(dtype)
        by_hand = [
            1 - pearsonr(s, t).statistic
            for s, t in zip(student.softmax(1).T.numpy()[1:], probability.T.numpy()[1:], strict=True)
        ]
        value = DISTLoss(0.0, 1.0, 1.0)(student.to(dtype), teacher)
        assert value.item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_underflowing_column_of_the_teacher_counts_nothing():
    student, teacher = randn(10, dtype=torch.float32)
    teacher[:, 0] -= 300
    columns = DISTLoss(0.0, 1.0, 1.0)(student, teacher)
    by_hand = [
        1 - pearsonr(s, t).statistic
        for s, t in zip(
            student.double().softmax(1).T[1:].numpy(), teacher.double().softmax(1).T[1:].numpy(), strict=True
        )
    ]
    assert columns.item() == pytest.approx(sum(by_hand) / 5, rel=1e-5)


def test_constant_student_is_uncorrelated_without_gradient():
    _, teacher = randn(11)
    student = torch.full_like(teacher, 0.1, requires_grad=True)
    value = DISTLoss(1.0, 1.0, 1.0)(student, teacher)
    value.backward()
    assert value == 2 and student.grad.abs().max() == 0


def test_temperature_squared_and_annealing():
    student, teacher = randn(12)
    loss = DISTLoss()
    torch.testing.assert_close(loss(student, teacher), 16 * DISTLoss(temperature=1.0)(student / 4, teacher / 4))
    loss.temperature = 1.0
    torch.testing.assert_close(loss(student, teacher), DISTLoss(temperature=1.0)(student, teacher))
    assert repr(loss) == "DISTLoss(beta=2.0, gamma=2.0, temperature=1.0, reduction='mean')"
    assert DISTLoss.task == "multiclass"


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 12])
def test_extreme_and_constant_logits_stay_finite(batch, dtype, temperature):
    for noise in (0.0, 1.0):
        student, teacher = (1e4 * z.sign() + noise * z for z in randn(13, batch))
        if batch > 1:
            student[0], teacher[1], student[2], teacher[2] = 0.1, 0.1, 1e4, -1e4
        student, teacher = (z.to(dtype).requires_grad_() for z in (student, teacher))
        value = DISTLoss(temperature=temperature)(student, teacher)
        value.backward()
        assert value.isfinite() and value >= 0 and value.dtype == torch.promote_types(dtype, torch.float32)
        assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    x, teacher = randn(14, dtype=torch.float32)
    layer = torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype):
        student = layer(x)
        value = DISTLoss()(student, teacher.to(dtype))
    value.backward()
    assert student.dtype == dtype and value.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()
    expected = reference_rows(student.detach(), teacher.to(dtype), 2.0, 2.0, 4.0).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1.0}, r"beta must be finite and at least 0, got -1\.0"),
        ({"gamma": math.inf}, r"gamma must be finite and at least 0, got inf"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0, got 0\.0"),
        ({"reduction": "sum"}, r"reduction must be one of \('mean', 'none'\), got 'sum'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        DISTLoss(**arguments)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [((4, 3), (3, 3), r"got \(4, 3\) and \(3, 3\)"), ((4, 1), (4, 1), "2 classes"), ((4,), (4,), "2 dimensions")],
)
def test_bad_shapes(student, teacher, message):
    with pytest.raises(InputError, match=message):
        DISTLoss()(torch.zeros(student), torch.zeros(teacher))


def test_temperature_is_checked_at_every_call():
    loss = DISTLoss()
    loss.temperature = -2.0
    with pytest.raises(InputError, match="temperature"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3))
