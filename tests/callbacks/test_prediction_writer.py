"""PredictionWriter: the file row by row."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Batch, Digits, PredictionWriter, SemiSupervisedDataModule, SupervisedModule

X = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(5))
OUTPUTS = {"multiclass": 10, "multilabel": 3, "binary": 1}
HEADERS = {"multiclass": [*"0123456789"], "multilabel": [*"012"], "binary": ["1"]}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=OUTPUTS)
def module(request):
    torch.manual_seed(0)
    return SupervisedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, OUTPUTS[request.param])), task=request.param)


def check(rows, logits, task, columns, no="0"):
    """Order, decisions, and probabilities from the formula in float64."""
    assert list(rows[0]) == ["index", "prediction", *columns]
    assert [int(row["index"]) for row in rows] == list(range(12))
    z = logits.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True) if task == "multiclass" else 1 / (1 + np.exp(-z))
    for row, expected in zip(rows, p.tolist(), strict=True):
        assert [float(row[name]) for name in columns] == pytest.approx(expected, rel=2e-5)
        above = [name for name, value in zip(columns, expected, strict=True) if value > 0.5]
        decisions = {
            "multiclass": columns[np.argmax(expected)],
            "multilabel": ";".join(above),
            "binary": above[0] if above else no,
        }
        assert row["prediction"] == decisions[task]


def test_plain_loader(quiet_trainer, tmp_path, module):
    """Numbered as they come; twice leaves one file, of the second run."""
    trainer = quiet_trainer(callbacks=[PredictionWriter()])
    for scale in (1, 2):
        trainer.predict(module, DataLoader(TensorDataset(scale * X), batch_size=5))
        check(read(tmp_path / "predictions.csv"), module.student(scale * X), module.task, HEADERS[module.task])
    assert [path.name for path in tmp_path.glob("*.csv")] == ["predictions.csv"]


class Shuffled(SemiSupervisedDataModule):
    """Serves the samples in another order, under class names."""

    def __init__(self, names):
        super().__init__(Digits())
        self.names = names

    def setup(self, stage):
        self.class_names = self.names

    def predict_dataloader(self):
        def stack(positions):
            index = torch.tensor([7 * k % 12 for k in positions])
            return Batch(X[index], index=index)

        return DataLoader(range(12), batch_size=5, collate_fn=stack)


def test_sorted_by_index_under_class_names(quiet_trainer, tmp_path, module):
    names = {
        "multiclass": [*"abcdefghij"],
        "multilabel": ["red", "green, or so", "blau, grün"],
        "binary": ["no", "yes"],
    }
    names = names[module.task]
    quiet_trainer(callbacks=[PredictionWriter()]).predict(module, datamodule=Shuffled(names))
    rows = read(tmp_path / "predictions.csv")
    check(rows, module.student(X), module.task, names[1:] if module.task == "binary" else names, no="no")


def test_names_that_do_not_fit_are_left_out(quiet_trainer, tmp_path, module):
    quiet_trainer(callbacks=[PredictionWriter()]).predict(module, datamodule=Shuffled(["a", "b", "c", "d"]))
    check(read(tmp_path / "predictions.csv"), module.student(X), module.task, HEADERS[module.task])


def test_digits(quiet_trainer, tmp_path, student):
    data = SemiSupervisedDataModule(Digits(), batch_size=256)
    outputs = torch.cat(quiet_trainer(callbacks=[PredictionWriter()]).predict(SupervisedModule(student), data))
    rows = read(tmp_path / "predictions.csv")
    assert len(rows) == 600
    assert [int(row["prediction"]) for row in rows] == outputs.argmax(1).tolist()


def test_somebody_elses_module(quiet_trainer, tmp_path):
    class Theirs(LightningModule):
        def predict_step(self, batch, batch_idx):
            return {"text": "no tensor"}

    quiet_trainer(callbacks=[PredictionWriter()]).predict(Theirs(), DataLoader(TensorDataset(X), batch_size=5))
    assert not list(tmp_path.glob("*.csv"))
