"""SymmetricCrossEntropyLoss: the formula from its two cross-entropies, and each alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import SymmetricCrossEntropyLoss

TARGET = torch.tensor([0, 3, 1, 2, 2, 3])


def randn(dtype=torch.float64):
    return (torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "beta", "log_zero"), [(0.1, 1.0, -4.0), (6.0, 0.1, -7.0), (0.0, 2.0, -0.5)])
def test_two_cross_entropies(alpha, beta, log_zero, dtype):
    expected = []
    for p, label in zip(softmax(randn(dtype).double().numpy(), axis=1), TARGET, strict=True):
        q = np.eye(4)[label]
        log_q = np.array([0.0 if share else log_zero for share in q])
        expected.append(-alpha * (q * np.log(p)).sum() - beta * (p * log_q).sum())
    found = SymmetricCrossEntropyLoss(alpha, beta, log_zero, "none")(randn(dtype), TARGET)
    assert found.dtype == dtype
    assert found.double().numpy() == pytest.approx(np.array(expected), rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_without_the_reverse_it_is_cross_entropy():
    found = SymmetricCrossEntropyLoss(alpha=0.3, beta=0.0)(randn(), TARGET)
    torch.testing.assert_close(found, 0.3 * F.cross_entropy(randn(), TARGET))


def test_the_reverse_alone_is_bounded():
    wrong = torch.tensor([[-1e4, 1e4]])
    loss = SymmetricCrossEntropyLoss(alpha=0.0, beta=1.0, log_zero=-4.0)
    assert loss(wrong, torch.tensor([0])) == 4
    assert loss(wrong, torch.tensor([1])) == 0


def test_defaults():
    expected = "SymmetricCrossEntropyLoss(alpha=0.1, beta=1.0, log_zero=-4.0, reduction='mean')"
    assert repr(SymmetricCrossEntropyLoss()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha must be finite and at least 0, got -0.1"),
        ({"beta": float("inf")}, "beta must be finite and at least 0, got inf"),
        ({"beta": float("nan")}, "beta must be finite and at least 0, got nan"),
        ({"log_zero": 0.0}, "log_zero must be finite and below 0, got 0.0"),
        ({"log_zero": -float("inf")}, "log_zero must be finite and below 0, got -inf"),
        ({"log_zero": float("nan")}, "log_zero must be finite and below 0, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        SymmetricCrossEntropyLoss(**arguments)
