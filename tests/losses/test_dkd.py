import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import DKDLoss, KDLoss


def randn(seed, batch=7, classes=5, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(classes, (batch,), generator=generator)
    return *pair.to(dtype), target


def reference_terms(student, teacher, target, temperature):
    """Rows of (target-class KL, other-classes KL, teacher's target probability), straight from probabilities."""
    rows = []
    for s, t, y in zip(student.double().numpy(), teacher.double().numpy(), target.tolist(), strict=True):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        target_kl = rel_entr(p_t[y], p_s[y]) + rel_entr(1 - p_t[y], 1 - p_s[y])
        others = [c for c in range(len(s)) if c != y]
        others_kl = sum(rel_entr(p_t[c] / (1 - p_t[y]), p_s[c] / (1 - p_s[y])) for c in others)
        rows.append((target_kl, others_kl, p_t[y]))
    return torch.tensor(np.array(rows)).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.5, 2.0, 1.0), (2.0, 0.0, 10.0)])
@pytest.mark.parametrize(("seed", "batch", "classes"), [(0, 7, 5), (1, 1, 3), (2, 9, 10)])
def test_agrees_with_reference_and_reductions(seed, batch, classes, alpha, beta, temperature, dtype):
    student, teacher, target = randn(seed, batch, classes, dtype)
    target_kl, others_kl, _ = reference_terms(student, teacher, target, temperature)
    expected = temperature**2 * (alpha * target_kl + beta * others_kl)
    rows = DKDLoss(alpha, beta, temperature, "none")(student, teacher, target)
    mean = DKDLoss(alpha, beta, temperature)(student, teacher, target)
    # Float32 probabilities are good to about 1e-7, which T² and the weights multiply.
    atol = 4e-7 * max(2.5, temperature**2 * (alpha + beta)) if dtype == torch.float32 else 1e-10
    assert rows.shape == (batch,) and rows.dtype == mean.dtype == dtype
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=atol)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_parts_make_up_the_soft_target_loss(classes, temperature):
    student, teacher, target = randn(3, classes=classes)
    whole = KDLoss(temperature, reduction="none")(student, teacher)
    target_part = DKDLoss(1.0, 0.0, temperature, "none")(student, teacher, target)
    others_part = DKDLoss(0.0, 1.0, temperature, "none")(student, teacher, target)
    p_target = reference_terms(student, teacher, target, temperature)[2]
    torch.testing.assert_close(target_part + (1 - p_target) * others_part, whole)
    assert classes > 2 or others_part.abs().max() == 0


@pytest.mark.parametrize("classes", [2, 5])
def test_gradcheck(classes):
    student, teacher, target = randn(4, classes=classes)
    loss = DKDLoss(temperature=2.0)
    pair = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, target), pair)


def test_perfect_match_is_zero_and_minimal():
    _, teacher, target = randn(5, dtype=torch.float32)
    student = teacher.clone().requires_grad_()
    value = DKDLoss()(student, teacher, target)
    value.backward()
    assert value == 0 and student.grad.abs().max() < 1e-6


def test_unlabeled_rows_take_the_teachers_class():
    student, teacher, target = randn(6)
    filled = target.clone()
    target[::2], filled[::2] = -100, teacher[::2].argmax(1)
    given = target.clone()
    torch.testing.assert_close(DKDLoss()(student, teacher, target), DKDLoss()(student, teacher, filled))
    assert target.equal(given)


def test_temperature_squared_and_annealing():
    student, teacher, target = randn(7)
    loss = DKDLoss()
    expected = 16 * DKDLoss(temperature=1.0)(student / 4, teacher / 4, target)
    torch.testing.assert_close(loss(student, teacher, target), expected)
    loss.temperature = 1.0
    torch.testing.assert_close(loss(student, teacher, target), DKDLoss(temperature=1.0)(student, teacher, target))
    assert repr(loss) == "DKDLoss(alpha=1.0, beta=8.0, temperature=1.0, reduction='mean', standardize=False)"
    assert DKDLoss.task == "multiclass"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 5])
