"""Norms and balance of gradients, and the number of unlabeled samples."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kd_lightning import InputError
from kd_lightning.teachers.training_checks import balance, gradient_norms, gradients, pool


def test_norms():
    """Of weighted terms, whatever the scale, and the graph stays."""
    layer = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[3.0, 4.0]], dtype=torch.double)
    terms = {"hard": (0.5, layer(x).sum()), "soft": (2.0, 3 * layer(x).sum()), "free": (1.0, torch.tensor(1.0))}
    expected = {"hard": 2.5, "soft": 30.0, "free": 0.0}
    assert gradient_norms(terms, [*layer.parameters()]) == pytest.approx(expected)
    assert gradient_norms(terms, [*layer.parameters()], scale=1024.0) == pytest.approx(expected)
    terms["hard"][1].backward()
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]


def test_a_reentrant_checkpoint():
    """It hides parameters from a gradient of a single term, which would be 0."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for reentrant in (True, False):
        x = checkpoint(network[0], torch.ones(1, 2, requires_grad=True), use_reentrant=reentrant)
        terms = {"hard": (1.0, network[1](x).sum())}
        if reentrant:
            with pytest.raises(InputError, match="use_reentrant=False"):
                gradient_norms(terms, [*network.parameters()])
            assert gradients(terms, network).text.startswith("not checked: reentrant checkpointing hides")
        else:
            found = gradient_norms(terms, [*network.parameters()])["hard"]
            terms["hard"][1].backward()
            expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in network.parameters()))
            assert found == pytest.approx(expected)


class TestBalance:
    def found(self, hard, soft, labeled=1.0):
        return balance({"hard": hard, "soft": soft}, {"soft"}, labeled, "here")

    def test_most_of_the_time(self):
        assert self.found([1, 1, 1], [11, 11, 1]).reason == "balance"
        assert self.found([1, 1, 1, 1], [11, 11, 1, 1]).hint is None  # half of the time
        assert self.found([1, 1], [10, 10]).hint is None  # not above 10

    def test_text(self):
        found = self.found([1, 1, 2], [20, 30, 80])
        ends = "soft 20 times hard at first, 40 times at the end"
        assert found.text == f"{ends}, 30 times in the middle of 3 measurements (here)"
        assert "T²" in found.hint and "soft_weight" in found.hint

    def test_few_labels(self):
        """Where most samples have no label, the soft term must count more."""
        assert self.found([1, 1], [99, 99], labeled=0.49).hint is None
        assert self.found([1, 1], [99, 99], labeled=0.5).hint is not None
        assert self.found([1, 1], [99, 99], labeled=None).hint is not None

    def test_several_soft_terms(self):
        courses = {"hard": [1, 1], "kl": [1, 1], "l1": [20, 20], "at": [99, 99]}
        assert balance(courses, {"kl", "l1"}, 1.0, "here").text.startswith("soft 20 times hard")

    @pytest.mark.parametrize("courses", [{}, {"hard": [1]}, {"soft": [1]}, {"hard": [0.0], "soft": [1.0]}])
    def test_nothing_to_compare(self, courses):
        assert "not checked" in balance(courses, {"soft"}, 1.0, "here").text

    def test_no_finite_gradient(self):
        assert "not checked" in self.found([1.0], [math.inf]).text


class TestPool:
    def test_none(self):
        assert pool(207, 0, 6).reason == "few" and "source's `unlabeled`" in pool(207, 0, 6).hint
        assert pool(600, 0, 6).hint is None
        found = pool(50, 0, 10, 1028)
        assert found.reason == "few" and "1028 more of the training part are left out" in found.text

    def test_some(self):
        found = pool(50, 1028, 10)
        assert found.text == "1028 beside 50 labeled ones, 20.6 for each" and found.hint is None
        assert pool(0, 10, 10).text == "10 beside 0 labeled ones"
