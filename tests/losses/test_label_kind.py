"""LabelKindLoss: which loss each row gets, the mean over all rows, the row fields of the two losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning.batch import LabelKind
from kd_lightning.errors import InputError
from kd_lightning.losses import EarlyLearningLoss, GeneralizedCrossEntropyLoss, LabelKindLoss

TARGET = torch.tensor([0, 3, 1, 2, 2, 3])
KIND = torch.tensor(
    [LabelKind.CLEAN, LabelKind.NOISY, LabelKind.PSEUDO, LabelKind.NOISY, LabelKind.CLEAN, LabelKind.NOISY],
    dtype=torch.int8,
)
NOISY = KIND == LabelKind.NOISY


def randn(seed=0):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def both():
    noisy = GeneralizedCrossEntropyLoss(reduction="none")(randn(), TARGET)
    return torch.where(NOISY, noisy, F.cross_entropy(randn(), TARGET, reduction="none"))


def test_each_row_has_its_loss():
    loss = LabelKindLoss(GeneralizedCrossEntropyLoss())
    torch.testing.assert_close(loss(randn(), TARGET, KIND), both().mean())
    torch.testing.assert_close(LabelKindLoss(loss.noisy, reduction="none")(randn(), TARGET, KIND), both())
    smooth = LabelKindLoss(nn.CrossEntropyLoss(), clean=nn.CrossEntropyLoss(label_smoothing=0.2), reduction="none")
    expected = F.cross_entropy(randn(), TARGET, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(smooth(randn(), TARGET, KIND)[~NOISY], expected[~NOISY])


def test_gradient():
    logits, reference = randn().requires_grad_(), randn().requires_grad_()
    LabelKindLoss(GeneralizedCrossEntropyLoss())(logits, TARGET, KIND).backward()
    (GeneralizedCrossEntropyLoss()(reference[NOISY], TARGET[NOISY]) / 2).backward()
    (F.cross_entropy(reference[~NOISY], TARGET[~NOISY]) / 2).backward()
    torch.testing.assert_close(logits.grad, reference.grad)


@pytest.mark.parametrize("kind", [None, torch.full((6,), LabelKind.CLEAN), torch.full((6,), LabelKind.PSEUDO)])
def test_all_clean(kind):
    found = LabelKindLoss(GeneralizedCrossEntropyLoss())(randn(), TARGET, kind)
    torch.testing.assert_close(found, F.cross_entropy(randn(), TARGET))


def test_all_noisy():
    found = LabelKindLoss(GeneralizedCrossEntropyLoss())(randn(), TARGET, torch.full((6,), LabelKind.NOISY))
    torch.testing.assert_close(found, GeneralizedCrossEntropyLoss()(randn(), TARGET))


@pytest.mark.parametrize(("value", "dtype"), [(5e4, torch.float16), (3e38, torch.float32)])
def test_logits_whose_sum_overflows(value, dtype):
    logits = torch.full((6, 4), value, dtype=dtype)
    found = LabelKindLoss(GeneralizedCrossEntropyLoss())(logits, TARGET, KIND)
    expected = (3 * torch.tensor(4.0).log() + 3 * (1 - 0.25**0.7) / 0.7) / 6
    torch.testing.assert_close(found, expected)


def test_a_stateful_loss_gets_its_own_rows():
    inner, alone = EarlyLearningLoss(), EarlyLearningLoss(reduction="none")
    loss, index = LabelKindLoss(inner, reduction="none"), torch.tensor([7, 1, 5, 4, 2, 0])
    for seed in (0, 1):
        rows = loss(randn(seed), TARGET, KIND, index)
        expected = alone(randn(seed)[NOISY], TARGET[NOISY], index[NOISY])
        torch.testing.assert_close(rows[NOISY], expected)
        torch.testing.assert_close(rows[~NOISY], F.cross_entropy(randn(seed), TARGET, reduction="none")[~NOISY])
    assert torch.equal(inner.averages, alone.averages)
    assert inner.reduction == "mean"
    with pytest.raises(InputError, match="index is required by EarlyLearningLoss"):
        loss(randn(), TARGET, KIND)


def test_a_stateful_loss_runs_without_rows(monkeypatch):
    """Other processes may have rows, and wait."""
    seen, inner = [], EarlyLearningLoss()
    monkeypatch.setattr(inner, "_update", lambda index, p: seen.append((len(index), len(p))))
    inner.averages = torch.zeros(9, 4)
    LabelKindLoss(inner)(randn(), TARGET, torch.full((6,), LabelKind.CLEAN), torch.arange(6))
    assert seen == [(0, 0)]


def test_is_moved_and_put_into_eval_mode():
    loss = LabelKindLoss(EarlyLearningLoss()).eval()
    assert not loss.noisy.training
    torch.testing.assert_close(loss(randn(), TARGET, KIND), F.cross_entropy(randn(), TARGET))


@pytest.mark.parametrize("name", ["noisy", "clean"])
def test_loss_without_rows(name):
    arguments = {"noisy": nn.CrossEntropyLoss()} | {name: nn.Identity()}
    with pytest.raises(InputError, match=f"{name}: Identity has no reduction, which must be 'none' to weight or sort"):
        LabelKindLoss(**arguments)
