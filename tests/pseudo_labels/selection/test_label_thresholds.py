"""LabelThresholds: accepted labels by hand, bad values, and which selection is for which task."""

import pytest
import torch

from kd_lightning import InputError, LabelThresholds, PseudoLabelModule
from kd_lightning.pseudo_labels import (
    AdaMatch,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    Sharpen,
    SoftMatch,
    TopKPerClass,
)

THRESHOLDS = [(0.95, 0.05), (0.5, 0.5), (0.7, 0.7), ([0.9, 0.6, 0.5], 0.1), (0.8, [0.3, 0.0, 0.8]), (1.0, 0.0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("positive", "negative"), THRESHOLDS)
def test_by_hand(positive, negative, dtype):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200, 3, generator=generator, dtype=torch.float64).to(dtype)
    p[:4] = torch.tensor([[0.95, 0.05, 0.5], [1.0, 0.0, 1.0], [0.7, 0.9, 0.3], [0.0, 1.0, 0.0]], dtype=torch.float64)
    selection = LabelThresholds(positive, negative)
    selection.setup(10, 3)
    target, weight = selection(p, p[:0], None)
    high, low = ([t] * 3 if isinstance(t, float) else t for t in (positive, negative))
    for row, values in enumerate(p.tolist()):
        for label, value in enumerate(values):
            above, below = value >= high[label] - 1e-7, value <= low[label] + 1e-7
            assert weight[row, label].item() == float(above or below)
            if above or below:
                assert target[row, label].item() == float(above)
            else:
                assert target[row, label].item() == float(value >= 0.5)
    assert target.dtype == weight.dtype == dtype


def test_without_rows():
    target, weight = LabelThresholds()(torch.zeros(0, 4), torch.zeros(2, 4), None)
    assert target.shape == weight.shape == (0, 4)


def test_it_has_no_state_and_moves_with_a_module():
    selection = LabelThresholds([0.9, 0.8], 0.1)
    assert not selection.state_dict()
    half = selection.half()
    assert half.positive.dtype == torch.float32
    assert half(torch.tensor([[0.8999, 0.8001]]), torch.zeros(0, 2), None)[1].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.1, 0.1), r"positive must lie in \[0, 1\], got 1.1"),
        ((0.9, -0.1), r"negative must lie in \[0, 1\], got -0.1"),
        ((float("nan"), 0.1), r"positive must lie in \[0, 1\], got nan"),
        ((0.9, [0.1, 2.0]), r"negative must lie in \[0, 1\], got 2.0"),
        ((0.4, 0.6), "negative must be at most positive, got positive=0.4, negative=0.6"),
        (([0.9, 0.2], 0.3), r"negative must be at most positive, got positive=\[0.9, 0.2\], negative=0.3"),
        (([0.9, 0.8], [0.1, 0.1, 0.1]), "must have one threshold for each label, got positive="),
        (([], 0.1), "must have one threshold for each label, got positive="),
    ],
)
def test_bad_thresholds(arguments, message):
    with pytest.raises(InputError, match=message):
        LabelThresholds(*arguments)


def test_thresholds_of_another_number_of_labels():
    selection = LabelThresholds([0.9, 0.8], 0.1)
    with pytest.raises(InputError, match="positive must be one number, or one for each of 3 labels, got 2"):
        selection.setup(10, 3)
    with pytest.raises(InputError, match="positive must be one number, or one for each of 3 labels, got 2"):
        selection(torch.rand(2, 3), torch.rand(0, 3), None)


OF_CLASSES = [
    FixedThreshold(),
    TopKPerClass(2),
    FlexMatch(),
    FreeMatch(),
    SoftMatch(),
    AdaMatch(),
    Sharpen(FixedThreshold()),
    DistributionAlignment(FixedThreshold()),
]


@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("selection", OF_CLASSES, ids=lambda one: type(one).__name__)
def test_selections_of_classes_are_refused(selection, task):
    name = type(selection).__name__
    message = rf"selection: {name} is for probabilities that sum to 1 \(task multiclass\), got task: {task}; use LabelT"
    with pytest.raises(InputError, match=message):
        PseudoLabelModule(torch.nn.Linear(2, 1), task=task, selection=selection)


@pytest.mark.parametrize("selection", [LabelThresholds(), DistributionAlignment(LabelThresholds())])
def test_it_is_refused_for_classes(selection):
    message = r"LabelThresholds is for labels of 0 or 1 \(task binary or multilabel\), got task: multiclass; use Fixed"
    with pytest.raises(InputError, match=message):
        PseudoLabelModule(torch.nn.Linear(2, 2), selection=selection)
