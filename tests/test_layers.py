"""Layers by name: what is captured, that nothing stays behind, and costs counted by hand."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import vit_b_16

from kd_lightning.errors import InputError
from kd_lightning.layers import capture, find_layer, list_layers
from kd_lightning.models import DigitsCNN, resnet8


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 1


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), Counting()), Counting(), nn.Linear(3, 2))


X = torch.arange(8.0).reshape(2, 4) / 8


class TestCapture:
    @pytest.mark.parametrize("stop", [True, False])
    def test_outputs_in_the_graph(self, network, stop):
        with capture(network, ["0", "1.0"], stop=stop) as outputs:
            network(X)
        expected = network[0](X)
        assert outputs.keys() == {"0", "1.0"}
        assert torch.equal(outputs["0"], expected)
        assert torch.equal(outputs["1.0"], expected.tanh())
        outputs["1.0"].sum().backward()
        assert network[0].weight.grad.abs().sum() > 0

    def test_what_lies_above_is_not_computed(self, network):
        with capture(network, ["1.1", "0"], stop=True):
            network(X)
        assert (network[1][1].calls, network[2].calls) == (1, 0)
        with capture(network, ["1.1", "0"]):
            network(X)
        assert (network[1][1].calls, network[2].calls) == (2, 1)

    @pytest.mark.parametrize("fault", [None, ValueError])
    def test_leaves_no_hook(self, network, fault):
        before = network(X)
        try:
            with capture(network, ["1", "3"]):
                network(X)
                if fault:
                    raise fault
        except ValueError:
            pass
        assert not any(layer._forward_hooks for layer in network.modules())
        assert torch.equal(copy.deepcopy(network)(X), before)
        assert torch.equal(torch.compile(network, backend="eager")(X), before)

    def test_last_call_counts_and_an_uncalled_layer_is_absent(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared, self.unused = nn.Tanh(), nn.Tanh()

            def forward(self, x):
                return self.shared(self.shared(x))

        twice = Twice()
        with capture(twice, ["shared", "unused"], stop=True) as outputs:
            out = twice(X)
        assert outputs.keys() == {"shared"}
        assert torch.equal(outputs["shared"], X.tanh().tanh())
        assert torch.equal(out, X.tanh().tanh())  # never complete, so the pass ran to its end

    def test_a_name_twice(self, network):
        with capture(network, ["0", "0"], stop=True) as outputs:
            network(X)
        assert list(outputs) == ["0"]

    def test_output_that_is_no_tensor(self):
        attention = nn.Sequential(nn.Identity(), nn.LSTM(4, 3))
        with pytest.raises(InputError, match="layer 1 gives no tensor, but tuple"), capture(attention, ["1"]):
            attention(X)
        assert not attention[1]._forward_hooks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer1.0.conv3", "layer 'layer1.0.conv3': CifarResNet has none of that name; nearest: layer1.0.conv[12]"),
        ("zzz", "has none of that name; it has conv1, bn1, relu, layer1, layer1.0, ..."),
        ("", "layer '': CifarResNet has none of that name"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        find_layer(resnet8(), name)


class TestList:
    def test_digits_by_hand(self):
        layers = {layer.name: layer for layer in list_layers(DigitsCNN(4), torch.zeros(3, 1, 8, 8))}
        assert list(layers) == [name for name, _ in DigitsCNN(4).named_modules() if name]
        assert layers["0"] == ("0", "Conv2d", (4, 8, 8), 9 * 4, 9 * 4 * 64)
        assert layers["7"][2:] == ((16, 4, 4), 9 * 8 * 16, 9 * 8 * 16 * 16)
        assert layers["13"][2:] == ((10,), 16 * 10 + 10, 160)
        assert layers["1"].parameters == 8 and layers["1"].macs == 0

    def test_outer_layers_count_their_inner_ones(self):
        layers = {layer.name: layer for layer in list_layers(resnet8(), torch.zeros(1, 3, 32, 32))}
        inner = [layer for name, layer in layers.items() if name.startswith("layer2.0.")]
        flat = [layer for layer in inner if layer.kind in ("Conv2d", "BatchNorm2d")]
        assert layers["layer2"].macs == sum(layer.macs for layer in flat) == 16 * 16 * (9 * 16 + 9 * 32 + 16) * 32
        assert layers["layer2"].parameters == sum(layer.parameters for layer in flat)

    def test_transformer_by_hand(self):
        vit = vit_b_16(image_size=32, num_classes=5)
        layers = {layer.name: layer for layer in list_layers(vit, torch.zeros(1, 3, 32, 32))}
        tokens, width, hidden = 5, 768, 3072
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width  # projections; scores and their sums
        block = layers["encoder.layers.encoder_layer_3"]
        assert block.shape == (tokens, width)
        assert block.macs == attention + 2 * tokens * width * hidden
        assert layers["encoder.layers.encoder_layer_3.self_attention"].shape is None  # a pair

    def test_leaves_everything_as_it_was(self):
        network = DigitsCNN(4, dropout=0.5)
        network[0].eval()
        state = {key: value.clone() for key, value in network.state_dict().items()}
        generator, modes = torch.get_rng_state(), [layer.training for layer in network.modules()]
        list_layers(network, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), generator)
        assert [layer.training for layer in network.modules()] == modes
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
        assert not any(layer._forward_hooks for layer in network.modules())
