"""Both parts of a cut network give what the network gives, for networks of many makers."""

from copy import deepcopy

import pytest
import timm
import torch
import torchvision
from torch import nn

from kd_lightning import InputError, models
from kd_lightning.features.cut import cut_above, cut_below

X = torch.randn(2, 3, 64, 64)
NETWORKS = {
    "torchvision resnet": (torchvision.models.resnet18, "layer4"),
    "inside a sequence": (torchvision.models.resnet18, "layer4.0"),
    "torchvision mobilenet": (torchvision.models.mobilenet_v2, "features"),
    "torchvision shufflenet": (torchvision.models.shufflenet_v2_x0_5, "conv5"),
    "timm resnet": (lambda: timm.create_model("resnet10t"), "layer4"),
    "timm efficientnet": (lambda: timm.create_model("tf_efficientnet_lite0"), "bn2"),
    "sequence": (models.resnet8, "layer3"),
}


@pytest.mark.parametrize(("make", "layer"), NETWORKS.values(), ids=NETWORKS)
def test_parts_are_the_network(make, layer):
    network = make().eval()
    below, above = cut_below(network, layer), cut_above(network, layer)
    with torch.no_grad():
        assert torch.equal(above(below(X)), network(X))
    below.load_state_dict({key: network.state_dict()[key] for key in below.state_dict()})  # under their own names
    names = {*below.state_dict()} | {*above.state_dict()}
    assert names == {*network.state_dict()}
    assert {*below.state_dict()}.isdisjoint(above.state_dict())


def test_layers_are_those_of_the_network_and_train():
    network = models.resnet8()
    below = cut_below(network, "layer2")
    assert below.layer1 is network.layer1
    below.train()
    below(X).sum().backward()
    assert network.conv1.weight.grad is not None
    assert int(network.layer2[0].bn1.num_batches_tracked) == 1


class Branching(nn.Module):
    """Parts that another layer contains, a default argument, functions, and a layer made in the forward pass."""

    def __init__(self, dropout=0.0, shortcut=False, twice=False, branch=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())])
        self.fc = nn.Linear(4, 5)
        self.dropout, self.shortcut, self.twice, self.branch = dropout, shortcut, twice, branch

    def forward(self, x, scale=None, flag=True):
        if self.branch and x.mean() > 0:
            x = -x
        x = stem = self.stem(x) if flag else None
        if self.dropout:
            x = nn.functional.dropout(x, self.dropout, training=self.training)
        x = self.stages[0](x).relu()
        x = self.stages[1][:2](x)
        if self.twice:
            x = self.stages[1][1](x)
        x = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())(x)
        if self.shortcut:
            x = x + stem.mean((2, 3))
        return self.fc(x)


@pytest.mark.parametrize("layer", ["stem", "stages.0", "stages.1.1", "fc"])
def test_functions_and_defaults(layer):
    network = Branching().eval()
    below, above = cut_below(network, layer), cut_above(network, layer)
    assert torch.equal(above(below(X)), network(X))


def test_modes_stay():
    network = Branching().train()
    network.stages.eval()
    before = {name: layer.training for name, layer in network.named_modules()}
    cut_below(network, "stages.1.0")
    assert before == {name: layer.training for name, layer in network.named_modules()}


REFUSED = {
    "no such layer": (Branching(), "stage", "layer 'stage': Branching has none of that name"),
    "shortcut": (Branching(shortcut=True), "stages.0", "layer stages.0: above it, Branching uses more .*: stem"),
    "twice": (Branching(twice=True), "stages.1.1", "layer stages.1.1: Branching must call it once .* 2 calls"),
    "branch": (Branching(branch=True), "stem", "layer stem: Branching cannot be cut there, since it cannot be traced"),
    "never called": (nn.ModuleDict({"a": nn.Linear(1, 1)}), "a", "layer a: ModuleDict cannot be cut there"),
}


@pytest.mark.parametrize(("network", "layer", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(network, layer, message):
    with pytest.raises(InputError, match=message) as caught:
        cut_above(network, layer)
    assert "\n" not in str(caught.value)


def test_dropout_below_that_training_would_lose():
    network = Branching(dropout=0.5)
    with pytest.raises(InputError, match="something else below it in training than in evaluation"):
        cut_below(network, "stages.0")
    assert torch.equal(cut_below(network.eval(), "stem")(X), network.stem(X))  # below it there is none


def test_survives_copies_compilation_and_export():
    network = models.resnet8().eval()
    below = cut_below(torch.compile(network, backend="eager"), "layer3")
    x = torch.randn(2, 3, 8, 8)
    expected = below(x)
    assert torch.equal(deepcopy(below)(x), expected)
    assert torch.equal(torch.compile(below, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(below, (x,)).module()(x), expected)
