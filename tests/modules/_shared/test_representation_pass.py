"""Which samples the figures of features are of."""

import logging

import pytest
import torch

from kd_lightning import Batch
from kd_lightning.features.representation import knn_accuracy, neighbor_agreement, probe_accuracy, rankme
from kd_lightning.modules._shared import representation_pass
from kd_lightning.modules._shared.representation_pass import RepresentationPass


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = torch.randn(4, 6, generator=generator)[y] + torch.randn(count, 6, generator=generator)
    return x, y, torch.randn(count, 3, generator=generator) + x[:, :3]


def batches(x, y, teacher, order, size=32, index=True):
    for rows in order.split(size):
        batch = Batch(x[rows], y[rows], index=rows if index else None)
        yield batch, x[rows], {"teacher": teacher[rows]}


def figures(found, **options):
    made = RepresentationPass()
    for batch in found:
        made.add(*batch)
    return made.compute("val", **options)


def test_figures_are_those_of_all_samples(caplog):
    x, y, teacher = samples(150)
    y[::5] = -100
    known = y >= 0
    with caplog.at_level(logging.INFO):
        found = figures(batches(x, y, teacher, torch.arange(150)))
    assert found["knn_accuracy"] == pytest.approx(knn_accuracy(x[known], y[known]))
    assert found["probe_accuracy"] == pytest.approx(probe_accuracy(x[known], y[known]))
    assert found["teacher_knn_accuracy"] == pytest.approx(knn_accuracy(teacher[known], y[known]))
    assert found["rankme"] == pytest.approx(rankme(x))
    assert found["neighbor_agreement"] == pytest.approx(neighbor_agreement(x, teacher))
    assert caplog.messages == [
        "val: features of 150 samples: knn_accuracy and probe_accuracy are of 120 labeled ones of 4 classes"
    ]


def test_order_repeats_and_padding_do_not_matter():
    x, y, teacher = samples(150)
    plain = figures(batches(x, y, teacher, torch.arange(150)))
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    padding = (Batch(x[:1], index=torch.tensor([-1])), x[:1] + 9, {"teacher": teacher[:1]})
    assert figures([padding, *batches(x, y, teacher, torch.cat([order, order[:7]]), size=10)]) == plain


def test_of_many_samples_the_same_ones_are_taken_in_any_order(monkeypatch, caplog):
    monkeypatch.setattr(representation_pass, "MOST", 120)
    x, y, teacher = samples(700)
    y = torch.arange(700) // 175  # sorted by class, as folders are
    made = RepresentationPass()
    for batch in batches(x, y, teacher, torch.arange(700)):
        made.add(*batch)
    rows, total = made._gathered(None)
    assert total == 700
    assert rows["label"].bincount().tolist() == pytest.approx([30] * 4, abs=2)
    with caplog.at_level(logging.INFO):
        plain = figures(batches(x, y, teacher, torch.arange(700)))
    assert "700 samples (120 of them are used)" in caplog.text
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert figures(batches(x, y, teacher, order)) == plain


def test_two_processes_give_the_same(monkeypatch):
    """Each has every other sample; one has none at first."""
    monkeypatch.setattr(representation_pass, "MOST", 120)
    x, y, teacher = samples(700)
    plain = figures(batches(x, y, teacher, torch.arange(700)))
    parts = [RepresentationPass() for _ in range(2)]
    for number, order in enumerate((torch.arange(0, 700, 2), torch.arange(1, 700, 2))):
        for batch in batches(x, y, teacher, order):
            parts[number].add(*batch)

    def gather(trainer, value):
        """What the other process has at this point."""
        if isinstance(value, int):
            return [value, 350]
        if isinstance(value, torch.Tensor):
            gather.other = representation_pass._smallest(parts[1]._joined())
            gather.keys = torch.cat([value, gather.other["key"]]).unique()[:120]
            return [value, gather.other["key"]]
        taken = gather.other["key"] <= gather.keys[-1]
        return [value, {name: part[taken] for name, part in gather.other.items()}]

    monkeypatch.setattr(representation_pass, "gather", gather)
    assert parts[0].compute("val") == plain


def test_batches_without_an_index():
    x, y, teacher = samples(150)
    found = figures(batches(x, y, teacher, torch.arange(150), index=False))
    assert found == pytest.approx(figures(batches(x, y, teacher, torch.arange(150))))


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        (None, "got 0 of 0"),
        (torch.zeros(120, dtype=torch.long), "got 120 of 1"),
        (torch.where(torch.arange(120) < 20, torch.arange(120) % 2, -100), "got 20 of 2"),
        (torch.rand(120, 3), "got 0 of 0"),
        (torch.rand(120), "got 0 of 0"),
    ],
    ids=["none", "one class", "too few", "multilabel", "regression"],
)
def test_without_labels_what_needs_none(y, reason, caplog):
    x, _, teacher = samples(120)
    batch = Batch(x, y, index=torch.arange(120))
    with caplog.at_level(logging.INFO):
        found = figures([(batch, x, {"teacher": teacher})])
    assert {*found} == {"rankme", "neighbor_agreement"}
    (line,) = caplog.messages
    assert "knn_accuracy and probe_accuracy are left out: they need at least 21 labeled ones of 2 classes" in line
    assert reason in line


def test_too_few_samples(caplog):
    x, y, teacher = samples(99)
    with caplog.at_level(logging.INFO):
        assert {*figures(batches(x, y, teacher, torch.arange(99)))} == {
            "knn_accuracy",
            "probe_accuracy",
            "teacher_knn_accuracy",
        }
    assert "rankme and neighbor_agreement are left out: they need at least 100, got 99" in caplog.text


def test_several_teachers_and_none():
    x, y, teacher = samples(120)
    batch = Batch(x, y, index=torch.arange(120))
    found = figures([(batch, x, {"teacher_0": teacher, "teacher_1": x})])
    assert found["teacher_1_neighbor_agreement"] == 1 > found["teacher_0_neighbor_agreement"]
    assert found["teacher_1_knn_accuracy"] == found["knn_accuracy"]
    assert {*figures([(batch, x, {})])} == {"knn_accuracy", "probe_accuracy", "rankme"}


def test_features_that_are_not_finite(caplog):
    x, y, teacher = samples(120)
    x[3, 2] = float("nan")
    with caplog.at_level(logging.INFO):
        assert figures(batches(x, y, teacher, torch.arange(120))) == {}
    assert "they are not finite" in caplog.text


def test_an_empty_pass_and_a_second_one(caplog):
    made = RepresentationPass()
    assert made.compute("val") == {}
    x, y, teacher = samples(120)
    for batch in batches(x, y, teacher, torch.arange(120)):
        made.add(*batch)
    with caplog.at_level(logging.INFO):
        assert made.compute("val", announce=False)
    assert not caplog.messages
    assert made.compute("val") == {}
