"""JSDLoss: scipy's value, and its limits."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import expit, softmax

from kd_lightning.losses import JSDLoss, KDLoss

SHAPES = {"multiclass": (7, 5), "multilabel": (6, 4), "binary": (8, 1)}


def randn(seed, *shape, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).mul(scale).unbind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("task", SHAPES)
def test_is_scipys_value(task, temperature, dtype):
    student, teacher = (z.to(dtype) for z in randn(0, *SHAPES[task]))
    pair = [z.double().numpy() / temperature for z in (student, teacher)]
    if task == "multiclass":
        distance = jensenshannon(*(softmax(z, axis=1) for z in pair), axis=1)
    else:
        distance = jensenshannon(*(np.stack([expit(z), expit(-z)]) for z in pair), axis=0)
    expected = torch.tensor(temperature**2 * np.reshape(distance**2, (len(student), -1)).mean(axis=1))
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    found = JSDLoss(temperature, task, "none")(student, teacher)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **near)
    torch.testing.assert_close(JSDLoss(temperature, task)(student, teacher).double(), expected.mean(), **near)


def test_is_symmetric_and_bounded():
    student, teacher = randn(1, 7, 5, scale=100.0)
    loss = JSDLoss(2.0, reduction="none")
    torch.testing.assert_close(loss(student, teacher), loss(teacher, student))
    assert (loss(student, teacher) <= 4 * math.log(2) + 1e-12).all()
    far = torch.tensor([[1e3, 0.0, 0.0]])
    assert loss(far, far.roll(1, dims=1)).item() == pytest.approx(4 * math.log(2))


def test_is_a_quarter_of_kd_where_both_hardly_differ():
    student, noise = randn(2, 7, 5)
    teacher = student + 1e-4 * noise
    assert JSDLoss()(student, teacher).item() == pytest.approx(KDLoss()(student, teacher).item() / 4, rel=1e-3)


def test_repr_and_defaults():
    assert repr(JSDLoss()) == "JSDLoss(temperature=4.0, task='multiclass', reduction='mean')"
