"""Labeled samples for an evaluation without a Trainer."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

import kd_lightning.data.evaluation_batches as module
from kd_lightning.batch import Batch
from kd_lightning.data import Digits, SemiSupervisedDataModule
from kd_lightning.data.evaluation_batches import batches_of, count_labels, evaluation_batches

CPU = torch.device("cpu")
IMAGES = Digits().load().train.images.tensors[0]


def digits(**arguments):
    data = SemiSupervisedDataModule(Digits(), labeled=2, batch_size=7, **arguments)
    data.setup("fit")
    return data


class Plain(LightningDataModule):
    """Anybody's datamodule; its hook doubles the images."""

    def __init__(self, train, val=None):
        super().__init__()
        self.train = train
        if val is not None:
            self.val_dataloader = lambda: val

    def train_dataloader(self):
        return self.train

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0], batch[1]]


def loader(y, x=1.0):
    y = torch.tensor(y)
    return DataLoader(list(zip(torch.full((len(y), 3), x), y, strict=True)), batch_size=2)


def test_validation_samples():
    data = digits()
    batches, what = evaluation_batches(data, CPU)
    assert what == "validation labels"
    assert torch.cat([batch.index for batch in batches]).tolist() == data.split.val
    assert torch.equal(torch.cat([batch.x for batch in batches]), IMAGES[data.split.val])


def test_samples_without_labels():
    data = digits(val_size=0)
    batches, what = evaluation_batches(data, CPU, labeled=False)
    assert "training images" in what
    assert torch.cat([batch.index for batch in batches]).tolist() == (data.split.labeled + data.split.unlabeled)[:1197]
    assert sum(map(count_labels, batches)) == 20


def test_labeled_training_samples_without_a_validation_part():
    """Under evaluation transforms, and none of the pool."""
    data = digits(val_size=0, train_transform=torch.nn.Dropout(0.9))
    batches, what = evaluation_batches(data, CPU)
    assert what.startswith("labels of training images")
    assert torch.cat([batch.index for batch in batches]).tolist() == data.split.labeled
    assert torch.equal(torch.cat([batch.x for batch in batches]), IMAGES[data.split.labeled])


def test_training_samples_if_no_validation_sample_has_a_label():
    data = Plain(loader([-100, -100, 3, -100]), loader([-100, -100], 5.0))
    batches, what = evaluation_batches(data, CPU)
    assert what.startswith("labels of training images")
    assert [batch.y.tolist() for batch in batches] == [[3, -100]] and (batches[0].x == 2).all()
    assert evaluation_batches(Plain(loader([-100])), CPU) is None


def test_enough_samples(monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 3)
    batches, _ = evaluation_batches(Plain(loader([1]), loader([0, -100, -100, -100, 2, 2])), CPU)
    assert [batch.y.tolist() for batch in batches] == [[0, -100]]


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one, [one]], lambda one: {"a": [one], "b": one}])
def test_the_first_of_several_loaders(wrap):
    data = Plain(None)
    assert [len(batch) for batch in batches_of(wrap(loader([1, 2, 3])), data, CPU)] == [2, 1]
    assert [*batches_of({}, data, CPU)] == []


def test_count_labels():
    assert count_labels(Batch(torch.zeros(3, 1))) == 0
    assert count_labels(Batch(torch.zeros(3, 1), torch.tensor([2, -100, 0]))) == 2
