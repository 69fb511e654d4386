"""Checks of teachers whose outputs are dense, and of the regression task."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from scipy.stats import binomtest, linregress
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, DistillModule, EnsembleDistillModule, SupervisedModule, Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.report.examination import examine
from kd_lightning.teachers.checks import accuracy, class_order, normalisation, soft_targets
from kd_lightning.teachers.findings import collect_rows, match_labels
from kd_lightning.teachers.regression_checks import error

SAMPLES, CLASSES, SIDE = 200, 4, 6
Y = torch.randint(0, CLASSES, (SAMPLES, 1, 1), generator=torch.Generator().manual_seed(0)).expand(SAMPLES, SIDE, SIDE)


def maps(share, y=Y, seed=1):
    """Logits (N, C, H, W) that are right in all positions of a share of the samples, and in none of the others."""
    right = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < share
    given = torch.where(right[:, None, None], y, (y + 1) % CLASSES)
    return 3 * nn.functional.one_hot(given, CLASSES).movedim(-1, 1).float()


def rows_of(logits, y=Y, class_dim=1, size=64, **kwargs):
    module = SupervisedModule(nn.Identity(), class_dim=class_dim, **kwargs)
    batches = [Batch(x, labels) for x, labels in zip(logits.split(size), y.split(size), strict=True)]
    rows = collect_rows(lambda batch: batch.x, batches, module.task, module.to_rows)
    return rows, match_labels(rows.logits, rows.y, module.task, rows.sample)


# Rows.


def test_each_position_of_a_sample_is_a_row_of_it():
    y = Y.clone()
    y[3, 0], y[5] = -100, -100
    rows, matched = rows_of(maps(0.7), y)
    assert rows.sample.tolist() == sorted(rows.sample.tolist())
    counts = torch.bincount(rows.sample)
    assert counts[3] == SIDE * (SIDE - 1)
    assert counts[0] == counts[5] == SIDE * SIDE  # an unlabeled sample has all
    assert matched.samples == SAMPLES - 1
    expected = maps(0.7).argmax(1) == y
    assert matched.accuracy == pytest.approx(float(expected[y != -100].double().mean()))


def test_many_positions_are_thinned_evenly():
    logits = torch.arange(3 * 40 * 40).view(3, 1, 40, 40).expand(3, 2, 40, 40).float()
    rows, _ = rows_of(logits, torch.zeros(3, 40, 40, dtype=torch.long))
    assert torch.bincount(rows.sample).tolist() == [256] * 3
    places = rows.logits[rows.sample == 1, 0] - 1600
    assert set(places.diff().tolist()) <= {6.0, 7.0}


def test_tokens_of_different_lengths():
    module = SupervisedModule(nn.Identity(), class_dim=-1)
    batches = [Batch(torch.randn(2, t, 3), torch.zeros(2, t).long(), mask=torch.ones(2, t)) for t in (4, 7)]
    rows = collect_rows(lambda batch: batch.x, batches, "multiclass", module.to_rows)
    assert torch.bincount(rows.sample).tolist() == [4, 4, 7, 7]


# Positions of one sample are not independent.


def test_interval_is_that_of_the_samples():
    _, matched = rows_of(maps(0.7))
    right = round(matched.accuracy * SAMPLES)
    low, high = binomtest(right, SAMPLES).proportion_ci(method="exact")
    assert matched.interval == pytest.approx((low, high), abs=1e-6)
    text = accuracy(matched, None, "multiclass", "labels").text
    assert f"of {SAMPLES * SIDE * SIDE} labels of {SAMPLES} samples right" in text


def test_few_samples_of_many_positions_are_no_verdict():
    finding = accuracy(rows_of(maps(0.0)[:20], Y[:20])[1], None, "multiclass", "labels")
    assert finding.severity == "warning" and "20 labeled samples are too few to judge" in finding.text


def test_a_teacher_at_chance_is_an_error():
    assert accuracy(rows_of(maps(0.25))[1], None, "multiclass", "labels").severity == "error"
    assert accuracy(rows_of(maps(0.7))[1], None, "multiclass", "labels").severity == "info"


def test_a_student_is_not_better_by_the_pixels_of_few_samples():
    """It is right in 4 samples more: 144 pixels, but no 3 standard errors."""
    teacher, student = maps(0.7), maps(0.7)
    wrong = (teacher.argmax(1) != Y)[:, 0, 0].nonzero().flatten()
    student[wrong[:4]] = maps(1.0)[wrong[:4]]
    found = accuracy(rows_of(teacher)[1], rows_of(student)[1], "multiclass", "labels")
    assert found.hint is None
    student[wrong] = maps(1.0)[wrong]
    found = accuracy(rows_of(teacher)[1], rows_of(student)[1], "multiclass", "labels")
    assert "the student is better already" in found.hint


def test_another_order_of_classes_is_found_and_helps():
    order = [2, 0, 3, 1]
    logits = maps(0.9)[:, order]
    finding = class_order(rows_of(logits)[1], "multiclass")
    assert finding.hint == f"Teacher(network, classes={order})"
    teacher = Teacher(nn.Identity(), classes=order)
    module = DistillModule(nn.Conv2d(CLASSES, CLASSES, 1), teacher, class_dim=1)
    assert torch.equal(module.teacher(Batch(logits)), maps(0.9))


def test_an_interval_of_soft_targets_is_over_samples():
    logits = torch.randn(30, CLASSES, 1, 1, generator=torch.Generator().manual_seed(2)).expand(30, CLASSES, SIDE, SIDE)
    rows, _ = rows_of(logits, Y[:30])
    single = soft_targets(logits[:, :, 0, 0], KDLoss(1.0), "multiclass")
    assert soft_targets(rows.logits, KDLoss(1.0), "multiclass", rows.sample) == single


def test_another_normalisation_is_found():
    torch.manual_seed(0)
    x = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = (255 * x[:, 0] > 128).long()

    class Net(nn.Module):
        def forward(self, x):
            return torch.cat([128 - x, x - 128], 1)

    module = SupervisedModule(Net(), class_dim=1)
    batches = [Batch(x, y)]
    teacher = Teacher(Net())
    rows = collect_rows(teacher, batches, "multiclass", module.to_rows)
    matched = match_labels(rows.logits, rows.y, "multiclass", rows.sample)
    finding, _ = normalisation(teacher, batches, matched, "multiclass", None, module.to_rows)
    assert "[0, 255]" in finding.text and "v2.Normalize([0.0], [0.0039216])" in finding.hint


# Regression.


def values(noise, count=300, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, outputs, generator=generator) * 3 + 1
    return y + noise * torch.randn(count, outputs, generator=generator), y


def judged(given, y, student=None):
    matched = match_labels(given, y, "regression")
    return error(matched, None if student is None else match_labels(student, y, "regression"), "labels")


def test_error_against_that_of_the_mean_written_out():
    given, y = values(1.0, outputs=2)
    y[5, 1] = math.nan
    finding = judged(given, y)
    z, t = given.double().numpy(), y.double().numpy()
    rmse = np.sqrt(np.nanmean((z - t) ** 2))
    base = np.sqrt(np.nanmean((t - np.nanmean(t, 0)) ** 2))
    r2 = np.mean(1 - np.nansum((z - t) ** 2, 0) / np.nansum((t - np.nanmean(t, 0)) ** 2, 0))
    assert finding.text == f"RMSE {rmse:.3g} on 599 labels of 300 samples, {base:.3g} with their mean (R2 {r2:.3g})"
    assert finding.severity == "info" and "%" not in finding.text


@pytest.mark.parametrize(("noise", "count", "severity"), [(1, 300, "info"), (8, 300, "error"), (8, 50, "warning")])
def test_a_teacher_that_is_no_nearer_than_the_mean(noise, count, severity):
    finding = judged(*values(noise, count))
    assert finding.severity == severity


def test_hardly_better_than_the_mean_is_a_warning():
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(200, 1, generator=generator)
    finding = judged(0.12 * y + 0.3 * torch.randn(200, 1, generator=generator), y)
    assert finding.severity == "warning" and "hardly better" in finding.hint


def test_another_unit_is_named():
    given, y = values(0.3)
    finding = judged(100 * given - 20, y)
    line = linregress((100 * given - 20).flatten().numpy(), y.flatten().numpy())
    assert finding.severity == "error"
    assert finding.hint.endswith(f"labels are about {line.slope:.3g} x output {line.intercept:+.3g}")


def test_a_student_that_is_better_already():
    given, y = values(2.0)
    assert "the student is better already" in judged(given, y, values(0.5)[0]).hint
    assert judged(given, y, values(2.0, seed=0)[0]).hint is None


def test_constant_labels_and_no_labels():
    given, y = values(1.0)
    assert "nothing can be compared" in judged(given, torch.ones_like(y)).text
    assert judged(given, None).text == "not checked: there are no labels"
    assert judged(given.masked_fill(y > 3, math.nan), y).severity == "error"


def test_positions_of_a_regressed_sample_count_as_one():
    """One of 12 samples decides: with pixels as samples it would be an error."""
    y = torch.randn(12, 1, 1, 1, generator=torch.Generator().manual_seed(1)).expand(12, 1, SIDE, SIDE)
    _, matched = rows_of(-y, y, task="regression")
    finding = accuracy(matched, None, "regression", "labels")
    assert "12 labeled samples are too few to judge" in finding.text
    assert finding.severity == "warning"


# In a run, and in the doctor.


class Bias(nn.Module):
    """Adds a parameter to the inputs, which are the outputs."""

    def __init__(self, channels, noise=0.0):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels, 1, 1, generator=torch.Generator().manual_seed(0)) * noise)

    def forward(self, x):
        return x + self.bias


class Line(nn.Linear):
    def __init__(self, scale):
        super().__init__(1, 1)
        nn.init.constant_(self.weight, scale)
        nn.init.zeros_(self.bias)


class Data(LightningDataModule):
    """Both loaders load the same batches."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return self.train_dataloader()


