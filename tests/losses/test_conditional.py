"""ConditionalLoss: its rows by hand in float64, which rows count as wrong, its limits, and what it passes on."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, rel_entr, softmax
from torch import nn

from kd_lightning import InputError
from kd_lightning.losses import (
    ConditionalLoss,
    DISTLoss,
    DKDLoss,
    HardDistillationLoss,
    JSDLoss,
    KDLoss,
    MLKDLoss,
    NKDLoss,
    ReverseKLLoss,
    RLDLoss,
    TTMLoss,
    WTTMLoss,
)
from kd_lightning.losses.protocols import standardizes, supports_top_k, temperature_of

TARGET = torch.tensor([0, 3, 1, -100, 2, 2, -100, 0])
INNER = [KDLoss, DKDLoss, TTMLoss, WTTMLoss, NKDLoss, RLDLoss, JSDLoss, ReverseKLLoss, HardDistillationLoss]
near = {"rtol": 1e-9, "atol": 1e-12}


def randn(seed=0, rows=8, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 2).unbind()


def rows_by_hand(student, teacher, labels, weight, temperature):
    """Row by row; labels are a class, None, or probabilities."""
    values = []
    for s, t, y in zip(student.double().numpy(), teacher.double().numpy(), labels, strict=True):
        soft = temperature**2 * rel_entr(softmax(t / temperature), softmax(s / temperature)).sum()
        share = None if y is None else np.eye(len(s))[y] if isinstance(y, int) else np.array(y)
        if share is not None and t.argmax() != share.argmax():
            soft = weight * soft - (1 - weight) * (share * log_softmax(s)).sum()
        values.append(soft)
    return torch.tensor(values)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rows_by_hand(weight, temperature):
    student, teacher = randn()
    labels = [None if y < 0 else y for y in TARGET.tolist()]
    expected = rows_by_hand(student, teacher, labels, weight, temperature)
    found = ConditionalLoss(KDLoss(temperature), weight, "none")(student, teacher, TARGET)
    torch.testing.assert_close(found, expected, **near)
    mean = ConditionalLoss(KDLoss(temperature, reduction="none"), weight)(student, teacher, TARGET)
    torch.testing.assert_close(mean, expected.mean(), **near)
    wrong = teacher.argmax(dim=1) != TARGET.clamp(min=0)
    assert 0 < (wrong & (TARGET >= 0)).sum() < (TARGET >= 0).sum()  # both kinds are among the rows


def test_probabilities():
    """As of mixed samples: the most likely class decides, and cross-entropy is that of the probabilities."""
    student, teacher = (logits[:4] for logits in randn(1))
    teacher[0, 2] = teacher[1, 0] = 9.0
    soft = torch.tensor([[0.6, 0.0, 0.4, 0.0], [0.7, 0.3, 0.0, 0.0], [0.0, 0.2, 0.3, 0.5], [math.nan] * 4]).double()
    expected = rows_by_hand(student, teacher, [*soft[:3].tolist(), None], 0.25, 2.0)
    found = ConditionalLoss(KDLoss(2.0), 0.25, "none")(student, teacher, soft)
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(found[0].item(), expected[0].item(), **near)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("kind", ["classes", "floats", "two classes"])
def test_binary_by_hand(shape, kind):
    student, teacher = (logits.flatten()[:6] for logits in randn(2))
    y = torch.tensor([0.0, 1.0, 0.0, 1.0, math.nan, 1.0], dtype=torch.float64)
    expected = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), y.tolist(), strict=True):
        p, q = expit(s / 3), expit(t / 3)
        soft = 9 * (rel_entr(q, p) + rel_entr(1 - q, 1 - p))
        if not math.isnan(label) and (t > 0) != (label > 0.5):
            soft = 0.2 * soft - 0.8 * math.log(expit(s) if label else 1 - expit(s))
        expected.append(soft)
    y = {
        "classes": torch.where(y.isnan(), -100, y).long(),
        "floats": y.view(shape),
        "two classes": torch.stack([1 - y, y], dim=1),
    }[kind]
    found = ConditionalLoss(KDLoss(3.0, "binary"), 0.2, "none")(student.view(shape), teacher.view(shape), y)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **near)


class TestLimits:
    @pytest.mark.parametrize("make", INNER)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_is_the_inner_loss_to_the_bit(self, make, reduction):
        """At weight 1; where the teacher is right; and without any label. Value and gradient."""
        student, teacher = (logits.float() for logits in randn(3))
        right = torch.where(TARGET < 0, -100, teacher.argmax(dim=1))
        for weight, target in ((1.0, TARGET), (0.0, right), (0.4, torch.full_like(TARGET, -100))):
            found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
            loss = ConditionalLoss(make(), weight, reduction)(found, teacher, target)
            alone = make(reduction=reduction)(expected, teacher, target)
            assert torch.equal(loss, alone)
            loss.sum().backward(), alone.sum().backward()
            assert torch.equal(found.grad, expected.grad)

    @pytest.mark.parametrize("make", INNER)
    def test_wrong_rows_have_the_labels_gradient_alone(self, make):
        student, teacher = randn(4)
        target = teacher.argmin(dim=1)
        found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
        ConditionalLoss(make())(found, teacher, target).backward()
        nn.functional.cross_entropy(expected, target).backward()
        torch.testing.assert_close(found.grad, expected.grad, **near)

    def test_a_tie_counts_as_right(self):
        student, teacher = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0]] * 2)
        rows = ConditionalLoss(KDLoss(1.0), reduction="none")(student, teacher, torch.tensor([0, 1]))
        assert rows[0] == rows[1] == KDLoss(1.0)(student, teacher)

    def test_a_teacher_that_is_not_finite_is_not_hidden(self):
        teacher = torch.full((1, 3), math.nan)
        assert ConditionalLoss(KDLoss())(torch.zeros(1, 3), teacher, torch.tensor([0])).isnan()

    def test_gradcheck(self):
        student, teacher = randn(5)
        loss = ConditionalLoss(KDLoss(2.0), 0.3, "none")
        assert torch.autograd.gradcheck(lambda s: loss(s, teacher, TARGET), [student.requires_grad_()])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        student, teacher = (logits.to(dtype) for logits in randn(6))
        found = ConditionalLoss(KDLoss(2.0), 0.3)(student, teacher, TARGET)
        expected = ConditionalLoss(KDLoss(2.0), 0.3)(student.double(), teacher.double(), TARGET)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_of_torch():
    student, teacher = randn(7)
    right = teacher.argmax(dim=1)
    rows = ConditionalLoss(nn.MSELoss(), reduction="none")(student, teacher, right)
    torch.testing.assert_close(rows, (student - teacher).square().mean(dim=1), **near)
    wrong = ConditionalLoss(nn.MSELoss(), reduction="none")(student, teacher, teacher.argmin(dim=1))
    torch.testing.assert_close(wrong, nn.functional.cross_entropy(student, teacher.argmin(1), reduction="none"), **near)


def test_passes_on_what_the_inner_loss_declares():
    loss = ConditionalLoss(KDLoss(3.0, standardize=True))
    assert (loss.task, temperature_of(loss), standardizes(loss), supports_top_k(loss)) == (
        "multiclass",
        3.0,
        True,
        False,
    )
    assert supports_top_k(ConditionalLoss(KDLoss())) and ConditionalLoss(KDLoss(task="binary")).task == "binary"
    assert temperature_of(ConditionalLoss(HardDistillationLoss())) == 1.0
    loss.temperature = 5.0
    assert loss.loss.temperature == 5.0
    loss.wrong_weight = 1.5
    with pytest.raises(InputError, match=r"wrong_weight must lie in \[0, 1\], got 1.5"):
        loss(*randn(), TARGET)
    inner = KDLoss(reduction="none")
    ConditionalLoss(inner, 0.5)(*randn(), TARGET)
    assert inner.reduction == "none"  # it is as it was


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ConditionalLoss(KDLoss(), -0.1), r"wrong_weight must lie in \[0, 1\], got -0.1"),
            (lambda: ConditionalLoss(KDLoss(), math.nan), r"wrong_weight must lie in \[0, 1\], got nan"),
            (lambda: ConditionalLoss(KDLoss(), reduction="sum"), "reduction must be one of"),
            (lambda: ConditionalLoss("kd"), "loss must be a soft loss, got str"),
            (lambda: ConditionalLoss(nn.Identity()), "loss: Identity has no reduction"),
            (lambda: ConditionalLoss(DISTLoss()), "DISTLoss compares the rows of a batch"),
            (lambda: ConditionalLoss(MLKDLoss()), "MLKDLoss compares the rows of a batch"),
            (lambda: ConditionalLoss(KDLoss(task="multilabel")), "multiclass or binary, got multilabel"),
        ],
    )
    def test_of_the_constructor(self, make, message):
        with pytest.raises(InputError, match=message):
            make()

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (None, "target must be given to ConditionalLoss, with -100 where there is no label, got None"),
            (torch.zeros(3).long(), r"target must be of shape \[8\], got torch.int64 of shape \[3\]"),
            (torch.zeros(8, 4).long(), r"target must be of shape \[8\], got torch.int64 of shape \[8, 4\]"),
            (torch.zeros(8, 3), r"target must be of shape \[8\] or \[8, 4\], got torch.float32 of shape \[8, 3\]"),
        ],
    )
    def test_of_targets(self, target, message):
        with pytest.raises(InputError, match=message):
            ConditionalLoss(KDLoss())(*randn(), target)

    def test_a_loss_without_rows(self):
        class Mean(nn.Module):
            reduction = "mean"

            def forward(self, student, teacher):
                return (student - teacher).abs().mean()

        with pytest.raises(InputError, match=r"loss: Mean with reduction 'none' must return one value for each row"):
            ConditionalLoss(Mean())(*randn(), TARGET)
