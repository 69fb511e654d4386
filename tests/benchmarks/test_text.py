"""The figures of benchmarks/text.py and benchmarks/language_model.py, by hand."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn


@pytest.fixture
def script(root, monkeypatch):
    """Imports a script, which lies in no package."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


class NextNumber(nn.Module):
    """Probability 1/2 for the number after the last one, and the rest evenly."""

    def forward(self, ids):
        logits = torch.full((*ids.shape, 96), math.log(0.5 / 95))
        return SimpleNamespace(logits=logits.scatter(2, (ids + 1).unsqueeze(2), math.log(0.5)))


def test_nats_are_of_each_character_given_those_before_it(script):
    rows = [[0, 1, 2, 3, 4], [7, 8, 9, 1, 2]]  # of 8 characters that have one before them, 7 follow it
    pieces = SimpleNamespace(ids=torch.tensor(rows * 50))
    expected = (7 * math.log(2) + math.log(95 / 0.5)) / 8
    assert script("language_model").nats(NextNumber(), pieces) == pytest.approx(expected, rel=1e-5)


def test_the_student_is_twelve_times_smaller(script):
    pytest.importorskip("transformers")
    student = sum(p.numel() for p in script("language_model").network_of("student").parameters())
    assert 10 < 813_824 / student < 14


def test_figures_of_kinds(script):
    """Of five mails, one hard ham is taken for spam."""
    text = script("text")
    targets = torch.tensor([0, 0, 1, 1, 2])
    found = text.figures(torch.eye(3)[[0, 0, 1, 2, 2]], targets)
    assert found == pytest.approx({"accuracy": 80, "macro F1": 100 * (1 + 2 / 3 + 2 / 3) / 3, "ham or spam": 80})


def test_predictions_are_in_the_order_of_the_mails(script):
    """Mails are sorted by length for that."""
    text = script("text")

    class First(nn.Module):
        def forward(self, ids, mask):
            return torch.stack([ids[:, 0], mask.sum(dim=1), mask.sum(dim=1) - (ids != 0).sum(dim=1)], dim=1).float()

    lengths = torch.randint(1, 12, (150,))
    ids = torch.arange(1, 151).unsqueeze(1) * (torch.arange(12) < lengths.unsqueeze(1))
    logits = text.predict(First(), Mails(ids))
    assert logits[:, 0].tolist() == [*range(1, 151)]
    assert logits[:, 1].tolist() == lengths.tolist()
    assert not logits[:, 2].any()


class Mails:
    """Word pieces alone."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)
