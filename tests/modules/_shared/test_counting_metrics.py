"""Metrics from counts: equal to torchmetrics', in memory that grows with the classes alone."""

import pytest
import torch
from torchmetrics.classification import (
    BinaryCalibrationError,
    BinaryF1Score,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MultilabelF1Score,
)

from kd_lightning.modules._shared.counting_metrics import (
    CALIBRATION_SHAPE,
    Sums,
    calibration_counts,
    calibration_error,
    class_counts,
    label_counts,
    macro_f1,
)


def batches(classes, seed, occurring, size=50, count=4):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        probabilities = torch.randn(size, classes, generator=generator).softmax(dim=1)
        yield probabilities, torch.randint(occurring, (size,), generator=generator)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "occurring"), [(2, 2), (5, 5), (5, 2), (300, 300), (300, 3)])
def test_macro_f1_is_torchmetrics_to_the_bit(classes, occurring, seed):
    """Also where classes neither occur nor are predicted."""
    ours, theirs = torch.zeros(3, classes, dtype=torch.long), MulticlassF1Score(classes, average="macro")
    for probabilities, y in batches(classes, seed, occurring):
        ours += class_counts(y, probabilities.argmax(dim=1), classes)
        theirs.update(probabilities, y)
        right, occurs, given = ours
        assert torch.equal(right, theirs.tp)
        assert torch.equal(given - right, theirs.fp)
        assert torch.equal(occurs - right, theirs.fn)
    assert torch.equal(macro_f1(ours), theirs.compute())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("labels", [1, 3, 40])
def test_f1_of_labels_is_torchmetrics_to_the_bit(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    theirs = MultilabelF1Score(labels, average="macro", ignore_index=-100) if labels > 1 else BinaryF1Score()
    ours = torch.zeros(3, labels, dtype=torch.long)
    for _ in range(3):
        probabilities = torch.rand(20, labels, generator=generator)
        y = (torch.rand(20, labels, generator=generator) < probabilities**2).long()
        y[:, labels // 2 :] *= labels == 1  # labels that never occur
        if labels > 1:
            y.view(-1)[::7] = -100
        ours += label_counts(y == 1, probabilities > 0.5, y >= 0)
        theirs.update(probabilities, y)
    assert torch.equal(macro_f1(ours, of_absent=True), theirs.compute())


def test_f1_without_any_label():
    counts = class_counts(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 3)
    assert counts.tolist() == [[0, 0, 0]] * 3
    assert macro_f1(counts) == macro_f1(counts, of_absent=True) == 0


def test_a_label_that_is_no_class_is_an_error():
    with pytest.raises(RuntimeError):
        class_counts(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 2]), 3)


def random_confidence(size, generator):
    confidence = torch.rand(size, generator=generator)
    confidence[: size // 10] = 1.0
    confidence[size // 10 : size // 5] = 1 / 15  # at an edge
    return confidence, torch.rand(size, generator=generator) < confidence**2


@pytest.mark.parametrize("most", [2**20, 7])
def test_calibration_is_torchmetrics(monkeypatch, most):
    monkeypatch.setattr("kd_lightning.modules._shared.counting_metrics._MOST", most)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.zeros(CALIBRATION_SHAPE, dtype=torch.long), BinaryCalibrationError(n_bins=15)
    for size in (1, 300, 50):
        confidence, right = random_confidence(size, generator)
        ours += calibration_counts(confidence, right)
        theirs.update(confidence, right.long())
    assert calibration_error(ours).item() == pytest.approx(theirs.compute().item(), abs=1e-7)


def test_calibration_of_many_classes_is_torchmetrics():
    ours, theirs = torch.zeros(CALIBRATION_SHAPE, dtype=torch.long), MulticlassCalibrationError(5)
    for probabilities, y in batches(5, 0, 5):
        confidence, predicted = probabilities.max(dim=1)
        ours += calibration_counts(confidence, predicted == y)
        theirs.update(probabilities, y)
    assert calibration_error(ours).item() == pytest.approx(theirs.compute().item(), abs=1e-7)


def test_calibration_of_more_than_float32_counts():
    """Two million equal probabilities in each of 20 updates: a count of float32 ends at 16.8 million."""
    counts = 20 * calibration_counts(torch.full((2_000_000,), 0.7), torch.zeros(2_000_000, dtype=torch.bool))
    counts += calibration_counts(torch.tensor([0.7]), torch.tensor([False]))
    assert counts[:2].sum() == 40_000_001
    assert calibration_error(counts).item() == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_of_what_is_not_finite(value):
    counts = calibration_counts(torch.tensor([0.5, value, 0.5]), torch.tensor([True, False, True]))
    assert counts[:2].sum() == 3
    assert calibration_error(counts).isnan()


class TestSums:
    def make(self):
        sums = Sums()
        sums.start("count")
        sums.start("loss", dtype=torch.float32)
        sums.start("matrix", 2, 3)
        return sums

    def test_add_up_and_are_not_saved(self):
        sums = self.make()
        for k in range(3):
            sums.add("count", k)
            sums.add("loss", torch.tensor(0.5))
            sums.add("matrix", torch.arange(6).view(2, 3))
        found = sums.of_all_processes()
        assert {name: value.tolist() for name, value in found.items()} == {
            "count": 3,
            "loss": 1.5,
            "matrix": [[0, 3, 6], [9, 12, 15]],
        }
        assert not sums.state_dict()

    def test_processes_add_up(self, monkeypatch):
        """One message for each type; the process's own sums stay, so that it may go on."""
        sums, sent = self.make(), []

        def all_reduce(flat):
            sent.append(flat.dtype)
            flat *= 2

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        sums.register_buffer("other", torch.ones(1))  # no sum
        sums.add("count", 4)
        sums.add("loss", 0.25)
        sums.add("matrix", torch.ones(2, 3, dtype=torch.long))
        for _ in range(2):
            found = sums.of_all_processes()
            assert (found["count"].item(), found["loss"].item(), found["matrix"].tolist()) == (8, 0.5, [[2] * 3] * 2)
            assert set(found) == {"count", "loss", "matrix"}
        assert sent == [torch.int64, torch.float32] * 2
        assert sums.count.item() == 4
