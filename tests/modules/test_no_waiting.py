"""No training step synchronizes with its device: the loader reads the values that are needed, on the CPU.

Tensors on torch's meta device have no values, so reading one fails.
"""

import dataclasses

import pytest
import torch
from lightning.pytorch import seed_everything

from kd_lightning import (
    ApprenticeModule,
    Batch,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.losses import DISTLoss, DKDLoss, GeneralizedCrossEntropyLoss, MLKDLoss, RLDLoss, WTTMLoss
from kd_lightning.models import DigitsCNN


def net(seed):
    torch.manual_seed(seed)
    return DigitsCNN(4)


MODULES = {
    "supervised": lambda: SupervisedModule(net(0)),
    "robust": lambda: SupervisedModule(net(0), hard_loss=GeneralizedCrossEntropyLoss()),
    "distill": lambda: DistillModule(net(0), net(1)),
    "decoupled": lambda: DistillModule(net(0), net(1), soft_loss=DKDLoss()),
    "correlation": lambda: DistillModule(net(0), net(1), soft_loss=DISTLoss()),
    "refined": lambda: DistillModule(net(0), net(1), soft_loss=RLDLoss()),
    "transformed": lambda: DistillModule(net(0), net(1), soft_loss=WTTMLoss()),
    "levels": lambda: DistillModule(net(0), net(1), soft_loss=MLKDLoss()),
    "average": lambda: EnsembleDistillModule(net(0), [net(1), net(2)]),
    "confidence": lambda: EnsembleDistillModule(net(0), [net(1), net(2)], teacher_weights="confidence"),
    "apprentice": lambda: ApprenticeModule(net(0), net(1), "joint", mutual=True),
    "hints": lambda: HintModule(net(0), net(1), {"5": "5"}, 1, input_shape=[1, 8, 8]),
    "joint hints": lambda: HintModule(net(0), net(1), {"5": "5"}, 0, hint_weight=0.1, input_shape=[1, 8, 8]),
}


def batches(labeled):
    data = SemiSupervisedDataModule(Digits(), labeled=labeled, batch_size=64)
    data.setup("fit")
    return iter(data.train_dataloader())


def moved(batch, device):
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in tensors.items()})


@pytest.mark.parametrize("labeled", [None, 10])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_no_step_reads_a_value(make, labeled, monkeypatch):
    module = make().to("meta")
    monkeypatch.setattr(type(module), "_may_synchronize", lambda self, x: False)  # a step without logging
    batch = moved(next(batches(labeled)), "meta")
    loss = module.training_step(batch, 0)
    assert loss.device.type == "meta"
    loss.backward()


def test_reading_a_value_on_meta_fails():
    """Without ``labeled`` of the loader, the step must read the labels."""
    module = SupervisedModule(net(0)).to("meta")
    batch = moved(next(batches(10)), "meta")
    batch.labeled = None
    with pytest.raises((RuntimeError, NotImplementedError)):
        module.training_step(batch, 0)


@pytest.mark.parametrize("make", [MODULES["distill"], MODULES["robust"]])
@pytest.mark.parametrize("labeled", [None, 10, 0.02])
def test_the_loss_is_the_same(make, labeled, monkeypatch, quiet_trainer):
    ends = []
    for synchronizes in (False, True):
        for module in ("_shared.student_module", "_shared.hard_loss"):
            name = f"kd_lightning.modules.{module}.must_synchronize"
            monkeypatch.setattr(name, lambda tensor, value=synchronizes: value)
        seed_everything(0, verbose=False)
        module = make()
        data = SemiSupervisedDataModule(Digits(), labeled=labeled, batch_size=64)
        quiet_trainer(max_epochs=2, limit_train_batches=5).fit(module, datamodule=data)
        ends.append(module.student.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
