"""The digits: equal to what scikit-learn loads, whose import they do without."""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits

from kd_lightning.data import Digits


def test_equal_to_scikit_learn():
    parts, expected = Digits().load(), load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for part, rows in ((parts.train, order[600:]), (parts.test, order[:600])):
        images = torch.stack([part.images[index][0] for index in range(len(rows))])
        assert torch.equal(images, torch.from_numpy(expected.images[rows] / 16).float().unsqueeze(1))
        assert torch.equal(part.targets, torch.from_numpy(expected.target[rows]).long())
    assert parts.class_names == [str(name) for name in expected.target_names]


def test_scikit_learn_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # an import of it fails
    assert len(Digits().load().train.targets) == 1197
