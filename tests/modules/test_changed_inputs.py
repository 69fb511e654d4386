"""A network that changes its inputs in place trains as its twin that does not: nothing else gets changed inputs."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import (
    ApprenticeModule,
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    PseudoLabelModule,
    SupervisedModule,
)

ROWS = 6
X = torch.randn(2 * ROWS, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, -100, 1, -100, 2, 2, 0, -100, 0, 1])
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Network(nn.Module):
    """Doubles its inputs first, in place or not."""

    def __init__(self, seed, in_place):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.in_place = in_place

    def forward(self, x):
        x = x.mul_(2) if self.in_place else x * 2
        return self.last(torch.tanh(self.first(x)))


def make_sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def make_lbfgs(parameters):
    return torch.optim.LBFGS(parameters, 0.1, max_iter=3)


def plain(seed):
    return Network(seed, False)


MODULES = {
    "LBFGS": lambda net: SupervisedModule(net(0), optimizer=make_lbfgs),
    "distill": lambda net: DistillModule(net(0), plain(1)),
    "co-teaching": lambda net: CoTeachingModule(net(0), plain(1), 0.2),
    "co-teaching, peer": lambda net: CoTeachingModule(plain(0), net(1), 0.2),
    "ensemble, average": lambda net: EnsembleDistillModule(net(0), [plain(1), plain(2)]),
    "ensemble, random": lambda net: EnsembleDistillModule(net(0), [plain(1), plain(2)], "random"),
    "ensemble, relabel": lambda net: EnsembleDistillModule(net(0), [plain(1), plain(2)], "relabel"),
    "apprentice, student": lambda net: ApprenticeModule(net(0), plain(1)),
    "apprentice, teacher": lambda net: ApprenticeModule(plain(0), net(1)),
    "ema": lambda net: PseudoLabelModule(net(0), ema_decay=0.9),
    "hint": lambda net: HintModule(net(0), plain(1), {"first": "first"}, 1, hint_optimizer=make_sgd),
}


@pytest.mark.parametrize("name", MODULES)
def test_weights_and_metrics_are_those_of_the_twin(name):
    found = []
    batches = [
        Batch(x, y, index=n + torch.arange(ROWS))
        for n, (x, y) in enumerate(zip(X.split(ROWS), Y.split(ROWS), strict=True))
    ]
    for in_place in (False, True):
        torch.manual_seed(0)
        module = MODULES[name](partial(Network, in_place=in_place))
        if name != "LBFGS":
            module.optimizer = make_sgd
        loader = DataLoader(copy.deepcopy(batches), batch_size=None)
        trainer = Trainer(accelerator="cpu", **SILENT, max_epochs=2)
        trainer.fit(module, loader, loader)
        found.append((module.state_dict(), trainer.callback_metrics))
    (twin, expected), (state, metrics) = found
    for key, value in twin.items():
        assert torch.equal(state[key], value), key
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx(
        {key: float(value) for key, value in expected.items()}, rel=0, abs=0, nan_ok=True
    )
