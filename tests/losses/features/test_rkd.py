import itertools
import math

import numpy as np
import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.losses import RKDLoss


def huber(difference):
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def relations(feature):
    """All distances over their mean, and all cosines of angles, by numpy."""
    rows = feature.double().numpy().reshape(len(feature), -1)
    samples = range(len(rows))
    distance = np.array([[math.dist(a, b) for b in rows] for a in rows])
    if (distance > 0).any():
        distance = distance / distance[distance > 0].mean()
    cosine = np.zeros((len(rows),) * 3)
    for i, j, k in itertools.product(samples, samples, samples):
        to_i, to_k = rows[i] - rows[j], rows[k] - rows[j]
        lengths = np.linalg.norm(to_i) * np.linalg.norm(to_k)
        cosine[i, j, k] = to_i @ to_k / lengths if lengths else 0
    return distance, cosine


def reference(student, teacher, distance_weight=25.0, angle_weight=50.0):
    parts = []
    for of_student, of_teacher in zip(relations(student), relations(teacher), strict=True):
        differences = (of_student - of_teacher).flatten()
        parts.append(sum(huber(difference) for difference in differences) / len(differences))
    return distance_weight * parts[0] + angle_weight * parts[1]


@pytest.mark.parametrize(("student", "teacher"), [((5, 4), (5, 9)), ((4, 3, 7), (4, 2, 5)), ((6, 3, 4, 4), (6, 8))])
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_value(randn, student, teacher, weights):
    student, teacher = randn(*student), randn(*teacher, seed=1)
    student[1] *= 5  # some differences lie in the linear part
    value = RKDLoss(*weights)(student, teacher)
    assert value.item() == pytest.approx(reference(student, teacher, *weights), rel=1e-11)


def test_published_weights(randn):
    student, teacher = randn(4, 6), randn(4, 5, seed=1)
    both = 25 * RKDLoss(1, 0)(student, teacher) + 50 * RKDLoss(0, 1)(student, teacher)
    torch.testing.assert_close(RKDLoss()(student, teacher), both, rtol=1e-12, atol=0)


def test_ignores_shift_rotation_and_scale(randn, rotation):
    student, teacher = randn(5, 6), randn(5, 4, seed=1)
    value = RKDLoss()(student, teacher)
    moved = 3 * student @ rotation(6) + randn(6, seed=2)
    torch.testing.assert_close(RKDLoss()(moved, teacher @ rotation(4) / 5 - 7), value, rtol=1e-10, atol=0)
    assert RKDLoss()(teacher, teacher) == 0 < value
    assert RKDLoss()(3 * teacher @ rotation(4) + 1, teacher).item() == pytest.approx(0, abs=1e-25)


def test_a_large_common_part_does_not_hide_distances_in_float32(randn):
    student, teacher = randn(6, 8), randn(6, 5, seed=1)
    value = RKDLoss()((student + 1000).float(), (teacher - 1000).float())
    assert value.item() == pytest.approx(reference(student, teacher), rel=1e-3)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_equal_samples_have_distance_0_and_finite_gradients(randn, weights):
    student, teacher = randn(4, 6), randn(4, 5, seed=1)
    student[1] = student[0]
    teacher[2] = teacher[3]
    student.requires_grad_()
    value = RKDLoss(*weights)(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(reference(student.detach(), teacher, *weights), rel=1e-11)
    assert student.grad.isfinite().all() and 0 < student.grad.abs().max() < 10


@pytest.mark.parametrize("rows", [0, 1])
def test_one_sample_teaches_nothing(randn, rows):
    student = randn(rows, 6).requires_grad_()
    value = RKDLoss()(student, randn(rows, 4, seed=1))
    value.backward()
    assert value == 0 and (student.grad == 0).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((-1.0, 50.0), "distance_weight must be finite and at least 0, got -1.0"),
        ((25.0, math.nan), "angle_weight must be finite and at least 0, got nan"),
        ((0.0, 0), "distance_weight or angle_weight must be above 0, got 0 for both"),
    ],
)
def test_weights_out_of_range(weights, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        RKDLoss(*weights)


def test_repr():
    assert repr(RKDLoss(1)) == "RKDLoss(distance_weight=1.0, angle_weight=50.0)"
