"""Names of the metrics of classes: odd ones, equal ones, two classes of the binary task, and monitored ones of many."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, SemiSupervisedDataModule, SupervisedModule

ODD = ["a/b", "a b", "c,d", "ünï", "x" * 150]


def data(names, y):
    part = TensorDataset(torch.nn.functional.one_hot(y.roll(1), len(names)).float(), y)
    return SemiSupervisedDataModule(DatasetSource(part, val=part, class_names=names), batch_size=7)


def validated(quiet_trainer, names, y, task="multiclass"):
    """The metrics of a network that predicts the label of the sample before."""
    student = nn.Identity() if task == "multiclass" else Second()  # x is the label of the sample before, one-hot
    trainer = quiet_trainer(limit_val_batches=1.0)
    return trainer.validate(SupervisedModule(student, task=task), datamodule=data(names, y), verbose=False)[0]


class Second(nn.Module):
    def forward(self, x):
        return x[:, 1] - 0.5


def test_odd_names(quiet_trainer):
    y = torch.arange(40).square() % 5
    found = validated(quiet_trainer, ODD, y)
    guess = y.roll(1)
    recalls = dict(enumerate(recall_score(y, guess, average=None, labels=range(5), zero_division=0)))
    there = {*y.tolist()}
    assert {name: value for name, value in found.items() if "recall" in name} == {
        f"val/recall_{ODD[c]}": pytest.approx(recall, rel=1e-6) for c, recall in recalls.items() if c in there
    }
    assert found["val/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess), rel=1e-6)


def test_equal_names_are_told_apart(quiet_trainer):
    """Else the logged recall were a mean of both."""
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    found = validated(quiet_trainer, ["crane", "cat", "crane"], y)
    recalls = {name: value for name, value in found.items() if "recall" in name}
    assert recalls == pytest.approx({"val/recall_crane 0": 2 / 3, "val/recall_cat": 0, "val/recall_crane 2": 1 / 2})


def test_both_classes_of_the_binary_task(quiet_trainer):
    y = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1])
    found = validated(quiet_trainer, ["good", "bad"], y, "binary")
    good, bad = recall_score(y, y.roll(1), average=None)
    assert (found["val/recall_good"], found["val/recall_bad"]) == (pytest.approx(good), pytest.approx(bad))
    assert found["val/balanced_accuracy"] == pytest.approx((good + bad) / 2)


def test_of_many_classes_those_that_are_monitored(quiet_trainer, tmp_path):
    names = [f"class/{n}" for n in range(30)]
    best = ModelCheckpoint(tmp_path, monitor="val/recall_class/3", mode="max", filename="best")
    trainer = quiet_trainer(callbacks=[best], enable_checkpointing=True, limit_val_batches=1.0, max_epochs=2)
    module = SupervisedModule(nn.Linear(30, 30), lr_scheduler=plateau)
    trainer.fit(module, datamodule=data(names, torch.arange(60) % 30))
    logged = {name for name in trainer.callback_metrics if "recall" in name}
    assert logged == {"val/recall_class/3", "val/recall_class/7"}


def plateau(optimizer):
    scheduler = ReduceLROnPlateau(optimizer, mode="max")
    scheduler.monitor = "val/recall_class/7"
    return scheduler


def test_a_monitored_class_without_samples(quiet_trainer, tmp_path):
    """A checkpoint would take its NaN of the first epoch for the best value."""
    best = ModelCheckpoint(tmp_path, monitor="val/recall_c", mode="max")
    trainer = quiet_trainer(callbacks=[best], enable_checkpointing=True, limit_val_batches=1.0)
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        trainer.fit(SupervisedModule(nn.Linear(3, 3)), datamodule=data(["a", "b", "c"], torch.arange(20) % 2))
