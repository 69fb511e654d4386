"""The head is found in networks of many makers and replaced alone; the layers below it, against timm's."""

from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.optim import param_groups_layer_decay
from torch import nn

from kd_lightning import InputError, load_weights, models, reset_classifier
from kd_lightning.features.heads import find_head, input_of_head, layers_of
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.build import build


class ViT(torchvision.models.VisionTransformer):
    """torchvision's, tiny."""

    def __init__(self, num_classes):
        super().__init__(32, 4, 2, 2, 8, 16, num_classes=num_classes)


class Swin(torchvision.models.SwinTransformer):
    """torchvision's, tiny."""

    def __init__(self, num_classes):
        super().__init__([4, 4], 8, [1, 2], [2, 2], [4, 4], num_classes=num_classes)


class Wrapped(nn.Module):
    """A backbone without its head, as most people write it."""

    def __init__(self, backbone, features, num_classes):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, num_classes)

    def forward(self, x):
        return self.head(self.backbone(x))


class HeadFirst(nn.Module):
    """Registers its head before the layers below it."""

    def __init__(self, num_classes, declared=True):
        super().__init__()
        self.fc = nn.Linear(6, num_classes)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        if declared:
            self.num_classes = num_classes

    def forward(self, x):
        return self.fc(self.body(x))


class Branching(nn.Module):
    """Cannot be traced: the forward pass branches on its inputs."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x if x.sum() > 0 else -x)


class CosineHeadFirst(nn.Module):
    """Uses the weight of its head without a call."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(6, num_classes, bias=False)
        self.body = nn.Linear(4, 6)

    def forward(self, x):
        return F.linear(F.normalize(self.body(x)), F.normalize(self.fc.weight))


