"""Labels: what is filled in, in place of what, and what is refused."""

import pytest
import torch

from kd_lightning import Batch, InputError
from kd_lightning.batch import Kind
from kd_lightning.data.labels import Labels, hide
from kd_lightning.pseudo_labels import PseudoLabels

NAN = float("nan")
VISIBLE = torch.tensor([4, -100, -100, 2, -100, -100])


def table(index, label, accepted, soft=None):
    index, label, accepted = torch.tensor(index), torch.tensor(label), torch.tensor(accepted)
    return PseudoLabels(index, label, torch.ones(len(index)), accepted, ~accepted, 0, 0, soft)


def fill(labels, index):
    index = torch.tensor(index)
    return labels.fill(Batch(index.float(), index=index))


def test_before_any():
    batch = fill(Labels(VISIBLE), [3, 1, 0])
    assert (batch.y.tolist(), batch.kind, batch.soft) == ([2, -100, 4], None, None)


def test_accepted_ones_are_filled_in():
    labels = Labels(VISIBLE)
    labels.set(table([1, 2, 4], [3, 1, 0], [True, False, True]))
    batch = fill(labels, [5, 4, 3, 2, 1, 0, 1])
    assert batch.y.tolist() == [-100, 0, 2, -100, 3, 4, 3]
    kinds = [Kind.MISSING, Kind.PSEUDO, Kind.CLEAN, Kind.MISSING, Kind.PSEUDO, Kind.CLEAN, Kind.PSEUDO]
    assert batch.kind.tolist() == kinds
    assert batch.soft is None
    assert labels.visible.tolist() == VISIBLE.tolist() == [4, -100, -100, 2, -100, -100]


def test_soft_ones_lie_at_their_samples():
    labels, soft = Labels(VISIBLE), torch.rand(3, 5)
    labels.set(table([5, 1, 2], [3, 1, 0], [True, False, True], soft))
    batch = fill(labels, [0, 1, 2, 3, 4, 5])
    none = torch.zeros(5)
    assert torch.equal(batch.soft, torch.stack([none, none, soft[2], none, none, soft[0]]))


def test_new_ones_replace_all_earlier_ones():
    labels = Labels(VISIBLE)
    labels.set(table([1, 2], [3, 1], [True, True], torch.rand(2, 5)))
    labels.set(table([1, 2], [4, 4], [False, True]))
    batch = fill(labels, [1, 2])
    assert (batch.y.tolist(), batch.kind.tolist(), batch.soft) == ([-100, 4], [Kind.MISSING, Kind.PSEUDO], None)
    labels.set(table([1, 2], [4, 4], [False, False], torch.rand(2, 5)))
    batch = fill(labels, [1, 2, 3])
    assert (batch.y.tolist(), batch.soft.sum().item()) == ([-100, -100, 2], 0)


def test_batches_that_were_filled_stay_as_they_are():
    labels = Labels(VISIBLE)
    labels.set(table([1], [3], [True]))
    batch = fill(labels, [1])
    labels.set(table([1], [2], [True]))
    assert batch.y.tolist() == [3]


def test_empty_table():
    labels = Labels(VISIBLE)
    none = torch.empty(0, dtype=torch.long)
    labels.set(PseudoLabels(none, none, none.float(), none.bool(), none.bool(), 0, 0))
    assert fill(labels, [1, 3]).y.tolist() == [-100, 2]


def test_counts():
    labels, everyone = Labels(VISIBLE), torch.tensor([0, 1, 2, 3, 4, 1])
    assert labels.count(everyone) == (2, 0)
    labels.set(table([1, 2, 4], [3, 1, 0], [True, False, True]))
    assert labels.count(everyone) == (5, 3)
    assert labels.count(everyone[:0]) == (0, 0)


@pytest.mark.parametrize(
    ("visible", "index", "message"),
    [
        (torch.full((6, 2), NAN), [1, 2], "for samples of one class each; these have many labels"),
        (torch.tensor([0.0, NAN, NAN]), [1, 2], "for samples of one class each"),
        (VISIBLE, [1, 6], "sample 6, but there are only 6"),
        (VISIBLE, [1, 3], "sample 3 has a label already"),
    ],
)
def test_refused(visible, index, message):
    labels = Labels(visible)
    with pytest.raises(InputError, match=f"pseudo-labels.*{message}"):
        labels.set(table(index, [0, 0], [True, True]))
    assert (labels.y is visible, labels.kind) == (True, None)


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (torch.tensor([3, 1, 2]), [-100, 1, -100, -100]),
        (torch.tensor([3.0, 1.0, 2.0]), [NAN, 1.0, NAN, NAN]),
        (torch.tensor([[0, 1], [1, 1], [0, 0]]), [[NAN, NAN], [1.0, 1.0], [NAN, NAN], [NAN, NAN]]),
    ],
)
def test_hide(truth, expected):
    torch.testing.assert_close(hide(truth, [1], 4), torch.tensor(expected), equal_nan=True)
