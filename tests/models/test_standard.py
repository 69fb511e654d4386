"""The networks of the standard table: their published sizes, counted anew, and what a run needs of them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning import InputError, models
from kd_lightning.models.cifar_resnet import BasicBlock
from kd_lightning.models.wide_resnet import PreActivationBlock, WideResNet
from kd_lightning.runs.build import build

RESNETS = {f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)}
RESNETS |= {f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)}
WIDE = {f"wrn_{depth}_{factor}": (depth, factor) for depth in (16, 40) for factor in (1, 2)}
VGGS = {"vgg8": 1, "vgg13": 2}
NAMES = [*RESNETS, *WIDE, *VGGS]
# Millions for CIFAR-100, of RepDistiller's networks.
PUBLISHED = {
    "resnet20": 0.28,
    "resnet56": 0.86,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_2": 0.70,
    "wrn_40_2": 2.26,
    "vgg8": 3.97,
    "vgg13": 9.46,
}


def make(name, device="cpu", **kwargs):
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(models, name)(**kwargs)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def convolutions(name):
    """Each convolution as (inputs, outputs, kernel, side of its output), and each BatchNorm's channels, by hand."""
    convs, norms = [], []
    if name in VGGS:
        inputs = 3
        for outputs, side in zip((64, 128, 256, 512, 512), (32, 16, 8, 4, 4), strict=True):
            for _ in range(VGGS[name]):
                convs.append((inputs, outputs, 3, side))
                norms.append(outputs)
                inputs = outputs
        return convs, norms
    if name in RESNETS:
        depth, (stem, *widths) = RESNETS[name]
        blocks = (depth - 2) // 6
    else:
        depth, factor = WIDE[name]
        stem, widths = 16, [16 * factor, 32 * factor, 64 * factor]
        blocks = (depth - 4) // 6
    inputs = stem
    convs.append((3, stem, 3, 32))
    if name in RESNETS:
        norms.append(stem)
    for outputs, side in zip(widths, (32, 16, 8), strict=True):
        for _ in range(blocks):
            convs += [(inputs, outputs, 3, side), (outputs, outputs, 3, side)]
            norms += [outputs if name in RESNETS else inputs, outputs]
            if inputs != outputs:
                convs.append((inputs, outputs, 1, side))
                norms += [outputs] if name in RESNETS else []
            inputs = outputs
    if name in WIDE:
        norms.append(inputs)
    return convs, norms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [100, 10])
def test_counts(name, classes):
    network = make(name, "meta", **({} if classes == 100 else {"num_classes": classes}))
    convs, norms = convolutions(name)
    head = convs[-1][1] if name in VGGS else max(outputs for _, outputs, *_ in convs)
    biases = sum(outputs for _, outputs, *_ in convs) if name in VGGS else 0
    weights = sum(i * o * k * k for i, o, k, _ in convs)
    assert parameters(network) == weights + biases + sum(2 * n for n in norms) + (head + 1) * classes
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert network.eval()(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, classes)
    macs = sum(i * o * k * k * side**2 for i, o, k, side in convs) + head * classes
    assert counter.get_total_flops() == 2 * 2 * macs  # two operations each, two images


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_published_parameters(name, millions):
    assert round(parameters(make(name, "meta")) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("depth", "millions", "macs"),  # He et al. 2015, table 6; operations: HRank (Lin et al. 2020)
    [(20, 0.27, None), (32, 0.46, None), (44, 0.66, None), (56, 0.85, 125.49), (110, 1.7, 252.89)],
)
def test_published_for_cifar10(depth, millions, macs):
    """There the shortcuts have no weights."""
    network = make(f"resnet{depth}", "meta", num_classes=10)
    shortcuts = [m for name, m in network.named_modules() if name.endswith("downsample")]
    count = parameters(network) - sum(map(parameters, shortcuts))
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    if macs is not None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.zeros(1, 3, 32, 32, device="meta"))
        ours = counter.get_total_flops() / 2 - 10 * 64 - 16 * 32 * 16**2 - 32 * 64 * 8**2
        assert ours / 1e6 == pytest.approx(macs, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_depth(name):
    """The layers with weights are as many as the name says, counted as its authors count them."""
    network = make(name, "meta")
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)]
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    stated = int(re.search(r"\d+", name)[0])
    assert len(linear) == 1
    if name in RESNETS:
        assert kernels.count((3, 3)) + 1 == stated
        assert kernels.count((1, 1)) == (3 if name.endswith("x4") else 2)  # projections are not counted
    elif name in WIDE:
        assert kernels.count((3, 3)) + 3 == stated  # three projections are counted, the linear layer is not,
        assert kernels.count((1, 1)) == (2 if name.endswith("_1") else 3)  # nor that WRN-d-1 needs only two
    else:
        assert len(kernels) + 3 == stated  # the original has three linear layers


