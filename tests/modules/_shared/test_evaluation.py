"""Evaluation: each figure against scikit-learn or the formula in float64, over batches with missing labels."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, recall_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Batch, DistillModule, InputError, SupervisedModule
from kd_lightning.losses.base import predicted_labels, to_probabilities
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.modules._shared.hard_loss import hard_loss_of

NAN = float("nan")
SHAPES = {"multiclass": (200, 5), "multilabel": (200, 3), "binary": (200,), "binary, column": (200, 1)}


def random_outputs(case):
    """Task, student's and teacher's logits, labels with holes."""
    task, shape = case.split(",")[0], SHAPES[case]
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    if task == "multiclass":
        y = torch.randint(5, (200,), generator=generator)
        y[::7] = -100
        y[100:150] = -100  # a batch without any
    else:
        y = torch.randint(2, shape, generator=generator).float()
        y.view(-1)[::7] = NAN
        y[100:150] = NAN
    return task, logits, teacher, y


def measure(task, logits, teacher, y, size=50):
    evaluation = Evaluation(task, 1 if task == "binary" else logits.shape[1])
    for start in range(0, len(y), size):
        part = slice(start, start + size)
        known = ~torch.isnan(y[part]) & (y[part] != -100)
        if task == "multiclass":
            loss = nn.functional.cross_entropy(logits[part][known], y[part][known])
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits[part][known], y[part][known])
        evaluation.update(logits[part], y[part], loss, int(known.sum()), None if teacher is None else teacher[part])
    return {name: value.tolist() for name, value in evaluation.compute().items()}


def binned_gap(confidence, right):
    """Expected calibration error over 15 bins of equal width."""
    bins = np.minimum((confidence * 15).astype(int), 14)
    return sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))


@pytest.mark.parametrize("case", SHAPES)
def test_against_references(case):
    task, logits, teacher, y = random_outputs(case)
    found = measure(task, logits, teacher, y)
    s, t, truth = logits.double().numpy(), teacher.double().numpy(), y.double().numpy()
    known = ~np.isnan(truth) & (truth != -100)
    if task == "multiclass":
        log_s = s - np.log(np.exp(s).sum(1, keepdims=True))
        log_t = t - np.log(np.exp(t).sum(1, keepdims=True))
        truth, guess, taught = truth[known].astype(int), s.argmax(1), t.argmax(1)
        losses = -log_s[known, truth]
        gap = binned_gap(np.exp(log_s[known]).max(1), guess[known] == truth)
        f1 = f1_score(truth, guess[known], average="macro")
        recall = recall_score(truth, guess[known], average=None)
        kl = (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
    else:
        p, q = 1 / (1 + np.exp(-s)), 1 / (1 + np.exp(-t))
        guess, taught = (s > 0).astype(int), (t > 0).astype(int)
        losses = -np.where(truth == 1, np.log(p), np.log(1 - p))[known]
        gap = binned_gap(p[known], truth[known])
        kl = (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean()
        if task == "multilabel":  # each label's over its own known samples
            f1 = np.mean([f1_score(truth[k, n], guess[k, n]) for n, k in enumerate(known.T)])
            recall = [recall_score(truth[k, n], guess[k, n]) for n, k in enumerate(known.T)]
        else:
            f1 = f1_score(truth[known], guess[known])
            recall = recall_score(truth[known], guess[known], average=None)
        truth = truth[known]
    more = {"recall": pytest.approx(recall, rel=1e-6)}
    if task != "multilabel":
        more["balanced_accuracy"] = pytest.approx(balanced_accuracy_score(truth, guess[known]), rel=1e-6)
    assert found == more | {
        "loss": pytest.approx(losses.mean(), rel=1e-5),
        "accuracy": pytest.approx(accuracy_score(truth, guess[known]), rel=1e-6),
        "f1": pytest.approx(f1, rel=1e-6),
        "calibration_error": pytest.approx(gap, abs=1e-6),
        "agreement": pytest.approx((guess == taught).mean(), rel=1e-6),
        "teacher_kl": pytest.approx(kl, rel=1e-5),
        "teacher_accuracy": pytest.approx(accuracy_score(truth, taught[known]), rel=1e-6),
    }


@pytest.mark.parametrize("case", SHAPES)
def test_batches_make_no_difference(case):
    task, logits, teacher, y = random_outputs(case)
    parts, whole = measure(task, logits, teacher, y, 50), measure(task, logits, teacher, y, 200)
    assert parts == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


@pytest.mark.parametrize("case", ["multilabel", "binary", "binary, column"])
def test_labels_that_are_probabilities(case):
    """They count as the likelier label: 0.9, of smoothed labels, is no 0."""
    task, logits, teacher, y = random_outputs(case)
    whole, smooth = (measure(task, logits, teacher, labels) for labels in (y, 0.1 + 0.8 * y))
    assert {**smooth, "loss": 0} == {**whole, "loss": 0}
    evaluation = Evaluation(task, 1 if task == "binary" else logits.shape[1])
    evaluation.add_confusion_matrix()
    logits = logits.flatten() if task == "binary" else logits
    evaluation.update(logits, 0.1 + 0.8 * y, torch.zeros(()), 1, None)
    assert evaluation.confusion.compute().reshape(-1, 2, 2)[:, 1].sum() == (y == 1).sum()


@pytest.mark.parametrize("case", SHAPES)
def test_only_what_there_is(case):
    task, logits, teacher, y = random_outputs(case)
    more = {"recall"} if task == "multilabel" else {"recall", "balanced_accuracy"}
    assert set(measure(task, logits, None, y)) == {"loss", "accuracy", "f1", "calibration_error"} | more
    none = torch.full_like(y, -100 if task == "multiclass" else NAN)
    assert set(measure(task, logits, teacher, none)) == {"agreement", "teacher_kl"}
    assert measure(task, logits, None, none) == {}


@pytest.mark.parametrize("case", SHAPES)
def test_the_same_network_agrees(case):
    task, logits, _, y = random_outputs(case)
    found = measure(task, logits, logits, y)
    assert found["agreement"] == 1
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert found["teacher_accuracy"] == found["accuracy"]


def test_classes_that_do_not_occur():
    """As in scikit-learn, they are left out of the mean; their own recall is unknown."""
    logits = torch.eye(4)[[0, 1, 1, 3, 0]]
    found = measure("multiclass", logits, None, torch.tensor([0, 0, 1, 1, 0]))
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["recall"] == pytest.approx([2 / 3, 1 / 2, NAN, NAN], nan_ok=True)
    found = measure("binary", torch.tensor([1.0, -1.0, 2.0]), None, torch.ones(3))
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx([NAN, 2 / 3], nan_ok=True)


def test_loss_with_class_weights_does_not_depend_on_the_batches():
    _, logits, _, y = random_outputs("multiclass")
    loss = nn.CrossEntropyLoss(torch.arange(5.0))
    for size in (10, 40, 200):
        evaluation = Evaluation("multiclass", 5)
        for z, part in zip(logits.split(size), y.split(size), strict=True):
            value, labels, weights = hard_loss_of(loss, "multiclass", z, Batch(z, part))
            evaluation.update(z, part, value, labels, None, weights)
        assert evaluation.compute()["loss"].item() == pytest.approx(loss(logits, y).item(), rel=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_memory_of_many_classes(task, quiet_trainer):
    """A matrix of 100,000 classes would have 80 GB. The limit is 0.5 GB, with a teacher, beside both logits."""
    classes, rows = 100_000, 128 if task == "multiclass" else 64
    student, teacher = (nn.Linear(2, classes, bias=False) for _ in range(2))
    y = torch.arange(rows) * 700 if task == "multiclass" else (torch.rand(rows, classes) < 0.1).to(torch.uint8)
    loader = DataLoader(TensorDataset(torch.randn(rows, 2), y), 64)
    module = DistillModule(student, teacher, task=task)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    trainer = quiet_trainer()
    trainer.validate(module, loader, verbose=False)
    assert memory("VmHWM") - before < 500 + 2 * 64 * classes * 4 / 1e6
    assert {"val/f1", "val/calibration_error", "val/teacher_kl"} <= set(trainer.callback_metrics)


def memory(name):
    """An entry of this process's status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1000


