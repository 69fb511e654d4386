"""Which samples pseudo-labels are for."""

from types import SimpleNamespace

import torch

from kd_lightning.pseudo_labels.pool import unlabeled_samples

NAN = float("nan")


def data(labels):
    return SimpleNamespace(unlabeled_indices=lambda: [4, 1], visible_labels=lambda: labels)


def test_samples_without_a_label():
    assert unlabeled_samples(data(torch.tensor([0, -100, -100, 1, -100]))) == [1, 4]  # 2 is for validation


def test_samples_that_lack_some_labels():
    labels = torch.tensor([[0, 1], [NAN, NAN], [1, NAN], [NAN, NAN], [NAN, NAN]])
    assert unlabeled_samples(data(labels)) == [1, 2, 4]
    assert unlabeled_samples(data(labels), dense=True) == [1, 4]


def test_data_that_do_not_know_them():
    assert unlabeled_samples(None) is None
    assert unlabeled_samples(SimpleNamespace(unlabeled_indices=(1, 2))) is None
    assert unlabeled_samples(SimpleNamespace(unlabeled_indices=lambda: [3])) == [3]
