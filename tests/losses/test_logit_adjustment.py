"""LogitAdjustmentLoss: value and gradient by hand, limits, priors from the labels of a fit, complaints."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.losses import LabelKindLoss, LogitAdjustmentLoss

PRIORS = [90.0, 9.0, 1.0]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(logits, target, tau):
    """Loss of each row and its gradient."""
    pi = np.array(PRIORS) / sum(PRIORS)
    losses, gradients = [], []
    for z, y in zip(logits.numpy(), target.tolist(), strict=True):
        raised = np.exp(z) * pi**tau
        losses.append(-np.log(raised[y] / raised.sum()))
        gradients.append(raised / raised.sum() - np.eye(len(z))[y])
    return np.array(losses), np.array(gradients)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_gradient(tau, reduction):
    logits, target = randn(7, 3), torch.tensor([0, 1, 2, 2, 1, 0, 2])
    losses, gradients = by_hand(logits, target, tau)
    loss = LogitAdjustmentLoss(tau, PRIORS, reduction)
    loss.log_priors = (torch.tensor(PRIORS, dtype=torch.float64) / sum(PRIORS)).log()
    given = logits.clone().requires_grad_()
    value = loss(given, target)
    value.sum().backward()
    share = 1 / 7 if reduction == "mean" else 1.0
    assert value.detach().numpy() == pytest.approx(losses.mean() if reduction == "mean" else losses, rel=1e-12)
    assert given.grad.numpy() == pytest.approx(share * gradients, rel=1e-10, abs=1e-15)


def test_limits():
    logits, target = randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    plain = F.cross_entropy(logits, target)
    assert LogitAdjustmentLoss(0.0, PRIORS)(logits, target).item() == pytest.approx(plain.item(), rel=1e-12)
    assert LogitAdjustmentLoss(2.0, [7, 7, 7])(logits, target).item() == pytest.approx(plain.item(), rel=1e-6)
    for loss in (LogitAdjustmentLoss(1.0, PRIORS), LogitAdjustmentLoss()):
        assert loss.eval()(logits, target).item() == pytest.approx(plain.item(), rel=1e-12)
    none = LogitAdjustmentLoss(1.0, PRIORS)(logits[:0].requires_grad_(), target[:0])
    assert none.item() == 0
    assert none.requires_grad
    half = LogitAdjustmentLoss(1.0, PRIORS)(logits.bfloat16(), target)
    assert half.dtype == torch.float32


def data(hidden=0, labels=None, **kwargs):
    """8, 2 and 1 labels of three classes, and 12 samples whose labels are hidden."""
    y = torch.tensor([0] * 8 + [1] * 2 + [2]) if labels is None else labels
    y = torch.cat([y, torch.full((12,), -100)])
    x = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(hidden))
    return SemiSupervisedDataModule(DatasetSource(TensorDataset(x, y)), val_size=0, batch_size=4, **kwargs)


@pytest.mark.parametrize("inside", [False, True])
def test_a_fit_counts_the_visible_labels(quiet_trainer, inside):
    loss = LogitAdjustmentLoss()
    module = SupervisedModule(nn.Linear(4, 3), hard_loss=LabelKindLoss(clean=loss, noisy=loss) if inside else loss)
    quiet_trainer().fit(module, datamodule=data())
    assert loss.log_priors.exp().tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 11], rel=1e-6)
    assert not any("prior" in key for key in module.state_dict())


def test_given_priors_stay(quiet_trainer):
    loss = LogitAdjustmentLoss(priors=PRIORS)
    quiet_trainer().fit(SupervisedModule(nn.Linear(4, 3), hard_loss=loss), datamodule=data())
    assert loss.log_priors.exp().tolist() == pytest.approx([0.9, 0.09, 0.01], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -1.0}, "tau must be finite and at least 0, got -1.0"),
        ({"tau": float("nan")}, "tau must be finite and at least 0, got nan"),
        ({"priors": [1.0, 0.0]}, r"priors must be finite numbers above 0, .* got \[1.0, 0.0\]"),
        ({"priors": [1.0]}, "one for each of at least 2 classes"),
        ({"reduction": "sum"}, "reduction must be one of"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        LogitAdjustmentLoss(**arguments)


def test_complaints(quiet_trainer, loader):
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(InputError, match="a fit counts the labels; set priors to train without one"):
        LogitAdjustmentLoss()(logits, target)
    with pytest.raises(InputError, match="priors must hold 3 classes, as the logits, got 2"):
        LogitAdjustmentLoss(priors=[1, 1])(logits, target)

    loss = LogitAdjustmentLoss()
    loss.count_labels(torch.tensor([3, 1]))
    with pytest.raises(InputError, match="LogitAdjustmentLoss counted labels of 2 classes, got 3 logits"):
        loss(logits, target)

    def fit(datamodule, **kwargs):
        quiet_trainer().fit(SupervisedModule(nn.Linear(4, 3), hard_loss=LogitAdjustmentLoss(), **kwargs), datamodule)

    with pytest.raises(InputError, match="LogitAdjustmentLoss needs a label of each class, but there is none of 2"):
        fit(data(labels=torch.tensor([0, 1, 1])), num_classes=3)
    with pytest.raises(InputError, match="LogitAdjustmentLoss counts labels, so it needs a datamodule"):
        fit(loader())
    with pytest.raises(InputError, match="LogitAdjustmentLoss and data.sampler: balanced both correct the imbalance"):
        fit(data(sampler="balanced"))
