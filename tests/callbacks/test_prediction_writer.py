"""PredictionWriter: the file row by row."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kd_lightning import Batch, Digits, PredictionWriter, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data.identity import Identities

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
    assert list(rows[0]) == ["index", "path", "content", "prediction", *columns]
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
    """Rows are numbered in the order of the loader; a second call replaces the file."""
    trainer = quiet_trainer(callbacks=[PredictionWriter()])
    for scale in (1, 2):
        trainer.predict(module, DataLoader(TensorDataset(scale * X), batch_size=5))
        check(read(tmp_path / "predictions.csv"), module.student(scale * X), module.task, HEADERS[module.task])
    assert [path.name for path in tmp_path.glob("*.csv")] == ["predictions.csv"]


class Shuffled(SemiSupervisedDataModule):
    """Loads the samples in another order, with class names."""

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


def test_names_of_another_number_are_ignored(quiet_trainer, tmp_path, module):
    quiet_trainer(callbacks=[PredictionWriter()]).predict(module, datamodule=Shuffled(["a", "b", "c", "d"]))
    check(read(tmp_path / "predictions.csv"), module.student(X), module.task, HEADERS[module.task])


def test_digits(quiet_trainer, tmp_path, student):
    data = SemiSupervisedDataModule(Digits(), batch_size=256)
    outputs = torch.cat(quiet_trainer(callbacks=[PredictionWriter()]).predict(SupervisedModule(student), data))
    rows = read(tmp_path / "predictions.csv")
    assert len(rows) == 600
    assert [int(row["prediction"]) for row in rows] == outputs.argmax(1).tolist()
    names = data.identities("test")
    assert [(row["path"], row["content"]) for row in rows] == list(zip(names.paths, names.contents, strict=True))


def test_two_loaders_with_equal_indices(quiet_trainer, tmp_path):
    """No row takes the place of another; the names are those of the first loader."""

    class Two(LightningDataModule):
        def predict_dataloader(self):
            index = torch.arange(12)
            return [DataLoader([Batch(x, index=index)], batch_size=None) for x in (X, -X)]

        def identities(self, part):
            return Identities([f"{k}.png" for k in range(12)], ["ab"] * 12)

    module = SupervisedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    quiet_trainer(callbacks=[PredictionWriter()]).predict(module, datamodule=Two())
    rows = read(tmp_path / "predictions.csv")
    assert [int(row["index"]) for row in rows] == [*range(12), *range(12)]
    expected = module.student(torch.cat([X, -X])).argmax(1).tolist()
    assert [int(row["prediction"]) for row in rows] == expected
    assert [row["path"] for row in rows] == [*(f"{k}.png" for k in range(12)), *[""] * 12]


def test_somebody_elses_module(quiet_trainer, tmp_path):
    class Theirs(LightningModule):
        def predict_step(self, batch, batch_idx):
            return {"text": "no tensor"}

    quiet_trainer(callbacks=[PredictionWriter()]).predict(Theirs(), DataLoader(TensorDataset(X), batch_size=5))
    assert not list(tmp_path.glob("*.csv"))


def test_without_returned_predictions(quiet_trainer, tmp_path, module):
    """The file is complete, and Lightning stores no predictions."""
    stored = []

    class Stored(Callback):
        def on_predict_epoch_end(self, trainer, pl_module):
            stored.extend(trainer.predict_loop.predictions)

    writer = PredictionWriter()
    assert isinstance(writer, BasePredictionWriter)
    trainer = quiet_trainer(callbacks=[writer, Stored()])
    loader = DataLoader(TensorDataset(X), batch_size=5)
    assert trainer.predict(module, loader, return_predictions=False) is None
    assert stored == []
    check(read(tmp_path / "predictions.csv"), module.student(X), module.task, HEADERS[module.task])


def test_step_with_a_dataloader_iter(quiet_trainer, tmp_path):
    """BasePredictionWriter refuses such a step; this writer needs no indices of Lightning's."""

    class Theirs(LightningModule):
        def predict_step(self, dataloader_iter):
            (x,), _, _ = next(dataloader_iter)
            return x.flatten(1)[:, :2]

    quiet_trainer(callbacks=[PredictionWriter()]).predict(Theirs(), DataLoader(TensorDataset(X), batch_size=5))
    rows = read(tmp_path / "predictions.csv")
    assert [float(row["output_1"]) for row in rows] == pytest.approx(X.flatten(1)[:, 1].tolist(), rel=1e-5)


def test_loader_without_a_sampler(quiet_trainer, tmp_path, module):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, strict=True))

    quiet_trainer(callbacks=[PredictionWriter()]).predict(module, DataLoader(Stream(), batch_size=5))
    check(read(tmp_path / "predictions.csv"), module.student(X), module.task, HEADERS[module.task])


@pytest.mark.parametrize("with_index", [False, True])
def test_several_processes_write_one_file(tmp_path, monkeypatch, with_index):
    """Rank 0 writes the rows of all; without an index, in the order in which Lightning distributes samples."""
    module, p = SupervisedModule(nn.Identity()), torch.rand(12, 10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)) if with_index else torch.arange(12)
    trainers = [
        SimpleNamespace(
            world_size=2,
            global_rank=rank,
            is_global_zero=not rank,
            loggers=[],
            default_root_dir=tmp_path / str(rank),
            strategy=SimpleNamespace(broadcast=lambda folder: folder or str(tmp_path / "0")),
        )
        for rank in range(2)
    ]
    writers = [PredictionWriter() for _ in trainers]
    for trainer, writer in zip(trainers, writers, strict=True):
        writer.on_predict_start(trainer, module)
        for rows in order[trainer.global_rank :: 2].split(4):
            batch = Batch(X[rows], index=rows if with_index else None)
            writer.on_predict_batch_end(
                SimpleNamespace(**vars(trainer), predict_loop=SimpleNamespace(current_batch_indices=None)),
                module,
                p[rows],
                batch,
                0,
            )
    gather = [(writer.rows, writer._kinds, writer._problem, writer._dense) for writer in writers]
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, rows: parts.__setitem__(slice(None), gather)
    )
    for trainer, writer in zip(trainers, writers, strict=True):
        writer.on_predict_end(trainer, module)
    assert not (tmp_path / "1").exists()
    rows = read(tmp_path / "0" / "predictions.csv")
    assert [int(row["index"]) for row in rows] == list(range(12))
    assert [int(row["prediction"]) for row in rows] == p.argmax(1).tolist()