def test_matrix_in_tests_alone(quiet_trainer, tmp_path):
    module, seen = SupervisedModule(nn.Linear(2, 3)), []
    loader = DataLoader(TensorDataset(torch.randn(6, 2), torch.arange(6) % 3), 3)

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, *args):
            seen.append(("val", module._evaluations[0].confusion))

        def on_test_batch_end(self, trainer, *args):
            seen.append(("test", module._evaluations[0].confusion))

    trainer = quiet_trainer(logger=CSVLogger(tmp_path), callbacks=[Watch()])
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    assert {part for part, matrix in seen if matrix is None} == {"val"}
    assert {part for part, matrix in seen if matrix is not None} == {"test"}


def test_confusion_matrix():
    task, logits, _, y = random_outputs("multiclass")
    evaluation = Evaluation(task, 5)
    evaluation.add_confusion_matrix()
    evaluation.update(logits, y, torch.tensor(0.0), 1, None)
    known = y != -100
    expected = confusion_matrix(y[known], logits[known].argmax(1))
    assert evaluation.confusion.compute().tolist() == expected.tolist()
    figures = evaluation.figures(["ant", "bee", "cat", "dog", "eel"])
    assert set(figures) == {"confusion_matrix"}
    figure = figures["confusion_matrix"]()
    written = {text.get_text() for text in figure.axes[0].get_xticklabels()}
    assert written == {"ant", "bee", "cat", "dog", "eel"}
    figure = evaluation.figures(["ant"])["confusion_matrix"]()
    assert {text.get_text() for text in figure.axes[0].get_xticklabels()} == {*"01234"}


