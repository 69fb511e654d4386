"""The network of the demo: its size for any width, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning.models import DigitsCNN


@pytest.mark.parametrize("width", [1, 4, 32])
@pytest.mark.parametrize("classes", [2, 10])
def test_parameters(width, classes):
    w = width
    convolutions = 9 * (w + w * 2 * w + 2 * w * 4 * w)
    norms = 2 * (w + 2 * w + 4 * w)
    linear = (4 * w + 1) * classes
    network = DigitsCNN(width, num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) == convolutions + norms + linear


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (5, 9), (28, 28)])
def test_any_size_from_four(size):
    assert DigitsCNN(4)(torch.randn(3, 1, *size)).shape == (3, 10)


def test_a_step_reaches_every_parameter():
    torch.manual_seed(0)
    network, x, y = DigitsCNN(4), torch.randn(8, 1, 8, 8), torch.arange(8)
    loss = F.cross_entropy(network(x), y)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in network.parameters())
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert F.cross_entropy(network(x), y) < loss


def test_dropout_in_training_alone():
    torch.manual_seed(0)
    network, x = DigitsCNN(8, dropout=0.5), torch.randn(4, 1, 8, 8)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5]
