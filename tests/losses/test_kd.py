import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, rel_entr, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import KDLoss

SHAPES = {"multiclass": (7, 5), "multilabel": (6, 4), "binary": (8, 1)}
VARIANTS = [("multiclass", False), ("multiclass", True), ("multilabel", False), ("binary", False)]


def randn(seed, *shape, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * scale
    return tuple(pair.to(dtype))


def reference_rows(student, teacher, temperature, task, standardize=False):
    rows = []
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        if standardize:
            s, t = ((z - z.mean()) / (1e-7 + z.std(ddof=1)) for z in (s, t))
        if task == "multiclass":
            value = rel_entr(softmax(t / temperature), softmax(s / temperature)).sum()
        else:
            p, q = expit(t / temperature), expit(s / temperature)
            value = np.mean(rel_entr(p, q) + rel_entr(1 - p, 1 - q))
        rows.append(temperature**2 * value)
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("task", "standardize"), VARIANTS)
def test_agrees_with_reference_and_reductions(task, standardize, seed, temperature, dtype):
    student, teacher = randn(seed, *SHAPES[task], dtype=dtype)
    # Float32 probabilities are good to about 1e-7, which T² multiplies.
    atol = 1e-6 * max(1.0, temperature**2 / 4) if dtype == torch.float32 else 1e-12
    expected = reference_rows(student, teacher, temperature, task, standardize)
    rows = KDLoss(temperature, task, standardize, "none")(student, teacher)
    mean = KDLoss(temperature, task, standardize)(student, teacher)
    assert rows.shape == (len(student),) and rows.dtype == mean.dtype == dtype
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=atol)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-6, atol=atol)
    assert abs(KDLoss(temperature, task, standardize)(teacher, teacher).item()) == 0


@pytest.mark.parametrize(("task", "standardize"), VARIANTS)
def test_gradcheck(task, standardize):
    pair = [z.requires_grad_() for z in randn(0, *SHAPES[task])]
    assert torch.autograd.gradcheck(KDLoss(2.0, task, standardize), pair)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_that_of_cross_entropy_with_soft_targets(temperature):
    student, teacher = randn(3, 6, 5)
    student.requires_grad_()
    cross_entropy = temperature**2 * F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))
    (expected,) = torch.autograd.grad(cross_entropy, student)
    (actual,) = torch.autograd.grad(KDLoss(temperature)(student, teacher), student)
    torch.testing.assert_close(actual, expected)


def test_high_temperature_limit_matches_centred_logits():
    student, teacher = randn(4, 6, 5)
    student.requires_grad_()
    (actual,) = torch.autograd.grad(KDLoss(1e5)(student, teacher), student)
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(1, keepdim=True)) / 5 / 6
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


def test_temperature_squared_and_annealing():
    student, teacher = randn(5, 6, 5)
    loss = KDLoss(4.0)
    expected = 16 * KDLoss(1.0)(student / 4, teacher / 4)
    torch.testing.assert_close(loss(student, teacher), expected)
    loss.temperature = 2.0
    torch.testing.assert_close(loss(student, teacher), KDLoss(2.0)(student, teacher))
    assert repr(loss) == "KDLoss(temperature=2.0, task='multiclass', standardize=False, reduction='mean')"


def test_target_is_ignored_and_teacher_is_the_first_distribution():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]])
    loss = KDLoss(1.0)
    p = 1 / (1 + math.exp(-4))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert loss(student, teacher, torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)