def test_probe_of_dense_outputs(quiet_trainer, caplog):
    x = maps(0.9)
    batches = [Batch(some, labels) for some, labels in zip(x.split(100), Y.split(100), strict=True)]
    module = DistillModule(Bias(CLASSES, 0.1), Bias(CLASSES), class_dim=1)
    with caplog.at_level("INFO"):
        quiet_trainer().fit(module, DataLoader(batches, batch_size=None))
    (line,) = [record.getMessage() for record in caplog.records if "soft targets" in record.getMessage()]
    assert f"of {SAMPLES * SIDE * SIDE} labels of {SAMPLES} samples right" in line
    assert f"{SAMPLES} samples), at temperature 4" in line


def test_probe_of_regressed_values(quiet_trainer, caplog):
    given, y = values(1.0)
    batches = [Batch(some, labels) for some, labels in zip(given.split(100), y.split(100), strict=True)]
    with caplog.at_level("INFO"):
        quiet_trainer().fit(
            DistillModule(Line(0.5), Line(1.0), task="regression"), DataLoader(batches, batch_size=None)
        )
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("teacher:")]
    assert line.startswith("teacher: RMSE ") and "with their mean (R2 0." in line
    assert "chance" not in caplog.text and "soft targets" not in caplog.text


def names(findings):
    return {finding.name: finding for finding in findings}


