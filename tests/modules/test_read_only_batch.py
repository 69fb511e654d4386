"""Modules and losses write neither into a batch nor into its tensors."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_lightning import (
    ABCModule,
    ApprenticeModule,
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    HintModule,
    PseudoLabelModule,
    SupervisedModule,
)
from kd_lightning.batch import LabelKind
from kd_lightning.losses import DKDLoss, EarlyLearningLoss, GeneralizedCrossEntropyLoss, LabelKindLoss


@dataclass
class ReadOnly(Batch):
    """A batch whose fields cannot be set, nor those of batches made from it."""

    def __post_init__(self):
        object.__setattr__(self, "is_complete", True)

    def __setattr__(self, name, value):
        if getattr(self, "is_complete", False):
            raise AttributeError(f"batch.{name} is set")
        object.__setattr__(self, name, value)


def net(seed, outputs=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, outputs))


def counted(module):
    """With the numbers of labels that a fit counts."""
    module.balance_classes(SimpleNamespace(visible_labels=lambda: torch.tensor([0, 0, 1, 2, 3])))
    return module


MODULES = {
    "supervised": lambda: SupervisedModule(net(0)),
    "class weights": lambda: SupervisedModule(net(0), hard_loss=nn.CrossEntropyLoss(torch.arange(4.0))),
    "early learning": lambda: SupervisedModule(net(0), hard_loss=EarlyLearningLoss()),
    "label kinds": lambda: SupervisedModule(net(0), hard_loss=LabelKindLoss(GeneralizedCrossEntropyLoss())),
    "distill": lambda: DistillModule(net(0), net(1)),
    "decoupled": lambda: DistillModule(net(0), net(1), soft_loss=DKDLoss()),
    "average": lambda: EnsembleDistillModule(net(0), [net(1), net(2)], teacher_weights="confidence"),
    "random": lambda: EnsembleDistillModule(net(0), [net(1), net(2)], "random", draw_per="sample"),
    "relabel": lambda: EnsembleDistillModule(net(0), [net(1), net(2)], "relabel", teacher_weights=[1.0, 2.0]),
    "vmap": lambda: EnsembleDistillModule(net(0), [net(1), net(2)], use_vmap=True),
    "apprentice": lambda: ApprenticeModule(net(0), net(1), "joint", mutual=True),
    "fixed teacher": lambda: ApprenticeModule(net(0), net(1), "fixed_teacher"),
    "hints": lambda: HintModule(net(0), net(1), {"3": "3"}, 1, input_shape=[6]),
    "joint hints": lambda: HintModule(net(0), net(1), {"3": "3"}, 0, hint_weight=0.1, input_shape=[6]),
    "online": lambda: PseudoLabelModule(net(0), selection=FixedThreshold(0.3), ema_decay=0.9),
    "refreshed": lambda: PseudoLabelModule(net(0), pseudo_labels="refreshed"),
    "ABC": lambda: counted(ABCModule(net(0), threshold=0.3)),
    "co-teaching": lambda: CoTeachingModule(net(0), net(1), 0.5),
}
TOTALS = {"mean_labels": 6.0, "mean_pseudo": 1.0, "mean_coarse": 1.0, "mean_rows": 8.0}


def batch(totals, labels=True, needs_y=False):
    generator = torch.Generator().manual_seed(0)
    kinds = [LabelKind.CLEAN, LabelKind.NOISY, LabelKind.COARSE, LabelKind.MISSING, LabelKind.PSEUDO, *[0] * 3]
    candidates = torch.zeros(8, 4, dtype=torch.bool)
    candidates[2, :2] = True
    fields = {
        "y": torch.tensor([0, 1, -100, -100, 2, 3, 0, 1]),
        "kind": torch.tensor(kinds, dtype=torch.int8),
        "weight": torch.rand(8, generator=generator),
        "candidates": candidates,
        "labeled": torch.tensor([0, 1, 4, 5, 6, 7]),
    }
    x, strong = (torch.randn(8, 6, generator=generator) for _ in range(2))
    fields = fields if labels else {"y": torch.full((8,), -100)} if needs_y else {}
    others = {"index": torch.arange(8), "view": torch.arange(8), "x_strong": strong}
    return ReadOnly(x, **others, **fields, **(TOTALS if totals else {}))


def state(batch):
    """The values of all fields, and how often each tensor was written to."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {
        name: (value.tolist(), value._version, value.data_ptr()) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("totals", [True, False], ids=["totals", "no totals"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_steps_write_nothing(make, totals, labels):
    module = make()
    read_only = batch(totals, labels, needs_y=isinstance(getattr(module, "soft_loss", None), DKDLoss))
    before = state(read_only)
    loss = module.training_step(read_only, 0)
    if loss.requires_grad:
        loss.backward()
    module.eval()
    module.validation_step(read_only, 0)
    module.test_step(read_only, 0)
    module.predict_step(read_only, 0)
    assert state(read_only) == before


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_steps_of_other_tasks_write_nothing(task):
    nan = float("nan")
    y = torch.tensor([[1, nan, 0, nan]] * 8) if task == "multilabel" else torch.tensor([1, 0, nan, 1, 0, 1, nan, 0])
    read_only = ReadOnly(torch.randn(8, 6), y)
    before = repr(state(read_only))  # NaN is not equal to itself
    module = DistillModule(
        net(0, 4 if task == "multilabel" else 1), net(1, 4 if task == "multilabel" else 1), task=task
    )
    module.training_step(read_only, 0).backward()
    module.eval()
    module.validation_step(read_only, 0)
    assert repr(state(read_only)) == before


def test_the_batch_of_this_test_can_fail():
    read_only = batch(True)
    for made in (read_only, read_only.select(torch.arange(3)), dataclasses.replace(read_only, view=None)):
        with pytest.raises(AttributeError, match=r"batch\.y is set"):
            made.y = None
    before = state(read_only)
    read_only.y.add_(0)
    assert state(read_only) != before
