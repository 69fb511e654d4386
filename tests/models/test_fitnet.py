"""FitNets: the paper's sizes counted by hand, no shortcut and no BatchNorm, and gradients everywhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning import InputError
from kd_lightning.models import FitNet
from kd_lightning.models.fitnet import Maxout

FITNET_1 = ((16,) * 3, (32,) * 3, (48, 48, 64))
FITNET_4 = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)


def size(stages, hidden=500, pieces=2, inputs=3, classes=10):
    total = 0
    for width in [width for stage in stages for width in stage]:
        total += (9 * inputs + 1) * width * pieces
        inputs = width
    if hidden is not None:
        total += (inputs + 1) * hidden * pieces
        inputs = hidden
    return total + (inputs + 1) * classes


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_sizes_of_the_paper():
    assert parameters(FitNet()) == size(FITNET_4) == 2548602  # 2.5M
    assert parameters(FitNet(FITNET_1)) == size(FITNET_1) == 251194  # 250K
    assert parameters(FitNet(num_classes=100)) == size(FITNET_4, classes=100)


@pytest.mark.parametrize("maxout", [True, False])
@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("stages", [((4,),), ((4, 6), (5,)), ((3,), (4,), (5,), (6,))])
def test_parameters_and_shapes(stages, hidden, maxout):
    network = FitNet(stages, hidden, maxout, in_channels=2, num_classes=3)
    assert parameters(network) == size(stages, hidden, 2 if maxout else 1, 2, 3)
    least = 2 ** (len(stages) - 1)
    for height, width in ((16, 16), (least, least), (9, 12)):
        assert network(torch.zeros(2, 2, height, width)).shape == (2, 3)
    if least > 1:
        with pytest.raises(RuntimeError, match="too small"):
            network(torch.zeros(2, 2, least - 1, 16))


def test_names_and_shapes_of_the_stages():
    shapes, x = {}, torch.zeros(1, 3, 32, 32)
    for name, layer in FitNet().named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes == {
        "stage1": (48, 32, 32),
        "pool1": (48, 16, 16),
        "stage2": (80, 16, 16),
        "pool2": (80, 8, 8),
        "stage3": (128, 8, 8),
        "pool": (128, 1, 1),
        "flatten": (128,),
        "hidden": (500,),
        "fc": (10,),
    }


@pytest.mark.parametrize(("stages", "count"), [(FITNET_1, 11), (FITNET_4, 19)])
def test_depth_and_nothing_but_convolutions(stages, count):
    network = FitNet(stages)
    weighted = [m for m in network.modules() if [*m.parameters(recurse=False)]]
    assert len(weighted) == count
    assert {type(m) for m in weighted} == {nn.Conv2d, nn.Linear} and not [*network.buffers()]


@pytest.mark.parametrize("maxout", [True, False])
@pytest.mark.parametrize("hidden", [None, 7])
def test_forward_by_hand_without_shortcuts(hidden, maxout):
    torch.manual_seed(0)
    network = FitNet(((4, 6), (5,), (3,)), hidden, maxout, num_classes=4).double()
    state, x = network.state_dict(), torch.randn(3, 3, 12, 9, dtype=torch.float64)

    def activate(z):
        half = z.shape[1] // 2
        return z[:, :half].where(z[:, :half] > z[:, half:], z[:, half:]) if maxout else z.clamp(min=0)

    def of(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    z = x
    for number, depth in ((1, 2), (2, 1), (3, 1)):
        for layer in range(depth):
            z = activate(F.conv2d(z, *of(f"stage{number}.{layer}.0"), padding=1))
        z = F.max_pool2d(z, 2) if number < 3 else z
    z = z.mean(dim=(2, 3))
    z = z if hidden is None else activate(F.linear(z, *of("hidden.0")))
    torch.testing.assert_close(network(x), F.linear(z, *of("fc")))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3), (2, 6, 3, 2)])
def test_maxout_by_hand(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y, z = Maxout()(x), x.detach().numpy()
    assert y.tolist() == np.stack([np.maximum(z[:, i], z[:, i + 3]) for i in range(3)], axis=1).tolist()
    y.sum().backward()  # one of each two pieces has it
    assert ((x.grad == 0) | (x.grad == 1)).all() and (x.grad[:, :3] + x.grad[:, 3:] == 1).all()


@pytest.mark.parametrize("maxout", [True, False])
@pytest.mark.parametrize("stages", [FITNET_1, FITNET_4, ((4,),)])
def test_gradient_reaches_every_parameter(stages, maxout):
    torch.manual_seed(0)
    network = FitNet(stages, maxout=maxout)
    F.cross_entropy(network(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("kwargs", [{"stages": ((8, 0), (4,))}, {"hidden": 0}, {"hidden": -1}])
def test_layers_without_channels(kwargs):
    with pytest.raises(InputError, match=f"{next(iter(kwargs))} must"):
        FitNet(**kwargs)
