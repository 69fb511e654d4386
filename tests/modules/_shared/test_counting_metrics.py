"""Metrics from counts: equal to torchmetrics', in memory that grows with the classes alone."""

import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError, MulticlassF1Score

from kd_lightning.modules._shared.counting_metrics import BinaryCalibrationSums, MacroF1


def batches(classes, seed, occurring, size=50, count=4):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        probabilities = torch.randn(size, classes, generator=generator).softmax(dim=1)
        y = torch.randint(occurring, (size,), generator=generator)
        y[::7] = -100
        yield probabilities, y


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "occurring"), [(2, 2), (5, 5), (5, 2), (300, 300), (300, 3)])
def test_macro_f1_is_torchmetrics_to_the_bit(classes, occurring, seed):
    """Also where classes neither occur nor are predicted."""
    ours, theirs = MacroF1(classes), MulticlassF1Score(classes, average="macro", ignore_index=-100)
    for probabilities, y in batches(classes, seed, occurring):
        ours.update(probabilities, y)
        theirs.update(probabilities, y)
        for name in ("tp", "fp", "tn", "fn"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.compute(), theirs.compute())
    ours.reset()
    assert ours.tp.sum() == 0


def test_macro_f1_of_unknown_labels():
    metric = MacroF1(3)
    metric.update(torch.eye(3), torch.full((3,), -100))
    assert metric.tp.tolist() == metric.tn.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError):
        metric.update(torch.eye(3), torch.tensor([0, 1, 3]))


def test_calibration_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = BinaryCalibrationSums(), BinaryCalibrationError(n_bins=15, ignore_index=-100)
    for size in (1, 300, 50):
        probabilities = torch.rand(size, generator=generator)
        probabilities[: size // 10] = 1.0
        probabilities[size // 10 : size // 5] = 1 / 15  # at an edge
        y = (torch.rand(size, generator=generator) < probabilities**2).long()
        y[1::5] = -100
        ours.update(probabilities, y)
        theirs.update(probabilities, y)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-7)
    assert all(state.numel() <= 16 for state in ours.metric_state.values())


def test_calibration_of_more_than_float32_counts():
    """Two million equal probabilities in each of 20 updates: a count of float32 ends at 16.8 million."""
    metric = BinaryCalibrationSums()
    metric.update(torch.full((2_000_000,), 0.7), torch.zeros(2_000_000, dtype=torch.long))
    for name in ("counts", "positives", "confidences"):
        setattr(metric, name, 20 * getattr(metric, name))
    metric.update(torch.tensor([0.7]), torch.tensor([0]))
    assert metric.counts.sum() == 40_000_001
    assert metric.compute().item() == pytest.approx(0.7, abs=1e-6)


def test_calibration_of_what_is_not_finite():
    metric = BinaryCalibrationSums()
    metric.update(torch.tensor([0.5, float("nan")]), torch.tensor([1, 0]))
    assert metric.compute().isnan()
