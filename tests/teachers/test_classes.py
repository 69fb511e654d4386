"""Teachers that know more classes than the student: probabilities are those among the student's classes."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import Dataset

from kd_lightning import (
    Batch,
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.cache.codecs import TopKCodec
from kd_lightning.losses import KDLoss
from kd_lightning.teachers.checks import class_order
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.findings import match_labels

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


@pytest.mark.parametrize("classes", [["0", 1, 2], [0.0, 1, 2], 3, [[0], 1, 2]])
def test_classes_of_other_types(classes):
    with pytest.raises(InputError, match="classes must be a list of class numbers and None, got"):
        Teacher(network(3), classes=classes)


def test_any_sequence_of_integers_is_the_same_map():
    expected = Teacher(network(3), classes=[2, 0, 1])
    for classes in ((2, 0, 1), np.array([2, 0, 1]), torch.tensor([2, 0, 1]), [np.int64(2), 0, 1]):
        teacher = Teacher(network(3), classes=classes)
        assert teacher.fingerprint() == expected.fingerprint()
        assert torch.equal(teacher(X), expected(X))


def test_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=nn.Module)
    linear = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 4}}
    teacher = {"class_path": "kd_lightning.Teacher", "init_args": {"network": linear, "classes": CLASSES}}
    config = parser.parse_object({"teacher": teacher})
    assert yaml.safe_load(parser.dump(config))["teacher"]["init_args"]["classes"] == CLASSES
    assert parser.instantiate_classes(config).teacher.classes == CLASSES


def test_confidence_is_that_among_the_students_classes():
    """w_k = (1 - exp(L_k) / sum of exp(L_j)) / (K - 1), in float64."""
    more, same = network(4), network(3, 2)
    ensemble = Ensemble([Teacher(more, classes=CLASSES), same])
    y = torch.tensor([0, 1, 2, 0, 1])
    losses = torch.stack([-z.double().log_softmax(-1)[range(5), y] for z in (more(X)[:, KEPT], same(X))], dim=1)
    expected = 1 - losses.softmax(dim=1)
    torch.testing.assert_close(ensemble.confidence(ensemble(Batch(X)), y).double(), expected, rtol=1e-5, atol=1e-6)


def test_as_one_network():
    teachers = [Teacher(network(4, seed), classes=CLASSES) for seed in (0, 1)]
    found = Ensemble(teachers, use_vmap=True)(Batch(X))
    torch.testing.assert_close(found, torch.stack([network(4, seed)(X)[:, KEPT] for seed in (0, 1)]))


def test_the_order_that_is_found_keeps_dropped_classes():
    """Of the outputs [1, None, 0, 2], the classes 0 and 1 are exchanged in the labels."""
    torch.manual_seed(0)
    y = torch.randint(3, (300,))
    logits = F.one_hot(torch.tensor([1, 0, 2])[y], 3) * 5.0 + torch.randn(300, 3)
    finding = class_order(match_labels(logits, y, "multiclass"), "multiclass", CLASSES)
    assert finding.hint == "Teacher(network, classes=[0, None, 1, 2])"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_rest_of_the_stored_probability_is_that_of_kept_classes(temperature):
    """Of 7 outputs, 5 are the student's, and 2 are stored; the largest logits are of dropped ones."""
    kept, k = [5, 0, 2, 3, 6], 2
    logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(3))
    logits[:, [1, 4]] += 9
    codec = TopKCodec(7, "float32", k, kept)
    found = codec.decode(torch.from_numpy(codec.encode(logits)))
    assert found[:, [1, 4]].eq(-math.inf).all()
    exact = logits[:, kept].double()
    p = exact.softmax(dim=1)
    for row in range(8):
        order = exact[row].argsort(descending=True)
        expected = torch.empty(5, dtype=torch.float64)
        expected[order[:k]] = exact[row, order[:k]]
        rest = exact[row, order[k:]].exp().sum() / 3
        expected[order[k:]] = rest.log()
        torch.testing.assert_close(found[row, kept].double(), expected, rtol=1e-5, atol=1e-6)
        if temperature == 1:  # the probabilities of the stored classes are exact
            torch.testing.assert_close(found[row, kept].double().softmax(0)[order[:k]], p[row, order[:k]])
    with pytest.raises(InputError, match="below the number of classes, 5, got 5"):
        TopKCodec(7, "float32", 5, kept)


class Data(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3


def test_a_cache_stores_the_largest_of_kept_classes(quiet_trainer, tmp_path):
    """With k = 2 of the 3 classes that the student has, the run equals the one without a cache."""
    teacher = network(6)
    with torch.no_grad():
        teacher.bias[3:] += 20  # of classes that the student does not have
    maps = {"three": [1, 0, 2, None, None, None], "other": [0, 1, 2, None, None, None]}
    ends = {}
    for name, classes in maps.items():
        for cache in ({}, {"cache": tmp_path, "cache_top_k": 2, "cache_dtype": "float32"}):
            seed_everything(1, verbose=False)
            module = DistillModule(
                network(3, 1), Teacher(copy.deepcopy(teacher), classes=classes, **cache), soft_loss=KDLoss(1.0)
            )
            data = SemiSupervisedDataModule(DatasetSource(Data()), labeled=2, val_size=2, num_views=1, batch_size=6)
            quiet_trainer(max_epochs=2).fit(module, datamodule=data)
            ends[name, bool(cache)] = module.student.weight.detach().clone()
    for name in maps:  # the one class that is not stored has the whole rest
        torch.testing.assert_close(ends[name, True], ends[name, False], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ends["three", True], ends["other", True], atol=1e-3)