def test_extreme_and_constant_logits_stay_finite(classes, dtype):
    student, teacher, target = randn(8, 12, classes)
    student, teacher = 1e4 * student.sign(), 1e4 * teacher.sign()
    student[0], teacher[1], target[2] = 0.1, 0.1, -100
    student, teacher = (z.to(dtype).requires_grad_() for z in (student, teacher))
    value = DKDLoss(temperature=1.0)(student, teacher, target)
    value.backward()
    assert value.isfinite() and value > 0 and value.dtype == torch.promote_types(dtype, torch.float32)
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    x, teacher, target = randn(9, dtype=torch.float32)
    layer = torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype):
        student = layer(x)
        value = DKDLoss()(student, teacher.to(dtype), target)
    value.backward()
    assert student.dtype == dtype and value.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()
    target_kl, others_kl, _ = reference_terms(student.detach(), teacher.to(dtype), target, 4.0)
    torch.testing.assert_close(value.double(), 16 * (target_kl + 8 * others_kl).mean(), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, r"alpha must be finite and at least 0, got -1\.0"),
        ({"beta": -0.5}, r"beta must be finite and at least 0, got -0\.5"),
        ({"beta": math.nan}, r"beta .* got nan"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0, got 0\.0"),
        ({"reduction": "sum"}, r"reduction must be one of \('mean', 'none'\), got 'sum'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        DKDLoss(**arguments)


@pytest.mark.parametrize(
    ("student", "teacher", "target", "message"),
    [
        ((4, 3), (4, 2), torch.zeros(4).long(), r"got \(4, 3\) and \(4, 2\)"),
        ((4, 1), (4, 1), torch.zeros(4).long(), r"at least 2 classes, got shape \(4, 1\)"),
        ((4, 3), (4, 3), None, r"target must be given to DKDLoss, got None"),
        (
            (4, 3),
            (4, 3),
            torch.zeros(3).long(),
            r"target must be long of shape \(4,\), got torch.int64 of shape \(3,\)",
        ),
        ((4, 3), (4, 3), torch.zeros(4, 2), r"got torch.float32 of shape \(4, 2\)"),
        ((4, 3), (4, 3), torch.zeros(4), r"got torch.float32 of shape \(4,\)"),
    ],
)
def test_bad_inputs(student, teacher, target, message):
    with pytest.raises(InputError, match=message):
        DKDLoss()(torch.zeros(student), torch.zeros(teacher), target)


def test_class_beyond_the_logits_is_an_error():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        DKDLoss()(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]))


def test_temperature_is_checked_at_every_call():
    loss = DKDLoss()
    loss.temperature = math.nan
    with pytest.raises(InputError, match="temperature"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long())


def test_probabilities_mean_the_most_likely_class():
    """As of mixed samples; a row of NaN has no label."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    soft = torch.tensor([[0.7, 0.3, 0], [0, 1, 0], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [torch.nan] * 3])
    expected = DKDLoss()(student, teacher, torch.tensor([0, 1, 2, 1, -100]))
    assert torch.equal(DKDLoss()(student, teacher, soft), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized_logits(dtype):
    student, teacher, target = randn(11, dtype=dtype)
    scaled = [
        torch.tensor((z - z.mean(1, keepdims=True)) / (1e-7 + z.std(1, ddof=1, keepdims=True)))
        for z in (student.double().numpy(), teacher.double().numpy())
    ]
    target_kl, others_kl, _ = reference_terms(*scaled, target, 2.0)
    found = DKDLoss(temperature=2.0, reduction="none", standardize=True)(student, teacher, target)
    atol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found.double(), 4 * (target_kl + 8 * others_kl), rtol=1e-6, atol=atol)


def test_standardized_loss_ignores_shift_and_scale():
    student, teacher, target = randn(12)
    target[0] = -100
    loss = DKDLoss(temperature=2.0, standardize=True)
    expected = loss(student, teacher, target)
    torch.testing.assert_close(loss(5 * student + 3, 0.2 * teacher - 1, target), expected, rtol=1e-6, atol=1e-6)
    assert not loss.supports_top_k and DKDLoss().supports_top_k
    constant = torch.full_like(student, 0.1, requires_grad=True)
    loss(constant, teacher, target).backward()
    assert 0 < constant.grad.abs().max() < 10
