"""Layers by name: what is captured, that nothing stays behind, and costs counted by hand."""

import copy
from collections import namedtuple
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchvision.models import vit_b_16

from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, capture_call, evaluating, find_layer
from kd_lightning.features.layers import list_layers
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
MAPS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


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

    def test_an_uncalled_layer_is_absent_and_one_called_twice_refused(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared, self.once, self.unused = nn.Tanh(), nn.Tanh(), nn.Tanh()

            def forward(self, x):
                return self.once(self.shared(self.shared(x)))

        twice = Twice()
        with capture(twice, ["once", "unused"], stop=True) as outputs:
            out = twice(X)
        assert outputs.keys() == {"once"}
        assert torch.equal(out, X.tanh().tanh().tanh())  # never complete, so the pass ran to its end
        with (
            pytest.raises(InputError, match="layer shared is called more than once in a pass; use a layer around"),
            capture(twice, ["shared"]),
        ):
            twice(X)

    def test_a_name_twice(self, network):
        with capture(network, ["0", "0"], stop=True) as outputs:
            network(X)
        assert list(outputs) == ["0"]

    def test_output_that_is_no_tensor(self):
        network = nn.Sequential(nn.Identity(), Returns(lambda x: (x, x * 2)))
        message = (
            "^layer 1 must return a tensor, or a tuple or mapping whose first tensor alone has a row for each sample, "
            "got tuple with 2 tensors; use a layer inside it or after it$"
        )
        with pytest.raises(InputError, match=message), capture(network, ["1"]):
            network(X)
        assert not network[1]._forward_hooks


class Returns(nn.Module):
    """Returns what a function makes of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


TWO = torch.zeros(2, 3, 4, dtype=torch.long)


class TestTuplesAndMappings:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x: (x + 1,),
            lambda x: [x + 1],
            lambda x: (x + 1, None),
            lambda x: (x + 1, (x, x)),  # a state
            lambda x: (x + 1, TWO),
            lambda x: (TWO, x + 1),
            lambda x: (x.sum(), x + 1),  # a loss
            lambda x: (x + 1, torch.zeros(1, 4, 3, 3), torch.zeros(6, 2)),  # a bias, and logits of a router
            lambda x: {"last_hidden_state": x + 1, "loss": x.sum()},
            lambda x: namedtuple("Output", "hidden state")(x + 1, None),
        ],
    )
    @pytest.mark.parametrize("by_name", [True, False])
    def test_the_only_tensor_with_rows(self, function, by_name):
        network = Returns(function)
        outer = nn.ModuleDict({"layer": network})
        x = X.clone().requires_grad_()
        with capture(outer, ["layer"]) as outputs:
            network(x=x) if by_name else network(x)
        assert torch.equal(outputs["layer"], X + 1)
        outputs["layer"].sum().backward()
        assert torch.equal(x.grad, torch.ones(2, 4))

    @pytest.mark.parametrize(
        ("function", "held"),
        [
            (lambda x: (x, x), "tuple with 2 tensors"),
            (lambda x: (torch.zeros(1, 3), x), "tuple with 2 tensors"),  # the first one has other rows
            (lambda x: {"last_hidden_state": x, "pooler_output": x[:, 0]}, "dict with 2 tensors"),
            (lambda x: (TWO, None), "tuple;"),
            (lambda x: (), "tuple;"),
            (lambda x: ((x, x), None), "tuple;"),
            (lambda x: x.sum().item(), "float;"),
            (lambda x: None, "NoneType;"),
            (lambda x: (x[0],), "tuple with 1 tensors"),
        ],
    )
    def test_refused(self, function, held):
        network = nn.Sequential(Returns(function))
        with pytest.raises(InputError, match=f"^layer 0 must return a tensor, .* got {held}"), capture(network, ["0"]):
            network(X)

    def test_one_row_is_read_as_many_are(self):
        """A bias of one row has as many rows as a batch of one sample; the last batch of an epoch may be one."""
        network = nn.Sequential(Returns(lambda x: (x + 1, torch.zeros(1, 4, 3, 3))))
        for rows in (2, 1):
            with capture(network, ["0"]) as outputs:
                network(X[:rows])
            assert torch.equal(outputs["0"], X[:rows] + 1)
        network = nn.Sequential(Returns(lambda x: (torch.zeros(1, 4, 3, 3), x + 1)))
        for rows in (2, 1):
            with pytest.raises(InputError) if rows == 2 else nullcontext(), capture(network, ["0"]) as outputs:
                network(X[:rows])
        assert outputs["0"].shape == (1, 4, 3, 3)  # always the first one, or none

    @pytest.mark.parametrize("rows", [1, 2, 3])
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent_layers(self, kind, first, rows):
        """The states have as many rows as layers, which may be as many as samples."""
        layer = kind(4, 3, num_layers=2, batch_first=first)
        network = nn.ModuleDict({"layer": layer})
        x = torch.randn(rows, 2, 4)
        with capture(network, ["layer"]) as outputs:
            out, _ = layer(x)
        assert outputs["layer"] is out

    @pytest.mark.parametrize("weights", [True, False])
    def test_attention(self, weights):
        layer = nn.MultiheadAttention(4, 2, batch_first=True)
        network, x = nn.ModuleDict({"layer": layer}), torch.randn(2, 5, 4)
        with capture(network, ["layer"]) as outputs:
            out, found = layer(query=x, key=x, value=x, need_weights=weights)
        assert outputs["layer"] is out and (found is None) != weights

    def test_blocks_of_hugging_face(self):
        transformers = pytest.importorskip("transformers")
        size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **size)).eval()
        names = ["encoder.layer.0", "encoder", "encoder.layer.0.attention", "encoder.layer.1.output"]
        with capture(bert, names) as outputs:
            out = bert(torch.arange(14).reshape(2, 7), output_hidden_states=True)
        assert torch.equal(outputs["encoder"], out.last_hidden_state)
        assert torch.equal(outputs["encoder.layer.0"], out.hidden_states[1])
        assert torch.equal(outputs["encoder.layer.1.output"], out.hidden_states[2])


def test_a_nested_tensor_is_padded():
    """In eval mode and without gradients, a padding mask makes nn.TransformerEncoder compute with nested tensors."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 6, 4), torch.arange(6) >= torch.tensor([6, 2, 4])[:, None]
    with capture(encoder, ["layers.0"]) as with_graph:
        encoder(x, src_key_padding_mask=padding)
    with torch.no_grad(), capture(encoder, ["layers.0", "layers.1"]) as outputs:
        expected = encoder(x, src_key_padding_mask=padding)
    assert not outputs["layers.0"].is_nested
    torch.testing.assert_close(outputs["layers.1"], expected)
    torch.testing.assert_close(outputs["layers.0"], with_graph["layers.0"].masked_fill(padding[:, :, None], 0.0))


class TestGradientCheckpointing:
    """A backward pass computes the layers again, which calls their hooks again."""

    @pytest.fixture
    def networks(self):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), Counting(), nn.Linear(3, 2))
        stored = copy.deepcopy(plain)
        block = stored[1]
        stored[1] = nn.ModuleList(block)  # the same names
        stored[1].forward = lambda x: checkpoint(block, x, use_reentrant=False)
        return plain, stored

    def test_a_backward_pass_inside_the_block(self, networks):
        gradients = []
        for network in networks:
            with capture(network, ["0", "1.0", "1.1"]) as outputs:
                network(X)
                first = dict(outputs)
                (outputs["1.1"].square().sum() + outputs["1.0"].sum()).backward()
            assert outputs.keys() == first.keys() and all(outputs[name] is first[name] for name in first)
            gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() == {"0.weight", "0.bias", "1.1.weight", "1.1.bias"}
        assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])

    @pytest.mark.parametrize("layer", ["1.0", "1.1"])
    @pytest.mark.parametrize("early_stop", [True, False])
    def test_a_pass_that_stops_inside_the_checkpointed_block(self, networks, layer, early_stop):
        gradients = []
        for network in networks:
            with set_checkpoint_early_stop(early_stop), capture(network, [layer], stop=True) as outputs:
                network(X)
            assert network[2].calls == 0
            outputs[layer].square().sum().backward()
            assert [*outputs] == [layer]
            gradients.append([p.grad for p in network.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) == (2 if layer == "1.0" else 4)
        assert all(map(torch.equal, *gradients))
        x = X.clone().requires_grad_()  # nothing stays behind: the next tensors are stored, not computed again
        y = x.exp()
        assert y.grad_fn._saved_result is y or torch.equal(y.grad_fn._saved_result, y)
        y.sum().backward()
        assert torch.equal(x.grad, X.exp())

    def test_reentrant_gives_no_graph(self, networks):
        network = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        x = X.clone().requires_grad_()
        with capture(network, ["0"]) as outputs:
            checkpoint(network, x, use_reentrant=True).sum().backward()
        assert not outputs["0"].requires_grad and network[0].weight.grad is not None


class TestChangedInPlace:
    @pytest.fixture
    def block(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("names", [["1"], ["0", "1"], ["1", "2"]])
    def test_names_the_layer(self, block, names, grad):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(InputError, match="^layer 1: its output is changed in place by a later layer; use that"),
            capture(block, names),
        ):
            block(MAPS)
        assert not any(layer._forward_hooks for layer in block.modules())

    def test_through_a_view_and_by_the_caller(self, block):
        viewed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(inplace=True))
        with pytest.raises(InputError, match="layer 0: its output is changed"), capture(viewed, ["0"]):
            viewed(MAPS)
        with pytest.raises(InputError, match="layer 2: its output is changed"), capture(block, ["2"]):
            block(MAPS).add_(1)

    def test_layers_before_and_after_it_are_right(self, block):
        with capture(block, ["0", "2"]) as outputs:
            block(MAPS)
        first = block[0](MAPS)
        assert torch.equal(outputs["0"], first)
        assert torch.equal(outputs["2"], block[1](first).relu())

    def test_not_where_the_pass_stops_there(self, block):
        block.eval()
        with capture(block, ["0", "1"], stop=True) as outputs:
            block(MAPS)
        expected = block[1](block[0](MAPS))
        assert torch.equal(outputs["1"], expected) and expected.min() < 0

    def test_another_error_comes_first(self, block):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), capture(block, ["1"]):
            block.append(nn.Linear(99, 1))(MAPS)


