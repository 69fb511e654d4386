"""Rounds of values: by hand in float64, changes, and labels and targets that are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning import InputError, UncertaintyThreshold
from kd_lightning.pseudo_labels import PseudoValues
from kd_lightning.pseudo_labels.table import restore
from kd_lightning.pseudo_labels.tasks import ValuesTask

NAN = float("nan")
INDEX = torch.tensor([2, 5, 6, 9, 11])
Y = torch.tensor([[1.0, 200.0], [NAN, 100.0], [NAN, NAN], [5.0, NAN], [3.0, 600.0]])
TASK = ValuesTask()


def views(seed=0, outputs=2):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 100.0])[:outputs]
    return torch.randn(5, 4, outputs, generator=generator) * scale + 3 * scale


def by_hand(y, predictions, limit):
    """[index, output, label, spread, accepted] of each label that is not given, in order."""
    y, predictions = y.double().numpy().reshape(len(y), -1), predictions.double().numpy()
    rows = []
    for row in range(len(y)):
        for output in range(y.shape[1]):
            if np.isnan(y[row, output]):
                given = y[~np.isnan(y[:, output]), output]
                values = predictions[row, :, output]
                spread = values.std(ddof=1) / given.std(ddof=1)
                rows.append([int(INDEX[row]), output, values.mean(), spread, spread <= limit])
    return rows


def test_by_hand():
    first, given = TASK.make_round(INDEX, Y, views(), UncertaintyThreshold(0.4), None, 3)
    wanted = by_hand(Y, views(), 0.4)
    assert [*zip(first.index.tolist(), first.output.tolist(), strict=True)] == [(row[0], row[1]) for row in wanted]
    assert first.label.tolist() == pytest.approx([row[2] for row in wanted], rel=1e-6)
    assert first.spread.tolist() == pytest.approx([row[3] for row in wanted], rel=1e-5)
    assert first.accepted.tolist() == [row[4] for row in wanted]
    assert len({*first.accepted.tolist()}) == 2
    torch.testing.assert_close(given, Y[[0, 1, 3, 4]], equal_nan=True)
    assert (first.round, first.epoch, first.change.any().item(), first.label.dtype) == (0, 3, False, Y.dtype)

    second, _ = TASK.make_round(INDEX, Y, views(1), TASK.accept_all(), first, 4)
    assert (second.round, second.accepted.all().item()) == (1, True)
    wanted_now = by_hand(Y, views(1), np.inf)
    stds = [np.array([1.0, 5, 3]).std(ddof=1), np.array([200.0, 100, 600]).std(ddof=1)]
    moved = [abs(new[2] - old[2]) / stds[new[1]] for new, old in zip(wanted_now, wanted, strict=True)]
    assert second.change.tolist() == pytest.approx(moved, rel=1e-5)
    assert TASK.make_round(INDEX, Y, views(1), TASK.accept_all(), first, 4)[0].hash == second.hash != first.hash
    again = restore(first.state_dict())
    assert (type(again), again.hash) == (PseudoValues, first.hash)


def test_one_value_a_sample():
    y, found = torch.tensor([1.0, NAN, NAN, 4.0, 2.5]).double(), views(outputs=1)
    table, given = TASK.make_round(INDEX, y, found, UncertaintyThreshold(0.5), None, 0)
    wanted = by_hand(y, found, 0.5)
    assert (table.index.tolist(), table.output, table.label.dtype) == ([5, 6], None, torch.float64)
    assert table.label.tolist() == pytest.approx([row[2] for row in wanted], rel=1e-12)
    assert table.accepted.tolist() == [row[4] for row in wanted]
    assert given.tolist() == [1.0, 4.0, 2.5]


def test_far_from_zero():
    """Spreads of large values are not those of rounding."""
    found = torch.tensor([1e6, 1e6 + 0.5]).view(1, 2, 1).expand(5, -1, -1)
    y = torch.tensor([1e6, NAN, NAN, 1e6 + 1, 1e6 + 2])
    table, _ = TASK.make_round(INDEX, y, found, TASK.accept_all(), None, 0)
    assert table.spread.tolist() == pytest.approx([0.5 / np.sqrt(2)] * 2, rel=1e-6)


BAD = {
    "none": (torch.tensor([NAN, NAN]), "output has no given label, so its standard deviation"),
    "one of several": (torch.tensor([[1.0, NAN], [2.0, NAN]]), "output 'depth' has no given label"),
    "alone": (torch.tensor([2.0, NAN]), "output has the label 2 alone"),
    "constant": (torch.tensor([[1.0, 3.0], [2.0, 3.0]]), "output 'depth' has the label 3 alone"),
    "infinite": (torch.tensor([1.0, float("inf")]), "labels must be finite, or NaN where missing, got inf"),
    "integers": (torch.tensor([1, 2, -100]), "pseudo-labels of task: regression are floats, but the labels are torch"),
}


@pytest.mark.parametrize("name", BAD)
def test_given_labels_that_have_no_standard_deviation(name):
    class Data:
        class_names = ("width", "depth")

    y, message = BAD[name]
    with pytest.raises(InputError, match=f"Owner: {message}"):
        TASK.check_given(y, Data(), "Owner")
    with pytest.raises(InputError, match="PseudoLabelRefresh: "):
        TASK.make_round(torch.arange(len(y)), y, torch.zeros(len(y), 2, y[0].numel()), TASK.accept_all(), None, 0)


def test_numbers_of_outputs():
    with pytest.raises(InputError, match="Owner: samples have 2 values, but the student gives 3 outputs"):
        TASK.check_labels(Y, 3, None, "Owner")
    with pytest.raises(InputError, match="samples have 2 values, but the network gives 1 outputs"):
        TASK.make_round(INDEX, Y, views(outputs=1), TASK.accept_all(), None, 0)
    with pytest.raises(InputError, match=r"the net must give values \(B,\) or \(B, D\), got \[2, 3, 4\]"):
        TASK.rows(torch.zeros(2, 3, 4), "the net")


@pytest.mark.parametrize("weight", [torch.full((3, 2), 0.5), torch.ones(3)])
def test_what_a_selection_may_not_return(weight):
    with pytest.raises(InputError, match=r"must return targets \[3, 2\], and weights of zeros and ones"):
        TASK.make_round(INDEX, Y, views(), lambda found, *_: (found.mean(dim=1), weight), None, 0)


def test_hard_losses():
    outputs, target = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    for loss, wanted in ((nn.MSELoss(), [[1, 0], [9, 9]]), (nn.L1Loss(), [[1, 0], [3, 3]])):
        assert TASK.compare(outputs, target, loss)[0].tolist() == wanted
        assert loss.reduction == "mean"

    class OfRows(nn.MSELoss):
        def forward(self, *args):
            return super().forward(*args).mean(dim=1)

    with pytest.raises(InputError, match=r"OfRows with reduction 'none' must return one value for each"):
        TASK.compare(outputs, target, OfRows())


def test_a_round_is_a_table():
    table, _ = TASK.make_round(INDEX, Y, views(), TASK.accept_all(), None, 0)
    assert isinstance(table, PseudoValues)
    assert table.soft is None
    assert TASK.nearest(table).startswith("the lowest spread is ")
