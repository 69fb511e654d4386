"""U-Net: the paper's size, the forward pass by hand, and images of any size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning import InputError
from kd_lightning.models import UNet


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def size(width, depth, inputs, classes):
    """Weights of all layers, from the paper's figure: 3x3 convolutions (here with BatchNorm), 2x2 up-convolutions."""
    total, widths = 0, [width * 2**level for level in range(depth + 1)]
    before = inputs
    for channels in widths:
        total += 9 * before * channels + 9 * channels * channels + 4 * channels
        before = channels
    for channels in widths[:-1]:
        total += 4 * 2 * channels * channels + channels
        total += 9 * 2 * channels * channels + 9 * channels * channels + 4 * channels
    return total + (width + 1) * classes


@pytest.mark.parametrize("arguments", [(64, 4, 1, 2), (4, 1, 3, 5), (5, 3, 2, 1)])
def test_parameters(arguments):
    with torch.device("meta"):
        network = UNet(*arguments)
    assert parameters(network) == size(*arguments)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 5 * arguments[1] + 3  # the paper's 23 at depth 4


def test_size_of_the_paper():
    """The paper's convolutions have biases in place of BatchNorm: 31.03 million weights."""
    with torch.device("meta"):
        network = UNet(64, 4, 1, 2)
    biases = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert parameters(network) - biases == 31_030_658


def test_forward_by_hand():
    torch.manual_seed(0)
    network = UNet(width=3, depth=2, in_channels=2, num_classes=4).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    state, x = network.state_dict(), torch.randn(2, 2, 8, 12, dtype=torch.float64)

    def level(x, name):
        for first in (0, 3):
            x = F.conv2d(x, state[f"{name}.{first}.weight"], padding=1)
            norm = (state[f"{name}.{first + 1}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var"))
            mean, var = norm
            x = (x - mean) / (var + 1e-5).sqrt()
            x = x * state[f"{name}.{first + 1}.weight"].view(-1, 1, 1) + state[f"{name}.{first + 1}.bias"].view(
                -1, 1, 1
            )
            x = x.clamp(min=0)
        return x

    def up(x, name):
        """Each pixel becomes 2 x 2."""
        b, _, h, w = x.shape
        spread = torch.einsum("bchw,cdij->bdhiwj", x, state[f"{name}.weight"]).reshape(b, -1, 2 * h, 2 * w)
        return spread + state[f"{name}.bias"].view(-1, 1, 1)

    full = level(x, "encoder.0")
    half = level(F.max_pool2d(full, 2), "encoder.1")
    quarter = level(F.max_pool2d(half, 2), "encoder.2")
    z = level(torch.cat([half, up(quarter, "up.1")], dim=1), "decoder.1")
    z = level(torch.cat([full, up(z, "up.0")], dim=1), "decoder.0")
    torch.testing.assert_close(network(x), F.conv2d(z, state["head.weight"], state["head.bias"]))


@pytest.mark.parametrize("side", [(8, 8), (1, 1), (3, 9), (17, 5), (33, 47)])
def test_any_size(side):
    torch.manual_seed(0)
    network = UNet(width=2, depth=3, num_classes=5).eval()
    x = torch.randn(2, 3, *side)
    logits = network(x)
    assert logits.shape == (2, 5, *side)
    height, width = (-(-length // 8) * 8 for length in side)
    padded = torch.empty(2, 3, height, width)  # by hand: the last row and column again
    for row in range(height):
        for column in range(width):
            padded[:, :, row, column] = x[:, :, min(row, side[0] - 1), min(column, side[1] - 1)]
    assert torch.equal(logits, network(padded)[:, :, : side[0], : side[1]])


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    network = UNet(width=4, depth=3, num_classes=3)
    F.cross_entropy(network(torch.randn(2, 3, 19, 16)), torch.randint(3, (2, 19, 16))).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in network.parameters())


def test_copies_and_names():
    network = UNet(width=2, depth=2)
    assert [name for name, _ in network.named_children()] == ["encoder", "pool", "up", "decoder", "head"]
    copied = copy.deepcopy(network).eval()
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(copied(x), network.eval()(x))


@pytest.mark.parametrize("arguments", [{"width": 0}, {"depth": 0}, {"depth": -1}])
def test_sizes_below_1(arguments):
    with pytest.raises(InputError, match=f"^{next(iter(arguments))} must be at least 1"):
        UNet(**arguments)
