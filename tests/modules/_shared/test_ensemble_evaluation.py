"""EnsembleEvaluation: each figure by hand in float64 over uneven batches; what a run charts, when and at what cost."""

import csv
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Batch, Digits, EnsembleDistillModule, SemiSupervisedDataModule, Teacher
from kd_lightning.models import DigitsCNN
from kd_lightning.modules._shared.ensemble_evaluation import EnsembleEvaluation
from kd_lightning.teachers.ensemble import Ensemble

NAN = float("nan")
ROWS = 11
SHAPES = {"multiclass": (ROWS, 4), "multilabel": (ROWS, 3), "binary": (ROWS,), "binary, column": (ROWS, 1)}


class Table(nn.Module):
    """Logits by the row's number, which is x; counts its forwards."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = nn.Parameter(logits.clone()), 0

    def forward(self, x):
        self.calls += 1
        return self.logits[x[:, 0].long()]


def case(name, count=3):
    """Task, the student's logits, the teachers', labels with holes."""
    task = name.split(",")[0]
    generator = torch.Generator().manual_seed(3)
    student, *teachers = (2 * torch.randn(SHAPES[name], generator=generator) for _ in range(count + 1))
    if task == "multiclass":
        y = torch.randint(4, (ROWS,), generator=generator)
        y[::5] = -100
        y[8:] = -100  # a batch without any
    else:
        y = torch.randint(2, SHAPES[name], generator=generator).float()
        y.view(-1)[::5] = NAN
        y[8:] = NAN
    return task, student, teachers, y


def soften(task, z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True) if task == "multiclass" else 1 / (1 + np.exp(-z))


def divergence(task, q, p):
    if task == "multiclass":
        return (q * np.log(q / p)).sum(1).mean()
    return (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean()


def by_hand(task, student, teachers, y, weights):
    """All figures that a teacher has a part in, and the matrix of agreement."""
    p, *probabilities = (soften(task, z.double().numpy()) for z in (student, *teachers))
    y = y.double().numpy()
    known = ~np.isnan(y) & (y != -100)
    weights = np.array(weights, dtype=float) / np.sum(weights)
    pooled = sum(w * q for w, q in zip(weights, probabilities, strict=True))

    def decide(q):
        return q.argmax(1) if task == "multiclass" else (q > 0.5).astype(int)

    count = len(probabilities)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    found = {
        "agreement": (decide(p) == decide(pooled)).mean(),
        "teacher_accuracy": (decide(pooled) == y)[known].mean(),
        "teacher_kl": divergence(task, pooled, p),
        "disagreement": np.mean([divergence(task, probabilities[i], probabilities[j]) for i, j in pairs]),
    }
    for k, q in enumerate(probabilities):
        found[f"teacher_{k}_accuracy"] = (decide(q) == y)[known].mean()
        found[f"teacher_{k}_agreement"] = (decide(q) == decide(p)).mean()
        found[f"teacher_{k}_ensemble_agreement"] = (decide(q) == decide(pooled)).mean()
    matrix = [[(decide(q) == decide(r)).mean() for r in probabilities] for q in probabilities]
    return {name: pytest.approx(value, rel=1e-5) for name, value in found.items()}, matrix


def measure(task, student, teachers, y, size=4, **kwargs):
    ensemble = Ensemble([t if isinstance(t, Teacher) else Table(t) for t in teachers], task=task, **kwargs)
    evaluation = EnsembleEvaluation(ensemble, task, 1 if task == "binary" else student.shape[1])
    evaluation.add_confusion_matrix()
    for start in range(0, ROWS, size):
        part = slice(start, start + size)
        batch = Batch(torch.arange(float(ROWS))[part, None])
        logits = ensemble(batch)
        labels = 0 if y is None else int((~torch.isnan(y[part]) & (y[part] != -100)).sum())
        evaluation.update(student[part], None if y is None else y[part], torch.tensor(1.0), labels, logits)
    return evaluation


def figures_of(evaluation):
    return {name: value.item() for name, value in evaluation.compute().items() if name != "recall"}


OTHERS = {"loss", "accuracy", "balanced_accuracy", "f1", "calibration_error"}


class TestFigures:
    @pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 5], [3, 0, 1]])
    @pytest.mark.parametrize("name", SHAPES)
    def test_by_hand(self, name, weights):
        task, student, teachers, y = case(name)
        evaluation = measure(task, student, teachers, y, weights=weights)
        expected, matrix = by_hand(task, student, teachers, y, weights)
        found = figures_of(evaluation)
        assert {key: value for key, value in found.items() if key not in OTHERS} == expected
        figures = evaluation.figures(None)
        assert set(figures) == {"confusion_matrix", "teachers_agreement"}
        axes = figures["teachers_agreement"]().axes[0]
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {(j, i): f"{matrix[i][j]:.2f}" for i in range(3) for j in range(3)}
        plt.close(figures["confusion_matrix"]())

    def test_only_what_there_is(self):
        task, student, teachers, y = case("multiclass")
        names = {"agreement", "teacher_kl", "disagreement"}
        names |= {f"teacher_{k}_{what}" for k in range(3) for what in ("agreement", "ensemble_agreement")}
        for none in (None, torch.full_like(y, -100)):
            assert set(figures_of(measure(task, student, teachers, none))) == names
        single = measure(task, student, teachers[:1], y)
        found = figures_of(single)
        assert {name for name in found if "teacher" in name or "agree" in name} == {
            *("agreement", "teacher_kl", "teacher_accuracy"),
            *("teacher_0_accuracy", "teacher_0_agreement", "teacher_0_ensemble_agreement"),
        }
        assert found["teacher_0_ensemble_agreement"] == 1
        figures = single.figures(None)
        assert set(figures) == {"confusion_matrix"}
        plt.close(figures["confusion_matrix"]())
        assert not [part for part in single.modules() if isinstance(part, Ensemble | Teacher)]

    def test_partial_teachers(self):
        """Pairs are compared on the classes that both know; those with less than two leave no doubt."""
        task, student, teachers, y = case("multiclass")
        maps = [[2, 0, 1], [0, 1, 3], [2, 3]]
        tables = [Teacher(Table(t[:, : len(m)]), classes=m) for t, m in zip(teachers, maps, strict=True)]
        found = figures_of(measure(task, student, tables, y))
        z = np.full((3, ROWS, 4), -np.inf)
        for k, m in enumerate(maps):
            z[k][:, m] = teachers[k][:, : len(m)].double().numpy()
        probabilities = [np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in z]
        q = np.stack(probabilities)
        knows = np.array([[c in m for c in range(4)] for m in maps])[:, None]
        pooled = (q * knows).sum(0) / knows.sum(0)
        known = (y != -100).numpy()
        assert found["teacher_accuracy"] == pytest.approx((pooled.argmax(1) == y.numpy())[known].mean())
        pooled /= pooled.sum(1, keepdims=True)
        kl = divergence("multiclass", pooled, soften(task, student.double().numpy()))
        assert found["teacher_kl"] == pytest.approx(kl, rel=1e-5)
        for k in range(3):
            assert found[f"teacher_{k}_accuracy"] == pytest.approx((z[k].argmax(1) == y.numpy())[known].mean())
        one, other = (soften(task, z[k][:, [0, 1]]) for k in (0, 1))  # 0 and 2, and 1 and 2, share a single class
        expected = (divergence(task, one, other) + divergence(task, other, one)) / 2
        assert found["disagreement"] == pytest.approx(expected, rel=1e-5)
        apart = [Teacher(Table(t[:, :2]), classes=m) for t, m in zip(teachers, ([0, 1], [2, 3]), strict=False)]
        found = figures_of(measure(task, student, apart, y))
        assert "disagreement" not in found
        assert all(np.isfinite(value) for value in found.values())

    def test_labels_that_a_teacher_does_not_know(self):
        """Of independent labels a teacher is right or wrong about those alone that it has learned."""
        task, student, teachers, y = case("multilabel", 2)
        partial_one = Teacher(Table(teachers[0][:, :2]), classes=[0, 1])
        found = figures_of(measure(task, student, [partial_one, teachers[1]], y))
        known = ~torch.isnan(y)[:, :2]
        right = ((teachers[0][:, :2] > 0) == y[:, :2])[known]
        assert found["teacher_0_accuracy"] == pytest.approx(right.float().mean().item())


class Counting(DigitsCNN):
    """Counts its forwards."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def images(folder):
    """The steps at which each figure was added."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


class TestRuns:
    @pytest.mark.parametrize(
        ("name", "strategy"),
        [*((name, "average") for name in SHAPES), ("multiclass", "random"), ("binary", "relabel")],
    )
    def test_charts(self, quiet_trainer, tmp_path, name, strategy):
        task, student, teachers, y = case(name)
        boards = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "board", "")]
        still = partial(torch.optim.SGD, lr=0.0)
        weights = [1, 2, 5]
        module = EnsembleDistillModule(
            Table(student), [Table(t) for t in teachers], strategy, task=task, optimizer=still, teacher_weights=weights
        )
        data = DataLoader(TensorDataset(torch.arange(float(ROWS))[:, None], y), 4)
        trainer = quiet_trainer(max_epochs=2, logger=boards, log_every_n_steps=1)
        trainer.fit(module, data, [data, data])
        expected, _ = by_hand(task, student, teachers, y, weights)
        found = {key: value.item() for key, value in trainer.callback_metrics.items()}
        for number in ("", "/1"):
            assert {key: found[f"val/{key}{number}"] for key in expected} == expected
        shares = [found[f"train/teacher_{k}_share"] for k in range(3)]
        assert sum(shares) == pytest.approx(1)
        if strategy == "average":
            assert shares == pytest.approx([0.125, 0.25, 0.625])
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["val/disagreement"]]
        assert len(rows) == 2
        for key, value in expected.items():
            assert float(rows[-1][f"val/{key}"]) == value
        fit = {"val/teachers_agreement": [3], "val/teachers_agreement/1": [3]}  # not in the sanity check
        assert images(tmp_path / "board") == fit
        trainer.test(module, data, verbose=False)
        assert {key: trainer.callback_metrics[f"test/{key}"].item() for key in expected} == expected
        assert images(tmp_path / "board") == fit | {"test/teachers_agreement": [6], "test/confusion_matrix": [6]}
        assert not plt.get_fignums()

    @pytest.mark.parametrize("teacher_weights", [None, "confidence"])
    def test_shares_are_of_rows(self, quiet_trainer, teacher_weights):
        """The mean over rows of what each teacher weighs, in batches of 4, 4 and 3."""
        task, student, teachers, y = case("multiclass")
        module = EnsembleDistillModule(
            Table(student),
            [Table(t) for t in teachers],
            teacher_weights=teacher_weights,
            optimizer=partial(torch.optim.SGD, lr=0.0),
        )
        trainer = quiet_trainer()
        trainer.fit(module, DataLoader(TensorDataset(torch.arange(float(ROWS))[:, None], y), 4))
        expected = np.full((ROWS, 3), 1 / 3)
        if teacher_weights is not None:
            losses = np.stack([-np.log(soften(task, t.double().numpy())) for t in teachers], axis=1)
            for b in (b for b in range(ROWS) if y[b] != -100):
                grown = np.exp(losses[b, :, int(y[b])])
                expected[b] = (1 - grown / grown.sum()) / 2
        found = [trainer.callback_metrics[f"train/teacher_{k}_share"].item() for k in range(3)]
        assert found == pytest.approx(expected.mean(0), rel=1e-5)

    @pytest.mark.parametrize("strategy", ["average", "random"])
    def test_each_teacher_is_asked_once(self, quiet_trainer, monkeypatch, strategy):
        """598 validation images are three batches; later epochs use the cached logits."""
        monkeypatch.setenv("PL_GLOBAL_SEED", "3")
        torch.manual_seed(0)
        networks = [Counting(4), Counting(4)]
        data = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=256, val_size=0.5)
        trainer = quiet_trainer(max_epochs=3, limit_train_batches=1)
        trainer.fit(EnsembleDistillModule(DigitsCNN(4), networks, strategy), data)
        calls = [network.calls for network in networks]
        if strategy == "average":
            assert calls == [3 + 3, 3 + 3]  # a step in each epoch
        else:
            assert sum(calls) == 3 + 2 * 3  # one of them in each step
            assert min(calls) >= 3

    def test_validation_without_labels(self, quiet_trainer, tmp_path, recwarn):
        """The figure of the teachers needs no confusion matrix."""
        _, student, teachers, y = case("multiclass")
        module = EnsembleDistillModule(Table(student), [Table(t) for t in teachers])
        data = DataLoader(TensorDataset(torch.arange(float(ROWS))[:, None], torch.full_like(y, -100)), 4)
        quiet_trainer(logger=TensorBoardLogger(tmp_path, "board", "")).fit(module, data, data)
        assert images(tmp_path / "board") == {"val/teachers_agreement": [3]}
        assert not [str(w.message) for w in recwarn if "compute" in str(w.message)]

    def test_without_teachers(self, quiet_trainer, tmp_path):
        _, student, _, y = case("multiclass")
        data = DataLoader(TensorDataset(torch.arange(float(ROWS))[:, None], y), 4)
        trainer = quiet_trainer(logger=TensorBoardLogger(tmp_path, "board", ""))
        trainer.test(EnsembleDistillModule(Table(student), None), data, verbose=False)
        assert images(tmp_path / "board") == {"test/confusion_matrix": [0]}
        assert not [name for name in trainer.callback_metrics if "teacher" in name or "agreement" in name]
