"""The target class and the other classes, by hand."""

import numpy as np
import pytest
import torch

from kd_lightning.losses.target_class import split_target, target_class

LOGITS = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 3.0]], dtype=torch.float64)


def test_target_class():
    given = torch.tensor([2, -100])
    assert target_class("Loss", given, LOGITS).tolist() == [[2], [2]]
    assert target_class("Loss", torch.tensor([[0.1, 0.2, 0.7], [torch.nan] * 3]), LOGITS).tolist() == [[2], [2]]
    assert given.tolist() == [2, -100]


@pytest.mark.parametrize("target", [0, 1, 2])
def test_split_target(target):
    pair, others = split_target(LOGITS, torch.full((2, 1), target))
    for row, z in enumerate(LOGITS.numpy()):
        p = np.exp(z) / np.exp(z).sum()
        assert pair[row].exp().tolist() == pytest.approx([p[target], 1 - p[target]])
        assert others[row].exp().tolist() == pytest.approx(np.delete(p, target) / (1 - p[target]))


def test_a_certain_target_leaves_the_others_exact():
    """1 - p is 0 here."""
    pair, others = split_target(torch.tensor([[200.0, 1.0, 0.0]]), torch.zeros(1, 1, dtype=torch.long))
    assert pair[0, 1].item() == pytest.approx(np.log(np.exp(1.0) + 1) - 200)
    assert others.exp().tolist()[0] == pytest.approx([np.e / (1 + np.e), 1 / (1 + np.e)])
