"""Quantised networks against formulas written out here, in float64 and plain torch."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import mobilenet_v2, resnet18

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.calibration import activation_ranges, calibrate, is_calibrated, is_range_key
from kd_lightning.quantization.layers import quantize, quantized_layers
from kd_lightning.quantization.sizes import bits_of, precision_of, size_of, weight_levels
from kd_lightning.runs.weights import load_weights

BITS = [8, 4, 2, "ternary"]
LEVELS = {8: (-127, 127), 4: (-7, 7), 2: (-2, 1), "ternary": (-1, 1)}
SIGMAS = {4: 3.0, 2: 2.0, "ternary": 0.7}
# the layer, its input's shape, and the dimension of its weight that counts output channels
LAYERS = {
    "linear": (nn.Linear(12, 5), (6, 12), 0),
    "linear of tokens": (nn.Linear(12, 5, bias=False), (2, 3, 12), 0),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11), 0),
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 7), 0),
    "conv2d of groups": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 7), 0),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7), 0),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), 0),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 7), 1),
    "transposed 2d": (nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), (2, 4, 5, 5), 1),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3), 1),
}
DIGITS = (8, 1, 8, 8)


def reference(weight, bits, dim=0):
    """The scales of the channels, and the levels of a weight (float64)."""
    channels = weight.double().movedim(dim, 0).flatten(1)
    low, high = LEVELS[bits]
    if bits == 8:
        scale = channels.abs().amax(1) / 127
    else:
        scale = (channels.abs().mean(1) + SIGMAS[bits] * channels.abs().std(1)) / max(-low, high)
    scale = scale.reshape([-1 if d == dim else 1 for d in range(weight.ndim)])
    return scale, (weight.double() / scale).round().clamp(low, high)


def rounded_input(x, largest):
    scale = largest / 128
    return (x.double() / scale).round().clamp(-128, 127) * scale


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digits(width=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return DigitsCNN(width, **kwargs)


def set_ranges(model, value):
    for largest in activation_ranges(model).values():
        largest.data.fill_(value)
    return model


# The layers' arithmetic


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_and_forward(kind, bits):
    layer, shape, dim = LAYERS[kind]
    with torch.no_grad():
        layer.weight.copy_(random(*layer.weight.shape) * torch.linspace(0.1, 2, layer.weight.shape[dim]).reshape(
            [-1 if d == dim else 1 for d in range(layer.weight.ndim)]
        ))  # fmt: skip
    net = set_ranges(quantize(nn.Sequential(layer), bits, skip=()), 1.5)
    scale, levels = reference(layer.weight, bits, dim)
    in_units, found = weight_levels(net[0])
    assert torch.equal(found.double(), levels)
    torch.testing.assert_close(in_units.double(), layer.weight.detach().double() / scale.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net[0].quant_weight().value.double(), levels * scale, rtol=1e-4, atol=1e-6)
    plain = copy.deepcopy(layer).double()
    plain.weight.data = levels * scale
    x = random(*shape, seed=1)
    assert (x.abs() > 1.5).any()
    torch.testing.assert_close(net(x).double(), plain(rounded_input(x, 1.5)), rtol=1e-4, atol=1e-5)
    float_inputs = quantize(nn.Sequential(layer), bits, None, skip=())
    torch.testing.assert_close(float_inputs(x).double(), plain(x.double()), rtol=1e-4, atol=1e-5)
    assert bits_of(net[0]) == (bits, 8) and bits_of(float_inputs[0]) == (bits, 32)


@pytest.mark.parametrize(("bits", "count"), [(8, 255), (4, 15), (2, 4), ("ternary", 3)])
def test_number_of_levels(bits, count):
    layer = nn.Linear(50_000, 1)
    layer.weight.data = torch.linspace(-1, 1, 50_000)[None] ** 9  # a tail that reaches beyond the largest level
    _, levels = weight_levels(quantize(nn.Sequential(layer), bits, skip=())[0])
    assert levels.unique().tolist() == list(range(LEVELS[bits][0], LEVELS[bits][1] + 1))
    assert len(levels.unique()) == count


def test_halves_are_rounded_to_even():
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -2.5]])  # a scale of 1
    assert weight_levels(quantize(nn.Sequential(layer), 8, skip=())[0])[1].tolist() == [[127, 0, 2, 2, 0, -2]]
    one = nn.Linear(1, 1, bias=False)
    one.weight.data.fill_(1)
    net = set_ranges(quantize(nn.Sequential(one), 8, skip=()), 128.0)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 200, -128.5, -200])
    expected = torch.tensor([0.0, 2, 2, 0, -2, 126, 127, 127, -128, -128])
    torch.testing.assert_close(net(x[:, None])[:, 0], expected)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_pass_straight_through(bits):
    """As in formulas in which rounding is the identity; the gradient of an input beyond the range goes to the range."""

    def straight(x):
        return x + (x.round() - x).detach()

    layer = nn.Linear(7, 12).double()
    layer.weight.data = random(12, 7).double()
    net = set_ranges(quantize(nn.Sequential(layer), bits, skip=()), 1.0).double()
    x = random(9, 7, seed=2).double().requires_grad_()
    pull = random(9, 12, seed=3).double()
    (net(x) * pull).sum().backward()
    y, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    largest = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    low, high = LEVELS[bits]
    scale, _ = reference(weight, bits)
    levels = straight(weight / scale)
    levels = levels + (levels.clamp(low, high) - levels).detach()  # a weight that is clipped can come back
    inputs = straight(y / (largest / 128)).clamp(-128, 127) * (largest / 128)
    ((inputs @ (levels * scale).T + layer.bias.detach()) * pull).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net[0].weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    found = next(iter(activation_ranges(net).values())).grad
    torch.testing.assert_close(found.double(), largest.grad, rtol=1e-4, atol=1e-5)
    outside = x.detach().abs() > 1
    assert outside.any() and not x.grad[outside].any() and x.grad[~outside].all()


@pytest.mark.parametrize("bits", [4, 2, "ternary"])
def test_spreads_are_near_the_least_error_on_gaussian_weights(bits):
    layer = nn.Linear(200_000, 1, bias=False)
    layer.weight.data = random(1, 200_000)
    weight = layer.weight.detach().double()
    found = quantize(nn.Sequential(layer), bits, skip=())[0].quant_weight().value
    low, high = LEVELS[bits]

    def error(sigma):
        scale = (weight.abs().mean() + sigma * weight.abs().std()) / max(-low, high)
        return float((weight - (weight / scale).round().clamp(low, high) * scale).square().mean())

    best = min(error(sigma) for sigma in torch.arange(0, 5, 0.05).tolist())
    assert float((weight - found.detach()).square().mean()) < 1.05 * best


@pytest.mark.parametrize("bits", BITS)
def test_channels_of_one_weight_and_of_zeros(bits):
    layers = [nn.Conv2d(3, 3, 1, groups=3), nn.Flatten(), nn.Linear(12, 1), nn.Linear(1, 5), nn.Linear(5, 4)]
    net = nn.Sequential(*layers)
    net[4].weight.data.zero_()
    net = calibrate(quantize(net, bits, skip=()), [random(6, 3, 2, 2)])
    out = net(random(6, 3, 2, 2))
    out.square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())
    assert not weight_levels(net[4])[1].any()
    for single in (net[0], net[3]):
        low, high = LEVELS[bits]
        assert set(weight_levels(single)[1].flatten().tolist()) <= {low, -high, high}
    assert np.isfinite(size_of(net).coded)


# What is quantised


def test_first_last_and_names_are_skipped():
    net = digits()
    assert list(quantized_layers(quantize(net))) == ["3", "7"]
    assert list(quantized_layers(quantize(net, skip=()))) == ["0", "3", "7", "13"]
    assert list(quantized_layers(quantize(net, skip=["first"]))) == ["3", "7", "13"]
    assert list(quantized_layers(quantize(net, skip=["last", "3"]))) == ["0", "7"]
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(quantized_layers(quantize(nested, skip=["0"]))) == ["1"]
    assert list(quantized_layers(quantize(nested, skip=["0.1"]))) == ["0.0", "1"]
    for layer in (net[0], net[13]):
        assert type(layer) in (nn.Conv2d, nn.Linear)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(input=x + self.token)


def test_parameters_of_a_network_are_named():
    with pytest.raises(InputError, match=r"parameter token of Positions cannot be quantised; .*name it in skip"):
        quantize(Positions(), skip=())
    net = quantize(Positions(), skip=["token"])
    assert list(quantized_layers(net)) == ["layer"]
    calibrate(net, [torch.full((2, 4), 2.0)])  # a layer that is called by keyword, too
    assert [float(value) for value in activation_ranges(net).values()] == [3.0]


def shares_a_weight():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[1].weight
    return net


def between(layer):
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), layer, nn.Linear(4, 4))


class MyConv(nn.Conv2d):
    pass


def old_spectral():
    return between(nn.utils.spectral_norm(nn.Linear(4, 4)))


def pruned():
    return between(nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))


UNSUPPORTED = {
    "lstm": (lambda: between(nn.LSTM(4, 4)), "2 (LSTM) cannot"),
    "embedding": (lambda: between(nn.Embedding(4, 4)), "2 (Embedding) cannot"),
    "attention": (lambda: between(nn.MultiheadAttention(4, 2)), "2 (MultiheadAttention) cannot"),
    "encoder": (lambda: between(nn.TransformerEncoderLayer(4, 2)), "2 (TransformerEncoderLayer) cannot"),
    "subclass": (lambda: between(MyConv(4, 4, 1)), "2 (MyConv) cannot"),
    "weight norm": (lambda: between(parametrizations.weight_norm(nn.Linear(4, 4))), "2 (ParametrizedLinear) cannot"),
    "spectral norm": (old_spectral, "2 (Linear) cannot"),
    "pruned": (pruned, "2 (Linear) cannot"),
    "groups of transposed": (lambda: between(nn.ConvTranspose2d(4, 4, 1, groups=2)), "2 (ConvTranspose2d) cannot"),
    "lazy": (lambda: between(nn.LazyConv2d(4, 1)), "2 (LazyConv2d) cannot"),
    "list": (lambda: between(nn.ParameterList([nn.Parameter(torch.ones(1))])), "2 (ParameterList) cannot"),
    "shared": (shares_a_weight, "1 and 2 share a weight, which cannot be quantised; name both in skip"),
    "nothing": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        "nothing is left to quantise: Sequential has 2",
    ),
    "no layers": (nn.Sequential, "nothing is left to quantise: Sequential has 0 layers"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_quantised(case):
    make, message = UNSUPPORTED[case]
    with pytest.raises(InputError) as error:
        quantize(make())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["lstm", "embedding", "attention", "encoder", "subclass", "groups of transposed"])
def test_what_cannot_be_quantised_can_be_skipped(case):
    assert list(quantized_layers(quantize(UNSUPPORTED[case][0](), skip=("first", "last", "2")))) == ["1"]


def test_shared_weights_that_are_skipped():
    net = quantize(shares_a_weight(), skip=["1", "2"])
    assert list(quantized_layers(net)) == ["0", "3"] and net[1].weight is net[2].weight


@pytest.mark.parametrize("bits", [3, 1, 16, 0, -8, True, 4.0, "4", "binary", None, [4]])
def test_weight_bits(bits):
    with pytest.raises(InputError, match=r"weight_bits must be one of 8, 4, 2, ternary, got "):
        quantize(digits(), bits)


@pytest.mark.parametrize("bits", [4, 16, 0, True, 8.0, "8", "float"])
def test_activation_bits(bits):
    with pytest.raises(InputError, match=r"activation_bits must be 8, or null for float activations, got "):
        quantize(digits(), 8, bits)


def test_other_wrong_inputs(monkeypatch):
    with pytest.raises(
        InputError, match="skip must name layers or parameters of DigitsCNN, or be first or last, got 'conv1'"
    ):
        quantize(digits(), skip=["first", "conv1"])
    with pytest.raises(InputError, match="model is already quantised"):
        quantize(quantize(digits()), 4)
    with pytest.raises(
        InputError, match="model is a single Linear, which cannot be quantised; put it in nn.Sequential"
    ):
        quantize(nn.Linear(4, 4), skip=())
    monkeypatch.setitem(sys.modules, "brevitas", None)
    with pytest.raises(InputError, match=r"quantize needs the extra quant: pip install 'kd-lightning\[quant\]'"):
        quantize(digits())


def test_the_original_does_not_change_and_the_copy_has_its_modes_and_frozen_parameters():
    net = digits().eval()
    net[3].train()
    net[4].weight.requires_grad_(False)
    net[7].weight.requires_grad_(False)
    state, types = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    copied = quantize(net, 4)
    copied[3].weight.data.zero_()
    assert [type(m) for m in net.modules()] == types and not quantized_layers(net)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert [name for name, m in net.named_modules() if m.training] == ["3"]
    modes = {name: m.training for name, m in copied.named_modules()}
    assert all(modes[name] == m.training for name, m in net.named_modules())
    assert {n for n, p in copied.named_parameters() if not p.requires_grad} == {"4.weight", "7.weight"}
    assert {n for n, p in copied.named_parameters() if is_range_key(n)} == {
        n for n in copied.state_dict() if n not in state
    }
    assert list(activation_ranges(copied)) == ["3", "7"]
    assert not any(m.training for m in quantize(digits().eval()).modules())
    assert all(m.training for name, m in quantize(digits()).named_modules())


class Twice(nn.Module):
    def __init__(self, alias):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again = self.middle if alias else None

    def forward(self, x):
        return self.last((self.again or self.middle)(self.middle(self.first(x)).relu()))


@pytest.mark.parametrize("alias", [False, True])
def test_a_layer_that_serves_twice(alias):
    """It stays one layer, also under two names, and its range covers both inputs."""
    torch.manual_seed(0)
    net = quantize(Twice(alias), 4)
    assert list(quantized_layers(net)) == ["middle"]
    assert net.again is (net.middle if alias else None)
    seen = []
    net.middle.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item()))
    x = 3 * random(5, 6)
    calibrate(net, [x])
    assert len(seen) == 2
    assert float(activation_ranges(net)["middle"]) == pytest.approx(max(seen))
    net(x).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    size = 2 * (36 + 6) * 4 + 36 / 2 + 6 * 4 + 6 * 4 + 4
    assert size_of(net).stored == size


# Training, copies, files


@pytest.mark.parametrize("bits", [4, "ternary"])
@pytest.mark.parametrize("build", [resnet18, mobilenet_v2])
def test_a_step_of_torchvisions_networks(build, bits):
    torch.manual_seed(0)
    net = quantize(build(num_classes=5), bits)
    x = random(4, 3, 32, 32)
    calibrate(net, [x])
    assert sum(1 for m in build().modules() if isinstance(m, nn.Conv2d | nn.Linear)) - 2 == len(quantized_layers(net))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    before = [p.detach().clone() for p in net.parameters()]
    nn.functional.cross_entropy(net(x), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    optimizer.step()
    assert net(x).isfinite().all()
    assert all(not torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True) if b.grad is not None)


@pytest.mark.parametrize("bits", BITS)
def test_copies_and_state_dicts_give_the_same_bits(bits):
    net = calibrate(quantize(digits(), bits), [random(*DIGITS)]).eval()
    x = random(*DIGITS, seed=1)
    copied = copy.deepcopy(net)
    assert torch.equal(copied(x), net(x))
    fresh = quantize(digits(seed=5), bits).eval()
    assert not torch.equal(fresh(x), net(x))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    copied[3].weight.data.zero_()
    assert net[3].weight.any() and not weight_levels(copied[3])[1].any()


@pytest.mark.parametrize("prefix", ["", "student."])
def test_float_weights_load(tmp_path, prefix):
    plain = digits(seed=7)
    state = {prefix + key: tensor for key, tensor in plain.state_dict().items()}
    if prefix:
        state = {"state_dict": state | {f"teacher.{k}": t for k, t in digits(8).state_dict().items()}}
    torch.save(state, tmp_path / "plain.pt")
    net = set_ranges(quantize(digits(), 4), 3.0)
    load_weights(net, tmp_path / "plain.pt")
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in plain.state_dict().items())
    assert [float(value) for value in activation_ranges(net).values()] == [3.0, 3.0]
    x = random(*DIGITS)
    assert torch.equal(net(x), set_ranges(quantize(plain, 4), 3.0)(x))


def test_quantised_weights_load_with_their_ranges(tmp_path):
    net = calibrate(quantize(digits(), 4), [random(*DIGITS)])
    state = {f"student.{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "whole.ckpt")
    fresh = load_weights(quantize(digits(seed=5), 4), tmp_path / "whole.ckpt")
    assert is_calibrated(fresh)
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in net.state_dict().items())
    del state[next(filter(is_range_key, state))]
    torch.save({"state_dict": state}, tmp_path / "half.ckpt")
    with pytest.raises(InputError, match=r"do not fit DigitsCNN: 1 missing: 3\.input_quant"):
        load_weights(fresh, tmp_path / "half.ckpt")


def test_other_floating_types():
    net = calibrate(quantize(digits(), 4), [random(*DIGITS)]).eval()
    x = random(*DIGITS, seed=1)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(copy.deepcopy(net).double()(x.double()).float(), expected, rtol=1e-3, atol=1e-3)
    double = calibrate(quantize(digits().double(), 4), [random(*DIGITS).double()]).eval()
    assert double(x.double()).dtype == torch.float64
    torch.testing.assert_close(double(x.double()).float(), expected, rtol=1e-3, atol=1e-3)


# Ranges


@pytest.mark.parametrize("training", [True, False])
def test_ranges_are_the_largest_inputs(training):
    """Of float activations between rounded weights; by hand, with a float network of those weights."""
    net = digits(dropout=0.5).train(training)
    net[1].running_var.fill_(4.0)
    plain = copy.deepcopy(net)
    for layer in (plain[3], plain[7]):
        scale, levels = reference(layer.weight, 4)
        layer.weight.data = (scale * levels).float()
    largest = {"3": 0.0, "7": 0.0}
    for name in largest:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: largest.update({name: max(largest[name], args[0].abs().max().item())})
        )
    batches = [random(*DIGITS), 2 * random(*DIGITS, seed=1), random(*DIGITS, seed=2)]
    for x in batches:
        plain(x)
    net = quantize(net, 4)
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    given = [batches[0], (batches[1], torch.zeros(8)), Batch(batches[2]), torch.zeros(0, 1, 8, 8)][: 4 - training]
    assert calibrate(net, given) is net
    assert {k: float(v) for k, v in activation_ranges(net).items()} == pytest.approx(largest, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items() if not is_range_key(key))
    assert net.training == training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_whether_ranges_are_calibrated():
    net = quantize(digits())
    assert not is_calibrated(net)
    assert is_calibrated(calibrate(net, [random(*DIGITS)]))
    assert is_calibrated(digits()) and is_calibrated(quantize(digits(), 4, None))


def test_without_quantised_activations_nothing_is_calibrated():
    net = quantize(digits(), 4, None)
    before = copy.deepcopy(net.state_dict())
    assert calibrate(net, []) is net and not activation_ranges(net)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: calibration needs at least one"),
        ([torch.zeros(0, 1, 8, 8)], "batches: calibration needs at least one"),
        ([torch.full(DIGITS, float("nan"))], "the input of 3 holds numbers that are not finite"),
        ([torch.ones(DIGITS), torch.full(DIGITS, float("inf"))], "the input of 3 holds numbers that are not finite"),
        (["images"], "a batch must be a Batch, a tensor x,"),
    ],
)
def test_batches_that_cannot_calibrate(batches, message):
    """And the network still rounds its activations."""
    net = quantize(digits().eval())
    before, x = copy.deepcopy(net.state_dict()), random(*DIGITS)
    expected = net(x)
    with pytest.raises(InputError, match=message):
        calibrate(net, batches)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(net(x), expected)


# Sizes


def entropy(levels):
    _, counts = np.unique(levels.numpy(), return_counts=True)
    share = counts / counts.sum()
    return -(share * np.log2(share)).sum() * levels.numel()


@pytest.mark.parametrize(("bits", "each"), [(8, 8), (4, 4), (2, 2), ("ternary", 2)])
@pytest.mark.parametrize("activations", [8, None])
def test_size_by_hand(bits, each, activations):
    """DigitsCNN(8): convolutions of 9 * 8, 9 * 8 * 16 and 9 * 16 * 32 weights, 32 * 10 + 10 in the last layer."""
    net = digits(8)
    rest = 4 * (9 * 8 + 4 * (8 + 16 + 32) + 32 * 10 + 10)
    assert size_of(net) == (rest + 4 * (9 * 8 * 16 + 9 * 16 * 32),) * 2
    levels = [reference(net[number].weight, bits)[1].int() for number in (3, 7)]
    scales = 4 * (16 + 32) + (8 if activations else 0)
    found = size_of(quantize(net, bits, activations))
    assert found.stored == rest + scales + (9 * 8 * 16 + 9 * 16 * 32) * each / 8
    # a weight just between two levels may fall to either
    assert found.coded == pytest.approx(rest + scales + sum(map(entropy, levels)) / 8, abs=0.5)
    assert found.coded < found.stored


def test_size_of_shared_and_passing_tensors():
    """A shared weight counts once; a buffer that no file holds, and integers, not at all."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, affine=False))
    net[1].weight = net[0].weight
    net.register_buffer("grid", torch.zeros(100), persistent=False)
    assert size_of(net) == (4 * 16 + 4 * 8,) * 2
    assert size_of(nn.Linear(4, 4).half()).stored == 2 * 20


def test_precision():
    assert precision_of(digits()) == "fp32"
    assert precision_of(quantize(digits())) == "8A-8W"
    assert precision_of(quantize(digits(), 4)) == "8A-4W"
    assert precision_of(quantize(digits(), 2, None)) == "32A-2W"
    assert precision_of(quantize(digits(), "ternary")) == "8A-ternary"
    assert precision_of(nn.Sequential(quantize(digits(), 8), quantize(digits(), 4))) == "8A-8W + 8A-4W"
