"""GeneralizedCrossEntropyLoss: the formula, its two limits, truncation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import GeneralizedCrossEntropyLoss

TARGET = torch.tensor([0, 3, 1, 2, 2, 3])


def randn(dtype=torch.float64):
    return (torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).to(dtype)


def probability(logits):
    return softmax(logits.double().numpy(), axis=1)[np.arange(len(logits)), TARGET]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("truncation", [None, 0.0, 0.2, 0.5])
@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_formula(q, truncation, dtype):
    p = np.maximum(probability(randn(dtype)), truncation or 0.0)
    assert not truncation or 0 < (p == truncation).sum() < 6
    found = GeneralizedCrossEntropyLoss(q, truncation, "none")(randn(dtype), TARGET)
    assert found.dtype == dtype
    assert found.double().numpy() == pytest.approx((1 - p**q) / q, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_defaults_are_the_papers():
    loss = GeneralizedCrossEntropyLoss()
    assert repr(loss) == "GeneralizedCrossEntropyLoss(q=0.7, truncation=None, reduction='mean')"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_q_is_cross_entropy(dtype):
    logits = randn(dtype).requires_grad_()
    expected = F.cross_entropy(logits, TARGET)
    found = GeneralizedCrossEntropyLoss(1e-6)(logits, TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_q_of_one_is_half_the_mean_absolute_error():
    p = randn().softmax(dim=1)
    error = (p - F.one_hot(TARGET, 4)).abs().sum(dim=1) / 2
    torch.testing.assert_close(GeneralizedCrossEntropyLoss(1.0, reduction="none")(randn(), TARGET), error)


def test_gradient_is_that_of_cross_entropy_times_a_power():
    """p^q of it: unlikely labels move less."""
    logits = randn().requires_grad_()
    (found,) = torch.autograd.grad(GeneralizedCrossEntropyLoss(0.7, reduction="none")(logits, TARGET).sum(), logits)
    expected = probability(randn())[:, None] ** 0.7 * (softmax(randn().numpy(), axis=1) - np.eye(4)[TARGET])
    assert found.numpy() == pytest.approx(expected, rel=1e-9)


def test_truncated_rows_teach_nothing():
    logits = randn().requires_grad_()
    (found,) = torch.autograd.grad(GeneralizedCrossEntropyLoss(0.7, 0.2, "none")(logits, TARGET).sum(), logits)
    (whole,) = torch.autograd.grad(GeneralizedCrossEntropyLoss(0.7, reduction="none")(logits, TARGET).sum(), logits)
    below = torch.from_numpy(probability(randn()) < 0.2)
    assert 0 < below.sum() < 6
    assert torch.equal(found[below], torch.zeros_like(found[below]))
    torch.testing.assert_close(found[~below], whole[~below])


def test_truncation_may_be_set_later():
    loss = GeneralizedCrossEntropyLoss(0.7, 0.0)
    loss.truncation = 0.5
    assert torch.equal(loss(randn(), TARGET), GeneralizedCrossEntropyLoss(0.7, 0.5)(randn(), TARGET))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0.0}, r"q must lie in \(0, 1\], got 0.0; its limit at 0 is torch.nn.CrossEntropyLoss"),
        ({"q": 1.1}, r"q must lie in \(0, 1\], got 1.1"),
        ({"q": float("nan")}, r"q must lie in \(0, 1\], got nan"),
        ({"truncation": 1.0}, r"truncation must lie in \[0, 1\), or be null for none, got 1.0"),
        ({"truncation": -0.1}, "truncation .* got -0.1"),
        ({"truncation": float("nan")}, "truncation .* got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        GeneralizedCrossEntropyLoss(**arguments)