def test_standardized_loss_ignores_shift_and_scale():
    student, teacher = randn(6, 6, 5)
    loss = KDLoss(2.0, standardize=True)
    torch.testing.assert_close(loss(5 * student + 3, 0.2 * teacher - 1), loss(student, teacher), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_standardized_constant_student_gets_gradients_of_usual_size(constant):
    student = torch.full((6, 5), constant, requires_grad=True)
    teacher = randn(11, 6, 5, dtype=torch.float32)[1]
    value = KDLoss(2.0, standardize=True)(student, teacher)
    value.backward()
    expected = reference_rows(torch.zeros(6, 5), teacher, 2.0, "multiclass", standardize=True).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert 0 < student.grad.abs().max() < 1


@pytest.mark.parametrize("student_shape", [(8,), (8, 1)])
@pytest.mark.parametrize("teacher_shape", [(8,), (8, 1)])
def test_binary_takes_both_shapes(student_shape, teacher_shape):
    student, teacher = randn(7, 8, 1)
    rows = KDLoss(task="binary", reduction="none")(student.view(student_shape), teacher.view(teacher_shape))
    torch.testing.assert_close(rows, reference_rows(student, teacher, 4.0, "binary"))


def test_binary_is_multiclass_with_a_zero_logit():
    student, teacher = randn(8, 8, 1)
    padded = [torch.cat([z, torch.zeros_like(z)], 1) for z in (student, teacher)]
    torch.testing.assert_close(KDLoss(task="binary")(student, teacher), KDLoss()(*padded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("task", "standardize"), VARIANTS)
def test_extreme_and_constant_logits_stay_finite(task, dtype, standardize):
    student, teacher = (1e4 * z.sign() for z in randn(9, *SHAPES[task]))
    student[0], teacher[1], student[2], teacher[2] = 0.1, 0.1, 1e4, -1e4
    student, teacher = (z.to(dtype).requires_grad_() for z in (student, teacher))
    value = KDLoss(1.0, task, standardize)(student, teacher)
    value.backward()
    assert value.isfinite() and value.dtype == torch.promote_types(dtype, torch.float32)
    assert value > 0
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", list(SHAPES))
def test_autocast_computes_in_float32(task, dtype):
    x, teacher = randn(10, *SHAPES[task], dtype=torch.float32)
    layer = torch.nn.Linear(x.shape[1], x.shape[1])
    with torch.autocast("cpu", dtype):
        student = layer(x)
        value = KDLoss(task=task)(student, teacher.to(dtype))
    value.backward()
    assert student.dtype == dtype and value.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()
    expected = reference_rows(student.detach(), teacher.to(dtype), 4.0, task).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=4e-6)


def test_empty_batch_is_zero_in_the_graph():
    student = torch.zeros(0, 5, requires_grad=True)
    value = KDLoss()(student, torch.zeros(0, 5))
    value.backward()
    assert value == 0 and student.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be finite and above 0, got 0\.0"),
        ({"temperature": -1.0}, r"temperature .* got -1\.0"),
        ({"temperature": math.inf}, r"temperature .* got inf"),
        ({"temperature": math.nan}, r"temperature .* got nan"),
        ({"task": "regression"}, r"task must be one of .*'binary'.* got 'regression'"),
        ({"reduction": "sum"}, r"reduction must be one of \('mean', 'none'\), got 'sum'"),
        ({"standardize": True, "task": "binary"}, r"standardize .* 'multiclass', got task 'binary'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        KDLoss(**arguments)


@pytest.mark.parametrize(
    ("task", "student", "teacher", "message"),
    [
        ("multiclass", (4, 3), (4, 2), r"got \(4, 3\) and \(4, 2\)"),
        ("multiclass", (4,), (4,), r"2 dimensions .* got shape \(4,\)"),
        ("multiclass", (4, 1), (4, 1), r"at least 2 classes, got shape \(4, 1\)"),
        ("multilabel", (4, 3), (3, 3), r"got \(4, 3\) and \(3, 3\)"),
        ("multilabel", (4,), (4,), r"multilabel logits must have 2 dimensions"),
        ("binary", (4, 2), (4, 2), r"binary logits must be \(B,\) or \(B, 1\), got student \(4, 2\)"),
        ("binary", (), (), r"binary logits must be \(B,\) or \(B, 1\), got student \(\)"),
        ("binary", (4,), (3, 1), r"got \(4,\) and \(3, 1\)"),
    ],
)
def test_bad_shapes(task, student, teacher, message):
    with pytest.raises(InputError, match=message):
        KDLoss(task=task)(torch.zeros(student), torch.zeros(teacher))


def test_temperature_is_checked_at_every_call():
    loss = KDLoss()
    loss.temperature = 0.0
    with pytest.raises(InputError, match="temperature"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3))
