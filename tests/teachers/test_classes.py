"""Teachers that know more classes than the student: probabilities are those among the student's classes."""

import math

import pytest
import torch
from torch import nn

from kd_lightning import Batch, DistillModule, EnsembleDistillModule, InputError, Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.teachers.ensemble import Ensemble

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
KEPT = [2, 0, 3]  # outputs of the classes 0, 1, 2; output 1 is none of the student's
CLASSES = [1, None, 0, 2]


def network(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, outputs)


def test_probabilities_are_renormalised_at_the_temperature():
    teacher, student, temperature = network(4), network(3, 1), 3.0
    restricted = (teacher(X).double() / temperature).exp()[:, KEPT]
    target = restricted / restricted.sum(1, keepdim=True)
    log = (student(X).double() / temperature).log_softmax(-1)
    expected = temperature**2 * (target * (target.log() - log)).sum(1).mean()
    module = DistillModule(student, Teacher(teacher, classes=CLASSES), soft_loss=KDLoss(temperature), soft_weight=1.0)
    torch.testing.assert_close(module.training_step((X, None), 0).double(), expected, rtol=1e-5, atol=1e-6)


def test_an_ensemble_with_a_teacher_of_more_classes():
    more, same, student = network(4), network(3, 2), network(3, 1)
    module = EnsembleDistillModule(
        student, [Teacher(more, classes=CLASSES), same], soft_loss=KDLoss(2.0), soft_weight=1.0
    )
    both = [(z.double() / 2).softmax(-1) for z in (more(X)[:, KEPT], same(X))]
    target = (both[0] + both[1]) / 2
    log = (student(X).double() / 2).log_softmax(-1)
    expected = 4 * (target * (target.log() - log)).sum(1).mean()
    torch.testing.assert_close(module.training_step((X, None), 0).double(), expected, rtol=1e-5, atol=1e-6)


def test_known_and_missing_classes():
    teacher = Teacher(network(3), classes=[3, None, 0])
    assert teacher.known_classes == [3, 0]
    assert teacher.missing_classes == [1, 2]
    logits = teacher(X)
    assert logits.shape == (5, 4)
    assert logits[:, 1:3].eq(-math.inf).all()
    assert torch.equal(logits[:, [3, 0]], network(3)(X)[:, [0, 2]])
    known = Ensemble([teacher, network(4, 1)]).known_classes(4)
    assert known.tolist() == [[True, False, False, True], [True] * 4]
    with pytest.raises(InputError, match=r"does not know the classes \[1, 2\]"):
        DistillModule(network(4), teacher)


def test_fingerprints_tell_class_maps_apart():
    maps = [[0, 1, None], [0, None, 1], [None, 0, 1], None]
    assert len({Teacher(network(3), classes=classes).fingerprint() for classes in maps}) == len(maps)


@pytest.mark.parametrize("classes", [[None, None, None], [0, 0, None], [0, -1, None], []])
def test_classes_that_are_no_map(classes):
    with pytest.raises(InputError, match="classes must name at least one class, from 0 on, and none twice"):
        Teacher(network(3), classes=classes)


def test_another_number_of_outputs():
    with pytest.raises(InputError, match=r"classes has 2 entries, but the teacher's output is \[5, 3\]"):
        Teacher(network(3), classes=[0, None])(Batch(X))