class Stateful(nn.Module):
    """Its forward pass changes attributes, buffers and the random generator; its last layer is registered first."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(6, num_classes)
        self.body = nn.Linear(4, 6)
        self.register_buffer("steps", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(6))
        self.outputs = []

    def forward(self, x, noise=0.0, mask=None):
        self.steps += 1
        features = self.body(x) * self.scale
        if noise:
            features = features + noise * torch.rand(6)
        if mask is not None:
            features = features * mask
        self.features = features
        self.outputs.append(features)
        return {"logits": self.head(features), "features": features}


def without(network, name):
    setattr(network, name, nn.Identity())
    return network


NETWORKS = {  # a maker of each, its head, the shape of its input
    "resnet18": (lambda n: torchvision.models.resnet18(num_classes=n), "fc", (3, 32, 32)),
    "mobilenet": (lambda n: torchvision.models.mobilenet_v3_small(num_classes=n), "classifier.3", (3, 32, 32)),
    "squeezenet": (lambda n: torchvision.models.squeezenet1_1(num_classes=n), "classifier.1", (3, 32, 32)),
    "vit": (ViT, "heads.head", (3, 32, 32)),
    "swin": (Swin, "head", (3, 32, 32)),
    "timm_resnet": (lambda n: timm.create_model("test_resnet", num_classes=n), "fc", (3, 32, 32)),
    "timm_vit": (lambda n: timm.create_model("test_vit", num_classes=n, img_size=32), "head", (3, 32, 32)),
    "timm_convnext": (lambda n: timm.create_model("test_convnext", num_classes=n), "head.fc", (3, 32, 32)),
    "digits": (lambda n: DigitsCNN(4, n), "13", (1, 8, 8)),
    "resnet8": (models.resnet8, "fc", (3, 16, 16)),
    "vgg8": (lambda n: models.vgg8(n), "fc", (3, 32, 32)),
    "wrn": (lambda n: models.wrn_16_1(n), "fc", (3, 16, 16)),
    "sequential": (lambda n: nn.Sequential(nn.Flatten(), nn.Linear(4, n)), "1", (2, 2)),
    "head_first": (HeadFirst, "fc", (4,)),
    "head_first_undeclared": (lambda n: HeadFirst(n, declared=False), "fc", (4,)),
    "cosine_head_first": (CosineHeadFirst, "fc", (4,)),
    "branching_body": (lambda n: nn.Sequential(Branching(nn.Linear(4, 6)), nn.Linear(6, n)), "1", (4,)),
    "bare": (lambda n: nn.Linear(4, n), "", (4,)),
}


def last_called(network, *inputs):
    """Name of the last linear or convolutional layer that a forward pass calls."""
    called = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
    network.eval()(*inputs)
    return called[-1]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "cosine_head_first"])
def test_head_is_the_last_layer_called(name):
    make, head, shape = NETWORKS[name]
    assert last_called(make(10), torch.rand(2, *shape)) == head
    network = make(10)
    if name != "timm_vit":  # it branches on the size of its inputs
        network.pretrained_cfg = {}  # where timm does not name the head, the trace finds it
    assert find_head(network) == head


def test_head_registered_first_is_replaced():
    """The body gives as many outputs as the head, so nothing but the order of calls distinguishes the two."""
    network = HeadFirst(6, declared=False)
    body = network.body[0]
    assert reset_classifier(network, 3)(torch.rand(2, 4)).shape == (2, 3)
    assert network.body[0] is body
    assert network.fc.out_features == 3


def test_head_inside_a_part_that_cannot_be_traced():
    class Two(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part, self.body = part, nn.Linear(4, 6)

        def forward(self, x):
            return self.part(self.body(x))

    assert find_head(Two(Branching(nn.Linear(6, 3)))) == "part.layers.0"
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), backend="eager")
    assert find_head(Two(compiled)) == "part._orig_mod.1"
    assert find_head(torch.compile(HeadFirst(10), backend="eager")) == "_orig_mod.fc"
    with pytest.raises(InputError, match="head must be named: the order in which Branching calls its layers"):
        find_head(Two(Branching(nn.Linear(6, 6), nn.Linear(6, 3))))


def test_find_head_leaves_the_network_alone():
    network = Stateful(3)
    network(torch.rand(2, 4))  # leaves a tensor with a graph in an attribute
    hooked = []
    network.body.register_forward_hook(lambda *_: hooked.append(1))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    features, random = network.features, torch.get_rng_state()
    network.outputs.clear()
    assert find_head(network) == "head"
    assert network.features is features
    assert not hooked
    assert not network.outputs
    assert network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_layers_out_of_use_are_no_head():
    """A projection head for another loss is registered last, and forward does not call it."""
    network = Wrapped(nn.Linear(4, 6), 6, 10)
    network.project = nn.Linear(6, 16)
    assert find_head(network) == "head"


@pytest.mark.parametrize("linear", [True, False])
def test_input_of_head(linear):
    if linear:
        network, x = HeadFirst(3), torch.rand(2, 4)
        wanted = network.body(x)
    else:
        network, x = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1), nn.Flatten(2)), torch.rand(2, 1, 5, 5)
        wanted = network[0](x).mean(dim=(2, 3))
    torch.testing.assert_close(input_of_head(network, x), wanted)
    assert not any(m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_head_is_replaced_and_nothing_else(name):
    make, head, shape = NETWORKS[name]
    network = make(10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert find_head(network) == head
    changed = reset_classifier(network, 3)
    assert changed is network or not head
    assert changed.eval()(torch.rand(2, *shape)).shape == (2, 3)
    fresh = make(3)
    after = changed.state_dict()
    assert {key: value.shape for key, value in after.items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    prefix = f"{head}." if head else ""
    for key in before.keys() - {f"{prefix}weight", f"{prefix}bias"}:
        assert torch.equal(before[key], after[key]), key
    for attribute in ("num_classes", "out_features"):
        assert getattr(changed, attribute, None) == getattr(fresh, attribute, None)


def test_num_classes_is_set_on_the_way_to_the_head_alone():
    inner = nn.Sequential(without(timm.create_model("test_resnet", num_classes=10), "fc"), HeadFirst(10))
    network = nn.Sequential(inner)
    network.num_classes, network.out_features, inner.num_classes = 10, 10, 7
    reset_classifier(network, 3, "0.1.fc")
    assert (network.num_classes, inner[1].num_classes) == (3, 3)
    assert (inner[0].num_classes, inner.num_classes) == (10, 7)
    assert network.out_features == 10  # which often counts features


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda bias: nn.Linear(4, 10, bias),
        lambda bias: nn.Conv1d(4, 10, 3, 2, 1, 2, bias=bias, padding_mode="circular"),
        lambda bias: nn.Conv2d(4, 10, (3, 1), 2, (1, 0), 2, bias=bias),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_new_layer_is_like_the_old(layer, bias, alone):
    old = layer(bias).to("meta", torch.float64).eval()
    network = old if alone else nn.Sequential(OrderedDict(body=nn.ReLU(), head=old))
    new = reset_classifier(network, 3)
    new = new if alone else new.head
    wanted = {**vars(old), "out_features": 3, "out_channels": 3}
    assert new is not old
    assert (new.weight.shape[0], new.bias is None) == (3, not bias)
    assert (new.weight.dtype, new.weight.device, new.training) == (torch.float64, torch.device("meta"), False)
    for key in vars(new).keys() - {"_parameters"}:
        assert getattr(new, key) == wanted[key], key


class TwoNames(nn.Module):
    def __init__(self, head_first):
        super().__init__()
        head = nn.Linear(8, 10)
        if head_first:
            self.head = head
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), head)
        self.head = head

    def forward(self, x):
        return self.head(self.layers[:-1](x))


@pytest.mark.parametrize("head_first", [False, True])
def test_head_under_two_names(head_first):
    network = reset_classifier(TwoNames(head_first), 3)
    assert network(torch.rand(2, 4)).shape == network.layers(torch.rand(2, 4)).shape == (2, 3)


def test_named_head():
    network = HeadFirst(10)
    assert find_head(network, "fc") == "fc"
    assert reset_classifier(network, 3, "fc")(torch.rand(2, 4)).shape == (2, 3)
    assert network.num_classes == 3


def test_auxiliary_heads_are_left_alone():
    network = torchvision.models.googlenet(num_classes=10, init_weights=False)
    reset_classifier(network, 3)
    assert (network.fc.out_features, network.aux2.fc2.out_features) == (3, 10)


def declaring(num_classes):
    network = HeadFirst(10)
    network.num_classes = num_classes
    return network


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (DigitsCNN(4), {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (DigitsCNN(4), {"head": "fc"}, r"linear or convolutional layer, such as \['3', '7', '13'\], got 'fc'"),
        (DigitsCNN(4), {"head": "1"}, "linear or convolutional layer, .* got '1'"),
        (nn.Sequential(nn.ReLU()), {}, "Sequential has no linear or convolutional layer to be its head"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, "groups 1, got groups 2"),
        (nn.Sequential(nn.LazyLinear(4)), {}, "0 has no weights yet; run the network once"),
        (declaring(6), {}, "head must be named: HeadFirst has num_classes 6, but its last layer, 'fc', has 10 outputs"),
        (declaring(7), {}, "head must be named: HeadFirst has num_classes 7, but no layer with so many outputs"),
        (Branching(nn.Linear(4, 6), nn.Linear(6, 10)), {}, "head must be named: .*Branching.* cannot be traced"),
        (nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 10)]), {}, "head must be named: .*ModuleList.* cannot be traced"),
        (timm.create_model("levit_128s"), {}, "head must be named: Levit.* has several, head.linear, head_dist.linear"),
    ],
)
def test_bad_input(network, arguments, message):
    with pytest.raises(InputError, match=message):
        reset_classifier(network, **({"num_classes": 3} | arguments))


def test_from_yaml(tmp_path):
    weights = DigitsCNN(4, 5).state_dict()
    torch.save(weights, tmp_path / "trained.pt")
    model = {"class_path": "kd_lightning.models.DigitsCNN", "init_args": {"width": 4, "num_classes": 5}}
    loaded = {
        "class_path": "kd_lightning.load_weights",
        "init_args": {"model": model, "path": f"{tmp_path}/trained.pt"},
    }
    config = {"class_path": "kd_lightning.reset_classifier", "init_args": {"network": loaded, "num_classes": 3}}
    built = build(nn.Module, config)
    assert built[13].out_features == 3
    assert torch.equal(built[0].weight, weights["0.weight"])
    assert load_weights(DigitsCNN(4, 3), _saved(built, tmp_path))[13].out_features == 3


def _saved(network, folder):
    torch.save(network.state_dict(), folder / "changed.pt")
    return folder / "changed.pt"


# The layers below.


def names(network, head=None):
    """The name of each parameter of each layer."""
    name = {id(p): name for name, p in network.named_parameters()}
    layers = layers_of(network, network.get_submodule(find_head(network, head)))
    return [[name[id(p)] for p in layer] for layer in layers]


def parts(network, head=None):
    """What each layer begins with."""
    return [layer[0].rpartition(".")[0] for layer in names(network, head)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_below_the_head_is_in_one_layer(name):
    make, head, _ = NETWORKS[name]
    network = make(10)
    found = [parameter for layer in names(network) for parameter in layer]
    assert sorted(found) == sorted(n for n, _ in network.named_parameters() if n.rpartition(".")[0] != head)
    assert all(names(network))


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "resnet18"])
def test_layers_are_those_of_timm(name):
    network = timm.create_model(name, num_classes=10)
    wanted = {}
    for group in param_groups_layer_decay(network, layer_decay=0.5, weight_decay=0.1):
        wanted.setdefault(group["lr_scale"], set()).update(id(p) for p in group["params"])
    layers = layers_of(network, network.get_classifier())
    assert [{id(p) for p in layer} for layer in layers] == [wanted[0.5**d] for d in range(len(layers), 0, -1)]
    assert wanted.keys() == {0.5**depth for depth in range(len(layers) + 1)}


def test_norms_and_the_order():
    assert names(DigitsCNN(4)) == [
        ["0.weight", "1.weight", "1.bias"],
        ["3.weight", "4.weight", "4.bias"],
        ["7.weight", "8.weight", "8.bias"],
    ]
    first = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    assert names(first) == [["0.weight", "0.bias"], ["1.weight", "1.bias", "2.weight"]]
    blocks = ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    assert parts(models.resnet8()) == ["conv1", *blocks]  # the last block has most parameters, and is one layer
    assert parts(torchvision.models.mobilenet_v3_small()) == [
        "features.0.0",
        *(f"features.{number}.block.0.0" for number in range(1, 12)),
        "features.12.0",
        "classifier.0",
    ]


VIT = ["", "encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_1.ln_1"]
RESNET = ["conv1", *(f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2))]


@pytest.mark.parametrize(
    ("network", "below"),
    [
        (ViT(10), VIT),
        (torchvision.models.resnet18(), RESNET),
        (Wrapped(without(torchvision.models.resnet18(), "fc"), 512, 10), [f"backbone.{part}" for part in RESNET]),
        (nn.Sequential(without(torchvision.models.resnet18(), "fc"), nn.Linear(512, 10)), [f"0.{p}" for p in RESNET]),
        (Wrapped(without(ViT(1), "heads"), 8, 10), ["backbone", *(f"backbone.{part}" for part in VIT[1:])]),
    ],
    ids=["vit", "resnet18", "wrapped", "sequence", "wrapped_vit"],
)
def test_backbones_are_opened_up(network, below):
    assert parts(network) == below


def test_token_and_position_belong_to_the_first_layer():
    assert set(names(ViT(10))[0]) == {"class_token", "encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}
    inner = nn.Sequential(OrderedDict(inner=ViT(10)))  # the head lies within
    assert {name.removeprefix("inner.") for name in names(inner)[0]} == set(names(ViT(10))[0])
    assert names(timm.create_model("test_vit"))[0][:2] == ["cls_token", "pos_embed"]


def test_shared_parameters_are_taken_once():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4))
    network[3].weight = shared.weight  # tied with the head, and so of the head
    assert names(network) == [["0.bias"]]
    assert not layers_of(nn.Linear(4, 2), nn.Linear(4, 2))[1:]


def test_head_alone():
    bare, in_sequence = nn.Linear(4, 2), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert layers_of(bare, bare) == layers_of(in_sequence, in_sequence[1]) == []


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_a_backbone_of_timm_gets_a_head(name):
    backbone = timm.create_model(name, num_classes=0).double()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    network = reset_classifier(backbone, 3)
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.items())
    x = torch.rand(2, *network.pretrained_cfg["input_size"], dtype=torch.double)
    assert network.eval()(x).shape == (2, 3)
    assert network.get_submodule(find_head(network)).weight.dtype == torch.double
    assert {*state} > {*before}