def test_doctor_of_dense_outputs():
    data = Data([Batch(some, labels) for some, labels in zip(maps(0.9).split(100), Y.split(100), strict=True)])
    found = names(examine(DistillModule(Bias(CLASSES, 1.0), Bias(CLASSES), class_dim=1), data))
    assert f"labels of {SAMPLES} samples right" in found["teacher"].text
    assert "4 of 4 classes at 3600 positions of a training batch" in found["labels"].text
    assert "norms on the student: hard" in found["gradients"].text
    assert found["eval mode"].hint is None


def test_doctor_of_an_ensemble_of_dense_outputs():
    data = Data([Batch(some, labels) for some, labels in zip(maps(0.9).split(100), Y.split(100), strict=True)])
    teachers = [Teacher(Bias(CLASSES)), Teacher(Bias(CLASSES, 0.1))]
    found = names(examine(EnsembleDistillModule(Bias(CLASSES, 1.0), teachers, class_dim=1), data))
    text = f"of {SAMPLES * SIDE * SIDE} validation labels of {SAMPLES} samples right"
    assert all(text in found[name].text for name in ("teachers[0]", "teachers[1]", "ensemble"))


def test_doctor_of_regressed_values():
    given, y = values(1.0)
    data = Data([Batch(given, y)])
    found = names(examine(DistillModule(Line(0.1), Line(1.0), task="regression"), data))
    why = ["training views", "capacity", "gradients over training", "unlabeled samples", "verdict"]
    assert [*found] == ["teacher", "eval mode", "labels", "gradients", *why]
    assert "present student" in found["teacher"].text and found["teacher"].hint is None
    assert found["labels"].text == "300 of 300 samples of a training batch labeled"
    found = names(examine(EnsembleDistillModule(Line(0.1), [Line(1.0), Line(0.9)], task="regression"), data))
    assert "RMSE" in found["ensemble"].text


def test_doctor_where_labels_are_the_projects_own():
    """The hard loss takes labels of another shape, with which outputs cannot be compared."""

    class Own(nn.Module):
        reduction = "mean"

        def forward(self, logits, target):
            return (logits.sum() - target.sum()).square()

    data = Data([Batch(torch.randn(20, 1), torch.randn(20, 5))])
    module = DistillModule(Line(0.1), Line(1.0), task="regression", hard_loss=Own())
    found = names(examine(module, data))
    assert found["teacher"].text == "not checked: there are no validation labels"