@pytest.mark.parametrize("announce", [True, False])
def test_no_confusion_matrix_of_thousands_of_classes(announce, caplog):
    """Its state would be as large as the square."""
    evaluation = Evaluation("multiclass", 2000)
    with caplog.at_level("INFO"):
        evaluation.add_confusion_matrix(announce)
    assert ("test/confusion_matrix is left out: at most 1000 classes, got 2000" in caplog.text) == announce
    evaluation.update(torch.eye(2000)[:4], torch.arange(4), torch.tensor(0.0), 4, None)
    assert evaluation.figures(None) == {}
    assert evaluation.compute()["accuracy"] == 1


def test_confusion_matrix_of_the_binary_task():
    evaluation = Evaluation("binary", 1)
    evaluation.add_confusion_matrix()
    evaluation.update(torch.tensor([-1.0, 1.0]), torch.tensor([0, 1]), torch.tensor(0.0), 2, None)
    figure = evaluation.figures(["no", "yes"])["confusion_matrix"]()
    assert {text.get_text() for text in figure.axes[0].get_xticklabels()} == {"no", "yes"}


@pytest.mark.parametrize("case", SHAPES)
def test_teacher_of_other_outputs(case):
    task, logits, teacher, _ = random_outputs(case)
    evaluation = Evaluation(task, 3)
    with pytest.raises(InputError, match=r"same number of outputs, got .* from the teacher and .* from the student"):
        evaluation.check(logits, torch.cat([teacher.reshape(200, -1)] * 2, dim=1))
    evaluation.check(logits, teacher)
    evaluation.check(logits, None)


def test_probabilities_and_decisions():
    z = torch.tensor([[0.0, 1.0], [3.0, 3.0]], requires_grad=True)
    assert to_probabilities(z.bfloat16(), "multiclass").dtype == torch.float32
    assert not to_probabilities(z, "multiclass").requires_grad
    e = np.e
    assert to_probabilities(z, "multiclass").tolist() == [pytest.approx([1 / (1 + e), e / (1 + e)]), [0.5, 0.5]]
    assert to_probabilities(z[:1], "multilabel").tolist() == [pytest.approx([0.5, e / (1 + e)])]
    assert to_probabilities(z[:, :1], "binary").shape == (2,)
    assert predicted_labels(z, "multiclass").tolist() == [1, 0]
    assert predicted_labels(z, "multilabel").tolist() == [[0, 1], [1, 1]]  # one half is no
    assert predicted_labels(z[:, :1], "binary").tolist() == [0, 1]
