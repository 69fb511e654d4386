"""HardDistillationLoss: cross-entropy with the teacher's decision, by hand."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from kd_lightning.losses import HardDistillationLoss, KDLoss

SHAPES = {"multiclass": (7, 5), "multilabel": (6, 4), "binary": (8, 1)}


def randn(seed, *shape, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).mul(scale).unbind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("task", SHAPES)
def test_agrees_with_the_formula(task, dtype):
    student, teacher = (z.to(dtype) for z in randn(0, *SHAPES[task]))
    s, t = (z.double().numpy() for z in (student, teacher))
    if task == "multiclass":
        rows = -log_softmax(s, axis=1)[np.arange(len(s)), t.argmax(axis=1)]
    else:
        rows = -np.log(np.where(t > 0, expit(s), 1 - expit(s))).mean(axis=1)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    found = HardDistillationLoss(task, "none")(student, teacher)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), torch.tensor(rows), **near)
    torch.testing.assert_close(HardDistillationLoss(task)(student, teacher).double(), torch.tensor(rows).mean(), **near)


@pytest.mark.parametrize("task", SHAPES)
def test_is_the_limit_of_kd_at_temperature_1_for_a_certain_teacher(task):
    student, teacher = randn(1, *SHAPES[task])
    expected = KDLoss(1.0, task)(student, 1e4 * teacher)
    torch.testing.assert_close(HardDistillationLoss(task)(student, teacher), expected)


def test_only_the_decision_counts():
    student, teacher = randn(2, 7, 5)
    loss = HardDistillationLoss()
    assert loss(student, teacher) == loss(student, 0.01 * teacher + 3)
    cached = torch.where(teacher < teacher.topk(2, dim=1).values[:, 1:], teacher.amin(dim=1, keepdim=True), teacher)
    assert loss(student, cached) == loss(student, teacher)  # the top 2, and one value for all others
    unknown = teacher.clone()  # classes that a teacher does not know
    unknown.scatter_(1, teacher.argmin(dim=1, keepdim=True), -torch.inf)
    assert loss(student, unknown) == loss(student, teacher)


def test_repr_and_declarations():
    assert repr(HardDistillationLoss()) == "HardDistillationLoss(task='multiclass', reduction='mean')"
    assert [HardDistillationLoss(task).supports_top_k for task in SHAPES] == [True, False, False]
