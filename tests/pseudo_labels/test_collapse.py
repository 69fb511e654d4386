"""When a class has absorbed the others."""

import pytest
import torch

from kd_lightning.pseudo_labels.collapse import collapse_text


def text(accepted, given=(5, 5, 5), unlabeled=100):
    return collapse_text(torch.tensor(accepted), torch.tensor(given), unlabeled)


def test_names_class_and_shares():
    assert text([2.0, 1.0, 60.0], (5, 3, 2)).startswith(
        "95% of the accepted pseudo-labels are of class 2, which has 20%"
    )


@pytest.mark.parametrize(
    ("accepted", "given", "unlabeled"),
    [
        ([6.0, 0.0, 53.9], (5, 5, 5), 100),  # less than nine tenths
        ([0.0, 50.0, 0.0], (5, 5, 5), 100),  # easy classes come first
        ([0.0, 0.0, 90.0], (1, 1, 3), 100),  # most labels are of this class, too
        ([0.0, 0.0, 29.0], (5, 5, 5), 29),  # so few rows are of one class by chance
        ([0.0, 0.0, 90.0], (0, 0, 0), 100),  # nothing to compare with
        ([0.0, 0.0, 0.0], (5, 5, 5), 100),
        ([90.0], (5,), 100),
    ],
)
def test_says_nothing(accepted, given, unlabeled):
    assert text(accepted, given, unlabeled) is None


def test_limits():
    assert text([0.0, 5.1, 45.9])
    assert text([0.0, 0.0, 60.0], (5, 5, 10))
    assert text([0.0, 0.0, 16.0], unlabeled=30)