@pytest.mark.parametrize("block", [BasicBlock, PreActivationBlock])
@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 6, 1), (4, 6, 2)])
def test_blocks(block, inputs, outputs, stride):
    """Against the papers' figures, written out in functions."""
    torch.manual_seed(0)
    network = block(inputs, outputs, stride).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    w, x = network.state_dict(), torch.randn(3, inputs, 8, 8).double()
    actual = network(x)

    def norm(x, name):
        return F.batch_norm(x, None, None, w[f"{name}.weight"], w[f"{name}.bias"], training=True)

    def conv3(x, name, stride=1):
        return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=1)

    if block is BasicBlock:
        expected = norm(conv3(norm(conv3(x, "conv1", stride), "bn1").relu(), "conv2"), "bn2")
        if inputs != outputs:
            x = norm(F.conv2d(x, w["downsample.0.weight"], stride=stride), "downsample.1")
        expected = (expected + x).relu()
    else:
        activated = norm(x, "bn1").relu()
        expected = conv3(norm(conv3(activated, "conv1", stride), "bn2").relu(), "conv2")
        expected += x if inputs == outputs else F.conv2d(activated, w["shortcut.weight"], stride=stride)
    assert torch.allclose(actual, expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn_16_2", "vgg8"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 64)])
def test_stages_by_name(name, size):
    network = make(name).eval()
    seen = {}
    for stage, module in network.named_children():
        module.register_forward_hook(lambda _m, _i, out, stage=stage: seen.update({stage: out}))
    x = torch.randn(2, 3, *size)
    assert network(x).shape == (2, 100)
    channels = {"resnet20": (16, 32, 64), "resnet8x4": (64, 128, 256), "wrn_16_2": (32, 64, 128)}
    channels = channels.get(name, (64, 128, 256, 512, 512))
    for number, width in enumerate(channels):
        halvings = min(number, 3 if name == "vgg8" else 2)
        sides = list(size)
        for _ in range(halvings):  # a pooling drops an odd row, a strided convolution does not
            sides = [side // 2 if name == "vgg8" else (side + 1) // 2 for side in sides]
        assert seen[f"layer{number + 1}"].shape == (2, width, *sides)
    last = seen["relu" if name == "wrn_16_2" else f"layer{len(channels)}"]
    assert torch.allclose(network.fc(last.mean((2, 3))), seen["fc"], atol=1e-5)  # global pooling, one linear layer


@pytest.mark.parametrize("name", ["resnet14", "resnet8x4", "wrn_16_1", "wrn_16_2", "vgg13"])
def test_every_layer_may_be_a_hint(name):
    """No layer's output changes after the layer returned it, so hooks capture what the layer computed."""
    network = make(name)
    outputs = []
    for module in network.modules():
        module.register_forward_hook(lambda _m, _i, out: outputs.append((out, out.clone())))
    network(torch.randn(2, 3, 32, 32))
    assert len(outputs) > 20
    assert all(torch.equal(out, copied) for out, copied in outputs)


@pytest.mark.parametrize("name", ["resnet8", "resnet110", "resnet8x4", "wrn_16_1", "wrn_16_2", "vgg8"])
def test_a_step_reaches_every_parameter(name):
    network = make(name)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = F.cross_entropy(network(x), y)
    before.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), key
        module = network.get_submodule(key.rpartition(".")[0])
        if not (isinstance(module, nn.Conv2d) and key.endswith("bias")):  # BatchNorm takes that one out
            assert parameter.grad.abs().max() > 0, key
    optimizer.step()
    assert F.cross_entropy(network(x), y) < before


@pytest.mark.parametrize("name", ["resnet56", "wrn_40_2", "vgg13"])
def test_init_keeps_the_gradients_scale(name):
    """Kaiming in fan-out mode: Var(w) = 2 / (outputs * kernel area)."""
    for module in make(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8"])
def test_plain_modules(name):
    network, x = make(name).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
        twin = copy.deepcopy(network)
        compiled = torch.compile(network, backend="eager", fullgraph=True)  # no graph breaks
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        assert torch.equal(compiled(x), expected)
        assert torch.allclose(last(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)
        network.fc.weight.zero_()
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_from_yaml(name):
    """By the function's path, and the class by its short name."""
    network = build(nn.Module, {"class_path": f"kd_lightning.models.{name}", "init_args": {"num_classes": 7}})
    assert network.fc.out_features == 7
    if name in RESNETS:
        depth, widths = RESNETS[name]
        spec = {"class_path": "CifarResNet", "init_args": {"depth": depth, "widths": list(widths)}}
    elif name in WIDE:
        depth, factor = WIDE[name]
        spec = {"class_path": "WideResNet", "init_args": {"depth": depth, "widen_factor": factor}}
    else:
        spec = {"class_path": "CifarVGG", "init_args": {"depth": int(name[3:])}}
    by_class = build(nn.Module, spec)
    shapes = {key: value.shape for key, value in make(name, "meta").state_dict().items()}
    assert shapes == {key: value.shape for key, value in by_class.state_dict().items()}


@pytest.mark.parametrize(
    ("network", "depths", "rule"),
    [
        (models.CifarResNet, (2, 18, -4), "6n [+] 2"),
        (models.WideResNet, (4, 20, -2), "6n [+] 4"),
        (models.CifarVGG, (3, 11, -2), "5n [+] 3"),
    ],
)
def test_depths_that_do_not_exist(network, depths, rule):
    for depth in depths:
        with pytest.raises(InputError, match=rf"depth must be {rule} .*, got {depth}"):
            network(depth)


def test_a_width_below_one():
    for widen_factor in (0, -2):
        with pytest.raises(InputError, match=f"widen_factor must be at least 1, got {widen_factor}"):
            WideResNet(16, widen_factor)
