"""Modules that are not ours train on SemiSupervisedDataModule: its batches unpack as ``x, y``."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.data import extract_batch_size, warning_cache
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import Batch, DatasetSource, Digits, SemiSupervisedDataModule

IDS = torch.randint(30, (50, 4), generator=torch.Generator().manual_seed(0))


class Texts(Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "attention_mask": (IDS[index] > 3).long(), "labels": index % 3}


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 3)

    def forward(self, input_ids, attention_mask):
        return (self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(dim=1)


class Plain(LightningModule):
    """As most modules are: batches are pairs, and the batch size is left to Lightning."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.seen = []

    def logits(self, x):
        return self.network(**x) if isinstance(x, dict) else self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.logits(x), y)
        self.seen.append((y.clone(), loss.detach()))
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.logits(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make(name, **kwargs):
    source = Digits() if name == "digits" else DatasetSource(Texts())
    return SemiSupervisedDataModule(source, **({"labeled": 0.4, "val_size": 0.2, "batch_size": 16} | kwargs))


def network(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) if name == "digits" else Scores()


@pytest.mark.parametrize("name", ["digits", "texts"])
def test_a_plain_module_trains_and_validates(name, quiet_trainer):
    """On missing labels, too, which are -100. Two workers give what none does."""
    ends = []
    for workers in (0, 2):
        data, module = make(name, num_workers=workers), Plain(network(name))
        warning_cache.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batch_size.*")
            trainer = quiet_trainer(max_epochs=2, limit_train_batches=3)
            trainer.fit(module, datamodule=data)
        assert len(module.seen) == 6
        assert any((y == -100).any() and (y >= 0).any() for y, _ in module.seen)
        sizes = [len(y) for y, _ in module.seen[3:]]
        means = sum(float(loss) * size for (_, loss), size in zip(module.seen[3:], sizes, strict=True)) / sum(sizes)
        assert float(trainer.callback_metrics["train_loss_epoch"]) == pytest.approx(means, rel=1e-5)
        (expected, rows) = (0.0, 0)
        with torch.no_grad():
            for x, y in data.val_dataloader():
                expected, rows = expected + float(F.cross_entropy(module.logits(x), y)) * len(y), rows + len(y)
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected / rows, rel=1e-5)
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_missing_labels_do_not_count():
    x, y = next(iter(make("digits", batch_size=64).train_dataloader()))
    known = y != -100
    assert 0 < known.sum() < 64
    logits = network("digits")(x)
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(logits[known], y[known]))


X = torch.ones(5, 2)
NESTED = {"a": X, "b": {"c": torch.ones(5, 3, 2)}}
BATCHES = {
    "tensor": Batch(X, torch.zeros(5).long()),
    "without labels": Batch(X),
    "mapping": Batch(NESTED, torch.zeros(5).long()),
    "mapping without labels": Batch(NESTED),
    "tuple without labels": Batch((X, X.long())),
    "all fields": Batch(X, index=torch.zeros(5).long(), mean_labels=2.0, labeled=torch.tensor([1])),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_lightning_finds_the_size_of_a_batch(batch, quiet_trainer):
    warning_cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_batch_size(batch) == 5

    class Logging(LightningModule):
        def training_step(self, batch, batch_idx):
            self.log("size", float(len(batch)), on_epoch=True, on_step=False)

        def configure_optimizers(self):
            return None

    trainer = quiet_trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batch_size.*")
        trainer.fit(Logging(), DataLoader([batch], batch_size=None))
    assert float(trainer.callback_metrics["size"]) == 5


def test_a_batch_without_labels_unpacks():
    x, y = BATCHES["mapping without labels"]
    assert x is NESTED
    assert y.tolist() == [-100] * 5
    x, y = Batch(X, BATCHES["tensor"].y)
    assert x is X
    assert y is BATCHES["tensor"].y


_SCRIPT = """
import json, sys
from lightning.pytorch import Trainer
from test_foreign_modules import Plain, make, network

name, processes = sys.argv[1], int(sys.argv[2])
module = Plain(network(name))
trainer = Trainer(
    accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=2, logger=False,
    limit_train_batches=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
data = make(name, labeled=None, unlabeled="none", batch_size=16 // processes, num_workers=1)
trainer.fit(module, datamodule=data)
with open(f"{trainer.global_rank}_of_{processes}.json", "w") as file:
    json.dump({key: value.tolist() for key, value in module.state_dict().items()}, file)
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ["digits", "texts"])
def test_two_processes_learn_what_one_does(name, tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(_SCRIPT)
    for world in (1, 2):
        processes.run_ranks(["train.py", name, str(world)], world=world, PYTHONPATH=str(Path(__file__).parent))
    one, first, second = (json.loads(Path(f"{part}.json").read_text()) for part in ("0_of_1", "0_of_2", "1_of_2"))
    assert first == second
    for key, value in one.items():
        torch.testing.assert_close(torch.tensor(first[key]), torch.tensor(value), rtol=1e-4, atol=1e-5)
