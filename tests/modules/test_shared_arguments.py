"""The arguments that all modules share: documented once, resolved by the parser, and checked in Python."""

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from kd_lightning import (
    ABCModule,
    ApprenticeModule,
    CoTeachingModule,
    DistillationTokenModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    PseudoLabelModule,
    SupervisedModule,
)

SHARED = {"task": "multiclass", "hard_loss": None, "lr_scheduler": None, "lr_interval": "epoch"}
SHARED |= {"weight_decay_exclude_1d": False}
SOFT = {"soft_loss": None, "soft_weight": 0.5}


def net():
    return nn.Linear(2, 3)


MAKE = {
    SupervisedModule: (net,),
    DistillModule: (net, net),
    DistillationTokenModule: (net, net),
    HintModule: (net, net, lambda: {"0": "0"}, lambda: 1),
    EnsembleDistillModule: (net, lambda: [net()]),
    ApprenticeModule: (net, net),
    PseudoLabelModule: (net,),
    ABCModule: (net,),
    CoTeachingModule: (net, net, lambda: 0.2),
}
HALF = SOFT | {"soft_weight": 0.5}
DEFAULTS = {DistillModule: SOFT, HintModule: SOFT, EnsembleDistillModule: SOFT}
DEFAULTS |= {ApprenticeModule: HALF, DistillationTokenModule: HALF}


def make(kind, **kwargs):
    return kind(*(part() for part in MAKE[kind]), **kwargs)


def actions(kind):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    return {action.dest.removeprefix("model."): action for action in parser._actions}


@pytest.mark.parametrize("kind", MAKE)
def test_parser_has_them_all(kind):
    found, base = actions(kind), actions(SupervisedModule)
    for name, default in (SHARED | DEFAULTS.get(kind, {})).items():
        assert found[name].default == default, name
        assert not found[name].required
        assert found[name].help
    for name in [*SHARED, "optimizer"]:
        assert (found[name].help, found[name]._typehint) == (base[name].help, base[name]._typehint)
    assert found["optimizer"].default["class_path"] == "torch.optim.Adam"


@pytest.mark.parametrize("kind", MAKE)
def test_config_builds_the_optimizer(kind):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    linear = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    values = {"student": linear, "teacher": linear, "teachers": [linear], "peer": linear}
    values |= {"hints": {"0": "0"}, "hint_epochs": 1, "forget_rate": 0.2}
    values = {name: value for name, value in values.items() if name in actions(kind)}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    config = parser.parse_object({"model": values | {"optimizer": sgd, "lr_interval": "step"}})
    module = parser.instantiate_classes(config).model
    assert type(module) is kind
    assert module.lr_interval == "step"
    optimizer = module.optimizer(module.student.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("kind", MAKE)
def test_python(kind):
    with pytest.raises(TypeError, match="optimiser"):
        make(kind, optimiser=torch.optim.SGD)
    with pytest.raises(InputError, match="lr_interval must be one of epoch, step, got 'day'"):
        make(kind, lr_interval="day")
    module = make(kind, optimizer=torch.optim.SGD, lr_interval="step")
    assert module.optimizer is torch.optim.SGD
    assert module.hparams["lr_interval"] == "step"
    assert module.hparams["task"] == "multiclass"
    assert ("soft_weight" in module.hparams) == (kind in DEFAULTS)
