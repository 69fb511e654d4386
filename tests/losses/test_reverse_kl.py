"""ReverseKLLoss: its value in float64, and its relation to KDLoss."""

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax

from kd_lightning.losses import KDLoss, ReverseKLLoss

SHAPES = {"multiclass": (7, 5), "multilabel": (6, 4), "binary": (8, 1)}


def randn(seed, *shape, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).mul(scale).unbind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("task", SHAPES)
def test_agrees_with_the_formula(task, temperature, dtype):
    student, teacher = (z.to(dtype) for z in randn(0, *SHAPES[task]))
    s, t = (z.double().numpy() / temperature for z in (student, teacher))
    if task == "multiclass":
        rows = rel_entr(softmax(s, axis=1), softmax(t, axis=1)).sum(axis=1)
    else:
        rows = (rel_entr(expit(s), expit(t)) + rel_entr(expit(-s), expit(-t))).mean(axis=1)
    expected = torch.tensor(temperature**2 * rows)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    found = ReverseKLLoss(temperature, task, "none")(student, teacher)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **near)
    torch.testing.assert_close(ReverseKLLoss(temperature, task)(student, teacher).double(), expected.mean(), **near)


def test_is_kd_with_both_exchanged():
    student, teacher = randn(1, 7, 5)
    torch.testing.assert_close(ReverseKLLoss()(student, teacher), KDLoss()(teacher, student))


def test_prefers_a_student_that_leaves_out_a_class():
    """A teacher of two likely classes: KD prefers the student of both, and of a third one."""
    teacher = torch.tensor([[0.495, 0.495, 0.01]]).log()
    one, all_three = torch.tensor([[0.96, 0.02, 0.02]]).log(), torch.tensor([[0.3, 0.3, 0.4]]).log()
    assert ReverseKLLoss(1.0)(one, teacher) < ReverseKLLoss(1.0)(all_three, teacher)
    assert KDLoss(1.0)(one, teacher) > KDLoss(1.0)(all_three, teacher)


def test_gradient_by_hand():
    """p_k (log p_k / q_k - KL) for each logit."""
    student, teacher = randn(2, 3, 4)
    student.requires_grad_()
    ReverseKLLoss(1.0)(student, teacher).backward()
    p, q = (softmax(z.detach().numpy(), axis=1) for z in (student, teacher))
    expected = p * (np.log(p / q) - rel_entr(p, q).sum(axis=1, keepdims=True)) / 3
    assert student.grad.numpy() == pytest.approx(expected)


def test_repr_and_defaults():
    assert repr(ReverseKLLoss()) == "ReverseKLLoss(temperature=4.0, task='multiclass', reduction='mean')"
