"""Active learning on samples whose inputs are a mapping or tuple: the selection is that of the plain form."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from kd_lightning import DatasetSource, DistillModule, SemiSupervisedDataModule
from kd_lightning.active.loop import ActiveLearningLoop
from kd_lightning.pseudo_labels import GraphPseudoLabels

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5)
FORMS = {
    "tensor": lambda x: x,
    "mapping": lambda x: {"a": 2 * x, "b": torch.tensor([0.5])},
    "tuple": lambda x: (2 * x, torch.tensor([0.5])),
}


class Samples(Dataset):
    def __init__(self, form):
        self.form = FORMS[form]

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return self.form(X[index]), int(Y[index])


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(6, 3)

    def forward(self, a, b=None):
        return {"logits": self.head(self.body(a if b is None else a * b))}


class Encoder(Net):
    """Cannot be called: a project calls its method."""

    def forward(self, *args, **kwargs):
        raise AssertionError

    def encode(self, x):
        return Net.forward(self, **x)


class Project(DistillModule):
    def call(self, network, x):
        return network.encode(x)


def run(form, strategy, trainer, make=lambda: DistillModule(Net(0), Net(1))):
    loop = ActiveLearningLoop(
        make,
        lambda: SemiSupervisedDataModule(
            DatasetSource(Samples(form), Samples(form)), labeled=3, val_size=0, batch_size=16
        ),
        partial(trainer, max_epochs=2),
        strategy,
        queries=4,
        rounds=1,
    )
    return loop.run()


@pytest.mark.parametrize("strategy", ["entropy", "bald", "badge", "k-centre", "disagreement"])
def test_each_strategy_selects_the_same(strategy, quiet_trainer):
    expected = run("tensor", strategy, quiet_trainer)
    assert len({*expected[0]["queried"]}) == 4
    for form in ("mapping", "tuple"):
        assert run(form, strategy, quiet_trainer) == expected


@pytest.mark.parametrize("strategy", ["bald", "badge"])
def test_a_project_calls_its_networks_itself(strategy, quiet_trainer):
    expected = run("mapping", strategy, quiet_trainer)
    assert run("mapping", strategy, quiet_trainer, lambda: Project(Encoder(0), Net(1))) == expected


@pytest.mark.parametrize("layer", [None, "body"])
def test_features_of_nested_inputs(layer):
    net = Net(0).eval()
    with torch.no_grad():
        expected = net.body(X)
        for form in FORMS.values():
            b = torch.full((60, 1), 0.5)
            x = form(X) if form is FORMS["tensor"] else (2 * X, b)
            x = {"a": 2 * X, "b": b} if form is FORMS["mapping"] else x
            assert torch.equal(GraphPseudoLabels(layer=layer).features_of(net, x), expected)
