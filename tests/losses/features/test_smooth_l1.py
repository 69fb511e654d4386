import math

import numpy as np
import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.losses import SmoothL1FeatureLoss


def reference(student, teacher, beta):
    distance = np.abs(student.numpy() - teacher.numpy())
    if beta == 0:
        return distance.mean()
    return np.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2).mean()


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7), (2, 4, 3, 5)])
@pytest.mark.parametrize("beta", [0, 0.3, 1.0, 5.0])
def test_value(randn, shape, beta):
    student, teacher = 3 * randn(*shape), randn(*shape, seed=1)
    value = SmoothL1FeatureLoss(beta)(student, teacher)
    assert value.item() == pytest.approx(reference(student, teacher, beta), rel=1e-12)
    assert SmoothL1FeatureLoss(beta)(teacher, teacher) == 0


def test_linear_far_away_and_quadratic_near():
    def value(distance):
        return SmoothL1FeatureLoss(2.0)(torch.tensor([[distance]]), torch.zeros(1, 1)).item()

    assert value(1.0) == 0.25 and value(-1.0) == 0.25 and value(2.0) == 1 and value(12.0) == 11


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_beta_out_of_range(beta):
    with pytest.raises(InputError, match=f"^beta must be finite and at least 0, got {beta}$"):
        SmoothL1FeatureLoss(beta)


def test_repr():
    assert repr(SmoothL1FeatureLoss(0.5)) == "SmoothL1FeatureLoss(beta=0.5)"
