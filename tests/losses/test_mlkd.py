"""MLKD: the formula in float64 with loops, which samples and classes count, and its limits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import KDLoss, MLKDLoss

PUBLISHED = (2.0, 3.0, 4.0, 5.0, 6.0)


def randn(seed, rows=6, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, classes, generator=generator, dtype=torch.float64).mul(scale).unbind()


def reference(student, teacher, temperatures, weights):
    """Rows (B,) of instance and batch terms, and the class term, a number."""
    s, t = student.double().numpy(), teacher.double().numpy()
    rows, classes = range(len(s)), range(s.shape[1])
    confidence, frequency = softmax(t, axis=1).max(axis=1), softmax(t, axis=1).sum(axis=0)
    found, of_classes = np.zeros(len(s)), 0.0
    for temperature in temperatures:
        p, q = softmax(s / temperature, axis=1), softmax(t / temperature, axis=1)
        for i in rows:
            if confidence[i] <= np.percentile(confidence, 50):
                found[i] += weights[0] * temperature**2 * rel_entr(q[i], p[i]).sum()
                found[i] += weights[1] * sum((q[i] @ q[j] - p[i] @ p[j]) ** 2 for j in rows)
        for a in classes:
            if frequency[a] <= np.percentile(frequency, 50):
                of_classes += sum((q[:, a] @ q[:, b] - p[:, a] @ p[:, b]) ** 2 for b in classes) / len(classes)
    return torch.tensor(found), weights[2] * of_classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperatures", [PUBLISHED, (1.0,)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 3.0)])
@pytest.mark.parametrize(("rows", "classes"), [(6, 5), (7, 4), (1, 3), (2, 2)])
def test_agrees_with_the_formula(rows, classes, weights, temperatures, dtype):
    student, teacher = (z.to(dtype) for z in randn(0, rows, classes))
    expected, of_classes = reference(student, teacher, temperatures, weights)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    mean = MLKDLoss(temperatures, *weights)(student, teacher)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean.double(), expected.mean() + of_classes, **near)
    found = MLKDLoss(temperatures, *weights, reduction="none")(student, teacher)
    torch.testing.assert_close(found.double(), expected + of_classes, **near)


def test_without_relations_it_is_kd_of_the_uncertain_samples():
    student, teacher = randn(1)
    confidence = teacher.softmax(dim=1).amax(dim=1)
    least = confidence.argsort()[:3]
    found = MLKDLoss(batch_weight=0.0, class_weight=0.0)(student, teacher)
    expected = sum(KDLoss(temperature)(student[least], teacher[least]) for temperature in PUBLISHED) / 2
    torch.testing.assert_close(found, expected)


def test_relations_do_not_depend_on_which_class_is_which():
    """A student that exchanges two classes everywhere has the same relations between samples."""
    _, teacher = randn(2)
    student = teacher[:, [1, 0, 2, 3, 4]]
    assert MLKDLoss(instance_weight=0.0, class_weight=0.0)(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert MLKDLoss(instance_weight=0.0, batch_weight=0.0)(student, teacher) > 0.001


def test_relations_do_not_depend_on_which_sample_is_which():
    _, teacher = randn(3)
    student = teacher[[1, 0, 2, 3, 4, 5]]
    assert MLKDLoss(instance_weight=0.0, batch_weight=0.0)(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert MLKDLoss(instance_weight=0.0, class_weight=0.0)(student, teacher) > 0.001


def test_class_relations_grow_with_the_square_of_the_batch():
    student, teacher = randn(4)
    loss = MLKDLoss(instance_weight=0.0, batch_weight=0.0)
    twice = loss(student.repeat(2, 1), teacher.repeat(2, 1))
    torch.testing.assert_close(twice, 4 * loss(student, teacher))


def test_temperature_is_the_median():
    assert MLKDLoss().temperature == 4 and MLKDLoss([8.0, 1.0]).temperature == 4.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperatures": []}, r"temperatures must be a list of numbers above 0, got \[\]"),
        ({"temperatures": 4.0}, r"temperatures must be a list of numbers above 0, got 4\.0"),
        ({"temperatures": "4"}, r"temperatures must be a list of numbers above 0, got '4'"),
        ({"temperatures": [4.0, 0.0]}, r"each of temperatures must be finite and above 0, got 0\.0"),
        ({"instance_weight": -1.0}, r"instance_weight must be finite and at least 0, got -1\.0"),
        ({"batch_weight": math.inf}, r"batch_weight must be finite and at least 0, got inf"),
        ({"class_weight": math.nan}, r"class_weight must be finite and at least 0, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        MLKDLoss(**arguments)


def test_repr_and_defaults():
    weights = "instance_weight=1.0, batch_weight=1.0, class_weight=1.0"
    assert repr(MLKDLoss()) == f"MLKDLoss(temperatures={PUBLISHED}, {weights}, reduction='mean')"
