"""Rounds of labels 0 and 1: by hand, changes, and targets that are refused."""

import pytest
import torch

from kd_lightning import InputError, LabelThresholds
from kd_lightning.pseudo_labels.tasks import pseudo_label_task

NAN = float("nan")
INDEX = torch.tensor([2, 5, 6, 9])
Y = torch.tensor([[1, 0], [NAN, 1], [NAN, NAN], [0, NAN]])
P = torch.tensor([[0.9, 0.9], [0.8, 0.1], [0.5, 0.05], [0.3, 0.6]])
TASK = pseudo_label_task("multilabel", "test")


def test_by_hand():
    first, given = TASK.make_round(INDEX, Y, P, LabelThresholds(0.7, 0.2), None, 3)
    assert given.tolist() == [[1, 0], [-100, 1], [0, -100]]
    assert (first.index.tolist(), first.output.tolist()) == ([5, 6, 6, 9], [0, 0, 1, 1])
    assert (first.label.tolist(), first.accepted.tolist()) == ([1, 1, 0, 1], [True, False, True, False])
    assert first.confidence.tolist() == pytest.approx([0.8, 0.5, 0.95, 0.6])
    assert (first.round, first.epoch, first.changed.any().item()) == (0, 3, False)
    second, _ = TASK.make_round(INDEX, Y, 1 - P, TASK.accept_all(), first, 4)
    assert (second.round, second.label.tolist()) == (1, [0, 1, 1, 0])
    assert second.changed.tolist() == [True, False, True, True]
    assert second.accepted.tolist() == [True, False, True, True]  # 0.5 is neither 0 nor 1
    again, _ = TASK.make_round(INDEX, Y, 1 - P, TASK.accept_all(), first, 4)
    assert again.hash == second.hash != first.hash


def test_one_label_a_sample():
    task = pseudo_label_task("binary", "test")
    y = torch.tensor([1, -100, -100, 0])
    table, given = task.make_round(INDEX, y, P[:, 1:], LabelThresholds(0.7, 0.07), None, 0)
    assert (table.index.tolist(), table.output, table.label.tolist()) == ([5, 6], None, [0, 0])
    assert (table.label.dtype, table.accepted.tolist()) == (y.dtype, [False, True])
    assert given.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("target", "weight", "message"),
    [
        (P[1:], P[1:] > 0, "targets of stored pseudo-labels of the multilabel task must be zeros and ones"),
        (P[1:] > 0.5, P[1:], "weights of stored pseudo-labels of the multilabel task must be zeros and ones"),
        (P[1:] > 0.5, P[1:, 0] > 0, r"must be zeros and ones \[3, 2\], got \[3\] from the selection"),
    ],
)
def test_what_a_selection_may_not_return(target, weight, message):
    with pytest.raises(InputError, match=message):
        TASK.make_round(INDEX, Y, P, lambda *_: (target.float(), weight.float()), None, 0)


def test_other_tasks():
    with pytest.raises(InputError, match="task must be multiclass, binary, multilabel or regression, got 'sorting'"):
        pseudo_label_task("sorting", "Owner")


def test_labels_of_another_number():
    with pytest.raises(InputError, match="Owner: samples have 2 labels, but the student gives 3 outputs"):
        TASK.check_labels(Y, 3, None, "Owner")
