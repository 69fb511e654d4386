"""Weights of classes and labels that do not fit the student: one line before the first step."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import InputError, SupervisedModule
from kd_lightning.losses import LabelKindLoss


def weights(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def fit(make_trainer, loss, task="multiclass"):
    shapes = {"multiclass": (), "multilabel": (3,), "binary": ()}
    y = torch.arange(6) % 3 if task == "multiclass" else torch.ones(6, *shapes[task])
    module = SupervisedModule(nn.Linear(2, 1 if task == "binary" else 3), task=task, hard_loss=loss)
    make_trainer().fit(module, DataLoader(TensorDataset(torch.randn(6, 2), y), 2))


CE, BCE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss


@pytest.mark.parametrize(
    ("task", "loss"),
    [
        ("multiclass", CE(weights(3))),
        ("multiclass", LabelKindLoss(CE(weights(3), reduction="none"))),
        ("multilabel", BCE(weights(3), pos_weight=weights(3))),
        ("multilabel", BCE(weights(1, 3), pos_weight=weights())),
        ("multilabel", BCE(pos_weight=weights(1))),
        ("binary", BCE(weights(1), pos_weight=weights())),
    ],
)
def test_they_fit(quiet_trainer, task, loss):
    fit(quiet_trainer, loss, task)


@pytest.mark.parametrize(
    ("task", "loss", "message"),
    [
        ("multiclass", CE(weights(2)), "hard_loss.weight .* each of the student's 3 outputs, got the shape [2]"),
        ("multiclass", CE(weights(3, 1)), "hard_loss.weight .* got the shape [3, 1]"),
        ("multiclass", CE(weights()), "hard_loss.weight .* got the shape []"),
        ("multiclass", CE(weights(3, dtype=torch.int64)), "hard_loss.weight must hold floating point .* torch.int64"),
        ("multiclass", LabelKindLoss(CE(weights(4))), "hard_loss.noisy.weight .* got the shape [4]"),
        ("multilabel", BCE(pos_weight=weights(2)), "hard_loss.pos_weight .* 3 outputs, got the shape [2]"),
        ("multilabel", BCE(weights(2, 3)), "hard_loss.weight .* got the shape [2, 3]"),
        # torch would give each row of a batch of two a weight of its own
        ("binary", BCE(pos_weight=weights(2)), "hard_loss.pos_weight .* 1 outputs, got the shape [2]"),
        ("multilabel", BCE(weights(2, 1)), "hard_loss.weight .* got the shape [2, 1]"),
    ],
)
def test_they_do_not_fit(quiet_trainer, task, loss, message):
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(InputError, match=pattern):
        fit(quiet_trainer, loss, task)


def test_a_loss_of_a_project_may_use_its_weights_for_anything(quiet_trainer):
    class Mine(nn.CrossEntropyLoss):
        def forward(self, logits, target):
            return nn.functional.cross_entropy(logits, target) * self.weight.sum()

    fit(quiet_trainer, Mine(weights(7)))
