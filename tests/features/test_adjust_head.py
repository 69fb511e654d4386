"""adjust_head: the formula, a head without a bias, complaints."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning import InputError
from kd_lightning.features import adjust_head

PRIORS = [50.0, 5.0, 1.0]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_logits(bias, tau):
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()
    x = randn(5, 4)
    expected = network(x).detach().numpy() - tau * np.log(np.array(PRIORS) / sum(PRIORS))
    assert adjust_head(network, PRIORS, tau) is network
    assert network(x).detach().numpy() == pytest.approx(expected, rel=1e-12)
    assert {*network.state_dict()} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_convolution_and_half_precision():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = network(randn(2, 2, 4, 4).float())
    after = adjust_head(network, PRIORS)(randn(2, 2, 4, 4).float())
    assert (before - after)[0].tolist() == pytest.approx(np.log(np.array(PRIORS) / 56).tolist(), rel=1e-5)
    assert adjust_head(nn.Linear(4, 3).half(), PRIORS).bias.dtype == torch.float16


@pytest.mark.parametrize(
    ("priors", "tau", "message"),
    [
        ([1.0, 1.0], 1.0, "priors must be 3 finite numbers above 0, one for each output"),
        ([1.0, 0.0, 1.0], 1.0, "priors must be 3 finite numbers above 0"),
        (PRIORS, float("inf"), "tau must be finite, got inf"),
    ],
)
def test_complaints(priors, tau, message):
    with pytest.raises(InputError, match=message):
        adjust_head(nn.Linear(4, 3), priors, tau)


def test_a_network_of_one_logit():
    with pytest.raises(InputError, match="the network must have at least 2 outputs, got 1"):
        adjust_head(nn.Linear(4, 1), [3.0])
