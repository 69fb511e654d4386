"""A round of labels: accepted and changed ones, its hash, and what is refused."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd_lightning import FixedThreshold, InputError, Sharpen, SoftMatch, TopKPerClass
from kd_lightning.pseudo_labels.table import PseudoLabels, check_classes, make_pseudo_labels


def random_pool(rows=40, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(rows, classes, generator=generator).mul(2).softmax(dim=1)
    return probabilities, torch.randperm(1000, generator=generator)[:rows]


def by_hand(probabilities, index, threshold, top):
    """{index: (label, confidence, accepted)}, row by row; of equal ones the first by index."""
    rows = {int(i): (int(p.argmax()), float(p.max())) for i, p in zip(index, probabilities.numpy(), strict=True)}
    accepted = {i for i, (_, confidence) in rows.items() if threshold is None or confidence >= threshold}
    if top is not None:
        for number in {label for label, _ in rows.values()}:
            members = sorted((i for i in accepted if rows[i][0] == number), key=lambda i: (-rows[i][1], i))
            accepted -= {*members[top:]}
    return {i: (*rows[i], i in accepted) for i in sorted(rows)}


@pytest.mark.parametrize("threshold", [None, 0.6, 1.0, 1e-3])
@pytest.mark.parametrize("top", [None, 1, 3, 99])
def test_by_hand(threshold, top):
    probabilities, index = random_pool()
    probabilities[5] = probabilities[9] = probabilities[2]  # equal ones
    selection = None if threshold is None else FixedThreshold(threshold)
    selection = selection if top is None else TopKPerClass(top, threshold or 0.0)
    table = make_pseudo_labels(probabilities, index, selection, epoch=7)
    expected = by_hand(probabilities, index, threshold, top)
    columns = (table.index, table.label, table.confidence, table.accepted)
    found = {i: row for i, *row in zip(*(column.tolist() for column in columns), strict=True)}
    assert list(found) == list(expected)
    assert [tuple(row) for row in found.values()] == [*expected.values()]
    assert (table.round, table.epoch, table.soft, table.changed.any()) == (0, 7, None, False)
    assert table.accepted.any() == (threshold != 1.0)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_uniform_ones_are_never_accepted(classes):
    probabilities = torch.full((2, classes), 1 / classes)
    probabilities[1, 1] += 1e-3
    assert make_pseudo_labels(probabilities, torch.arange(2)).accepted.tolist() == [False, True]


def test_a_confidence_equal_to_the_threshold_is_accepted():
    probabilities = torch.tensor([[0.95, 0.05], [0.0, 1.0], [0.94999, 0.05001]])
    for dtype in (torch.float32, torch.float64):
        given = probabilities.to(dtype)
        assert make_pseudo_labels(given, torch.arange(3), FixedThreshold(0.95)).accepted.tolist() == [True, True, False]
        assert make_pseudo_labels(given, torch.arange(3), FixedThreshold(1.0)).accepted.tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.01])
def test_soft_ones_are_sharpened(temperature):
    probabilities, index = random_pool()
    probabilities[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    table = make_pseudo_labels(probabilities, index, Sharpen(FixedThreshold(0), temperature))
    p = probabilities.double().numpy()[index.argsort().numpy()]
    log = np.log(np.maximum(p, 1e-300)) / temperature
    power = np.exp(log - log.max(axis=1, keepdims=True))
    expected = power / power.sum(axis=1, keepdims=True)
    assert table.soft.dtype == torch.float32
    assert table.soft.numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(table.soft.argmax(dim=1), table.label)


def test_what_changed():
    index = torch.tensor([4, 2, 9])
    first = make_pseudo_labels(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]), index)
    assert (first.round, first.changed.tolist()) == (0, [False] * 3)
    order = torch.tensor([2, 0, 1])  # a loader may give them in another order
    probabilities = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.1, 0.9]])
    second = make_pseudo_labels(probabilities[order], index[order], FixedThreshold(0.85), previous=first)
    assert (second.round, second.index.tolist(), second.changed.tolist()) == (1, [2, 4, 9], [False, True, False])
    assert second.accepted.tolist() == [True, False, True]


def test_hash_and_state():
    probabilities, index = random_pool()
    selection = Sharpen(FixedThreshold(0.5))
    table = make_pseudo_labels(probabilities, index, selection)
    again = PseudoLabels(**table.state_dict())
    assert again.hash == table.hash == make_pseudo_labels(probabilities, index, selection).hash
    others = [replace(table, round=1), replace(table, epoch=1), replace(table, soft=None)]
    for name in ("index", "label", "confidence", "weight", "changed", "soft"):
        value = getattr(table, name).clone()
        value[3] = ~value[3] if value.dtype == torch.bool else value[3] + 1
        others.append(replace(table, **{name: value}))
    assert len({table.hash, *(other.hash for other in others)}) == 10


def test_weights_and_aligned_classes():
    """Weights are those of the selection; the class is that of its target, and the confidence that of the class."""
    probabilities, index = random_pool()
    expected = SoftMatch(momentum=0.0)
    expected.setup(1000, 4)
    selection = copy.deepcopy(expected)
    table = make_pseudo_labels(probabilities, index, selection)
    target, weight = expected(probabilities[index.argsort()], probabilities[:0], None)
    assert torch.equal(table.weight, weight)
    assert 0 < weight.min() < weight.max() == 1
    assert table.accepted.all()
    other = make_pseudo_labels(probabilities, index, lambda p, labeled, i: (target.roll(1, dims=1), weight))
    assert torch.equal(other.label, (table.label + 1) % 4)
    own = probabilities[index.argsort()]
    assert other.confidence.tolist() == [row[label].item() for row, label in zip(own, other.label, strict=True)]


@pytest.mark.parametrize(
    ("y", "classes", "names", "named"),
    [
        ([0, 2, -100, 2], 3, None, "'1', so"),
        ([0, 2, -100, 2], 3, ["ant", "bee", "cat"], "'bee', so"),
        ([0, 2, -100, 2], 3, ["ant", "bee"], "'1', so"),  # names of something else
        ([-100], 2, None, "'0', '1', so"),
        ([], 2, None, "'0', '1', so"),
        ([9], 7, None, "'0', '1', '2', '3', '4', ..., so"),
    ],
)
def test_class_without_a_label(y, classes, names, named):
    with pytest.raises(InputError, match=f"^Owner: no labeled sample of class {named} no pseudo-label can be learned"):
        check_classes(torch.tensor(y, dtype=torch.long), classes, SimpleNamespace(class_names=names), "Owner")


def test_a_class_without_images_needs_no_label():
    data = SimpleNamespace(class_names=["ant", "bee", "cat"], absent_classes=lambda: {1})
    with pytest.warns(UserWarning, match="no labeled sample of class 'bee'"):
        check_classes(torch.tensor([0, 2]), 3, data, "Owner")
    with pytest.raises(InputError, match="no labeled sample of class 'cat', so"):
        check_classes(torch.tensor([0, -100]), 3, data, "Owner")


@pytest.mark.parametrize("y", [torch.tensor([1, -100, 0]), torch.tensor([1.0, float("nan"), 0.0])])
def test_every_class_has_a_label(y):
    check_classes(y, 2, None, "Owner")