class Chain(nn.Sequential):
    """Has a forward pass of its own: up to torch 2.10, ``.compile()`` of torch's own layers compiles nothing."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class TestCompiled:
    """Compiled as a wrapper, in place, and in a part: with a backend that counts its compilations and graph runs."""

    NAMES = ("0", "1.0", "2")

    @pytest.fixture(params=["wrapper", "in place", "a wrapped layer", "a layer in place"])
    def compiled(self, request):
        torch._dynamo.reset()
        counts = {"compiled": 0, "run": 0}

        def backend(graph, _inputs):
            counts["compiled"] += 1

            def run(*args):
                counts["run"] += 1
                return graph.forward(*args)

            return run

        torch.manual_seed(0)
        network = Chain(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), Chain(nn.ReLU()), nn.Linear(3, 2))
        plain = copy.deepcopy(network)
        if request.param == "wrapper":
            network = torch.compile(network, backend=backend)
        elif request.param == "in place":
            network.compile(backend=backend)
        elif request.param == "a wrapped layer":
            network[2] = torch.compile(network[2], backend=backend)
        else:
            network[2].compile(backend=backend)
        yield plain, network, counts
        torch._dynamo.reset()

    @pytest.mark.parametrize("stop", [True, False])
    @pytest.mark.parametrize("warm", [True, False])
    def test_right_outputs_and_compiled_again_afterwards(self, compiled, warm, stop):
        plain, network, counts = compiled
        if warm:
            assert torch.equal(network(X), plain(X)) and counts == {"compiled": 1, "run": 1}
        for x in (X, X + 1):  # the second pass must not give the first one's
            before = dict(counts)
            with capture(network, self.NAMES, stop=stop) as outputs:
                out = network(x)
                assert torch.equal(out, plain(x))
            assert counts == before
            assert outputs.keys() == set(self.NAMES)
            first = plain[0](x)
            expected = {"0": first, "1.0": first.tanh(), "2": plain[2](plain[1](first))}
            assert all(torch.equal(outputs[name], expected[name]) for name in self.NAMES)
        outputs["2"].sum().backward()
        assert find_layer(network, "0").weight.grad.abs().sum() > 0
        runs = counts["run"]
        for n in (1, 2):
            assert torch.equal(network(X), plain(X))
            assert counts == {"compiled": 1, "run": runs + n}
        assert not any(layer._forward_hooks for layer in network.modules())

    def test_compiled_again_after_an_error(self, compiled):
        _, network, counts = compiled
        with pytest.raises(KeyError), capture(network, self.NAMES):
            raise KeyError
        network(X)
        assert counts == {"compiled": 1, "run": 1}

    @pytest.mark.parametrize("warm", [True, False])
    def test_names_are_those_of_the_plain_network(self, compiled, warm):
        plain, network, _ = compiled
        if warm:
            network(X)
        for name in ("0", "1", "1.0", "3"):
            assert repr(find_layer(network, name)) == repr(find_layer(plain, name))
        assert torch.equal(find_layer(network, "1.1").weight, plain[1][1].weight)
        with pytest.raises(InputError, match="layer '1.7': Chain has none of that name; nearest: 1"):
            find_layer(network, "1.7")

    def test_a_plain_network_leaves_others_compiled(self, compiled):
        plain, network, counts = compiled
        with capture(plain, ["0"]) as outputs:
            network(X)
            plain(X)
        assert counts["run"] == 1 and torch.equal(outputs["0"], plain[0](X))


class TestDry:
    @pytest.fixture
    def mixed(self):
        """In training, with a layer in eval mode whose own layer trains."""
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(4))),
            nn.Dropout(0.5),
        )
        network[2].eval()
        network[2][1].train()
        network[2][1][1].eval()
        return network

    @pytest.mark.parametrize("fault", [None, ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_everything_as_it_was(self, mixed, training, fault):
        mixed.training = training  # of itself alone
        modes = {name: layer.training for name, layer in mixed.named_modules()}
        state = {key: value.clone() for key, value in mixed.state_dict().items()}
        generator = torch.get_rng_state()
        with pytest.raises(fault) if fault else nullcontext(), evaluating(mixed):
            assert not any(layer.training for layer in mixed.modules())
            assert torch.equal(torch.get_rng_state(), generator)
            assert torch.equal(mixed(MAPS), mixed(MAPS))
            torch.rand(3)
            mixed.train()
            if fault:
                raise fault
        assert set(modes.values()) == {True, False}
        assert {name: layer.training for name, layer in mixed.named_modules()} == modes
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(state[key], value) for key, value in mixed.state_dict().items())

    def test_uses_the_running_statistics(self, mixed):
        mixed[1].running_mean.fill_(3.0)
        with evaluating(mixed), capture(mixed, ["0", "1"]) as outputs:
            mixed(MAPS)
        torch.testing.assert_close(outputs["1"], (outputs["0"] - 3) / (1 + 1e-5) ** 0.5)

    def test_gradients_may_flow_and_a_shared_layer_keeps_its_mode(self):
        shared = nn.Linear(4, 4).eval()
        network = nn.Sequential(shared, nn.Sequential(shared, nn.Dropout(1.0))).train()
        shared.eval()
        with evaluating(network):
            network(X).sum().backward()
        assert shared.weight.grad.abs().sum() > 0
        assert (network.training, network[1].training, network[1][1].training, shared.training) == (*[True] * 3, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer1.0.conv3", "layer 'layer1.0.conv3': CifarResNet has none of that name; nearest: layer1.0.conv[12]"),
        ("zzz", "has none of that name; it has conv1, bn1, relu, layer1, layer1.0, ..."),
        ("layer1.", "layer 'layer1.': CifarResNet has none of that name"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        find_layer(resnet8(), name)


@pytest.mark.parametrize("stop", [True, False])
def test_the_network_itself(network, stop):
    with capture(network, ["", "0"], stop=stop) as outputs:
        network(X)
    assert torch.equal(outputs[""], network(X))
    assert torch.equal(outputs["0"], network[0](X))
    assert find_layer(network, "") is network
    compiled = torch.compile(network, backend="eager")
    with capture(compiled, ["", "0"]) as outputs:
        compiled(X)
    assert torch.equal(outputs[""], network(X))


@pytest.mark.parametrize("compile", [torch.jit.script, lambda network: torch.jit.trace(network, X)])
def test_torchscript(compile):
    program = compile(nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.ReLU()).eval())
    for name in ("", "0", "0.0"):
        with pytest.raises(InputError, match=f"^layer {name!r} is TorchScript, .* into nn.Sequential, "):
            capture(program, [name]).__enter__()
    with pytest.raises(InputError, match="layer '0.1': .* has none of that name; nearest: "):
        find_layer(program, "0.1")
    network = nn.Sequential(program)
    with capture(network, [""]) as outputs:
        network(X)
    assert torch.equal(outputs[""], program(X))


def test_the_output_of_a_backbone():
    class Backbone(nn.Module):
        def forward(self, x):
            return {"last_hidden_state": x[:, None], "pooler_output": x + 1}

    with capture(Backbone(), [""]) as outputs:
        Backbone()(X)
    assert outputs == {}  # of another network
    network = Backbone()
    with capture(network, [""]) as outputs:
        network(X)
    assert torch.equal(outputs[""], X + 1)


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
        assert layers["encoder.layers.encoder_layer_3.self_attention"].shape == (tokens, width)  # the first of a pair

    def test_inputs_that_are_a_mapping_or_a_tuple(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix, self.pair = nn.Linear(4, 3, bias=False), Returns(lambda x: (x, None))
                self.head = nn.Linear(3, 2, bias=False)

            def forward(self, image, scale):
                x, _ = self.pair(self.mix(image) * scale)
                return {"logits": self.head(x), "features": x}

        inputs = {"image": torch.ones(5, 4), "scale": torch.tensor(2.0)}
        expected = [("mix", "Linear", (3,), 12, 12), ("pair", "Returns", (3,), 0, 0), ("head", "Linear", (2,), 6, 6)]
        assert list_layers(Scaled(), inputs) == list_layers(Scaled(), (*inputs.values(),)) == expected
        swapped = (inputs["scale"], inputs["image"])
        assert list_layers(Scaled(), swapped, lambda network, x: network(x[1], x[0])) == expected

    def test_shapes_of_tuples_and_mappings(self):
        network = nn.Sequential(Returns(lambda x: (x, (x, x))), Returns(lambda pair: {"a": pair[0], "n": 3}))
        assert [layer.shape for layer in list_layers(network, torch.zeros(2, 5))] == [(5,), (5,)]
        network = nn.Sequential(Returns(lambda x: ((x, x), None)))
        assert list_layers(network, torch.zeros(2, 5))[0].shape is None

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


class TestCalls:
    def test_input_and_output_of_a_layer(self):
        network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        x = torch.randn(5, 4)
        with capture_call(network, "2") as calls:
            output = network(x)
            network(x[:2])
        assert [len(given) for given, _ in calls] == [5, 2]
        assert torch.equal(calls[0][0], network[1](network[0](x)))
        assert calls[0][1] is output
        network(x)
        assert len(calls) == 2
        assert not network[2]._forward_hooks

    def test_names(self):
        network = nn.Linear(4, 3)
        with capture_call(network, "") as calls:
            network(input=torch.zeros(1, 4))
        assert calls[0][0].shape == (1, 4)
        with pytest.raises(InputError, match="layer '7': Linear has none of that name"), capture_call(network, "7"):
            pass

    @pytest.mark.parametrize("name", ["", "_orig_mod"])
    def test_a_compiled_network_is_named_with_its_wrapper_or_without(self, name):
        network = nn.Sequential(nn.Linear(4, 3))
        compiled = torch.compile(network, backend="eager")
        assert find_layer(compiled, name) is network
        assert find_layer(compiled, f"{name}.0".removeprefix(".")) is network[0]
